"""One attempt to bake an AMI: hold the build, run the tool, and leave no doubt about what became of it."""

import asyncio
import contextlib
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from temporalio.client import Client
from temporalio.service import RPCError

from activities.heartbeat import Lease
from activities.packer_output import PackerOutput
from kiln.errors import AttemptLostError, BuildError, BuildTimedOutError, CapacityError, ToolFailedError
from kiln.models import BuilderReport, BuildRef, BuiltImage
from kiln.naming import BUILD_TAG, build_workflow_id, resource_tags
from kiln.ports import Ami, Cloud, Held, Ledger, LogBook, LogWriting, Marks, Order, PackerKit, Tool, Toolbox, ToolExit
from kiln.redact import Redactor

POLL = timedelta(seconds=1)
CAPACITY_ATTEMPTS = 3
LAST_LINE_LENGTH = 200
# A builder's report to its workflow is for show; nothing waits for it.
REPORT_TIMEOUT = timedelta(seconds=1)


@dataclass(frozen=True)
class PackerTerms:
    """How long things may take: `limit` a build over all its attempts, `grace` Packer's own clean-up after SIGINT."""

    limit: timedelta
    lease: timedelta
    grace: timedelta
    capacity_delay: timedelta


@dataclass(frozen=True)
class PackerParts:
    """What an attempt works with. `holder` names the worker; `client` reports to the workflow, where there is one."""

    ledger: Ledger
    cloud: Cloud
    logs: LogBook
    tools: Toolbox
    kit: PackerKit
    terms: PackerTerms
    holder: str
    client: Client | None = None


