"""organization-images: an organization's images as its clients see them come, change and go."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from api.workstations import Workstation
from kiln.catalog import images
from kiln.catalog.attempts import requeue_lapsed
from kiln.naming import build_workflow_id
from kiln.ports import BaseImage, Program
from support.api_server import RunningApi
from support.dev_temporal import DevTemporal
from support.organization import OrganizationTenant, refused
from support.rows import rewrite
from support.tenants import on_both_databases

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
BASE = BaseImage(1, "Debian", 8.0, "2023-06-10", "1", "debian-*", "/dev/xvda", "admin", "2", "ubuntu-*")


@pytest.fixture
def tenant(api: RunningApi) -> Iterator[OrganizationTenant]:
    """An organization of this test's own."""
    tenant = OrganizationTenant(api)
    yield tenant
    tenant.close()


def ids(page: dict[str, Any]) -> list[int]:
    """The images' ids on a page."""
    return [image["attributes"]["id"] for image in page["images"]]


@on_both_databases
def test_an_image_of_a_machine(tenant: OrganizationTenant) -> None:
    """It is pending, as large as the machine's disk, and the machine is installing meanwhile."""
    machine_id = tenant.new_machine(disk_gib=75)
    answer = tenant.post("/images", {"machine_id": machine_id, "name": "My Custom Template"})
    attributes = answer["attributes"]
    image_id = attributes["id"]
    created, updated = attributes.pop("created_at"), attributes.pop("updated_at")
    assert TIME.fullmatch(created)
    assert created == updated
    assert abs((datetime.fromisoformat(created) - datetime.now(UTC)).total_seconds()) < 10
    assert answer == {
        "id": str(image_id),
        "type": "image",
        "attributes": {
            "id": image_id,
            "name": "My Custom Template",
            "size": 75,
            "status": "pending",
            "source": "seat",
            "softwares": [],
        },
    }
    assert tenant.machine(machine_id)["friendly_status"] == "installing"


def test_its_build_is_kilns_too(tenant: OrganizationTenant, temporal: DevTemporal) -> None:
    """The build stands in `/api/v1/builds`, marked as simulated, and Temporal has its workflow."""
    machine_id = tenant.new_machine()
    image_id = int(tenant.post("/images", {"machine_id": machine_id})["id"])
    build_id = tenant.build_of(image_id)
    shown = tenant.http.get(f"/api/v1/builds/{build_id}").json()
    spec = {"machine_id": machine_id, "instance_id": tenant.machine_row(machine_id).instance_id, "region": "us-east-1"}
    assert (shown["kind"], shown["api"], shown["spec"]) == ("snapshot", "organization-images", spec)
    assert shown["simulated"] is True
    workflow = temporal.run(temporal.client.get_workflow_handle(build_workflow_id(build_id)).describe())
    assert workflow.workflow_type == "build-image"


def test_machine_images_knows_nothing_of_it(tenant: OrganizationTenant) -> None:
    """Neither the build nor the AMI is there under the other contract, which cannot delete it."""
    image_id = tenant.new_image()
    build_id = tenant.build_of(image_id)
    ami_id = tenant.image_of(build_id).reference
    assert tenant.http.get(f"/api/v1/images/builds/{build_id}").status_code == 404
    assert tenant.http.get("/api/v1/images").json() == {"images": []}
    assert tenant.http.delete(f"/api/v1/images/{ami_id}").status_code == 404
    assert tenant.image(image_id)["status"] == "available"


def test_an_image_of_software(tenant: OrganizationTenant) -> None:
    """It lists each program once, in the order that was asked for; a base image is chosen where none is named."""
    base = tenant.api.parts.software.newest_base
    first, second = [program for program in tenant.api.parts.software.programs if base.id in program.bases][:2]
    answer = tenant.post("/images/install", {"software_ids": [second.id, first.id, second.id], "base_image_id": None})
    attributes = answer["attributes"]
    assert (attributes["status"], attributes["source"]) == ("pending", "pre_installation")
    assert attributes["name"] == f"Template #{answer['id']}"
    assert attributes["softwares"] == [
        {"id": str(each.id), "type": "software", "attributes": {"id": each.id, "name": each.name, "size": each.size}}
        for each in (second, first)
    ]
    chosen = Workstation(base, (second, first))
    assert attributes["size"] == chosen.size_gb
    spec = tenant.row(tenant.build_of(attributes["id"])).spec
    assert (spec["template"], spec["region"]) == ("kiln://workstation", "us-east-1")
    assert spec["variables"]["software"] == f"{second.script},{first.script}"
    assert spec["variables"]["volume_size_gb"] == str(chosen.size_gb)


