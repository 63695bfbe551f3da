"""GET /api/v1/images and DELETE /api/v1/images/{image_id}."""

import re
import time
import uuid
from collections.abc import Collection
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from api import machine_images
from kiln.catalog import images
from kiln.catalog.tables import Image
from kiln.naming import delete_workflow_id
from support.api_server import RunningApi, settings_for
from support.dev_temporal import DevTemporal
from support.parallel import Pending
from support.processes import eventually
from support.rows import new_ami_id, rewrite
from support.tenants import Tenant, error, on_both_databases

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
NOT_FOUND = error("image_not_found", "no image of this organization has this id")

pytestmark = on_both_databases


def listed(tenant: Tenant, **query: str) -> list[dict[str, Any]]:
    answer = tenant.http.get("/api/v1/images", params=query)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert set(body) == {"images"}
    rows: list[dict[str, Any]] = body["images"]
    return rows


def ids(rows: list[dict[str, Any]]) -> list[str]:
    return [row["image_id"] for row in rows]


def delete(tenant: Tenant, image_id: str) -> httpx.Response:
    return tenant.http.delete(f"/api/v1/images/{image_id}")


def finish_deletion(tenant: Tenant, build_id: str, kept: Collection[str] = ()) -> None:
    """What the deletion's workflow does, once the deletion has begun."""
    image = tenant.image_of(build_id)
    assert eventually(lambda: tenant.image_of(build_id).status == images.DELETING)
    with tenant.catalog.transaction() as tx:
        images.finish_deletion(tx, image.id, kept)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deletion that is not done at once goes on in the background."""
    monkeypatch.setattr(machine_images, "DELETE_PATIENCE", timedelta(seconds=0.3))


def test_an_organization_without_images(tenant: Tenant, neighbour: Tenant) -> None:
    """Another organization's images, and builds without one, are not listed."""
    neighbour.succeeded()
    tenant.queued()
    tenant.building()
    tenant.failed("no")
    assert listed(tenant) == []


def test_a_finished_image(tenant: Tenant) -> None:
    """Every key of the contract, and the mark of the simulation."""
    image_id = new_ami_id()
    build_id = tenant.succeeded(image_id, provider="gemini", region="eu-central-1")
    row = listed(tenant)[0]
    assert TIME.fullmatch(row.pop("created_at"))
    assert row == {
        "image_id": image_id,
        "provider": "gemini",
        "region": "eu-central-1",
        "status": "available",
        "build_id": build_id,
        "simulated": True,
    }


def test_an_ami_that_ec2_is_making_is_pending(tenant: Tenant) -> None:
    """It is listed from the moment that EC2 has given it an id."""
    image_id = new_ami_id()
    build_id = tenant.building(pending_image=image_id)
    row = listed(tenant)[0]
    assert TIME.fullmatch(row.pop("created_at"))
    assert row == {
        "image_id": image_id,
        "provider": "codex",
        "region": "us-east-1",
        "status": "pending",
        "build_id": build_id,
        "simulated": True,
    }


def test_the_newest_image_comes_first(tenant: Tenant) -> None:
    """Pending and finished images stand in one order of time."""
    names = [new_ami_id() for _ in range(4)]
    made = [
        tenant.building(pending_image=names[0]),
        tenant.succeeded(names[1]),
        tenant.building(pending_image=names[2]),
        tenant.succeeded(names[3]),
    ]
    for age, build_id in enumerate(reversed(made)):
        moment = tenant.row(build_id).created_at - timedelta(minutes=age)
        rewrite(tenant.catalog, build_id, started_at=moment)
        with tenant.catalog.transaction() as tx:
            tx.execute(update(Image).where(Image.build_id == build_id).values(created_at=moment))
    assert ids(listed(tenant)) == names[::-1]


def test_filters(tenant: Tenant) -> None:
    """By region and provider, alone and together, over pending and finished images alike."""
    first, second, third = new_ami_id(), new_ami_id(), new_ami_id()
    tenant.succeeded(first, provider="codex", region="us-east-1")
    tenant.succeeded(second, provider="codex", region="eu-central-1")
    tenant.building(pending_image=third, provider="gemini", region="eu-central-1")
    assert ids(listed(tenant, region="us-east-1")) == [first]
    assert set(ids(listed(tenant, region="eu-central-1"))) == {second, third}
    assert ids(listed(tenant, provider="gemini")) == [third]
    assert ids(listed(tenant, provider="codex", region="eu-central-1")) == [second]
    assert listed(tenant, provider="nobody") == listed(tenant, region="mars-1") == []


