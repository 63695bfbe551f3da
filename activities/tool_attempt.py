"""One attempt that runs a tool: its lines to the log, its end by its own exit, a lost lease, a cancel or the deadline."""

import asyncio
import contextlib
from abc import abstractmethod
from collections.abc import Awaitable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

from activities.attempt import Attempt, AttemptParts
from activities.heartbeat import Lease
from kiln.errors import AttemptLostError, BuildError
from kiln.ports import LogWriting, Order, Tool, Toolbox, ToolExit, ToolLine


@dataclass(frozen=True, kw_only=True)
class ToolParts(AttemptParts):
    """What an attempt with a tool works with."""

    tools: Toolbox


T = TypeVar("T", bound=ToolParts)


class ToolAttempt(Attempt[T]):
    """`_make` runs the tool to its end by `_carry_out`."""

    @abstractmethod
    async def _take(self, order: Order, line: ToolLine, log: LogWriting) -> None:
        """One line of the tool's, to the log and to whatever the attempt learns from it."""

    async def _carry_out(
        self, order: Order, starting: Awaitable[Tool], lease: Lease, log: LogWriting
    ) -> ToolExit | BuildError:
        """Sees the tool to its end: its exit, or what came before it (a lost lease, a cancel, the deadline)."""
        async with await starting as tool:
            return await self._watch(order, tool, lease, log)

    async def _watch(self, order: Order, tool: Tool, lease: Lease, log: LogWriting) -> ToolExit | BuildError:
        lease.guard(tool)
        limit = self._parts.terms.limit
        deadline = await asyncio.to_thread(self._parts.ledger.tool_started, order.build_id, order.attempt, limit)
        self._phase = f"{self.tool_name} is running"
        self._report(order, f"{self.tool_name} is running (attempt {order.attempt}, on {self._parts.holder})")
        reading = asyncio.create_task(self._read(order, tool, log))
        losing = asyncio.create_task(lease.lost.wait())
        try:
            patience = (deadline - datetime.now(UTC)).total_seconds()
            await asyncio.wait({reading, losing}, timeout=max(0.0, patience), return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                await reading
                return await tool.wait()
            verdict = lease.reason or self._timed_out(limit)
            await self._stop(tool, log, verdict)
            return verdict
        except asyncio.CancelledError:
            await self._stop(tool, log, AttemptLostError("the attempt was cancelled"))
            raise
        finally:
            losing.cancel()
            reading.cancel()
            await asyncio.gather(losing, reading, return_exceptions=True)

    async def _stop(self, tool: Tool, log: LogWriting, why: BuildError) -> None:
        self._phase = f"stopping {self.tool_name}"
        with contextlib.suppress(BuildError):
            await log.write("kiln", f"stopping {self.tool_name}: {why}")
        await tool.stop(self._parts.terms.grace)

    async def _read(self, order: Order, tool: Tool, log: LogWriting) -> None:
        async for line in tool.lines():
            await self._take(order, line, log)


def how_it_ended(ended: ToolExit) -> str:
    """`exit code 1`, or `signal 9`."""
    return f"exit code {ended.code}" if ended.code is not None else f"signal {ended.signal}"