class PackerAttempt:
    """One attempt's state. Everything that it makes carries its number in name and tags."""

    def __init__(self, parts: PackerParts, build: BuildRef) -> None:
        self._parts = parts
        self._build = build
        self._phase = "waiting"
        self._number = 0
        self._last_line = ""
        self._noted: frozenset[str] = frozenset()
        self._reports: set[asyncio.Task[None]] = set()

    def heartbeat_details(self) -> dict[str, object]:
        """What operators see beside the pending activity. Lines are redacted before they get here."""
        return {"phase": self._phase, "attempt": self._number, "last_line": self._last_line}

    async def run(self) -> BuiltImage:
        """Begins the next attempt, and adopts what an earlier one finished or bakes anew."""
        order, asked_at = await self._begin()
        async with (
            Lease(self._parts.ledger, order, self._parts.terms.lease, asked_at) as lease,
            self._parts.logs.writing(order.build_id, order.attempt) as log,
        ):
            adopted = await self._adopt(order, log) if order.attempt > 1 else None
            return adopted or await self._bake(order, lease, log)

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

    async def _adopt(self, order: Order, log: LogWriting) -> BuiltImage | None:
        """The AMI that an earlier attempt got EC2 to make, if there is one: building it again would double it."""
        self._phase = "looking for what an earlier attempt finished"
        await log.write("kiln", _introduction(order))
        marks = Marks(self._parts.ledger.installation, order.build_id, order.known_ids)
        await self._end_instances(order, marks)
        ami = await self._finished_image(order, marks)
        if ami is None:
            return None
        if ami.tags.get(BUILD_TAG) != order.build_id:
            await asyncio.to_thread(self._parts.cloud.tag, order.spec.region, _with_snapshots(ami), self._tags(order))
        await log.write("kiln", f"adopting {ami.image_id} ({ami.name}), which an earlier attempt finished")
        return await self._built(order, order.spec.region, ami.image_id, adopted=True)

    async def _end_instances(self, order: Order, marks: Marks) -> None:
        """An instance that lives could still become an image."""
        while await asyncio.to_thread(self._parts.cloud.end_instances, order.spec.region, marks):
            await asyncio.sleep(POLL.total_seconds())

    async def _finished_image(self, order: Order, marks: Marks) -> Ami | None:
        while True:
            amis = await asyncio.to_thread(self._parts.cloud.images_of_build, order.spec.region, marks)
            available = [ami for ami in amis if ami.state == "available"]
            if available:
                return available[-1]  # the oldest: what came after it was doubled
            if not any(ami.state == "pending" for ami in amis) or _is_past(order.deadline_at):
                return None
            self._phase = "waiting for the AMI that an earlier attempt began"
            await asyncio.sleep(POLL.total_seconds())

    async def _bake(self, order: Order, lease: Lease, log: LogWriting) -> BuiltImage:
        """Runs Packer to its end. Raises what ended it otherwise."""
        output = PackerOutput(ids=set(order.known_ids))
        self._noted = order.known_ids
        group = await asyncio.to_thread(self._make_security_group, order)
        job = await asyncio.to_thread(self._parts.kit.prepare, order, group)
        redactor = Redactor(order.secrets.values())
        try:
            tool = await self._parts.tools.start(job.argv, job.env, job.cwd, redactor, lease.remaining)
            async with tool:
                ended = await self._watch(order, tool, lease, log, output)
        finally:
            await asyncio.to_thread(self._parts.kit.discard, job)
        return await self._judge(order, ended, output, log, redactor.text(" ".join(job.argv)))

    def _make_security_group(self, order: Order) -> str:
        cloud, region = self._parts.cloud, order.spec.region
        self._parts.ledger.prepare(order.build_id, order.attempt, cloud.account(region))
        return cloud.make_security_group(region, self._parts.kit.security_group(order))

    async def _watch(
        self, order: Order, tool: Tool, lease: Lease, log: LogWriting, output: PackerOutput
    ) -> ToolExit | BuildError:
        """The tool's exit, or what came before it: a lost lease, a cancel, the deadline."""
        lease.guard(tool)
        limit = self._parts.terms.limit
        deadline = await asyncio.to_thread(self._parts.ledger.tool_started, order.build_id, order.attempt, limit)
        self._phase = "Packer is running"
        self._report(order, f"Packer is running (attempt {order.attempt}, on {self._parts.holder})")
        reading = asyncio.create_task(self._read(order, tool, log, output))
        losing = asyncio.create_task(lease.lost.wait())
        try:
            patience = (deadline - datetime.now(UTC)).total_seconds()
            await asyncio.wait({reading, losing}, timeout=max(0.0, patience), return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                await reading
                return await tool.wait()
            verdict = lease.reason or BuildTimedOutError(
                f"Packer build timed out after {int(limit.total_seconds())} seconds"
            )
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
        self._phase = "stopping Packer"
        with contextlib.suppress(BuildError):
            await log.write("kiln", f"stopping Packer: {why}")
        await tool.stop(self._parts.terms.grace)

    async def _read(self, order: Order, tool: Tool, log: LogWriting, output: PackerOutput) -> None:
        async for line in tool.lines():
            for text in output.feed(line.text):
                self._last_line = text[:LAST_LINE_LENGTH]
                await log.write(line.stream, text)
            fresh = output.new_ids(self._noted)
            if fresh:
                self._noted |= fresh
                await asyncio.to_thread(self._parts.ledger.note_ids, order.build_id, fresh)

    async def _judge(
        self, order: Order, ended: ToolExit | BuildError, output: PackerOutput, log: LogWriting, command: str
    ) -> BuiltImage:
        if isinstance(ended, BuildError):
            raise ended
        image = output.image()
        if ended.code == 0 and image is not None:
            return await self._built(order, *image, adopted=False)
        if ended.reason != "exited":
            raise AttemptLostError(f"Packer was ended from outside ({ended.reason})")
        how = f"exit code {ended.code}" if ended.code is not None else f"signal {ended.signal}"
        await log.write("kiln", f"{command}: {how}")
        if ended.code == 0:
            raise ToolFailedError("Packer ended well, but named no AMI")
        raise self._final_if_worn_out(output.failure(), order.attempt)

    def _final_if_worn_out(self, failure: BuildError, attempt: int) -> BuildError:
        if isinstance(failure, CapacityError):
            delay = self._parts.terms.capacity_delay
            return CapacityError(str(failure), final=attempt >= CAPACITY_ATTEMPTS, retry_after=delay)
        return failure

    async def _built(self, order: Order, region: str, image_id: str, *, adopted: bool) -> BuiltImage:
        account = await asyncio.to_thread(self._parts.cloud.account, region)
        return BuiltImage(image_id=image_id, region=region, account=account, attempt=order.attempt, adopted=adopted)

    def _tags(self, order: Order) -> dict[str, str]:
        return {**order.spec.tags, **resource_tags(self._parts.ledger.installation, order.build_id, order.attempt)}

    def _report(self, order: Order, detail: str) -> None:
        """Tells the workflow that the tool runs, for the Temporal UI. Nothing waits for it, and it may fail."""
        if self._parts.client is not None:
            task = asyncio.create_task(_send_report(self._parts.client, order, detail))
            self._reports.add(task)
            task.add_done_callback(self._reports.discard)


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


def _with_snapshots(ami: Ami) -> list[str]:
    return [ami.image_id, *ami.snapshot_ids]


def _is_past(deadline: datetime | None) -> bool:
    return deadline is not None and datetime.now(UTC) >= deadline
