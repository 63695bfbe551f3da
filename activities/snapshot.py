"""The activity that makes an image of a stopped machine, and one attempt of it."""

import asyncio
import contextlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from temporalio import activity

from activities.ami_search import finished_image, mark, marks_of
from activities.attempt import POLL, Attempt, AttemptParts, is_past, see_through
from activities.calls import seen_through
from activities.heartbeat import Lease
from kiln.errors import (
    BuildError,
    ConflictError,
    KilnError,
    NotFoundError,
    RefusedError,
    SourceUnavailableError,
    ToolFailedError,
)
from kiln.models import BuildRef, BuiltImage
from kiln.naming import image_name, resource_tags
from kiln.ports import Ami, Cloud, LogWriting, MachineCloud, Order

# EC2 hides what it has only just begun to make, for a while.
HIDDEN_PATIENCE = timedelta(minutes=2)
# What EC2 may show of an instance for a while that it has shown as stopped before.
STALE_STATES = (None, "stopping")


@dataclass(frozen=True, kw_only=True)
class SnapshotParts(AttemptParts):
    """What an attempt works with. `cloud` and `machines` are two views of one EC2; `name_prefix` begins AMIs' names; `settle`
    is how long EC2 may hide what it has."""

    cloud: Cloud
    machines: MachineCloud
    name_prefix: str
    settle: timedelta = timedelta(0)


class SnapshotActivities:
    """Runs on the machines' queue: there is nothing to compute, only EC2 to wait for."""

    def __init__(self, parts: SnapshotParts) -> None:
        self._parts = parts

    @activity.defn(name="snapshot-machine")
    async def build(self, build: BuildRef) -> BuiltImage:
        """The AMI of this build's machine: the one that EC2 makes now, or one that a lost attempt had begun.

        Raises SourceUnavailableError, ToolFailedError, BuildTimedOutError, BuildCancelledError, BuildOverError,
        AttemptLostError, WorkerStoppingError.
        """
        return await see_through(SnapshotAttempt(self._parts, build))