@pytest.mark.parametrize(
    ("base", "sizes", "size_gb"), [(18.6, (1.4,), 21), (8.0, (), 9), (20.0, (), 21), (100.0, (0.1,), 106), (0.2, (), 1)]
)
def test_an_images_size(base: float, sizes: tuple[float, ...], size_gb: int) -> None:
    """Base image and software, and 5 % more: exactly, and rounded up."""
    programs = tuple(Program(number, "a", size, "a", frozenset({1})) for number, size in enumerate(sizes))
    assert Workstation(BaseImage(**{**BASE.__dict__, "size": base}), programs).size_gb == size_gb


@pytest.mark.parametrize("name", ["x", "🎨" * 30, "Büro für Entwürfe", " spaced ", "%_"])
def test_names(tenant: OrganizationTenant, name: str) -> None:
    """Up to 30 characters of any script, kept as they were sent."""
    image_id = tenant.new_image("pending", base_image_id=tenant.base_image_id, name=name)
    assert tenant.image(image_id)["name"] == name


@on_both_databases
def test_the_list(tenant: OrganizationTenant) -> None:
    """Newest first, in pages; the count is of all, and the last page has no next."""
    made = [tenant.new_image("pending") for _ in range(3)]
    assert tenant.get("/images")["images"][0] == tenant.get(f"/images/{made[-1]}")
    first, second = tenant.get("/images?per_page=2"), tenant.get("/images?per_page=2&page=2&colour=red")
    assert (ids(first), ids(second)) == (made[:0:-1], made[:1])
    assert [(page["count"], page["page"], page["next_page"]) for page in (first, second)] == [(3, 1, 2), (3, 2, None)]
    page = tenant.get(f"/images?page={10**15}")
    assert page == {"images": [], "count": 3, "page": 10**15, "next_page": None}


@on_both_databases
def test_search(tenant: OrganizationTenant) -> None:
    """`q` is a part of the name as it stands, in any case; the count is of what it finds."""
    for name in ("Straße 100%", "a_b", "axb"):
        tenant.new_image("pending", base_image_id=tenant.base_image_id, name=name)
    found = {q: tenant.get(f"/images?q={q}") for q in ("STRASSE", "100%25", "A_B", "%25", "nothing", "x" * 60_000)}
    names = {q: [image["attributes"]["name"] for image in page["images"]] for q, page in found.items()}
    assert list(names.values()) == [["Straße 100%"], ["Straße 100%"], ["a_b"], ["Straße 100%"], [], []]
    assert [page["count"] for page in found.values()] == [1, 1, 1, 1, 0, 0]


def test_a_status_follows_the_build(tenant: OrganizationTenant) -> None:
    """Pending, building while its tool runs, pending again when the attempt was lost; then how it ended."""
    image_id = tenant.new_image("building")
    seen = [tenant.image(image_id)]
    rewrite(tenant.catalog, tenant.build_of(image_id), lease_until=datetime(2026, 1, 1, tzinfo=UTC))
    with tenant.catalog.transaction() as tx:
        requeue_lapsed(tx)
    seen.append(tenant.image(image_id))
    rewrite(tenant.catalog, tenant.build_of(image_id), status="building")
    tenant.succeed(tenant.build_of(image_id))
    seen.append(tenant.image(image_id))
    assert [image["status"] for image in seen] == ["building", "pending", "available"]
    assert seen[0]["created_at"] < seen[0]["updated_at"] < seen[2]["updated_at"]
    assert tenant.image(tenant.new_image("failed"))["status"] == "failed"
    tenant.mark_gone(tenant.build_of(image_id), "not in EC2 any more")
    assert tenant.image(image_id)["status"] == "failed"


def test_a_cancelled_build_reads_as_before_and_then_failed(tenant: OrganizationTenant) -> None:
    """Until nothing of it is left, the image is what it was."""
    image_id = tenant.new_image("building")
    build_id = tenant.build_of(image_id)
    assert tenant.http.post(f"/api/v1/builds/{build_id}/cancel").json()["status"] == "cancelling"
    assert tenant.image(image_id)["status"] == "building"
    tenant.end_cancelled(build_id)
    assert tenant.image(image_id)["status"] == "failed"


