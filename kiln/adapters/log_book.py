"""The log store as the floors above know it: one attempt's writing, the end of a log, and live reading."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import UTC, datetime
from typing import Self

from kiln.adapters.log_tail import LogTail
from kiln.adapters.log_writer import LogWriter
from kiln.adapters.logs import LogFenced, LogStore
from kiln.errors import AttemptLostError
from kiln.ports import End, Gap, LogLine


class AttemptLog:
    """`kiln.ports.LogWriting`: refuses once a later attempt writes to the same log."""

    def __init__(self, store: LogStore, build_id: str, attempt: int) -> None:
        self._store = store
        self._build_id = build_id
        self._attempt = attempt
        self._writer = LogWriter(store, build_id, attempt)

    async def __aenter__(self) -> Self:
        with _fenced():
            await asyncio.to_thread(self._store.open_attempt, self._build_id, self._attempt)
        return self

    async def write(self, stream: str, text: str) -> None:
        with _fenced():
            await self._writer.write(stream, text)

    async def __aexit__(self, *_exc: object) -> None:
        with _fenced():
            await self._writer.aclose()


@contextlib.contextmanager
def _fenced() -> Iterator[None]:
    try:
        yield
    except LogFenced as error:
        raise AttemptLostError(str(error)) from error


class StoreLogBook:
    """`kiln.ports.LogBook`: what workers write."""

    def __init__(self, dsn: str) -> None:
        self._store = LogStore(dsn)
        self._store.create()

    def writing(self, build_id: str, attempt: int) -> AttemptLog:
        return AttemptLog(self._store, build_id, attempt)

    def note(self, build_id: str, attempt: int, text: str) -> None:
        """One line of Kiln's own after an attempt's lines. A log that has ended stays as it is."""
        with contextlib.suppress(LogFenced):
            self._store.open_attempt(build_id, attempt + 1)
            self._store.append(build_id, attempt + 1, [(datetime.now(UTC), "kiln", text)])

    def end(self, build_id: str, status: str) -> None:
        self._store.end(build_id, status)

    def close(self) -> None:
        self._store.close()


class LogReader:
    """`kiln.ports.LogReading`: what the API reads."""

    def __init__(self, dsn: str) -> None:
        self._store = LogStore(dsn)
        self._store.create()
        self._tail = LogTail(self._store)

    def follow(self, build_id: str, after: int) -> AsyncIterator[LogLine | Gap | End]:
        return self._tail.follow(build_id, after)

    def read(self, build_id: str, after: int, limit: int) -> Sequence[LogLine | Gap]:
        return self._store.read(build_id, after, limit)

    def end(self, build_id: str, status: str) -> None:
        self._store.end(build_id, status)

    def keep(self, pod_id: str, first: int, lines: Sequence[tuple[datetime, str, str]]) -> int:
        return self._store.keep(pod_id, first, lines)

    def ping(self) -> None:
        self._store.ping()

    async def aclose(self) -> None:
        await self._tail.aclose()
        await asyncio.to_thread(self._store.close)
