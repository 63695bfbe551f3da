"""What is done to an organization's machines in EC2. Each step may be repeated, and finds what an earlier try left."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from temporalio import activity

from activities.calls import seen_through
from activities.heartbeat import staying_alive
from kiln.errors import (
    CapacityError,
    ConflictError,
    ImageNotFoundError,
    LeftoversError,
    NotFoundError,
    OperationFailedError,
    OperationOverError,
    RefusedError,
    UnavailableError,
)
from kiln.models import (
    LaunchedInstance,
    MachineOperation,
    OperationClaimRequest,
    OperationFailure,
    OperationRef,
    SourceAnswer,
    SourceState,
)
from kiln.naming import LAUNCH_TAG, NAME_TAG, launch_token, machine_tags, users_tags
from kiln.ports import (
    Instance,
    Launch,
    MachineCloud,
    MachineLedger,
    MachineOrder,
    MachineSource,
    Placement,
    Retired,
    SoftwareShelf,
)

POLL = timedelta(seconds=1)
CAPACITY_ATTEMPTS = 3
# An instance that is not running after so long never will be.
LAUNCH_PATIENCE = timedelta(minutes=15)
# EC2 hides what it has only just launched, for a while.
HIDDEN_PATIENCE = timedelta(minutes=2)
# An operating system may take its time over shutting down: after so long, the house-keeping watches it instead.
POWER_PATIENCE = timedelta(minutes=2)
ENDING_PATIENCE = timedelta(minutes=5)
TERMINATED = "terminated"
ENDED_STATES = frozenset({"shutting-down", TERMINATED})


@dataclass(frozen=True, kw_only=True)
class MachineParts:
    """What the steps work with. `capacity_delay` is how long the next try waits for EC2 to have room; `placement` where a
    machine runs that has not run anywhere yet; `settle` how long EC2 may hide what it has."""

    ledger: MachineLedger
    cloud: MachineCloud
    shelf: SoftwareShelf
    capacity_delay: timedelta
    placement: Placement = Placement()  # noqa: RUF009  frozen
    settle: timedelta = timedelta(0)


class MachineActivities:
    """Runs on the machines' queue. Raises OperationOverError where an operation was closed meanwhile."""

    def __init__(self, parts: MachineParts) -> None:
        self._ledger = parts.ledger
        self._cloud = parts.cloud
        self._shelf = parts.shelf
        self._capacity_delay = parts.capacity_delay
        self._placement = parts.placement
        self._settle = parts.settle

    @activity.defn(name="claim-operation")
    async def claim(self, request: OperationClaimRequest) -> bool:
        """Whether the operation is open, and this run's."""
        return await asyncio.to_thread(self._ledger.claim_operation, request.operation, request.run_id)

    @activity.defn(name="find-source")
    async def find_source(self, ref: OperationRef) -> SourceAnswer:
        """Whether there is an AMI to launch from yet."""
        source = await asyncio.to_thread(self._ledger.source, ref)
        return SourceAnswer(state=source.state, message=source.message)

    @activity.defn(name="launch-instance")
    async def launch(self, ref: OperationRef) -> LaunchedInstance:
        """The operation's instance, launched now or by an earlier try. Raises CapacityError, OperationFailedError."""
        async with staying_alive(lambda: "launching"):
            order = await asyncio.to_thread(self._ledger.machine_order, ref)
            until = datetime.now(UTC) + self._settle
            while True:
                try:
                    instance_id = await seen_through(self._instance_of, order)
                    return LaunchedInstance(operation=ref, instance_id=instance_id)
                except (ConflictError, ImageNotFoundError) as error:
                    if datetime.now(UTC) >= until:
                        raise OperationFailedError(str(error)) from error
                await asyncio.sleep(POLL.total_seconds())

    def _instance_of(self, order: MachineOrder) -> str:
        """Raises ConflictError or ImageNotFoundError also while EC2 does not show everywhere what it has."""
        launched = self._launched_already(order) or self._launch(order)
        try:
            return self._ledger.note_launch(order.ref, launched)
        except OperationOverError:
            # The ledger spares it if it is the machine's after all.
            account = self._cloud.account(order.region)
            self._ledger.retire([Retired(order.ref.machine_id, launched, order.region, account)])
            raise

    def _launched_already(self, order: MachineOrder) -> str | None:
        if order.next_instance_id is not None:
            return order.next_instance_id
        found = [each for each in self._launched(order) if each.state not in ENDED_STATES]
        return found[0].instance_id if found else None

    def _launched(self, order: MachineOrder) -> list[Instance]:
        """What this operation launched, oldest first: not the instance that the machine has, whatever its tags say."""
        number = str(order.ref.number)
        instances = self._cloud.instances_of_machine(order.region, self._ledger.installation, order.ref.machine_id)
        others = [each for each in instances if each.instance_id != order.instance_id]
        return [each for each in others if each.tags.get(LAUNCH_TAG) == number]

    def _launch(self, order: MachineOrder) -> str:
        account = self._cloud.account(order.region)
        self._require_account(order, account)
        self._ledger.note_account(order.ref, account)
        old = self._shown(order.region, order.instance_id) if order.instance_id else None
        launch = Launch(
            image_id=self._image_of(order),
            instance_type=order.instance_type,
            disk_gib=order.disk_gib,
            client_token=launch_token(self._ledger.installation, order.ref.machine_id, order.ref.number),
            tags=self._tags(order, old),
            placement=self._place(order, old),
        )
        try:
            return self._cloud.launch(order.region, launch)
        except CapacityError as error:
            raise self._worn_out(error) from error
        except ImageNotFoundError as error:
            raise ImageNotFoundError(f"its image {launch.image_id} is no longer in EC2") from error

    def _place(self, order: MachineOrder, old: Instance | None) -> Placement:
        """Where the machine runs, by EC2's last word on it; a terminated instance has lost its own."""
        if old is not None and old.state not in ENDED_STATES:
            return old.placement
        if old is None and self._cloud.simulated:  # one that was restarted knows none of the places that it had
            return self._placement
        return self._placement if order.placement == Placement() else order.placement

    def _require_account(self, order: MachineOrder, account: str) -> None:
        if order.account not in (None, account):
            raise OperationFailedError(
                f"the machine is in account {order.account}, and these credentials are of {account}"
            )

    def _image_of(self, order: MachineOrder) -> str:
        source = self._ledger.source(order.ref)
        if source.state is not SourceState.READY:
            raise OperationFailedError(source.message or "its image is not available")
        return source.image_id or self._base_image(order, source)

    def _base_image(self, order: MachineOrder, source: MachineSource) -> str:
        base = self._shelf.base_image(source.base_image_id) if source.base_image_id is not None else None
        if base is None:
            raise OperationFailedError(f"base image {source.base_image_id} is no longer in the software catalogue")
        owner, name = base.lookup(simulated=self._cloud.simulated)
        found = self._cloud.base_image(order.region, owner, name)
        if found is None:
            raise OperationFailedError(f"EC2 in {order.region} has no AMI of {base.name}")
        return found

    def _tags(self, order: MachineOrder, old: Instance | None) -> Mapping[str, str]:
        users = users_tags(old.tags) if old else order.tags
        ours = machine_tags(self._ledger.installation, order.ref.machine_id)
        return {**users, NAME_TAG: order.name, **ours, LAUNCH_TAG: str(order.ref.number)}

    def _worn_out(self, error: CapacityError) -> CapacityError:
        final = activity.info().attempt >= CAPACITY_ATTEMPTS
        return CapacityError(str(error), final=final, retry_after=self._capacity_delay)

    @activity.defn(name="adopt-instance")
    async def adopt(self, launched: LaunchedInstance) -> None:
        """Waits until the launched instance runs, and makes it the machine's. Raises OperationFailedError."""
        ref, said = launched.operation, "waiting for EC2"
        async with staying_alive(lambda: said):
            order = await asyncio.to_thread(self._order_unless_adopted, launched)
            if order is None:
                return
            began = datetime.now(UTC)
            while True:
                shown = await asyncio.to_thread(self._shown, order.region, launched.instance_id)
                if shown is not None and shown.state == "running":
                    break
                said = f"{launched.instance_id} is {shown.state if shown else 'not shown by EC2 yet'}"
                _refuse_hopeless(launched.instance_id, shown, began)
                await asyncio.sleep(POLL.total_seconds())
            # Placed where it was asked to be; EC2 tells more than was asked where the order left it the choice.
            await asyncio.to_thread(self._ledger.adopt_instance, ref, shown)

    def _order_unless_adopted(self, launched: LaunchedInstance) -> MachineOrder | None:
        """None if an earlier try has adopted the instance, and its answer was lost. Raises OperationOverError."""
        try:
            return self._ledger.machine_order(launched.operation)
        except OperationOverError:
            holdings = self._ledger.holdings(launched.operation.machine_id)
            if holdings is None or launched.instance_id not in holdings.instance_ids:
                raise
            return None

    def _shown(self, region: str, instance_id: str) -> Instance | None:
        return self._cloud.instances(region, [instance_id]).get(instance_id)

    @activity.defn(name="power-machine")
    async def power(self, ref: OperationRef) -> None:
        """Starts or stops the machine's instance, and ends the operation once EC2 says so.

        Raises CapacityError, OperationFailedError.
        """
        async with staying_alive(lambda: str(ref.operation)):
            order = await asyncio.to_thread(self._order_unless_ended, ref)
            if order is None:
                return
            if order.instance_id is None:
                raise OperationFailedError("the machine has no instance")
            state = await self._powered(order, order.instance_id)
            await asyncio.to_thread(self._ledger.finish_operation, ref, state, _problem_of(ref, state))

    def _order_unless_ended(self, ref: OperationRef) -> MachineOrder | None:
        """None if an earlier try has ended the operation, and its answer was lost. Raises OperationOverError."""
        try:
            return self._ledger.machine_order(ref)
        except OperationOverError:
            if activity.info().attempt == 1:
                raise
            return None

    async def _powered(self, order: MachineOrder, instance_id: str) -> str:
        """The instance's state after it was started or stopped; what EC2 has no more is terminated."""
        try:
            await seen_through(self._switch, order, instance_id)
            return await self._settled_state(order, instance_id)
        except CapacityError as error:
            raise self._worn_out(error) from error
        except (NotFoundError, RefusedError) as error:
            state = await self._state_now(order, instance_id)
            if state in ENDED_STATES:
                return state
            kind = OperationFailedError if isinstance(error, RefusedError) else UnavailableError
            raise kind(str(error)) from error

    def _switch(self, order: MachineOrder, instance_id: str) -> None:
        # In another account the machine's instance would pass for terminated.
        self._require_account(order, self._cloud.account(order.region))
        # That may have taken long: what another try has ended meanwhile, and the user undone, is not done again.
        self._ledger.machine_order(order.ref)
        if order.ref.operation is MachineOperation.START:
            self._cloud.start_instance(order.region, instance_id)
        else:
            self._cloud.stop_instance(order.region, instance_id, force=order.forced)

    async def _state_now(self, order: MachineOrder, instance_id: str) -> str:
        """EC2's word; what it has not shown for as long as it may hide what it has is terminated."""
        until = datetime.now(UTC) + self._settle
        while (shown := await asyncio.to_thread(self._shown, order.region, instance_id)) is None:
            if datetime.now(UTC) >= until:
                return TERMINATED
            await asyncio.sleep(POLL.total_seconds())
        return shown.state

    async def _settled_state(self, order: MachineOrder, instance_id: str) -> str:
        wanted = "running" if order.ref.operation is MachineOperation.START else "stopped"
        until = datetime.now(UTC) + POWER_PATIENCE
        while True:
            state = await self._state_now(order, instance_id)
            if state == wanted or state in ENDED_STATES or datetime.now(UTC) > until:
                return state
            await asyncio.sleep(POLL.total_seconds())

    @activity.defn(name="abandon-operation")
    async def abandon(self, failure: OperationFailure) -> None:
        """Ends an operation that failed or was cancelled, and retires whatever it launched."""
        await asyncio.to_thread(self._ledger.finish_operation, failure.operation, None, failure.message)

    @activity.defn(name="end-retired")
    async def end_retired(self, ref: OperationRef) -> None:
        """Terminates the instances that the machine no longer has, and those that this operation launched too many.

        Raises LeftoversError while one is still there.
        """
        async with staying_alive(lambda: "ending instances that the machine no longer has"):
            await asyncio.to_thread(self._retire_surplus, ref)
            until = datetime.now(UTC) + ENDING_PATIENCE
            while left := await asyncio.to_thread(self._end, ref.machine_id):
                if datetime.now(UTC) > until:
                    raise LeftoversError("still there: " + ", ".join(left))
                await asyncio.sleep(POLL.total_seconds())

    def _retire_surplus(self, ref: OperationRef) -> None:
        """A reply that was lost may have left an instance that nobody noted; the ledger spares those that are wanted."""
        holdings = self._ledger.holdings(ref.machine_id)
        if holdings is None or holdings.account is None or self._cloud.account(holdings.region) != holdings.account:
            return
        launched = self._cloud.instances_of_machine(holdings.region, self._ledger.installation, ref.machine_id)
        self._ledger.retire(
            [
                Retired(ref.machine_id, each.instance_id, holdings.region, holdings.account)
                for each in launched
                if each.tags[LAUNCH_TAG].isdigit() and int(each.tags[LAUNCH_TAG]) <= ref.number
            ]
        )

    def _end(self, machine_id: int) -> list[str]:
        """One pass; returns what is still there."""
        retired = self._ledger.retired(timedelta(0), machine_id)
        return [each.instance_id for each in retired if not end_instance(self._ledger, self._cloud, each)]