def test_an_empty_filter_is_none(tenant: Tenant) -> None:
    """What a form leaves empty narrows nothing."""
    tenant.succeeded()
    assert len(listed(tenant, region="", provider="")) == 1


def test_unknown_query_parameters_are_ignored(tenant: Tenant) -> None:
    """A parameter that nobody knows narrows nothing."""
    tenant.succeeded()
    assert len(listed(tenant, colour="red", cursor="x")) == 1


@pytest.mark.parametrize("query", ["offset=0", "limit=10", "region=us-east-1&limit=1"])
def test_a_paged_listing_is_of_container_images(tenant: Tenant, query: str) -> None:
    """`offset` or `limit` ask for container images, whatever else is asked for: no AMI is among them."""
    tenant.succeeded()
    answer = tenant.http.get(f"/api/v1/images?{query}")
    assert (answer.status_code, answer.json()["data"], answer.json()["totalCount"]) == (200, [], 0)


@pytest.mark.parametrize("name", ["region", "provider"])
def test_a_nul_in_a_filter_is_a_422(tenant: Tenant, name: str) -> None:
    """No database compares with such text."""
    answer = tenant.http.get(f"/api/v1/images?{name}=a%00b")
    message = f"{name}: must not hold a NUL character"
    assert (answer.status_code, answer.json()) == (422, error("invalid_request", message))


@pytest.mark.parametrize("value", ["%ff", "%ed%a0%80", "'; DROP TABLE images; --", "%F0%9F%94%A5", "x" * 20_000])
def test_a_filter_may_hold_anything_else(tenant: Tenant, value: str) -> None:
    """What is not there is not found."""
    tenant.succeeded()
    assert tenant.http.get(f"/api/v1/images?region={value}").json() == {"images": []}


def test_an_image_that_is_gone_is_not_listed(tenant: Tenant) -> None:
    """What EC2 no longer has is gone from the list."""
    build_id = tenant.succeeded()
    tenant.mark_gone(build_id, "deregistered in EC2 by somebody else than Kiln")
    assert listed(tenant) == []


def test_another_apis_image_is_not_listed(tenant: Tenant) -> None:
    """machine-images shows what was made through it, and deletes nothing else."""
    build_id = tenant.succeeded()
    with tenant.catalog.transaction() as tx:
        tx.execute(update(Image).where(Image.build_id == build_id).values(api="organization-images"))
    answer = delete(tenant, tenant.image_of(build_id).reference)
    assert (listed(tenant), answer.status_code, answer.json()) == ([], 404, NOT_FOUND)


def test_a_deletion_answers_once_all_is_gone(tenant: Tenant) -> None:
    """204 with no body; while it lasts, the image is listed as being deregistered."""
    image_id = new_ami_id()
    build_id = tenant.succeeded(image_id)
    pending = Pending(lambda: delete(tenant, image_id))
    assert eventually(lambda: tenant.image_of(build_id).status == images.DELETING)
    assert [row["status"] for row in listed(tenant)] == ["deregistering"]
    assert pending.is_waiting(0.2)
    finish_deletion(tenant, build_id)
    answer = pending.result()
    assert (answer.status_code, answer.content) == (204, b"")
    assert "Kiln-Kept-Snapshots" not in answer.headers
    assert listed(tenant) == []


def test_a_deletion_is_a_workflow(tenant: Tenant, temporal: DevTemporal, impatient: None) -> None:
    """It is seen through by Temporal, whatever becomes of the API."""
    build_id = tenant.succeeded()
    delete(tenant, tenant.image_of(build_id).reference)
    handle = temporal.client.get_workflow_handle(delete_workflow_id(tenant.image_of(build_id).id))
    assert temporal.run(handle.describe()).workflow_type == "delete-image"


