"""`progress` of a live build: what its own workflow says, beside what Temporal knows of its builder."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from temporalio import activity
from temporalio.worker import Worker

from activities.record import RecordActivities
from kiln.adapters.log_book import StoreLogBook
from kiln.catalog import workers
from kiln.catalog.ledger import CatalogLedger
from kiln.catalog.workers import Presence
from kiln.models import BuilderReport, BuildRef, BuiltImage, Claim
from kiln.naming import CONTROL_QUEUE, PACKER_QUEUE, build_workflow_id
from support.api_server import RunningApi, settings_for
from support.dev_temporal import DevTemporal, running_temporal
from support.processes import eventually
from support.tenants import Tenant
from workflows.build_image import BuildImageWorkflow
from workflows.runner import WORKFLOWS, workflow_runner

LAST_LINE = "==> amazon-ebs.agent: Waiting for instance i-0abcdef1234567890 to become ready"
KEYS = {"phase", "detail", "attempt", "since", "last_line", "waiting_for"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningApi, DevTemporal]]:
    """A stack of this file's own: its workers would carry out every other test's builds as well."""
    with running_temporal() as temporal:
        settings = settings_for(tmp_path_factory.mktemp("progress"), temporal.port)
        with RunningApi(settings) as api:
            yield api, temporal


@pytest.fixture
def api(served: tuple[RunningApi, DevTemporal]) -> RunningApi:
    return served[0]


@pytest.fixture
def control(served: tuple[RunningApi, DevTemporal]) -> Iterator[None]:
    """A worker that carries workflows out, and builds nothing."""
    api, temporal = served
    book = StoreLogBook(api.settings.logs_dsn)
    record = RecordActivities(CatalogLedger(api.catalog, api.parts.sealer, Claim(mine=True)), book)
    with serving(temporal, CONTROL_QUEUE, [record.claim], workflows=WORKFLOWS):
        yield
    book.close()


@contextmanager
def serving(temporal: DevTemporal, queue: str, activities: Sequence[Callable[..., Any]], **more: Any) -> Iterator[None]:
    """A worker on this queue until the block's end."""

    @asynccontextmanager
    async def running() -> AsyncIterator[None]:
        with ThreadPoolExecutor(4) as threads:
            worker = Worker(
                temporal.client,
                task_queue=queue,
                activities=activities,
                activity_executor=threads,
                workflow_runner=workflow_runner(),
                **more,
            )
            async with worker:
                yield

    context = running()
    temporal.run(context.__aenter__())
    try:
        yield
    finally:
        temporal.run(context.__aexit__(None, None, None))


@activity.defn(name="packer-build")
async def a_builder(build: BuildRef) -> BuiltImage:
    """Reports and heartbeats as the Packer activity does, until it is cancelled."""
    info = activity.info()
    assert info.workflow_id is not None
    workflow = activity.client().get_workflow_handle(info.workflow_id)
    report = BuilderReport(phase="building", attempt=1, detail="Packer is running (attempt 1)")
    await workflow.signal(BuildImageWorkflow.builder_report, report)
    while True:
        activity.heartbeat({"phase": "building", "attempt": 1, "last_line": LAST_LINE})
        await asyncio.sleep(0.1)


def progress(tenant: Tenant, build_id: str) -> dict[str, Any]:
    """Once there is some."""
    found: list[dict[str, Any]] = []

    def asked() -> bool:
        body = tenant.http.get(f"/api/v1/builds/{build_id}").json()["progress"]
        found.append(body)
        return body is not None and body["phase"] != "claiming"

    assert eventually(asked), found
    assert set(found[-1]) == KEYS
    return found[-1]


def test_a_build_waits_for_a_builder(tenant: Tenant, control: None) -> None:
    """A queue that no living worker serves is said to be so."""
    found = progress(tenant, tenant.submit().json()["build_id"])
    since = datetime.fromisoformat(found.pop("since"))
    assert abs(datetime.now(UTC) - since) < timedelta(seconds=20)
    assert found == {
        "phase": "waiting",
        "detail": "waiting for a Packer builder",
        "attempt": 0,
        "last_line": None,
        "waiting_for": "waiting for a Packer builder; none is connected",
    }


def test_a_build_waits_for_a_builder_that_is_there(tenant: Tenant, control: None) -> None:
    """A builder that is merely busy is not said to be missing."""
    presence = Presence("builder-1", "packer", (PACKER_QUEUE,), slots=4)
    with tenant.catalog.transaction() as tx:
        workers.note(tx, presence)
    found = progress(tenant, tenant.submit().json()["build_id"])
    with tenant.catalog.transaction() as tx:
        workers.leave(tx, "builder-1")
    assert found["waiting_for"] == "waiting for a Packer builder"


def test_what_a_builder_does(tenant: Tenant, served: tuple[RunningApi, DevTemporal], control: None) -> None:
    """The workflow's word for it, and the last line that the tool printed."""
    build_id = tenant.submit().json()["build_id"]
    with serving(served[1], PACKER_QUEUE, [a_builder]):
        assert eventually(
            lambda: (progress(tenant, build_id)["last_line"], progress(tenant, build_id)["attempt"]) == (LAST_LINE, 1)
        )
        found = progress(tenant, build_id)
        assert (found["phase"], found["detail"]) == ("building", "Packer is running (attempt 1)")
        # The worker stops at once: its activity would wait for a cleanup that nobody carries out here.
        temporal = served[1]
        temporal.run(temporal.client.get_workflow_handle(build_workflow_id(build_id)).terminate())
