"""Writes one attempt's lines to the log store in batches, without making the tool wait for the database."""

import asyncio
import uuid
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Self

from kiln.adapters.log_payload import CHUNK_BYTES, CHUNK_LINES, Entry
from kiln.adapters.logs import LogFenced, LogStore
from kiln.errors import UnavailableError

FIRST_RETRY = timedelta(milliseconds=50)
LAST_RETRY = timedelta(seconds=2)
# A line costs memory beyond its text.
LINE_BYTES = 200


@dataclass(frozen=True)
class WriterTerms:
    """How a writer paces itself.

    `interval` lies between two batches, unless a whole one is waiting. `backlog_bytes` may wait for the store; when that
    is full and the store has been away for `patience`, lines are given up, and counted in a line of Kiln's own.
    """

    interval: timedelta = timedelta(milliseconds=50)
    backlog_bytes: int = 8 * 1024 * 1024
    patience: timedelta = timedelta(seconds=30)


class LogWriter:
    """The lines of one build's attempt, which must have been opened in the store. Leaving the context writes all."""

    def __init__(self, store: LogStore, build_id: str, attempt: int, terms: WriterTerms | None = None) -> None:
        self._append = partial(store.append, build_id, attempt)
        self._terms = terms or WriterTerms()
        self._backlog = _Backlog(self._terms.backlog_bytes)
        self._work = asyncio.Event()
        self._hurry = asyncio.Event()
        self._progress = asyncio.Event()
        self._closing = False
        self._away_since: float | None = None
        self._task: asyncio.Task[None] | None = None
        self.fenced = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def write(self, stream: str, text: str, time: datetime | None = None) -> None:
        """Takes a line (`time` with its zone, or now); waits only while the backlog is full.

        Raises LogFenced once the store has refused a batch, and whatever else ended the writing.
        """
        self._raise_failure()
        if self._closing:
            raise RuntimeError("the log writer is closed")
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        await self._make_room()
        self._backlog.add((time or datetime.now(UTC), stream, text))
        self._work.set()
        if self._backlog.has_a_batch:
            self._hurry.set()

    async def aclose(self) -> None:
        """Writes what is left. Raises LogFenced, or UnavailableError if the store stays away for `patience`."""
        self._closing = True
        self._work.set()
        self._hurry.set()
        if self._task is not None:
            await asyncio.shield(self._task)

    async def _make_room(self) -> None:
        """Returns when there is room, or no hope for any."""
        while self._backlog.is_full and not self._is_out_of_patience():
            self._progress.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(FIRST_RETRY.total_seconds()):
                    await self._progress.wait()
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self._task is not None and self._task.done():
            self._task.result()

    def _is_out_of_patience(self) -> bool:
        if self._away_since is None:
            return False
        return asyncio.get_running_loop().time() - self._away_since >= self._terms.patience.total_seconds()

    async def _run(self) -> None:
        """The background task: takes batches out of the backlog until the writer is closed and all is written."""
        thread = ThreadPoolExecutor(1, "log-writer")
        try:
            while await self._wait_for_work():
                await self._store(thread, self._backlog.take())
                self._progress.set()
                await self._pause()
        except LogFenced:
            self.fenced.set()
            raise
        finally:
            self._progress.set()
            thread.shutdown(wait=False)

    async def _wait_for_work(self) -> bool:
        """Whether there is any, or the writer is closed."""
        if not self._backlog and not self._closing:
            self._work.clear()
        await self._work.wait()
        return bool(self._backlog)

    async def _pause(self) -> None:
        """Lets lines collect, unless there are enough of them."""
        if self._closing or self._backlog.has_a_batch:
            return
        self._hurry.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._terms.interval.total_seconds()):
                await self._hurry.wait()

    async def _store(self, thread: ThreadPoolExecutor, entries: list[Entry]) -> None:
        """Appends one batch, again and again while the store is away. Raises LogFenced, UnavailableError."""
        append = partial(self._append, entries, batch=uuid.uuid4().hex)
        delay = FIRST_RETRY
        while True:
            try:
                await asyncio.get_running_loop().run_in_executor(thread, append)
            except UnavailableError:
                self._away_since = self._away_since or asyncio.get_running_loop().time()
                if self._closing and self._is_out_of_patience():
                    raise
                await asyncio.sleep(delay.total_seconds())
                delay = min(delay * 2, LAST_RETRY)
            else:
                self._away_since = None
                return


@dataclass
class _Lost:
    """Stands in the backlog where lines were given up."""

    since: datetime
    lines: int = 1

    def entry(self) -> Entry:
        return self.since, "kiln", f"{self.lines} lines are missing here: the log store did not answer in time"


class _Backlog:
    """Lines that wait to be written, in order."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._waiting: deque[Entry | _Lost] = deque()
        self._bytes = 0

    def __bool__(self) -> bool:
        return bool(self._waiting)

    @property
    def is_full(self) -> bool:
        return self._bytes >= self._max_bytes

    @property
    def has_a_batch(self) -> bool:
        return len(self._waiting) >= CHUNK_LINES or self._bytes >= CHUNK_BYTES

    def add(self, entry: Entry) -> None:
        """Keeps the line, or only counts it if there is no room."""
        if not self.is_full:
            self._waiting.append(entry)
            self._bytes += _size(entry)
            return
        last = self._waiting[-1]
        if isinstance(last, _Lost):
            last.lines += 1
        else:
            self._waiting.append(_Lost(entry[0]))

    def take(self) -> list[Entry]:
        """The next batch: at least one line, and no more than a chunk of the store holds if it is more than one."""
        batch: list[Entry] = []
        size = 0
        while self._waiting and len(batch) < CHUNK_LINES and (not batch or size < CHUNK_BYTES):
            first = self._waiting.popleft()
            entry = first.entry() if isinstance(first, _Lost) else first
            batch.append(entry)
            size += _size(entry)
            self._bytes -= 0 if isinstance(first, _Lost) else _size(entry)
        return batch


def _size(entry: Entry) -> int:
    return len(entry[2]) + LINE_BYTES
