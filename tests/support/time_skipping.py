"""Time that the time-skipping test server skips, in steps that end locked.

The server lets go of its clock a moment before it has a retry's timer in its queue (`TestWorkflowStoreImpl.save`). With
nothing else in the queue the clock may then jump to the workflow's time-out, ten years ahead; in steps it jumps by one.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta

from google.protobuf.duration_pb2 import Duration
from temporalio.api.testservice.v1 import LockTimeSkippingRequest, SleepRequest, UnlockTimeSkippingRequest
from temporalio.service import TestService

STEP = timedelta(minutes=1)


class TimeSkipping:
    """The clock of one server, which was started locked. The server counts locks: each is taken back once."""

    def __init__(self, server: TestService) -> None:
        self._server = server
        self._step: asyncio.Task[object] | None = None
        self._is_held = False

    @asynccontextmanager
    async def on(self) -> AsyncIterator[None]:
        """Has the server skip the time in which it has nothing to do but wait, until the block's end."""
        await self._resume()
        steps = asyncio.create_task(self._go_on())
        try:
            yield
        finally:
            steps.cancel()
            with suppress(asyncio.CancelledError):
                await steps
            await self._hold()

    def close(self) -> None:
        if self._step is not None:
            self._step.cancel()

    async def _go_on(self) -> None:
        while True:
            if self._step is None:
                self._step = asyncio.create_task(self._take_step())
            await asyncio.shield(self._step)
            self._step = None

    async def _take_step(self) -> None:
        """Unlocks; the server locks again by itself once its clock is a step further."""
        duration = Duration()
        duration.FromTimedelta(STEP)
        await self._server.unlock_time_skipping_with_sleep(SleepRequest(duration=duration))

    async def _hold(self) -> None:
        """Locks at once, where a step has not come to its end: an activity may keep it from that for long."""
        if self._step is not None and not self._step.done():
            self._is_held = True
            await self._server.lock_time_skipping(LockTimeSkippingRequest())

    async def _resume(self) -> None:
        if self._is_held:
            self._is_held = False
            await self._server.unlock_time_skipping(UnlockTimeSkippingRequest())