def end_instance(ledger: MachineLedger, cloud: MachineCloud, retired: Retired) -> bool:
    """Asks for a retired instance's end; True once it is gone. Raises LeftoversError if it is in another account."""
    account = cloud.account(retired.region)
    if account != retired.account:
        raise LeftoversError(
            f"{retired.instance_id} is in account {retired.account}, and these credentials are of {account}"
        )
    if not cloud.terminate_instance(retired.region, retired.instance_id):
        return False
    shown = cloud.instances(retired.region, [retired.instance_id])
    if not shown and retired.retired_at and datetime.now(UTC) - retired.retired_at < HIDDEN_PATIENCE:
        return False  # EC2 may know it only elsewhere yet
    ledger.forget_retired(retired.region, retired.instance_id)
    return True


def _problem_of(ref: OperationRef, state: str) -> str | None:
    """What a machine's users are told of the state in which a start or a stop has left its instance."""
    if state in ENDED_STATES:
        return "its instance was terminated in EC2"
    if ref.operation is MachineOperation.START and state == "stopped":
        return "EC2 did not start its instance, or stopped it again"
    return None


def _refuse_hopeless(instance_id: str, shown: Instance | None, began: datetime) -> None:
    """Raises OperationFailedError for an instance that will not run any more."""
    if shown is not None and shown.state in (*ENDED_STATES, "stopping", "stopped"):
        reason = f": {shown.state_reason}" if shown.state_reason else ""
        raise OperationFailedError(f"the new instance {instance_id} is {shown.state}{reason}")
    now = datetime.now(UTC)
    if shown is None and now - began > HIDDEN_PATIENCE:
        raise OperationFailedError(f"EC2 no longer shows the new instance {instance_id}")
    if shown is not None and now - shown.launched_at > LAUNCH_PATIENCE:
        raise OperationFailedError(f"the new instance {instance_id} is still {shown.state} after {LAUNCH_PATIENCE}")
