"""The contract kiln: builds of every kind through one lens, but for their log (see test_log_stream.py)."""

import re
import time
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update

from kiln.catalog.tables import Build
from kiln.naming import build_workflow_id
from support.dev_temporal import DevTemporal
from support.rows import make_older, new_ami_id, rewrite
from support.tenants import Tenant, error, on_both_databases

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
NOT_FOUND = error("build_not_found", "no build of this organization has this id")
BAD_ID = error("invalid_request", "build_id: must be a UUID")
BAD_CURSOR = error("invalid_request", "cursor: must be the next_cursor of an earlier page")
PAST_THE_PATIENCE = 2.5

pytestmark = on_both_databases


def shown(tenant: Tenant, build_id: str) -> dict[str, Any]:
    answer = tenant.http.get(f"/api/v1/builds/{build_id}")
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def cancelled(tenant: Tenant, build_id: str) -> dict[str, Any]:
    answer = tenant.http.post(f"/api/v1/builds/{build_id}/cancel")
    assert answer.status_code == 202, answer.text
    body: dict[str, Any] = answer.json()
    return body


def iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def expected(tenant: Tenant, build_id: str, **changes: Any) -> dict[str, Any]:
    """Every key that a build has, as its row says."""
    row = tenant.row(build_id)
    body = {
        "id": build_id,
        "kind": "machine",
        "api": "machine-images",
        "status": row.status,
        "image": None,
        "spec": {
            "provider": "codex",
            "region": "us-east-1",
            "instance_type": "t3.medium",
            "template_source": "builtin://default-ec2",
            "variables": {},
            "secret_variables": [],
            "tags": {},
        },
        "error": None,
        "attempt": row.attempt,
        "workflow_id": f"build-{build_id}",
        "workflow_url": None,
        "created_by": row.created_by,
        "created_at": iso(row.created_at),
        "started_at": iso(row.started_at),
        "completed_at": iso(row.completed_at),
        "progress": None,
        "simulated": True,
    }
    return {**body, **changes}


def without_wait(body: dict[str, Any]) -> dict[str, Any]:
    """The body less `queued_seconds`, which grows while it is looked at."""
    assert isinstance(body["queued_seconds"], float)
    return {name: value for name, value in body.items() if name != "queued_seconds"}


def test_a_queued_build(tenant: Tenant) -> None:
    """Every key of the contract, null unless it is known."""
    build_id = tenant.queued()
    assert without_wait(shown(tenant, build_id)) == expected(tenant, build_id, status="queued", attempt=0)


def test_a_building_build(tenant: Tenant) -> None:
    """The first attempt's tool runs."""
    build_id = tenant.building()
    body = shown(tenant, build_id)
    assert TIME.fullmatch(body["started_at"])
    assert without_wait(body) == expected(tenant, build_id, status="building", attempt=1)


def test_a_succeeded_build(tenant: Tenant) -> None:
    """Its image, with the size of its disk in bytes."""
    image_id = new_ami_id()
    build_id = tenant.succeeded(image_id, region="eu-central-1")
    body = shown(tenant, build_id)
    assert (body["status"], body["error"], body["progress"]) == ("succeeded", None, None)
    assert TIME.fullmatch(body["completed_at"])
    assert body["image"] == {
        "kind": "ami",
        "reference": image_id,
        "ami_id": image_id,
        "digest": None,
        "region": "eu-central-1",
        "platform": "linux/amd64",
        "size_bytes": 8 * 1024**3,
        "simulated": True,
    }


def test_a_failed_build(tenant: Tenant) -> None:
    """The error has a code and the tool's own words."""
    build_id = tenant.failed("no space left on device")
    body = shown(tenant, build_id)
    assert (body["status"], body["error"]) == ("failed", {"code": "tool_failed", "message": "no space left on device"})


def test_a_build_that_timed_out(tenant: Tenant) -> None:
    """Kiln's own word for it, as status and as code."""
    message = "Packer build timed out after 1800 seconds"
    body = shown(tenant, tenant.failed(message, timed_out=True))
    assert (body["status"], body["error"]) == ("timed_out", {"code": "timed_out", "message": message})


def test_an_image_that_is_gone_says_why(tenant: Tenant) -> None:
    """The build stays listed, and its image's state is told."""
    build_id = tenant.succeeded()
    tenant.mark_gone(build_id, "the simulated EC2 no longer has it")
    image = shown(tenant, build_id)["image"]
    assert (image["state"], image["state_reason"]) == ("gone", "the simulated EC2 no longer has it")


def test_the_spec_is_what_was_asked_less_secrets(tenant: Tenant) -> None:
    """A secret variable's name stays, its value is nowhere in the answer."""
    body = {
        "provider": "gemini",
        "variables": {"npm_token": "s3cr3t-value", "extra_packages": "ripgrep"},
        "tags": {"team": "platform"},
    }
    build_id = tenant.submit(body).json()["build_id"]
    answer = tenant.http.get(f"/api/v1/builds/{build_id}")
    assert answer.json()["spec"] == {
        "provider": "gemini",
        "region": "us-east-1",
        "instance_type": "t3.medium",
        "template_source": "builtin://default-ec2",
        "variables": {"extra_packages": "ripgrep"},
        "secret_variables": ["npm_token"],
        "tags": {"team": "platform"},
    }
    assert "s3cr3t-value" not in answer.text + tenant.http.get("/api/v1/builds").text


