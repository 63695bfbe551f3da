"""Temporal is down, or accepts connections and says nothing: the catalog's row holds all the same."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import httpx
import pytest

from api import machine_images
from kiln.catalog import attempts, images
from support.api_server import RunningApi, settings_for
from support.organization import OrganizationTenant
from support.ports import free_ports
from support.rows import new_ami_id
from support.tenants import Tenant

# A second's patience for the call, and a little for everything else.
PROMPT_SECONDS = 2.5
TRIES = 3


@contextmanager
def refusing_port() -> Iterator[int]:
    """Nobody listens there."""
    yield free_ports(1)[0]


@contextmanager
def silent_port() -> Iterator[int]:
    """Connections are taken, and never answered."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        yield listener.getsockname()[1]


@pytest.fixture(scope="module", params=[refusing_port, silent_port], ids=["refusing", "silent"])
def lonely_api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApi]:
    with request.param() as port, RunningApi(settings_for(tmp_path_factory.mktemp("lonely"), port)) as api:
        yield api


@pytest.fixture
def api(lonely_api: RunningApi) -> RunningApi:
    return lonely_api


class Watch:
    """Times calls. What a busy machine adds to one try it hardly adds to all of them; a wait of the server's own is in each."""

    def __init__(self) -> None:
        self.discarded_seconds = 0.0

    def prompt(self, call: Callable[[], httpx.Response]) -> httpx.Response:
        """The answer of a try that took no longer than is allowed; fails if none did."""
        for _ in range(TRIES):
            began = time.monotonic()
            answer = call()
            took = time.monotonic() - began
            if took < PROMPT_SECONDS:
                return answer
            self.discarded_seconds += took
        raise AssertionError(f"{TRIES} tries took {self.discarded_seconds:.1f} s")


@pytest.fixture(autouse=True)
def watch() -> Iterator[Watch]:
    """No request waits for Temporal longer than its patience."""
    watch, began = Watch(), time.monotonic()
    yield watch
    assert time.monotonic() - began - watch.discarded_seconds < 2 * PROMPT_SECONDS


def test_a_submission_is_accepted(tenant: Tenant, watch: Watch) -> None:
    """The row is the order, which the dispatcher brings to Temporal later."""
    answer = watch.prompt(tenant.submit)
    assert (answer.status_code, answer.json()["status"]) == (202, "queued")
    row = tenant.row(answer.json()["build_id"])
    assert (row.status, row.run_id) == ("queued", None)


def test_a_cancel_before_the_start_holds(tenant: Tenant) -> None:
    """No run has the build: it is cancelled at once, and no run will get it."""
    build_id = tenant.submit().json()["build_id"]
    answer = tenant.http.post(f"/api/v1/images/builds/{build_id}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (202, "cancelled")
    with tenant.catalog.transaction() as tx:
        assert attempts.claim(tx, build_id, "a run") is None


def test_a_cancel_of_a_running_build_holds(tenant: Tenant) -> None:
    """The row asks for it, and the builder that renews its lease learns so."""
    build_id = tenant.building()
    answer = tenant.http.post(f"/api/v1/builds/{build_id}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (202, "cancelling")
    with tenant.catalog.transaction() as tx, pytest.raises(attempts.BuildCancelledError):
        attempts.renew(tx, build_id, 1, timedelta(seconds=30))


def test_reads_come_from_the_catalog(tenant: Tenant) -> None:
    """Builds, images and pages are there; progress is not known, and a workflow's page is not said to be gone."""
    build_id = tenant.building()
    for path in (f"/api/v1/images/builds/{build_id}", "/api/v1/images"):
        assert tenant.http.get(path).status_code == 200
    body = tenant.http.get(f"/api/v1/builds/{build_id}").json()
    assert (body["status"], body["progress"]) == ("building", None)
    assert body["workflow_url"].endswith(f"/build-{build_id}")


def test_a_page_of_live_builds_is_prompt(tenant: Tenant, watch: Watch) -> None:
    """All of them wait together."""
    for _ in range(50):
        tenant.queued()
    body = watch.prompt(lambda: tenant.http.get("/api/v1/builds")).json()
    assert [build["progress"] for build in body["builds"]] == [None] * 50


def test_a_deletion_goes_on_in_the_background(tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row says that the image is to go; it is listed no more once that was answered."""
    monkeypatch.setattr(machine_images, "DELETE_PATIENCE", timedelta(seconds=2))
    image_id = new_ami_id()
    build_id = tenant.succeeded(image_id)
    answer = tenant.http.delete(f"/api/v1/images/{image_id}")
    assert (answer.status_code, answer.content) == (202, b"")
    assert tenant.image_of(build_id).status == images.DELETING
    assert tenant.http.get("/api/v1/images").json() == {"images": []}


def test_readiness_names_temporal(api: RunningApi) -> None:
    """And nothing else, since all else is well."""
    answer = api.http.get("/readyz")
    parts = answer.json()["parts"]
    assert (answer.status_code, parts.pop("temporal")) == (503, "does not answer")
    assert {name for name, state in parts.items() if state != "ok"} == {"containers"}  # this server has no registry
    assert answer.headers["Retry-After"] == "5"


def test_probes_and_metrics_are_there(api: RunningApi) -> None:
    """The process is alive, and counts."""
    assert api.http.get("/healthz").status_code == api.http.get("/metrics").status_code == 200


def test_machines_are_ordered(api: RunningApi) -> None:
    """Their rows are the orders as well."""
    tenant = OrganizationTenant(api)
    machine_id = tenant.new_machine()
    (created,) = tenant.post("/machines")["machines"]
    tenant.post(f"/machines/{machine_id}/start")
    statuses = [tenant.machine(each)["friendly_status"] for each in (created["attributes"]["id"], machine_id)]
    assert statuses == ["creating", "turning_on"]
    tenant.close()
