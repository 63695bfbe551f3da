"""Kiln's real workflows and activities on a Temporal server, a real catalog and a real log store, with fakes for EC2
and Packer.
"""

import asyncio
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import update
from temporalio import activity
from temporalio.api.enums.v1 import IndexedValueType
from temporalio.api.operatorservice.v1 import AddSearchAttributesRequest
from temporalio.api.sdk.v1 import WorkflowMetadata
from temporalio.client import Client, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError, CancelledError
from temporalio.worker import ActivityInboundInterceptor, ExecuteActivityInput, Interceptor, Worker

from activities.cleanup import CleanupActivities
from activities.deletion import DeletionActivities
from activities.house import HouseActivities
from activities.interceptor import ErrorInterceptor
from activities.machine_house import MachineHouse
from activities.packer import PackerActivities
from activities.packer_attempt import PackerParts, PackerTerms
from activities.pod_house import PodHouse
from activities.pod_record import PodRecord
from activities.record import RecordActivities
from activities.verify import VerifyActivities
from kiln.adapters.log_book import StoreLogBook
from kiln.adapters.logs import LogStore
from kiln.catalog import images
from kiln.catalog.ledger import CatalogLedger
from kiln.catalog.machine_ledger import CatalogMachineLedger
from kiln.catalog.pod_ledger import CatalogPodLedger
from kiln.catalog.session import Catalog
from kiln.catalog.tables import Build, Image
from kiln.errors import UnavailableError
from kiln.models import BuildEnd, BuildRef, BuildStatusView, Claim, ImageRef
from kiln.naming import CONTROL_QUEUE, PACKER_QUEUE, build_workflow_id
from kiln.ports import LogLine
from kiln.sealing import Sealer
from support.fake_machines import FakeMachines
from support.fakes import FakeCloud, FakePackerKit, FakeToolbox
from support.pod_rows import POD_LEASE
from support.rows import REGION, add_build, add_organization, build_row, ref
from support.time_skipping import TimeSkipping
from workflows.build_image import BuildImageWorkflow
from workflows.runner import WORKFLOWS, workflow_runner
from workflows.start import SEARCH_ATTRIBUTES, start_build

POLL_SECONDS = 0.02
PATIENCE_SECONDS = 15.0
CONTROL_THREADS = 8
SECRET_NAME = "api_token"
HEARTBEAT_TIMEOUT = timedelta(seconds=3)
THROTTLE = timedelta(milliseconds=200)
# Above a worker's shutdown: an activity that does not end would hang the test.
GRACEFUL = timedelta(milliseconds=50)

BuildHandle = WorkflowHandle[BuildImageWorkflow, BuildEnd]


async def register_search_attributes(client: Client) -> None:
    """What `kiln.temporal` does at a worker's start; the time-skipping server cannot list them, which comes first."""
    keyword = IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD
    attributes = {key.name: keyword for key in SEARCH_ATTRIBUTES}
    await client.operator_service.add_search_attributes(
        AddSearchAttributesRequest(namespace=client.namespace, search_attributes=attributes)
    )


class Gate(Interceptor):
    """Counts activities by type as they end well, and holds some back then: their work is done, and their workflow does
    not know it yet."""

    def __init__(self) -> None:
        self.finished: Counter[str] = Counter()
        self._held = ""
        self._reached = asyncio.Event()
        self._opened = asyncio.Event()

    def hold(self, activity_type: str) -> None:
        self._held = activity_type

    async def is_reached(self) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await self._reached.wait()

    def open(self) -> None:
        self._held = ""
        self._opened.set()

    async def passes(self, activity_type: str) -> None:
        self.finished[activity_type] += 1
        if activity_type == self._held:
            self._reached.set()
            await self._opened.wait()

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:  # noqa: A002
        return _Gated(next, self)


class _Gated(ActivityInboundInterceptor):
    def __init__(self, next: ActivityInboundInterceptor, gate: Gate) -> None:  # noqa: A002
        super().__init__(next)
        self._gate = gate

    async def execute_activity(self, input: ExecuteActivityInput) -> Any:  # noqa: A002
        result = await super().execute_activity(input)
        await self._gate.passes(activity.info().activity_type)
        return result


