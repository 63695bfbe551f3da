"""One attempt of a builder, whatever it builds with: hold the build, and leave no doubt about what became of it."""

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import ClassVar, Generic, TypeVar

from temporalio.client import Client
from temporalio.service import RPCError

from activities.heartbeat import Lease, staying_alive
from kiln.errors import (
    BuildTimedOutError,
    ContextInvalidError,
    ContextMissingError,
    SourceUnavailableError,
)
from kiln.models import BuilderReport, BuildRef, BuiltImage
from kiln.naming import build_workflow_id
from kiln.ports import Held, Ledger, LogBook, LogWriting, Order

POLL = timedelta(seconds=1)
# What no tool has printed; a log never ends without the reason.
SAID_BY_KILN = (ContextInvalidError, ContextMissingError, SourceUnavailableError)
LAST_LINE_LENGTH = 200
# A builder's report to its workflow is for show; nothing waits for it.
REPORT_TIMEOUT = timedelta(seconds=1)


@dataclass(frozen=True)
class AttemptTerms:
    """How long things may take: `limit` a build over all its attempts, `grace` a tool's own clean-up after SIGINT."""

    limit: timedelta
    lease: timedelta
    grace: timedelta


@dataclass(frozen=True, kw_only=True)
class AttemptParts:
    """What an attempt works with. `holder` names the worker; `client` reports to the workflow, where there is one."""

    ledger: Ledger
    logs: LogBook
    terms: AttemptTerms
    holder: str
    client: Client | None = None


P = TypeVar("P", bound=AttemptParts)


class Attempt(ABC, Generic[P]):
    """One attempt's state. Everything that it makes carries its number."""

    tool_name: ClassVar[str]
    timed_out: ClassVar[str] = "the build timed out after {seconds} seconds"

    def __init__(self, parts: P, build: BuildRef) -> None:
        self._parts = parts
        self._build = build
        self._phase = "waiting"
        self._number = 0
        self._last_line = ""
        self._reports: set[asyncio.Task[None]] = set()

    def heartbeat_details(self) -> dict[str, object]:
        """What operators see beside the pending activity. Lines are redacted before they get here."""
        return {"phase": self._phase, "attempt": self._number, "last_line": self._last_line}

    async def run(self) -> BuiltImage:
        """Begins the next attempt, and adopts what an earlier one finished or makes it anew."""
        order, asked_at = await self._begin()
        async with (
            Lease(self._parts.ledger, order, self._parts.terms.lease, asked_at) as lease,
            self._parts.logs.writing(order.build_id, order.attempt) as log,
        ):
            if order.attempt > 1:
                self._phase = "looking for what an earlier attempt finished"
                await log.write("kiln", _introduction(order))
                adopted = await self._adopt(order, log)
                if adopted is not None:
                    return adopted
            try:
                return await self._make(order, lease, log)
            except SAID_BY_KILN as error:
                await log.write("kiln", str(error))
                raise

    @abstractmethod
    async def _adopt(self, order: Order, log: LogWriting) -> BuiltImage | None:
        """The image that an earlier attempt finished, if there is one: building it again would double it."""

    @abstractmethod
    async def _make(self, order: Order, lease: Lease, log: LogWriting) -> BuiltImage:
        """Sees the image made. Raises what came before that."""

    async def _begin(self) -> tuple[Order, float]:
        """The next attempt, once no earlier one's tool can still be at work; and when it was asked for."""
        while True:
            asked_at = time.monotonic()
            order = await asyncio.to_thread(
                self._parts.ledger.begin, self._build.build_id, self._parts.holder, self._parts.terms.lease
            )
            if not isinstance(order, Held):
                self._number = order.attempt
                return order, asked_at
            self._phase = "waiting for the previous attempt's lease to end"
            await asyncio.sleep(min(order.remaining, POLL).total_seconds() + 0.02)

    def _timed_out(self, limit: timedelta) -> BuildTimedOutError:
        return BuildTimedOutError(self.timed_out.format(seconds=int(limit.total_seconds())))

    async def _write(self, log: LogWriting, stream: str, text: str) -> None:
        self._last_line = text[:LAST_LINE_LENGTH]
        await log.write(stream, text)

    def _report(self, order: Order, detail: str) -> None:
        """Tells the workflow that the tool runs, for the Temporal UI. Nothing waits for it, and it may fail."""
        if self._parts.client is not None:
            task = asyncio.create_task(_send_report(self._parts.client, order, detail))
            self._reports.add(task)
            task.add_done_callback(self._reports.discard)


async def see_through(attempt: Attempt[P]) -> BuiltImage:
    """Runs an attempt inside its activity, with signs of life. Raises what ends the attempt."""
    async with staying_alive(attempt.heartbeat_details):
        return await attempt.run()


def is_past(deadline: datetime | None) -> bool:
    """Whether the build's deadline, if it has one yet, is over."""
    return deadline is not None and datetime.now(UTC) >= deadline


async def _send_report(client: Client, order: Order, detail: str) -> None:
    handle = client.get_workflow_handle(build_workflow_id(order.build_id))
    report = BuilderReport(phase="building", attempt=order.attempt, detail=detail)
    with contextlib.suppress(RPCError):
        await handle.signal("builder_report", report, rpc_timeout=REPORT_TIMEOUT)


def _introduction(order: Order) -> str:
    if order.predecessor_lost:
        return (
            f"attempt {order.attempt} takes the build up: attempt {order.attempt - 1} was lost, "
            "and with it whatever its tool printed after the last line above"
        )
    return f"attempt {order.attempt} takes the build up: attempt {order.attempt - 1} ended without an image"