def test_the_creator_is_the_key(tenant: Tenant) -> None:
    """By the id under which the operator lists it, not by the key itself."""
    body = shown(tenant, tenant.submit().json()["build_id"])
    assert uuid.UUID(body["created_by"])
    assert tenant.key not in str(body)


def test_how_long_a_build_waited(tenant: Tenant) -> None:
    """From its creation to its tool's start, or to its end, or to now."""
    waiting, built, dropped = tenant.queued(), tenant.building(), tenant.queued()
    cancelled(tenant, dropped)
    for build_id, column in ((built, "started_at"), (dropped, "completed_at")):
        created = tenant.row(build_id).created_at
        rewrite(tenant.catalog, build_id, **{column: created + timedelta(seconds=42.5)})
    make_older(tenant.catalog, waiting, timedelta(seconds=60))
    assert shown(tenant, built)["queued_seconds"] == shown(tenant, dropped)["queued_seconds"] == 42.5
    assert 60 <= shown(tenant, waiting)["queued_seconds"] < 65


def test_the_workflows_page(tenant: Tenant, temporal: DevTemporal) -> None:
    """Its address in the Temporal UI while Temporal has the workflow, null before and after."""
    build_id = tenant.submit().json()["build_id"]
    url = f"http://127.0.0.1:8233/namespaces/default/workflows/build-{build_id}"
    assert shown(tenant, build_id)["workflow_url"] == url
    assert cancelled(tenant, build_id)["workflow_url"] == url
    assert shown(tenant, tenant.queued())["workflow_url"] is None
    assert shown(tenant, tenant.succeeded())["workflow_url"] is None


def test_no_worker_no_progress(tenant: Tenant) -> None:
    """`progress` is null when no worker answers within a second."""
    build_id = tenant.submit().json()["build_id"]
    began = time.monotonic()
    assert shown(tenant, build_id)["progress"] is None
    assert time.monotonic() - began < PAST_THE_PATIENCE


def test_builds_of_every_api_are_shown(tenant: Tenant) -> None:
    """kiln shows all, with `api` naming the contract."""
    build_id = tenant.queued()
    with tenant.catalog.transaction() as tx:
        tx.execute(update(Build).where(Build.id == build_id).values(api="cloud-builds"))
    assert shown(tenant, build_id)["api"] == "cloud-builds"


@pytest.mark.parametrize("bad", ["1", "not-a-uuid", "550e8400e29b41d4a716446655440000", "%00", "%F0%9F%94%A5"])
def test_a_bad_uuid_is_a_422(tenant: Tenant, bad: str) -> None:
    """What is no UUID is malformed, in every call that takes one."""
    for method, suffix in (("GET", ""), ("POST", "/cancel"), ("GET", "/logs")):
        answer = tenant.http.request(method, f"/api/v1/builds/{bad}{suffix}")
        assert (answer.status_code, answer.json()) == (422, BAD_ID)


def test_what_is_not_the_organizations_own_is_a_404(tenant: Tenant, neighbour: Tenant) -> None:
    """Another organization's build answers exactly as an unknown one, in every call."""
    foreign = neighbour.building()
    for build_id in (str(uuid.uuid4()), foreign):
        for method, suffix in (("GET", ""), ("POST", "/cancel"), ("GET", "/logs")):
            answer = tenant.http.request(method, f"/api/v1/builds/{build_id}{suffix}")
            assert (answer.status_code, answer.json()) == (404, NOT_FOUND)
    assert neighbour.row(foreign).cancel_requested_at is None


def test_a_waiting_build_is_cancelled_at_once(tenant: Tenant) -> None:
    """What no run has claimed has nothing to clean up."""
    body = cancelled(tenant, tenant.queued())
    assert (body["status"], body["error"], body["progress"]) == ("cancelled", None, None)
    assert TIME.fullmatch(body["completed_at"])


def test_a_running_build_is_cancelling_until_nothing_is_left(tenant: Tenant) -> None:
    """Repeating the call changes nothing, nor does one after the end."""
    build_id = tenant.building()
    bodies = [cancelled(tenant, build_id), cancelled(tenant, build_id), shown(tenant, build_id)]
    assert [body["status"] for body in bodies] == ["cancelling"] * 3
    tenant.end_cancelled(build_id)
    ended = shown(tenant, build_id)
    assert (ended["status"], cancelled(tenant, build_id)) == ("cancelled", ended)


def test_a_cancel_after_the_end_changes_nothing(tenant: Tenant) -> None:
    """An ended build stays as it ended."""
    for build_id in (tenant.succeeded(), tenant.failed("no"), tenant.failed("late", timed_out=True)):
        before = shown(tenant, build_id)
        assert cancelled(tenant, build_id) == before == shown(tenant, build_id)


def test_a_workflow_id_is_the_builds(tenant: Tenant) -> None:
    """Other services signal and query a build under this id."""
    build_id = tenant.queued()
    assert shown(tenant, build_id)["workflow_id"] == build_workflow_id(build_id) == f"build-{build_id}"
