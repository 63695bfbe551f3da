"""Signs of life: to Temporal, so that a cancel arrives and a death is noticed; to the catalog, so that no two attempts
build at once.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Self

from temporalio import activity

from kiln.errors import BuildError, UnavailableError
from kiln.ports import Ledger, Tool

HEARTBEAT_INTERVAL = timedelta(seconds=1)
RENEW_INTERVAL = timedelta(seconds=3)


class Lease:
    """Holds a build for one attempt while the context is open, and gives it up at its end.

    `lost` is set once the attempt may not go on; `reason` then says why (cancelled, over, another attempt's). When the
    catalog does not answer, the tool's guard ends the tool at the lease's end, with or without this process.
    """

    def __init__(self, ledger: Ledger, build_id: str, attempt: int, length: timedelta) -> None:
        self._ledger = ledger
        self._build_id = build_id
        self._attempt = attempt
        self._length = length
        self._tool: Tool | None = None
        self._keeper: asyncio.Task[None] | None = None
        self.lost = asyncio.Event()
        self.reason: BuildError | None = None

    async def __aenter__(self) -> Self:
        self._keeper = asyncio.create_task(self._keep())
        return self

    async def __aexit__(self, *_exc: object) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        with contextlib.suppress(UnavailableError):  # then the lease runs out by itself
            await asyncio.to_thread(self._ledger.release, self._build_id, self._attempt)

    async def guard(self, tool: Tool) -> None:
        """From now on the tool lives no longer than the lease."""
        self._tool = tool
        await self._renew()

    async def _keep(self) -> None:
        interval = min(RENEW_INTERVAL, self._length / 4).total_seconds()
        while self.reason is None:
            await asyncio.sleep(interval)
            await self._renew()

    async def _renew(self) -> None:
        asked_at = time.monotonic()
        try:
            await asyncio.to_thread(self._ledger.renew, self._build_id, self._attempt, self._length)
        except UnavailableError:
            return
        except BuildError as error:
            self.reason = error
            self.lost.set()
            return
        if self._tool is not None:
            # Counted from before the question, so that the tool never outlives what the catalog says.
            await self._tool.renew(self._length.total_seconds() - (time.monotonic() - asked_at))


@contextlib.asynccontextmanager
async def beating(details: Callable[[], object]) -> AsyncIterator[None]:
    """Heartbeats the running activity every second with what `details` says; they are a hint for operators only."""

    async def beat() -> None:
        while True:
            activity.heartbeat(details())
            await asyncio.sleep(HEARTBEAT_INTERVAL.total_seconds())

    task = asyncio.create_task(beat())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