class SnapshotAttempt(Attempt[SnapshotParts]):
    """EC2 `CreateImage`. The machine's own instance is nowhere noted as the build's: no cleanup may take it for one."""

    tool_name = "EC2"
    timed_out = "EC2 did not finish the image within {seconds} seconds"

    async def _adopt(self, order: Order, log: LogWriting) -> BuiltImage | None:
        marks = marks_of(order, self._parts.ledger.installation)
        ami = await finished_image(self._parts.cloud, order, marks, self._awaits_image)
        if ami is None:
            return None
        await mark(self._parts.cloud, order, ami, self._tags(order))
        await self._tag_snapshots(order, ami)
        await log.write("kiln", f"adopting {ami.image_id} ({ami.name}), which an earlier attempt began")
        return await self._built(order, ami, adopted=True)

    def _awaits_image(self) -> None:
        self._phase = "waiting for the AMI that an earlier attempt began"

    async def _make(self, order: Order, lease: Lease, log: LogWriting) -> BuiltImage:
        try:
            return await self._made(order, lease, log)
        except KilnError as error:
            refused = not error.retryable and not isinstance(error, BuildError)
            if refused or isinstance(error, ToolFailedError):
                with contextlib.suppress(BuildError):
                    await log.write("kiln", str(error))
            if refused:
                raise ToolFailedError(f"EC2 refused to make the image: {error}") from error
            raise

    async def _made(self, order: Order, lease: Lease, log: LogWriting) -> BuiltImage:
        await asyncio.to_thread(self._note_account, order)
        await self._require_stopped(order)
        limit = self._parts.terms.limit
        deadline = await asyncio.to_thread(self._parts.ledger.tool_started, order.build_id, order.attempt, limit)
        if is_past(deadline):
            raise self._timed_out(limit)
        image_id = await self._begin_image(order)
        await asyncio.to_thread(self._parts.ledger.note_ids, order.build_id, [image_id])
        said = f"EC2 is making {image_id} of {order.snapshot.instance_id}"
        await self._write(log, "kiln", said)
        self._report(order, f"{said} (attempt {order.attempt}, on {self._parts.holder})")
        ami = await self._until_available(order, image_id, deadline, lease)
        await self._tag_snapshots(order, ami)
        await self._write(
            log, "kiln", f"{image_id} is available: {ami.size_gib} GiB in {len(ami.snapshot_ids)} snapshots"
        )
        return await self._built(order, ami, adopted=False)

    def _note_account(self, order: Order) -> None:
        """From now on the cleanup has something to look for."""
        account = self._parts.machines.account(order.region)
        self._parts.ledger.prepare(order.build_id, order.attempt, account)

    async def _require_stopped(self, order: Order) -> None:
        until, instance_id = datetime.now(UTC) + self._parts.settle, order.snapshot.instance_id
        while (state := await asyncio.to_thread(self._state_of, order)) != "stopped":
            if state not in STALE_STATES or datetime.now(UTC) >= until:
                stands = "no more" if state is None else f"{state}, not stopped"
                raise SourceUnavailableError(f"the machine's instance {instance_id} is {stands}")
            await asyncio.sleep(POLL.total_seconds())

    def _state_of(self, order: Order) -> str | None:
        spec = order.snapshot
        instance = self._parts.machines.instances(spec.region, [spec.instance_id]).get(spec.instance_id)
        return instance.state if instance else None

    async def _begin_image(self, order: Order) -> str:
        """Has EC2 begin; a reply that was lost on its way is made up for by the name, which no two attempts share."""
        spec, tags = order.snapshot, self._tags(order)
        name = image_name(self._parts.name_prefix, "machine", order.build_id, order.attempt)
        self._phase = "asking EC2 for an image"
        try:
            return await seen_through(self._parts.machines.create_image, spec.region, spec.instance_id, name, tags)
        except RefusedError as error:
            raise SourceUnavailableError(str(error)) from error
        except ConflictError:
            return (await self._named(order, name)).image_id
        except NotFoundError as error:
            raise SourceUnavailableError(f"the machine's instance {spec.instance_id} is no more") from error

    async def _named(self, order: Order, name: str) -> Ami:
        marks = marks_of(order, self._parts.ledger.installation)
        until = datetime.now(UTC) + HIDDEN_PATIENCE
        while datetime.now(UTC) < until:
            amis = await asyncio.to_thread(self._parts.cloud.images_of_build, order.region, marks)
            for ami in amis:
                if ami.name == name:
                    return ami
            await asyncio.sleep(POLL.total_seconds())
        raise ToolFailedError(f"EC2 says that it has an AMI named {name} already, and does not show it")

    async def _until_available(self, order: Order, image_id: str, deadline: datetime, lease: Lease) -> Ami:
        hidden_until = datetime.now(UTC) + HIDDEN_PATIENCE
        while True:
            ami = await asyncio.to_thread(self._parts.cloud.image, order.region, image_id)
            if ami is not None and ami.state == "available":
                return ami
            self._phase = f"{image_id} is {ami.state if ami else 'not shown by EC2 yet'}"
            if ami is not None and ami.state != "pending":
                raise ToolFailedError(f"{image_id} is {ami.state}: {ami.state_reason or 'EC2 gives no reason'}")
            if ami is None and datetime.now(UTC) > hidden_until:
                raise ToolFailedError(f"EC2 no longer shows {image_id}")
            await self._rest(deadline, lease)

    async def _rest(self, deadline: datetime, lease: Lease) -> None:
        """A pause. Raises what ends the attempt: a lost lease, a cancel, the deadline."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(lease.lost.wait(), POLL.total_seconds())
        if lease.reason is not None:
            raise lease.reason
        if datetime.now(UTC) >= deadline:
            raise self._timed_out(self._parts.terms.limit)

    async def _built(self, order: Order, ami: Ami, *, adopted: bool) -> BuiltImage:
        account = await asyncio.to_thread(self._parts.cloud.account, order.region)
        return BuiltImage(
            image_id=ami.image_id, region=order.region, account=account, attempt=order.attempt, adopted=adopted
        )

    async def _tag_snapshots(self, order: Order, ami: Ami) -> None:
        # CreateImage tags its snapshots on AWS alone.
        await asyncio.to_thread(self._parts.cloud.tag, order.region, ami.snapshot_ids, self._tags(order))

    def _tags(self, order: Order) -> dict[str, str]:
        return resource_tags(self._parts.ledger.installation, order.build_id, order.attempt)
