"""organization-images: the machines that images are made of and assigned to."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from kiln.models import FriendlyStatus
from kiln.naming import operation_workflow_id
from support.api_server import RunningApi, settings_for
from support.dev_temporal import DevTemporal, running_temporal
from support.organization import OrganizationTenant, refused
from support.tenants import on_both_databases

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
REGIONS = ("us-east-1", "eu-central-1")
STATES = {
    "stopped": "off",
    "running": "ready",
    "pending": "turning_on",
    "stopping": "turning_off",
    "shutting-down": "turning_off",
    "terminated": "off",
}


@pytest.fixture(scope="module")
def own_temporal() -> Iterator[DevTemporal]:
    """Machines' ids are small numbers, which those of other catalogs have as well."""
    with running_temporal() as server:
        yield server


@pytest.fixture(scope="module")
def sqlite_api(tmp_path_factory: pytest.TempPathFactory, own_temporal: DevTemporal) -> Iterator[RunningApi]:
    with RunningApi(settings_for(tmp_path_factory.mktemp("api"), own_temporal.port, regions=REGIONS)) as api:
        yield api


@pytest.fixture
def tenant(api: RunningApi) -> Iterator[OrganizationTenant]:
    """An organization of this test's own."""
    tenant = OrganizationTenant(api)
    yield tenant
    tenant.close()


def names(page: dict[str, Any]) -> list[str]:
    """The machines' names on a page."""
    return [machine["attributes"]["name"] for machine in page["machines"]]


def workflow_type(temporal: DevTemporal, machine_id: int, number: int) -> str:
    """The type of the workflow that Temporal has for a machine's operation."""
    handle = temporal.client.get_workflow_handle(operation_workflow_id(machine_id, number))
    return temporal.run(handle.describe()).workflow_type


@on_both_databases
def test_a_machine(tenant: OrganizationTenant) -> None:
    """Every attribute of the contract, alone and in the list alike."""
    machine_id = tenant.new_machine(disk_gib=75, region="eu-central-1", name="Studio")
    shown = tenant.get(f"/machines/{machine_id}")
    listed = tenant.get("/machines")
    assert listed == {"machines": [shown], "count": 1, "page": 1, "next_page": None}
    attributes = shown["attributes"]
    assert TIME.fullmatch(attributes.pop("created_at"))
    assert TIME.fullmatch(attributes.pop("updated_at"))
    assert shown == {
        "id": str(machine_id),
        "type": "machine",
        "attributes": {
            "id": machine_id,
            "name": "Studio",
            "region": "eu-central-1",
            "friendly_status": "off",
            "disk_size": 75,
            "machine_type": "t3.medium",
            "assigned_image_id": None,
            "assigned_image_name": None,
        },
    }


@on_both_databases
def test_the_list_is_narrowed(tenant: OrganizationTenant) -> None:
    """By a part of the name and by statuses, several joined with commas; an unknown one matches nothing."""
    for state in STATES:
        tenant.new_machine(state, name=f"{state} 1%")
    queries = {
        "q=STOP": ["stopped 1%", "stopping 1%"],
        "q=%25": [f"{state} 1%" for state in STATES],
        "q=s%25": [],
        "status=off": ["stopped 1%", "terminated 1%"],
        "status=ready,turning_on": ["running 1%", "pending 1%"],
        "status=ready,nothing": ["running 1%"],
        "status=nothing": [],
        "status=,": [],
        "status=off&q=term": ["terminated 1%"],
        "colour=red&per_page=1&page=2": ["running 1%"],
    }
    found = {query: tenant.get(f"/machines?{query}") for query in queries}
    assert {query: names(page) for query, page in found.items()} == queries
    assert {query: page["count"] for query, page in found.items() if "page" not in query} == {
        query: len(expected) for query, expected in queries.items() if "page" not in query
    }


@on_both_databases
def test_statuses(tenant: OrganizationTenant) -> None:
    """What EC2 says, unless something is being done to the machine; each is found by its own filter."""
    made = {tenant.new_machine(state): status for state, status in STATES.items()}
    for operation, status in (
        ("create", "creating"),
        ("rebuild", "installing"),
        ("start", "turning_on"),
        ("stop", "turning_off"),
    ):
        machine_id = tenant.new_machine("running")
        tenant.rewrite_machine(machine_id, operation=operation)
        made[machine_id] = status
    for status in FriendlyStatus:
        page = tenant.get(f"/machines?status={status}")
        wanted = [machine_id for machine_id, expected in made.items() if expected == status]
        assert [machine["attributes"]["id"] for machine in page["machines"]] == sorted(wanted)


def test_machines_of_a_base_image(tenant: OrganizationTenant, own_temporal: DevTemporal) -> None:
    """Without a word, one machine of the newest base image, of the server's own sizes; its workflow is started."""
    answer = tenant.post("/machines")
    (machine,) = answer["machines"]
    attributes = machine["attributes"]
    assert answer["count"] == 1
    assert attributes["name"] == f"Machine #{machine['id']}"
    assert (attributes["friendly_status"], attributes["assigned_image_id"]) == ("creating", None)
    assert (attributes["disk_size"], attributes["machine_type"]) == (30, "t3.medium")
    assert tenant.machine_row(attributes["id"]).base_image_id == tenant.base_image_id
    assert tenant.machine(attributes["id"]) == attributes
    assert workflow_type(own_temporal, attributes["id"], 1) == "rebuild-machine"


