"""GET /api/v1/images/builds/{build_id} and its cancel call: a build in every state of its life."""

import re
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update

from kiln.catalog import attempts
from kiln.catalog.tables import Build
from kiln.models import BuildKind, BuildRef
from kiln.naming import build_workflow_id
from support.dev_temporal import DevTemporal
from support.rows import new_ami_id
from support.tenants import Tenant, error, on_both_databases
from workflows.start import start_build

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
NOT_FOUND = error("build_not_found", "no build of this organization has this id")
BAD_ID = error("invalid_request", "build_id: must be a UUID")
BAD_IDS = [
    "1",
    "not-a-uuid",
    "550e8400e29b41d4a716446655440000",
    "{550e8400-e29b-41d4-a716-446655440000}",
    "%00",
    "%ff",
]

pytestmark = on_both_databases


def shown(tenant: Tenant, build_id: str) -> dict[str, Any]:
    answer = tenant.http.get(f"/api/v1/images/builds/{build_id}")
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def cancelled(tenant: Tenant, build_id: str) -> dict[str, Any]:
    answer = tenant.http.post(f"/api/v1/images/builds/{build_id}/cancel")
    assert answer.status_code == 202, answer.text
    body: dict[str, Any] = answer.json()
    return body


def expected(build_id: str, **changes: Any) -> dict[str, Any]:
    """Every key that a build has, null unless it is known."""
    unknown = dict.fromkeys(("image_id", "started_at", "completed_at", "error"))
    body = {"build_id": build_id, "status": "queued", "provider": "codex", "region": "us-east-1", "simulated": True}
    return {**body, **unknown, **changes}


def iso(moment: datetime | None) -> str:
    assert moment is not None
    return moment.astimezone(UTC).replace(microsecond=0, tzinfo=None).isoformat() + "Z"


def test_a_queued_build(tenant: Tenant) -> None:
    """Packer is not running yet, and nothing else is known."""
    build_id = tenant.queued()
    assert shown(tenant, build_id) == expected(build_id)


def test_a_building_build(tenant: Tenant) -> None:
    """Packer runs, since the time that is said."""
    build_id = tenant.building()
    body = shown(tenant, build_id)
    assert TIME.fullmatch(body["started_at"])
    assert body == expected(build_id, status="building", started_at=iso(tenant.row(build_id).started_at))


def test_a_pending_ami_is_not_the_builds_image_yet(tenant: Tenant) -> None:
    """`image_id` is null until the image exists."""
    build_id = tenant.building(pending_image=new_ami_id())
    assert shown(tenant, build_id)["image_id"] is None


def test_an_attempt_that_waits_is_queued_again(tenant: Tenant) -> None:
    """Once its worker is lost, a build waits: it keeps the time at which Packer first ran."""
    build_id = tenant.building()
    with tenant.catalog.transaction() as tx:
        attempts.release(tx, build_id, 1)
        attempts.begin(tx, build_id, "another worker", timedelta(seconds=30))
    started_at = iso(tenant.row(build_id).started_at)
    assert shown(tenant, build_id) == expected(build_id, status="queued", started_at=started_at)


def test_a_succeeded_build(tenant: Tenant) -> None:
    """The AMI, and when it was done."""
    image_id = new_ami_id()
    build_id = tenant.succeeded(image_id)
    row = tenant.row(build_id)
    times = {"started_at": iso(row.started_at), "completed_at": iso(row.completed_at)}
    assert shown(tenant, build_id) == expected(build_id, status="succeeded", image_id=image_id, **times)


def test_a_failed_build(tenant: Tenant) -> None:
    """The tool's own last error line."""
    message = "Build 'amazon-ebs.agent' errored: Script exited with non-zero exit status: 1."
    build_id = tenant.failed(message)
    body = shown(tenant, build_id)
    row = tenant.row(build_id)
    times = {"started_at": iso(row.started_at), "completed_at": iso(row.completed_at)}
    assert body == expected(build_id, status="failed", error=message, **times)


def test_a_build_that_timed_out_has_failed(tenant: Tenant) -> None:
    """machine-images has no word of its own for a time-out; the error says it exactly."""
    build_id = tenant.failed("Packer build timed out after 1800 seconds", timed_out=True)
    body = shown(tenant, build_id)
    assert (body["status"], body["error"]) == ("failed", "Packer build timed out after 1800 seconds")


def test_the_image_of_a_finished_build_may_be_gone(tenant: Tenant) -> None:
    """The build stays, keeps its image's id, and says why the image is gone."""
    build_id = tenant.succeeded()
    tenant.mark_gone(build_id, "the simulated EC2 no longer has it")
    body = shown(tenant, build_id)
    assert (body["status"], body["image_gone"]) == ("succeeded", "the simulated EC2 no longer has it")
    assert body["image_id"] == tenant.image_of(build_id).reference