def test_snapshots_that_are_kept_are_reported(tenant: Tenant) -> None:
    """A snapshot that somebody else's AMI uses stays: the answer and the build's record name it."""
    image_id = new_ami_id()
    build_id = tenant.succeeded(image_id)
    pending = Pending(lambda: delete(tenant, image_id))
    finish_deletion(tenant, build_id, ["snap-2", "snap-1"])
    answer = pending.result()
    assert (answer.status_code, answer.headers["Kiln-Kept-Snapshots"]) == (204, "snap-1, snap-2")
    image = tenant.http.get(f"/api/v1/builds/{build_id}").json()["image"]
    assert (image["state"], image["kept_snapshots"]) == ("deleted", ["snap-1", "snap-2"])


def test_a_repeated_deletion_is_a_404(tenant: Tenant) -> None:
    """While the first one runs, and after it."""
    image_id = new_ami_id()
    build_id = tenant.succeeded(image_id)
    pending = Pending(lambda: delete(tenant, image_id))
    assert eventually(lambda: tenant.image_of(build_id).status == images.DELETING)
    during = delete(tenant, image_id)
    finish_deletion(tenant, build_id)
    assert pending.result().status_code == 204
    after = delete(tenant, image_id)
    assert (during.status_code, during.json()) == (after.status_code, after.json()) == (404, NOT_FOUND)


def test_a_deletion_that_lasts_goes_on_in_the_background(tenant: Tenant, impatient: None) -> None:
    """202 with no body, after which the image is not listed; repeating the call is a 404."""
    image_id = new_ami_id()
    tenant.succeeded(image_id)
    began = time.monotonic()
    answer = delete(tenant, image_id)
    assert time.monotonic() - began >= 0.3
    assert (answer.status_code, answer.content) == (202, b"")
    assert listed(tenant) == []
    assert delete(tenant, image_id).status_code == 404


def test_a_stopping_server_leaves_a_deletion_to_the_background(
    tmp_path: Path, temporal: DevTemporal, api: RunningApi
) -> None:
    """Whoever waits for it is answered at once."""
    database = api.settings.catalog_url
    with RunningApi(settings_for(tmp_path, temporal.port, catalog_url=database)) as stopping:
        tenant = Tenant(stopping)
        build_id = tenant.succeeded()
        pending = Pending(lambda: delete(tenant, tenant.image_of(build_id).reference))
        assert eventually(lambda: tenant.image_of(build_id).status == images.DELETING)
        stopping.stop()
        assert pending.result().status_code == 202
        tenant.close()
    assert stopping.stopped_in < 2


def test_an_image_that_is_being_built_is_a_409(tenant: Tenant, neighbour: Tenant) -> None:
    """Its own organization is told; to another one it is unknown."""
    image_id = new_ami_id()
    build_id = tenant.building(pending_image=image_id)
    answer = delete(tenant, image_id)
    assert (answer.status_code, answer.json()) == (409, error("image_building", f"{image_id} is still being built"))
    assert tenant.row(build_id).pending_image == image_id
    answer = delete(neighbour, image_id)
    assert (answer.status_code, answer.json()) == (404, NOT_FOUND)


def test_what_is_not_the_organizations_own_is_a_404(tenant: Tenant, neighbour: Tenant) -> None:
    """Kiln deletes nothing that it does not own: unknown, another's, gone, and a failed build's are one answer."""
    foreign = neighbour.succeeded()
    gone = tenant.succeeded()
    tenant.mark_gone(gone, "gone")
    failed = new_ami_id()
    build_id = tenant.building(pending_image=failed)
    tenant.end_cancelled(build_id)
    known = [neighbour.image_of(foreign).reference, tenant.image_of(gone).reference, failed]
    for image_id in ("ami-0123456789abcdef0", "ami-doesnotexist", *known):
        answer = delete(tenant, image_id)
        assert (answer.status_code, answer.json()) == (404, NOT_FOUND)
    assert neighbour.image_of(foreign).status == images.AVAILABLE


@pytest.mark.parametrize(
    "bad", ["x", "snap-0abcdef1234567890", "ami-", "ami-%00", "ami-%C3%BC", str(uuid.UUID(int=1)), "ami-" + "a" * 5000]
)
def test_a_malformed_id_is_a_422(tenant: Tenant, bad: str) -> None:
    """What cannot be an AMI's id is the caller's mistake."""
    answer = delete(tenant, bad)
    message = "image_id: must be the id of an AMI, such as ami-0abcdef1234567890"
    assert (answer.status_code, answer.json()) == (422, error("invalid_request", message))