class Harness:
    """What a test of the workflows works with. `terms` is how long attempts may take."""

    def __init__(
        self, client: Client, catalog: Catalog, folder: Path, *, skips_time: bool, max_attempts: int = 10
    ) -> None:
        self.client = client
        self._skips_time = skips_time
        self._time = TimeSkipping(client.test_service)
        self.catalog = catalog
        self.sealer = Sealer(Sealer.new_key())
        claim = Claim(
            mine=False, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT.total_seconds(), max_attempts=max_attempts
        )
        self.ledger = CatalogLedger(catalog, self.sealer, claim)
        self.machine_ledger = CatalogMachineLedger(catalog)
        self.pod_ledger = CatalogPodLedger(catalog, self.sealer, POD_LEASE)
        self.organization = add_organization(catalog)
        self.cloud = FakeCloud(self.ledger.installation)
        self.machines = FakeMachines(self.cloud)
        self.tools = FakeToolbox(self.cloud)
        self.gate = Gate()
        self.limit = timedelta(minutes=30)
        self.capacity_delay = timedelta(seconds=1)
        self._log_url = f"sqlite:///{folder / 'logs.db'}"
        self.logs = StoreLogBook(self._log_url)

    def close(self) -> None:
        self._time.close()
        self.logs.close()
        self.catalog.close()

    @property
    def finished(self) -> Counter[str]:
        """How often each light activity has ended well."""
        return self.gate.finished

    # Builds

    def order(self, *, secret: str = "", **spec: Any) -> str:
        """A build's row, which nobody has brought to Temporal yet."""
        secrets = self.sealer.seal({SECRET_NAME: secret}) if secret else None
        return add_build(self.catalog, self.organization, secrets=secrets, **spec)

    async def submit(self, *, secret: str = "", **spec: Any) -> str:
        """A build's row, and its workflow."""
        build_id = self.order(secret=secret, **spec)
        await self.start(build_id)
        return build_id

    async def start(self, build_id: str) -> None:
        await self.until(lambda: self._has_started(build_id))

    async def _has_started(self, build_id: str) -> bool:
        try:
            await start_build(self.client, self.ref(build_id))
        except UnavailableError:  # this machine was busy for a second
            return False
        return True

    def ref(self, build_id: str) -> BuildRef:
        return ref(self.organization, build_id)

    def handle(self, build_id: str) -> BuildHandle:
        return self.client.get_workflow_handle_for(BuildImageWorkflow.run, build_workflow_id(build_id))

    async def end(self, build_id: str) -> BuildEnd:
        """The workflow's result; skips time. Raises WorkflowFailureError."""
        async with self.skipping():
            return await self.handle(build_id).result()

    @asynccontextmanager
    async def skipping(self) -> AsyncIterator[None]:
        """Has the server skip the time in which it has nothing to do but wait; nothing may take long in real time."""
        async with asyncio.timeout(PATIENCE_SECONDS * 2):
            if not self._skips_time:
                yield
                return
            async with self._time.on():
                yield

    async def status(self, build_id: str) -> BuildStatusView:
        return await self.handle(build_id).query(BuildImageWorkflow.status)

    async def details(self, build_id: str) -> str:
        """What the Temporal UI shows as a build's current details."""
        return await self.details_of(self.handle(build_id))

    async def details_of(self, handle: WorkflowHandle[Any, Any]) -> str:
        answer: WorkflowMetadata = await handle.query("__temporal_workflow_metadata", result_type=WorkflowMetadata)
        return answer.current_details

    async def failure(self, build_id: str) -> ApplicationError:
        """The error that the workflow fails with; skips time."""
        try:
            end = await self.end(build_id)
        except WorkflowFailureError as error:
            assert isinstance(error.cause, ApplicationError), error.cause
            return error.cause
        raise AssertionError(f"it did not fail: {end}")

    async def is_cancelled(self, build_id: str) -> None:
        """Returns once the workflow has ended as Cancelled; skips time."""
        try:
            end = await self.end(build_id)
        except WorkflowFailureError as error:
            assert isinstance(error.cause, CancelledError), error.cause
            return
        raise AssertionError(f"it was not cancelled: {end}")

    async def reaches(self, build_id: str, phase: str) -> None:
        """Returns once the workflow says that it is in this phase."""

        async def is_there() -> bool:
            progress = (await self.status(build_id)).progress
            return progress is not None and progress.phase == phase

        await self.until(is_there)

    async def until(self, condition: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Returns once the condition holds. Time passes as it does outside."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not await condition():
            assert time.monotonic() < deadline, "it did not come true in time"
            await asyncio.sleep(POLL_SECONDS)

    def row(self, build_id: str) -> Build:
        return build_row(self.catalog, build_id)

    def image_of(self, build_id: str) -> Image | None:
        with self.catalog.read() as session:
            return images.of_build(session, build_id)

    def published(self, build_id: str) -> ImageRef:
        """The image that this build published, as deletions know it."""
        row = self.image_of(build_id)
        assert row is not None
        return ImageRef(image_id=row.id, organization_id=row.organization_id)

    def begin_deletion(self, image: ImageRef, ago: timedelta = timedelta(0)) -> None:
        """What the API writes when somebody deletes an image."""
        with self.catalog.transaction() as tx:
            assert images.begin_deletion(tx, image.image_id)
            tx.execute(update(Image).where(Image.id == image.image_id).values(deleting_at=datetime.now(UTC) - ago))

    def log(self, build_id: str) -> list[str]:
        """The lines of a build's log."""
        store = LogStore(self._log_url)
        lines = [each.text for each in store.read(build_id, 0, 10_000) if isinstance(each, LogLine)]
        store.close()
        return lines

    # Workers

    @asynccontextmanager
    async def control(self, *, cached_workflows: int = 100) -> AsyncIterator[None]:
        """Workers for workflows and for light activities."""
        async with self.activities(), self.workflows(cached=cached_workflows):
            yield

    def workflows(self, *, cached: int = 100) -> Worker:
        """A worker for workflows alone. With nothing cached each of its tasks replays the history."""
        return Worker(
            self.client,
            task_queue=CONTROL_QUEUE,
            workflows=WORKFLOWS,
            workflow_runner=workflow_runner(),
            interceptors=[ErrorInterceptor()],
            max_cached_workflows=cached,
        )

    @asynccontextmanager
    async def activities(self) -> AsyncIterator[None]:
        """A worker for the light activities alone."""
        with ThreadPoolExecutor(CONTROL_THREADS) as pool:
            worker = Worker(
                self.client,
                task_queue=CONTROL_QUEUE,
                activities=self._light_activities(),
                activity_executor=pool,
                interceptors=[self.gate, ErrorInterceptor()],
                max_concurrent_activities=CONTROL_THREADS,
                max_heartbeat_throttle_interval=THROTTLE,
            )
            async with worker:
                yield

    def _light_activities(self) -> list[Callable[..., Any]]:
        record, verify = RecordActivities(self.ledger, self.logs), VerifyActivities(self.ledger, self.cloud)
        cleanup = CleanupActivities(self.ledger, self.cloud, self.logs, timedelta(0))
        deletion = DeletionActivities(self.ledger, self.cloud)
        house = HouseActivities(
            ledger=self.ledger,
            cloud=self.cloud,
            client=self.client,
            regions=(REGION,),
            sweep_grace=timedelta(0),
        )
        return [
            *(record.claim, record.note_cancel, record.record_end, verify.publish, cleanup.clean_up, deletion.delete),
            *(house.find_lost_builds, house.observe_images, house.sweep),
            *self._machine_house(),
            *self._pods(),
        ]

    def machine_house(self, grace: timedelta = timedelta(0)) -> MachineHouse:
        return MachineHouse(
            ledger=self.machine_ledger,
            cloud=self.machines,
            client=self.client,
            regions=(REGION,),
            settle=timedelta(0),
            grace=grace,
        )

    def _machine_house(self) -> list[Callable[..., Any]]:
        house = self.machine_house()
        return [house.observe, house.find_lost_operations, house.end_retired, house.sweep]

    def pod_house(self) -> PodHouse:
        return PodHouse(self.pod_ledger, self.logs, self.client)

    def _pods(self) -> list[Callable[..., Any]]:
        pods = PodRecord(self.pod_ledger, self.logs)
        return [pods.claim, pods.prompt, pods.terminate, pods.record_end, self.pod_house().look_after]

    @asynccontextmanager
    async def builder(self, name: str = "worker-1") -> AsyncIterator[Worker]:
        """A worker that runs Packer. Leaving the block stops it as SIGTERM would."""
        async with self.builder_of(self.client, name) as worker:
            yield worker

    def builder_of(self, client: Client, name: str) -> Worker:
        parts = PackerParts(
            ledger=self.ledger,
            cloud=self.cloud,
            logs=self.logs,
            tools=self.tools,
            kit=FakePackerKit(self.ledger.installation),
            terms=PackerTerms(
                limit=self.limit,
                lease=HEARTBEAT_TIMEOUT * 0.8,
                grace=timedelta(seconds=5),
                capacity_delay=self.capacity_delay,
            ),
            holder=name,
            client=client,
        )
        return Worker(
            client,
            task_queue=PACKER_QUEUE,
            activities=[PackerActivities(parts).build],
            # One at a time: a worker that freezes then holds no open poll that would swallow the next attempt.
            max_concurrent_activities=1,
            interceptors=[ErrorInterceptor()],
            graceful_shutdown_timeout=GRACEFUL,
            max_heartbeat_throttle_interval=THROTTLE,
        )

    @asynccontextmanager
    async def workers(self) -> AsyncIterator[None]:
        """All that builds need."""
        async with self.control(), self.builder():
            yield


def copied_catalog(original: Path, folder: Path) -> Catalog:
    """A catalog on a copy of a migrated SQLite file."""
    return Catalog(f"sqlite:///{shutil.copy(original, folder / 'catalog.db')}")
