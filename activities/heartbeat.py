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

from kiln.errors import AttemptLostError, BuildError, UnavailableError, WorkerStoppingError
from kiln.ports import Ledger, Order, Tool

HEARTBEAT_INTERVAL = timedelta(seconds=1)
RENEW_INTERVAL = timedelta(seconds=3)


class Lease:
    """Holds a build for one attempt while the context is open, and gives it up at its end.

    `asked_at` is the monotonic time before the question that began the attempt. `lost` is set once the attempt may not
    go on; `reason` then says why (cancelled, over, another attempt's). When the catalog does not answer, the tool's
    guard ends the tool at the lease's end, with or without this process.
    """

    def __init__(self, ledger: Ledger, order: Order, length: timedelta, asked_at: float) -> None:
        self._ledger = ledger
        self._build_id = order.build_id
        self._attempt = order.attempt
        self._length = length
        # Counted from before the question that granted it, so that no tool outlives what the catalog says.
        self._ends_at = asked_at + length.total_seconds()
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

    @property
    def remaining(self) -> timedelta:
        """How long the lease lasts without another renewal."""
        return timedelta(seconds=max(0.0, self._ends_at - time.monotonic()))

    def guard(self, tool: Tool) -> None:
        """The tool, started with what remained of the lease, lives on as the lease is renewed."""
        self._tool = tool

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
        self._ends_at = asked_at + self._length.total_seconds()
        if self._tool is not None:
            await self._tool.renew(self.remaining.total_seconds())


@contextlib.asynccontextmanager
async def staying_alive(details: Callable[[], object]) -> AsyncIterator[None]:
    """Heartbeats the running activity, and tells a user's cancel from a worker's end.

    Raises WorkerStoppingError or AttemptLostError, which Temporal retries, where nobody cancelled anything.
    """
    try:
        async with beating(details):
            yield
    except asyncio.CancelledError:
        _raise_unless_users_cancel()
        raise


def _raise_unless_users_cancel() -> None:
    """A worker that stops, or an operator who pauses or resets the activity, does not cancel what it is about."""
    why = activity.cancellation_details()
    if why is None or why.cancel_requested:
        return
    if why.worker_shutdown:
        raise WorkerStoppingError("the worker is shutting down; another one takes this up")
    raise AttemptLostError("Temporal took this attempt away")


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