def test_an_id_has_no_case(tenant: Tenant) -> None:
    """A UUID in capitals is the same UUID (RFC 9562)."""
    build_id = tenant.queued()
    assert shown(tenant, build_id.upper())["build_id"] == build_id


@pytest.mark.parametrize("bad", BAD_IDS)
def test_a_bad_uuid_is_a_422(tenant: Tenant, bad: str) -> None:
    """What is no UUID is malformed, in every call that takes one."""
    for method, suffix in (("GET", ""), ("POST", "/cancel"), ("GET", "/logs")):
        answer = tenant.http.request(method, f"/api/v1/images/builds/{bad}{suffix}")
        assert (answer.status_code, answer.json()) == (422, BAD_ID)


def test_what_is_not_the_organizations_own_is_a_404(tenant: Tenant, neighbour: Tenant) -> None:
    """Another organization's build answers exactly as an unknown one, in every call."""
    for build_id in (str(uuid.uuid4()), neighbour.queued(), neighbour.succeeded()):
        for method, suffix in (("GET", ""), ("POST", "/cancel"), ("GET", "/logs")):
            answer = tenant.http.request(method, f"/api/v1/images/builds/{build_id}{suffix}")
            assert (answer.status_code, answer.json()) == (404, NOT_FOUND)


def test_a_neighbours_cancel_changes_nothing(tenant: Tenant, neighbour: Tenant) -> None:
    """A refused cancel leaves the build as it was."""
    build_id = neighbour.building()
    tenant.http.post(f"/api/v1/images/builds/{build_id}/cancel")
    assert neighbour.row(build_id).cancel_requested_at is None


def test_another_apis_build_is_unknown(tenant: Tenant) -> None:
    """machine-images shows what was made through it."""
    build_id = tenant.queued()
    with tenant.catalog.transaction() as tx:
        tx.execute(update(Build).where(Build.id == build_id).values(api="cloud-builds"))
    for method, suffix in (("GET", ""), ("POST", "/cancel"), ("GET", "/logs")):
        answer = tenant.http.request(method, f"/api/v1/images/builds/{build_id}{suffix}")
        assert (answer.status_code, answer.json()) == (404, NOT_FOUND)


def test_a_build_is_cancelled_while_it_waits(tenant: Tenant) -> None:
    """What no run has claimed ends at once, and no run will claim it."""
    build_id = tenant.queued()
    body = cancelled(tenant, build_id)
    assert body == expected(build_id, status="cancelled", completed_at=iso(tenant.row(build_id).completed_at))
    assert shown(tenant, build_id) == body
    with tenant.catalog.transaction() as tx:
        assert attempts.claim(tx, build_id, "a run") is None


def test_a_running_build_reads_as_before_until_nothing_of_it_is_left(tenant: Tenant) -> None:
    """`cancelled` is said only once the cleanup is done."""
    build_id = tenant.building()
    before = shown(tenant, build_id)
    assert cancelled(tenant, build_id) == before
    assert tenant.row(build_id).cancel_requested_at is not None
    tenant.end_cancelled(build_id)
    assert shown(tenant, build_id)["status"] == "cancelled"


def test_the_second_cancel_changes_nothing(tenant: Tenant) -> None:
    """Cancelling twice is a 202 as the first was."""
    build_id = tenant.building()
    first, asked_at = cancelled(tenant, build_id), tenant.row(build_id).cancel_requested_at
    assert cancelled(tenant, build_id) == first
    assert tenant.row(build_id).cancel_requested_at == asked_at


def test_a_cancel_after_the_end_changes_nothing(tenant: Tenant) -> None:
    """An ended build stays as it ended, whatever the end was."""
    waiting = tenant.queued()
    cancelled(tenant, waiting)
    for build_id in (tenant.succeeded(), tenant.failed("no"), tenant.failed("late", timed_out=True), waiting):
        before, row = shown(tenant, build_id), tenant.row(build_id)
        assert cancelled(tenant, build_id) == before == shown(tenant, build_id)
        assert tenant.row(build_id).cancel_requested_at == row.cancel_requested_at


def test_a_cancel_reaches_the_workflow(tenant: Tenant, temporal: DevTemporal) -> None:
    """The run that has the build is asked to cancel itself."""
    build_id = tenant.building()
    ref = BuildRef(build_id=build_id, organization_id=tenant.organization_id, kind=BuildKind.MACHINE)
    temporal.run(start_build(temporal.client, ref))
    cancelled(tenant, build_id)
    history = temporal.run(temporal.client.get_workflow_handle(build_workflow_id(build_id)).fetch_history())
    assert any(event.HasField("workflow_execution_cancel_requested_event_attributes") for event in history.events)
