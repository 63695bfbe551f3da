"""The workflows of machines and of images made of them, on instances in memory."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from temporalio.api.enums.v1 import EventType
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError, CancelledError
from temporalio.worker import Worker

from activities.attempt import AttemptTerms
from activities.interceptor import ErrorInterceptor
from activities.machines import MachineActivities, MachineParts
from activities.snapshot import SnapshotActivities, SnapshotParts
from kiln.adapters.software import SoftwareCatalogue
from kiln.catalog.tables import Machine
from kiln.errors import UnavailableError
from kiln.models import BuildRef, HouseTerms, OperationRef
from kiln.naming import LAUNCH_TAG, MACHINES_QUEUE, NAME_TAG, machine_tags, operation_workflow_id
from kiln.ports import Placement
from kiln.settings import PROJECT_ROOT
from support import machine_rows
from support.harness import GRACEFUL, HEARTBEAT_TIMEOUT, THROTTLE, Harness
from support.rows import ami
from workflows.dispatch import Dispatcher
from workflows.start import start_house_keeping, start_operation

CANCEL_REQUESTED = EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CANCEL_REQUESTED
TASK_COMPLETED = EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED
# Long enough ago for the house-keeping to ask where an operation is.
LONG_AGO = timedelta(minutes=1)
EVERY_ROUND = HouseTerms(pause_seconds=0.2, rounds_a_sweep=1)
PLACEMENT = Placement("subnet-1", ("sg-1",), "a-key")
USERS_TAGS = {"team": "art"}


class MachineHarness(Harness):
    """What a test of machines works with; `machines` is their EC2."""

    # Rows

    def machine(self, state: str = "stopped", **changes: Any) -> int:
        """A machine that was taken in with an instance in this state."""
        values = {"placement": PLACEMENT, "tags": USERS_TAGS, **changes}
        number = machine_rows.add_machine(self.catalog, self.organization, state, **values)
        ours = machine_tags(self.ledger.installation, number)
        self.machines.put(
            machine_rows.instance(
                state, **values | {"instance_id": self.instance_of(number), "tags": USERS_TAGS | ours}
            )
        )
        return number

    def launched(self, machine_id: int, number: int = 1, **changes: Any) -> str:
        """An instance that some operation launched for a machine."""
        ours = machine_tags(self.ledger.installation, machine_id)
        tags = {NAME_TAG: "a machine", **ours, LAUNCH_TAG: str(number)}
        return self.machines.put(machine_rows.instance(**{"tags": tags, **changes}))

    def template(self, status: str = "available") -> int:
        template = machine_rows.add_template(self.catalog, self.organization, "pending")
        self.finish(template, status)
        return template

    def finish(self, template: int, status: str) -> None:
        """Brings a pending template to this status."""
        build = machine_rows.template_of(self.catalog, self.organization, template).build
        machine_rows.bring(self.catalog, build.id, status)
        if status == "available":
            self.cloud.put_image(ami(self.image_id(template)))

    def image_id(self, template: int) -> str:
        """The AMI of an available template."""
        image = machine_rows.template_of(self.catalog, self.organization, template).image
        assert image is not None
        return image.reference

    def assign(self, machine: int) -> int:
        """A new template that the machine awaits from now on."""
        template = self.template()
        machine_rows.assign(self.catalog, self.organization, template, machine)
        return template

    def order_start(self, machine: int) -> OperationRef:
        return machine_rows.start(self.catalog, self.organization, machine)

    def order_stop(self, machine: int, *, force: bool = False) -> OperationRef:
        return machine_rows.stop(self.catalog, self.organization, machine, force=force)

    def order_rebuild(self) -> OperationRef:
        """The recreation of a stopped machine from an image."""
        self.assign(machine := self.machine())
        return self.order_start(machine)

    def order_creation(self, **source: Any) -> OperationRef:
        return machine_rows.create_machine(self.catalog, self.organization, **source)

    def order_image(self, machine: int) -> str:
        """The build of an image of a machine."""
        return machine_rows.make_image(self.catalog, self.organization, machine).build.id

    def machine_row(self, machine: int) -> Machine:
        return machine_rows.machine_row(self.catalog, machine)

    def instance_of(self, machine: int) -> str:
        known = self.machine_row(machine).instance_id
        assert known is not None
        return known

    def status_of(self, machine: int) -> str:
        return machine_rows.machine_of(self.catalog, self.organization, machine).status

    def retired(self) -> set[str]:
        return {each.instance_id for each in self.machine_ledger.retired(timedelta(0))}

    def ref(self, build_id: str) -> BuildRef:
        brief = self.ledger.build_of(build_id)
        assert brief is not None
        return brief.ref

    # Operations

    async def begin(self, ref: OperationRef) -> OperationRef:
        """Starts an operation's workflow."""

        async def has_started() -> bool:
            try:
                await start_operation(self.client, ref)
            except UnavailableError:  # this machine was busy for a second
                return False
            return True

        await self.until(has_started)
        return ref

    def operation(self, ref: OperationRef) -> WorkflowHandle[Any, Any]:
        return self.client.get_workflow_handle(operation_workflow_id(ref.machine_id, ref.number))

    async def cancel(self, ref: OperationRef) -> None:
        """What the Temporal UI and CLI do; returns once the workflow has heard of it."""
        await self.operation(ref).cancel()

        async def has_heard() -> bool:
            kinds = [event.event_type for event in (await self.operation(ref).fetch_history()).events]
            return CANCEL_REQUESTED in kinds and TASK_COMPLETED in kinds[kinds.index(CANCEL_REQUESTED) :]

        await self.until(has_heard)

    async def done(self, ref: OperationRef) -> Machine:
        """The machine, once the workflow has ended well; skips time."""
        async with self.skipping():
            await self.operation(ref).result()
        return self.machine_row(ref.machine_id)

    async def reason(self, ref: OperationRef) -> str:
        """What the workflow fails with; skips time."""
        error = await self.error(ref)
        assert isinstance(error, ApplicationError), error
        return error.message

    async def was_cancelled(self, ref: OperationRef) -> Machine:
        """The machine, once the workflow has ended as Cancelled; skips time."""
        error = await self.error(ref)
        assert isinstance(error, CancelledError), error
        return self.machine_row(ref.machine_id)

    async def error(self, ref: OperationRef) -> BaseException | None:
        """What the workflow ends in; skips time."""
        try:
            await self.done(ref)
        except WorkflowFailureError as error:
            return error.cause
        raise AssertionError("it ended well")

    async def says(self, ref: OperationRef, text: str) -> None:
        """Returns once the workflow shows this to operators."""

        async def is_shown() -> bool:
            return text in await self.details_of(self.operation(ref))

        await self.until(is_shown)

    async def waits_for_ec2(self, ref: OperationRef) -> None:
        """Returns once a worker is waiting for the new instance to run."""
        await self.says(ref, "waiting until")
        await self.asked("instances", self.machines.calls["instances"] + 2)

    async def asked(self, call: str, times: int = 1) -> None:
        """Returns once EC2 was asked so often."""

        async def is_asked() -> bool:
            return self.machines.calls[call] >= times

        await self.until(is_asked)

    # House-keeping

    def make_operation_older(self, ref: OperationRef) -> None:
        then = datetime.now(UTC) - LONG_AGO
        machine_rows.rewrite_machine(self.catalog, ref.machine_id, operation_at=then)

    async def keep_house(self, rounds: int = 2) -> None:
        """Lets so many whole rounds pass, each with a sweep."""
        await start_house_keeping(self.client, EVERY_ROUND)
        wanted = self.finished["sweep-machines"] + rounds

        async def have_passed() -> bool:
            return self.finished["sweep-machines"] >= wanted

        await self.until(have_passed)

    async def dispatch(self) -> None:
        """One round of the dispatcher."""
        await Dispatcher(self.ledger, self.client, EVERY_ROUND, machines=self.machine_ledger).round()

    # Workers

    @asynccontextmanager
    async def machinist(self, name: str = "worker-1") -> AsyncIterator[None]:
        """A worker for what is done to machines. Leaving the block stops it as SIGTERM would."""
        steps = MachineActivities(self._machine_parts())
        snapshots = SnapshotActivities(self._snapshot_parts(name))
        worker = Worker(
            self.client,
            task_queue=MACHINES_QUEUE,
            activities=[
                *(steps.claim, steps.find_source, steps.launch, steps.adopt, steps.power, steps.abandon),
                *(steps.end_retired, snapshots.build),
            ],
            interceptors=[self.gate, ErrorInterceptor()],
            graceful_shutdown_timeout=GRACEFUL,
            max_heartbeat_throttle_interval=THROTTLE,
        )
        async with worker:
            yield

    def _machine_parts(self) -> MachineParts:
        shelf = SoftwareCatalogue.load(PROJECT_ROOT / "packer" / "software.yaml")
        return MachineParts(
            ledger=self.machine_ledger, cloud=self.machines, shelf=shelf, capacity_delay=self.capacity_delay
        )

    def _snapshot_parts(self, name: str) -> SnapshotParts:
        return SnapshotParts(
            ledger=self.ledger,
            logs=self.logs,
            terms=AttemptTerms(limit=self.limit, lease=HEARTBEAT_TIMEOUT * 0.8, grace=timedelta(seconds=5)),
            holder=name,
            client=self.client,
            cloud=self.cloud,
            machines=self.machines,
            name_prefix="kiln",
        )

    @asynccontextmanager
    async def workers(self) -> AsyncIterator[None]:
        """All that machines need."""
        async with self.control(), self.machinist():
            yield
