"""One attempt to bake an AMI: hold the build, run Packer, and leave no doubt about what became of it."""

import asyncio
from dataclasses import dataclass
from datetime import timedelta

from activities.ami_search import finished_image, mark, marks_of
from activities.attempt import POLL, AttemptTerms
from activities.heartbeat import Lease
from activities.packer_output import PackerOutput
from activities.tool_attempt import ToolAttempt, ToolParts, how_it_ended
from kiln.errors import AttemptLostError, BuildError, CapacityError, ToolFailedError
from kiln.models import BuildRef, BuiltImage
from kiln.naming import resource_tags
from kiln.ports import Cloud, LogWriting, Marks, Order, PackerKit, ToolExit, ToolLine
from kiln.redact import Redactor

CAPACITY_ATTEMPTS = 3


@dataclass(frozen=True)
class PackerTerms(AttemptTerms):
    """`capacity_delay` is how long the next attempt waits for EC2 to have room."""

    capacity_delay: timedelta


@dataclass(frozen=True, kw_only=True)
class PackerParts(ToolParts):
    """What an attempt works with."""

    cloud: Cloud
    kit: PackerKit
    terms: PackerTerms


class PackerAttempt(ToolAttempt[PackerParts]):
    """Everything that it makes carries its number in name and tags."""

    tool_name = "Packer"
    timed_out = "Packer build timed out after {seconds} seconds"

    def __init__(self, parts: PackerParts, build: BuildRef) -> None:
        super().__init__(parts, build)
        self._output = PackerOutput(ids=set())
        self._noted: frozenset[str] = frozenset()

    async def _adopt(self, order: Order, log: LogWriting) -> BuiltImage | None:
        """The AMI that an earlier attempt got EC2 to make, if there is one: building it again would double it."""
        marks = marks_of(order, self._parts.ledger.installation)
        await self._end_instances(order, marks)
        ami = await finished_image(self._parts.cloud, order, marks, self._awaits_image)
        if ami is None:
            return None
        await mark(self._parts.cloud, order, ami, self._tags(order))
        await log.write("kiln", f"adopting {ami.image_id} ({ami.name}), which an earlier attempt finished")
        return await self._built(order, order.machine.region, ami.image_id, adopted=True)

    async def _end_instances(self, order: Order, marks: Marks) -> None:
        """An instance that lives could still become an image."""
        while await asyncio.to_thread(self._parts.cloud.end_instances, order.machine.region, marks):
            await asyncio.sleep(POLL.total_seconds())

    def _awaits_image(self) -> None:
        self._phase = "waiting for the AMI that an earlier attempt began"

    async def _make(self, order: Order, lease: Lease, log: LogWriting) -> BuiltImage:
        """Runs Packer to its end. Raises what ended it otherwise."""
        self._output, self._noted = PackerOutput(ids=set(order.known_ids)), order.known_ids
        group = await asyncio.to_thread(self._make_security_group, order)
        job = await asyncio.to_thread(self._parts.kit.prepare, order, group)
        redactor = Redactor(order.secrets.values())
        try:
            starting = self._parts.tools.start(job.argv, job.env, job.cwd, redactor, lease.remaining)
            ended = await self._carry_out(order, starting, lease, log)
        finally:
            await asyncio.to_thread(self._parts.kit.discard, job)
        return await self._judge(order, ended, log, redactor.text(" ".join(job.argv)))

    def _make_security_group(self, order: Order) -> str:
        cloud, region = self._parts.cloud, order.machine.region
        self._parts.ledger.prepare(order.build_id, order.attempt, cloud.account(region))
        return cloud.make_security_group(region, self._parts.kit.security_group(order))

    async def _take(self, order: Order, line: ToolLine, log: LogWriting) -> None:
        for text in self._output.feed(line.text):
            await self._write(log, line.stream, text)
        fresh = self._output.new_ids(self._noted)
        if fresh:
            self._noted |= fresh
            await asyncio.to_thread(self._parts.ledger.note_ids, order.build_id, fresh)

    async def _judge(self, order: Order, ended: ToolExit | BuildError, log: LogWriting, command: str) -> BuiltImage:
        if isinstance(ended, BuildError):
            raise ended
        image = self._output.image()
        if ended.code == 0 and image is not None:
            return await self._built(order, *image, adopted=False)
        if ended.reason != "exited":
            raise AttemptLostError(f"Packer was ended from outside ({ended.reason})")
        await log.write("kiln", f"{command}: {how_it_ended(ended)}")
        if ended.code == 0:
            raise ToolFailedError("Packer ended well, but named no AMI")
        raise self._final_if_worn_out(self._output.failure(), order.attempt)

    def _final_if_worn_out(self, failure: BuildError, attempt: int) -> BuildError:
        if isinstance(failure, CapacityError):
            delay = self._parts.terms.capacity_delay
            return CapacityError(str(failure), final=attempt >= CAPACITY_ATTEMPTS, retry_after=delay)
        return failure

    async def _built(self, order: Order, region: str, image_id: str, *, adopted: bool) -> BuiltImage:
        account = await asyncio.to_thread(self._parts.cloud.account, region)
        return BuiltImage(image_id=image_id, region=region, account=account, attempt=order.attempt, adopted=adopted)

    def _tags(self, order: Order) -> dict[str, str]:
        return {**order.machine.tags, **resource_tags(self._parts.ledger.installation, order.build_id, order.attempt)}