@on_both_databases
def test_assignment(tenant: OrganizationTenant) -> None:
    """Every machine shows the image, which waits for its next start; a later one takes its place."""
    some, other = [tenant.new_machine(name=name) for name in ("off", "other")], tenant.new_machine("running")
    first, second = tenant.new_image(), tenant.new_image()
    assert tenant.post(f"/images/{first}/assign", {"machine_ids": [*some, other, other]}) == {}
    assert tenant.post(f"/images/{second}/assign", {"machine_ids": some[:1]}) == {}
    shown = [tenant.machine(machine_id) for machine_id in (*some, other)]
    assert [machine["assigned_image_id"] for machine in shown] == [second, first, first]
    assert [machine["friendly_status"] for machine in shown] == ["off", "off", "ready"]
    assert shown[0]["assigned_image_name"] == f"Template #{second}"


@pytest.mark.parametrize("how", ["json", "bytes"])
def test_an_assignment_is_all_or_none(tenant: OrganizationTenant, how: str) -> None:
    """One machine that stands against it, and none is assigned; a Content-Type is not needed."""
    image_id, good, small = tenant.new_image(), tenant.new_machine(), tenant.new_machine(disk_gib=1)
    body: Any = {"machine_ids": [good, small]}
    sent = body if how == "json" else str(body).replace("'", '"').encode()
    assert refused(tenant.call("POST", f"/images/{image_id}/assign", sent))[:2] == (400, 4510)
    assert tenant.machine(good)["assigned_image_id"] is None


@on_both_databases
def test_deleting_one_that_waits_cancels_its_build(tenant: OrganizationTenant) -> None:
    """It is gone at once, and the machine that it was to be made of is off again."""
    machine_id = tenant.new_machine()
    image_id = int(tenant.post("/images", {"machine_id": machine_id})["id"])
    assert tenant.delete(f"/images/{image_id}") == {}
    assert tenant.row(tenant.build_of(image_id)).status == "cancelled"
    assert refused(tenant.call("GET", f"/images/{image_id}"))[:2] == (404, 404)
    assert tenant.get("/images")["count"] == 0
    assert tenant.machine(machine_id)["friendly_status"] == "off"


@on_both_databases
def test_deleting_one_that_is_available(tenant: OrganizationTenant) -> None:
    """It is gone at once; its AMI is being deleted behind it, and machines have it no more."""
    image_id, machine_id = tenant.new_image(), tenant.new_machine()
    tenant.post(f"/images/{image_id}/assign", {"machine_ids": [machine_id]})
    tenant.rewrite_machine(machine_id, built_assignment=1)
    assert tenant.delete(f"/images/{image_id}") == {}
    assert tenant.image_of(tenant.build_of(image_id)).status == images.DELETING
    assert tenant.get("/images")["images"] == []
    assert tenant.machine(machine_id)["assigned_image_id"] is None
    assert refused(tenant.call("DELETE", f"/images/{image_id}"))[:2] == (404, 404)


def test_deleting_one_that_failed(tenant: OrganizationTenant) -> None:
    """Nothing is left to be cleaned up."""
    image_id = tenant.new_image("failed")
    assert tenant.delete(f"/images/{image_id}") == {}
    assert tenant.get("/images")["count"] == 0


@on_both_databases
def test_a_repeated_post_makes_one_image(tenant: OrganizationTenant) -> None:
    """Under one idempotency key the answer is the first's; with another body, or on another path, it is refused."""
    sent, body = {"Idempotency-Key": "once"}, {"machine_id": tenant.new_machine()}
    first = tenant.post("/images", body, headers=sent)
    before = tenant.kept()
    assert tenant.post("/images", body, headers=sent) == first
    for path, other in (("/images", {**body, "name": "x"}), ("/machines", body)):
        assert refused(tenant.call("POST", path, other, headers=sent))[:2] == (409, 409)
    assert tenant.kept() == before


def test_what_can_be_installed(tenant: OrganizationTenant) -> None:
    """Programs and base images, each flat and nested."""
    body = tenant.get("/software")
    shelf = tenant.api.parts.software
    for name, kind, entries in (
        ("software", "software", shelf.programs),
        ("base_images", "base_image", shelf.base_images),
    ):
        assert body[name]
        assert body[name] == [
            {
                "id": entry.id,
                "type": kind,
                "name": entry.name,
                "size": entry.size,
                "attributes": {"id": entry.id, "name": entry.name, "size": entry.size},
            }
            for entry in entries
        ]