@on_both_databases
def test_several_machines_of_an_image(tenant: OrganizationTenant) -> None:
    """Numbered, in the image's region and at least of its size; what the contract does not know is ignored."""
    image_id = tenant.new_image()
    body = {
        "name": "ẞ" * 253,
        "quantity": 2,
        "machine_type": "m7i.large",
        "image_id": image_id,
        "plan_id": 3,
        "permissions": {"a": 1},
    }
    answer = tenant.post("/machines", body)
    assert names(answer) == [f"{body['name']} 1", f"{body['name']} 2"]
    for machine in answer["machines"]:
        attributes = machine["attributes"]
        assert (attributes["assigned_image_id"], attributes["machine_type"]) == (image_id, "m7i.large")
        assert (attributes["region"], attributes["disk_size"]) == ("us-east-1", 30)
    assert tenant.get("/machines")["machines"] == answer["machines"]


def test_machines_of_software(tenant: OrganizationTenant) -> None:
    """An image is made for them in their region, which the list of images shows; it is theirs."""
    base = tenant.api.parts.software.newest_base
    program = next(each for each in tenant.api.parts.software.programs if base.id in each.bases)
    body = {"software_ids": [program.id], "quantity": 2, "region": "eu-central-1", "disk_size": 500}
    machines = tenant.post("/machines", body)["machines"]
    (image,) = tenant.get("/images")["images"]
    assert image["attributes"]["softwares"][0]["attributes"]["name"] == program.name
    row = tenant.row(tenant.build_of(image["attributes"]["id"]))
    assert (row.region, row.api, row.kind) == ("eu-central-1", "organization-images", "machine")
    for machine in machines:
        attributes = machine["attributes"]
        assert (attributes["assigned_image_id"], attributes["disk_size"]) == (image["attributes"]["id"], 500)
        assert (attributes["region"], attributes["friendly_status"]) == ("eu-central-1", "creating")


@on_both_databases
def test_a_repeated_post_makes_no_more_machines(tenant: OrganizationTenant) -> None:
    """Under one idempotency key the answer is the first's."""
    sent = {"Idempotency-Key": "once"}
    first = tenant.post("/machines", {"quantity": 3}, headers=sent)
    assert tenant.post("/machines", {"quantity": 3}, headers=sent) == first
    assert tenant.get("/machines")["count"] == 3


def test_start_and_stop(tenant: OrganizationTenant, own_temporal: DevTemporal) -> None:
    """The machine turns on, and off, and a workflow is started for either; bodies may be missing or hold what is not
    known."""
    off, running = tenant.new_machine(), tenant.new_machine("running")
    assert tenant.post(f"/machines/{off}/start") == {}
    assert tenant.post(f"/machines/{running}/stop", {"gracefully": False, "colour": "red"}) == {}
    assert [tenant.machine(each)["friendly_status"] for each in (off, running)] == ["turning_on", "turning_off"]
    assert tenant.machine_row(running).operation_forced is True
    assert [workflow_type(own_temporal, each, 1) for each in (off, running)] == ["power-machine", "power-machine"]


@on_both_databases
@pytest.mark.parametrize("body", [b"", b"{}", b'{"region": "us-east-1", "machine_type_id": 4}', b'{"region": null}'])
def test_bodies_of_a_start(tenant: OrganizationTenant, body: bytes) -> None:
    """None at all, and what clients of other servers send, without a Content-Type."""
    machine_id = tenant.new_machine()
    assert tenant.post(f"/machines/{machine_id}/start", body) == {}
    assert tenant.machine_row(machine_id).operation == "start"


@on_both_databases
@pytest.mark.parametrize(
    ("body", "forced"), [(b"", False), (b'{"gracefully": true}', False), (b'{"gracefully": false}', True)]
)
def test_bodies_of_a_stop(tenant: OrganizationTenant, body: bytes, forced: bool) -> None:
    """Gracefully, unless the caller says otherwise."""
    machine_id = tenant.new_machine("running")
    assert tenant.post(f"/machines/{machine_id}/stop", body) == {}
    assert tenant.machine_row(machine_id).operation_forced is forced


def test_the_start_after_an_assignment(tenant: OrganizationTenant, own_temporal: DevTemporal) -> None:
    """The machine is recreated: it is installing until the new instance runs."""
    image_id, machine_id = tenant.new_image(), tenant.new_machine()
    tenant.post(f"/images/{image_id}/assign", {"machine_ids": [machine_id]})
    tenant.post(f"/machines/{machine_id}/start")
    assert tenant.machine(machine_id)["friendly_status"] == "installing"
    assert workflow_type(own_temporal, machine_id, 1) == "rebuild-machine"


@pytest.mark.parametrize(
    ("state", "path"),
    [("running", "start"), ("pending", "start"), ("stopping", "start"), ("stopped", "stop"), ("pending", "stop")],
)
def test_a_machine_in_the_wrong_state(tenant: OrganizationTenant, state: str, path: str) -> None:
    """Starting one that is not off, and stopping one that is not ready, is refused and changes nothing."""
    machine_id = tenant.new_machine(state)
    assert refused(tenant.call("POST", f"/machines/{machine_id}/{path}"))[:2] == (400, 400)
    assert tenant.machine_row(machine_id).operation is None


def test_a_machine_without_its_instance(tenant: OrganizationTenant) -> None:
    """It cannot be started, and the refusal says what to do; with an image assigned it can."""
    machine_id = tenant.new_machine("terminated")
    status, code, message = refused(tenant.call("POST", f"/machines/{machine_id}/start"))
    assert (status, code) == (400, 400)
    assert "assign an image" in message
    tenant.post(f"/images/{tenant.new_image()}/assign", {"machine_ids": [machine_id]})
    tenant.post(f"/machines/{machine_id}/start")
    assert tenant.machine(machine_id)["friendly_status"] == "installing"
