"""organization-images: every refusal of the contract, in its order, and that nothing of what was refused is kept."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from api.workstations import choose
from kiln.adapters.software import SoftwareCatalogue
from kiln.errors import InvalidRequestError
from kiln.ports import BaseImage, Program
from support.api_server import RunningApi
from support.organization import OrganizationTenant, refused
from support.signing import NOTHING, ORGANIZATION_API
from support.tenants import on_both_databases

UNKNOWN = 2**31 - 2
Call = tuple[str, str, Any]


@pytest.fixture
def tenant(api: RunningApi) -> Iterator[OrganizationTenant]:
    """An organization of this test's own."""
    tenant = OrganizationTenant(api)
    yield tenant
    tenant.close()


@pytest.fixture
def other(api: RunningApi) -> Iterator[OrganizationTenant]:
    """Another organization on the same server."""
    other = OrganizationTenant(api)
    yield other
    other.close()


def of_machine(state: str, **columns: Any) -> Callable[[OrganizationTenant], Call]:
    """An image is to be made of a machine in this state."""

    def prepare(tenant: OrganizationTenant) -> Call:
        machine_id = tenant.new_machine(state)
        if columns:
            tenant.rewrite_machine(machine_id, **columns)
        return "POST", "/images", {"machine_id": machine_id}

    return prepare


def of_imaged(tenant: OrganizationTenant) -> Call:
    machine_id = tenant.new_machine()
    tenant.post("/images", {"machine_id": machine_id})
    return "POST", "/images", {"machine_id": machine_id}


def assignment(status: str = "available", **machine: Any) -> Callable[[OrganizationTenant], Call]:
    """An image in this status is to be assigned to a machine."""

    def prepare(tenant: OrganizationTenant) -> Call:
        machine_ids = [tenant.new_machine(**machine)]
        return "POST", f"/images/{tenant.new_image(status)}/assign", {"machine_ids": machine_ids}

    return prepare


def assignment_of(*machine_ids: int) -> Callable[[OrganizationTenant], Call]:
    return lambda tenant: ("POST", f"/images/{tenant.new_image()}/assign", {"machine_ids": list(machine_ids)})


def assignment_to_imaged(tenant: OrganizationTenant) -> Call:
    machine_id = tenant.new_machine()
    tenant.post("/images", {"machine_id": machine_id})
    return "POST", f"/images/{tenant.new_image()}/assign", {"machine_ids": [machine_id]}


def deletion_of_awaited(tenant: OrganizationTenant) -> Call:
    image_id = tenant.new_image()
    tenant.post(f"/images/{image_id}/assign", {"machine_ids": [tenant.new_machine(name="Studio")]})
    return "DELETE", f"/images/{image_id}", NOTHING


def creation(status: str = "available", **fields: Any) -> Callable[[OrganizationTenant], Call]:
    """Machines are to be made from an image in this status."""
    return lambda tenant: ("POST", "/machines", {"image_id": tenant.new_image(status), **fields})


REFUSALS = {
    "no disk to make an image of": (of_machine("terminated"), 4208, "no instance"),
    "no instance at all": (of_machine("stopped", instance_id=None, ec2_state=None), 4208, "no instance"),
    "not stopped": (of_machine("running"), 4209, "is running"),
    "still turning off": (of_machine("stopping"), 4209, "turning off"),
    "an image of it is being made": (of_imaged, 4212, ""),
    "the machine is being created": (of_machine("stopped", operation="create", instance_id=None), 4212, "created"),
    "pending": (assignment("pending"), 4210, "pending"),
    "building": (assignment("building"), 4210, "building"),
    "failed": (assignment("failed"), 4210, "failed"),
    "no machines": (assignment_of(), 4211, "machine_ids"),
    "an unknown machine": (assignment_of(UNKNOWN), 4211, "machine_ids"),
    "ids beyond any row's": (assignment_of(-1, 0, 2**31, 2**70), 4211, "machine_ids"),
    "more ids than a statement holds": (assignment_of(*range(10**6, 10**6 + 40_000)), 4211, "machine_ids"),
    "assigned to one of which an image is pending": (assignment_to_imaged, 4214, "being made"),
    "another region": (assignment(region="eu-central-1"), 4214, "eu-central-1"),
    "too small a disk": (assignment(disk_gib=1), 4510, "GB"),
    "deleted while it is building": (
        lambda tenant: ("DELETE", f"/images/{tenant.new_image('building')}", NOTHING),
        4213,
        "",
    ),
    "deleted while it is awaited": (deletion_of_awaited, 400, "Studio"),
    "machines of a pending image": (creation("pending"), 4210, "pending"),
    "machines too small for their image": (creation(disk_size=1), 4510, "disk_size"),
    "machines in another region": (creation(region="eu-central-1"), 400, "region: "),
    "machines too small for their base": (lambda _: ("POST", "/machines", {"disk_size": 1}), 4510, "disk_size"),
    "image and software": (creation(software_ids=[1]), 400, "image_id: "),
    "image and base image": (creation(base_image_id=1), 400, "image_id: "),
    "a start in another region": (
        lambda tenant: ("POST", f"/machines/{tenant.new_machine()}/start", {"region": "eu-central-1"}),
        400,
        "region: ",
    ),
}


@on_both_databases
@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal(tenant: OrganizationTenant, name: str) -> None:
    """The code of the contract in the body of a true 400, a message that says which, and no row for it."""
    prepare, code, word = REFUSALS[name]
    method, path, body = prepare(tenant)
    before = tenant.kept()
    status, shown, message = refused(tenant.call(method, path, body))
    assert (status, shown) == (400, code)
    assert word in message
    assert tenant.kept() == before


BAD_FORMS = [
    ("/images", {}, "machine_id"),
    ("/images", NOTHING, "machine_id"),
    ("/images", b"[]", "body"),
    ("/images", b"{", "body"),
    ("/images", b'{"machine_id": 7, "name": "\\ud800"}', "body"),
    ("/images", {"machine_id": None}, "machine_id"),
    ("/images", {"machine_id": "7"}, "machine_id"),
    ("/images", {"machine_id": True}, "machine_id"),
    ("/images", {"machine_id": 7.0}, "machine_id"),
    ("/images", {"machine_id": 7, "colour": "red"}, "colour"),
    ("/images", {"machine_id": 7, "name": ""}, "name"),
    ("/images", {"machine_id": 7, "name": "  "}, "name"),
    ("/images", {"machine_id": 7, "name": "a\nb"}, "name"),
    ("/images", {"machine_id": 7, "name": "a\0"}, "name"),
    ("/images", {"machine_id": 7, "name": "x" * 31}, "name"),
    ("/images", {"machine_id": 7, "name": 7}, "name"),
    ("/images/install", NOTHING, "software_ids"),
    ("/images/install", {"software_ids": []}, "software_ids"),
    ("/images/install", {"software_ids": None, "base_image_id": None}, "software_ids"),
    ("/images/install", {"software_ids": 1}, "software_ids"),
    ("/images/install", {"software_ids": ["1"]}, "software_ids.0"),
    ("/images/install", {"software_ids": [True]}, "software_ids.0"),
    ("/images/install", {"software_ids": [None]}, "software_ids.0"),
    ("/images/install", {"software_ids": [10**6]}, "software_ids"),
    ("/images/install", {"software_ids": [10**6], "base_image_id": 10**6}, "software_ids"),
    ("/images/install", {"base_image_id": "1"}, "base_image_id"),
    ("/images/install", {"base_image_id": 1, "image_id": 1}, "image_id"),
    (f"/images/{UNKNOWN}/assign", {}, "machine_ids"),
    (f"/images/{UNKNOWN}/assign", {"machine_ids": 7}, "machine_ids"),
    (f"/images/{UNKNOWN}/assign", {"machine_ids": ["7"]}, "machine_ids.0"),
    (f"/images/{UNKNOWN}/assign", {"machine_ids": [7, True]}, "machine_ids.1"),
    (f"/images/{UNKNOWN}/assign", {"machine_ids": [7], "force": True}, "force"),
    ("/machines", {"name": "\t"}, "name"),
    ("/machines", {"name": "x" * 256}, "name"),
    ("/machines", {"name": "x" * 254, "quantity": 2}, "name"),
    ("/machines", {"quantity": 0}, "quantity"),
    ("/machines", {"quantity": 51}, "quantity"),
    ("/machines", {"quantity": True}, "quantity"),
    ("/machines", {"machine_type": "huge"}, "machine_type"),
    ("/machines", {"disk_size": 0}, "disk_size"),
    ("/machines", {"disk_size": 16385}, "disk_size"),
    ("/machines", {"region": "mars-1"}, "region"),
    ("/machines", {"software_ids": [10**6]}, "software_ids"),
    ("/machines", {"image_id": "1"}, "image_id"),
    (f"/machines/{UNKNOWN}/start", {"region": 7}, "region"),
    (f"/machines/{UNKNOWN}/start", b"7", "body"),
    (f"/machines/{UNKNOWN}/stop", {"gracefully": "yes"}, "gracefully"),
]


def test_bad_forms(tenant: OrganizationTenant) -> None:
    """A 400 before anything is looked up, whose message begins with the field; no row is kept."""
    before = tenant.kept()
    for path, body, field in BAD_FORMS:
        status, code, message = refused(tenant.call("POST", path, body))
        assert (status, code, message.partition(": ")[0]) == (400, 400, field), (path, body, message)
    assert tenant.kept() == before


def test_software_that_does_not_fit() -> None:
    """The refusal names the software and the base image that it does not install on."""
    bases = [BaseImage(number, f"Base {number}", 8, "2024-01-01", "", "", "", "", "", "") for number in (1, 2)]
    shelf = SoftwareCatalogue(bases, [Program(7, "Blender", 1.1, "blender", frozenset({1}))])
    assert choose(shelf, [7], 1).programs
    with pytest.raises(InvalidRequestError, match=r"^software_ids: Blender \(7\) does not install on Base 2$"):
        choose(shelf, [7], None)


@pytest.mark.parametrize(
    "query", ["page=0", "page=-1", "page=x", "page=", "per_page=0", "per_page=101", "per_page=10000"]
)
@pytest.mark.parametrize("path", ["/images", "/machines"])
def test_pages_out_of_range(tenant: OrganizationTenant, path: str, query: str) -> None:
    """Refused rather than clamped, by the parameter's name."""
    status, code, message = refused(tenant.call("GET", f"{path}?{query}"))
    assert (status, code) == (400, 400)
    assert message.startswith(f"{query.partition('=')[0]}: ")


@on_both_databases
@pytest.mark.parametrize(
    "text", ["x", "1.0", "0", "-1", "+1", "01", "%00", str(2**31), str(2**63), "9" * 400, str(UNKNOWN)]
)
def test_ids_of_nobody(tenant: OrganizationTenant, text: str) -> None:
    """What is no id, what no database counts to, and what nobody has is the same 404."""
    machine_ids = {"machine_ids": [1]}
    calls: list[Call] = [
        ("GET", f"/images/{text}", NOTHING),
        ("DELETE", f"/images/{text}", NOTHING),
        ("POST", f"/images/{text}/assign", machine_ids),
        ("GET", f"/machines/{text}", NOTHING),
        ("POST", f"/machines/{text}/start", NOTHING),
        ("POST", f"/machines/{text}/stop", NOTHING),
    ]
    for method, path, body in calls:
        assert refused(tenant.call(method, path, body))[:2] == (404, 404), (method, path)


@on_both_databases
@pytest.mark.parametrize("number", [-1, 0, UNKNOWN, 2**31, 2**63, 10**100])
def test_ids_of_nobody_in_bodies(tenant: OrganizationTenant, number: int) -> None:
    """Likewise."""
    for path, field in (
        ("/images", "machine_id"),
        ("/images/install", "base_image_id"),
        ("/machines", "image_id"),
        ("/machines", "base_image_id"),
    ):
        before = tenant.kept()
        assert refused(tenant.call("POST", path, {field: number}))[:2] == (404, 404), field
        assert tenant.kept() == before


def test_numbers_of_any_length(tenant: OrganizationTenant) -> None:
    """A number of thousands of digits is unknown like another one, and is not repeated whole."""
    number, assign = 10**4000, f"/images/{tenant.new_image()}/assign"
    software = refused(tenant.call("POST", "/images/install", {"software_ids": [number]}))
    machines = refused(tenant.call("POST", assign, {"machine_ids": [number]}))
    assert [software[:2], machines[:2]] == [(400, 400), (400, 4211)]
    assert max(len(software[2]), len(machines[2])) < 200


def test_what_is_another_organizations(tenant: OrganizationTenant, other: OrganizationTenant) -> None:
    """Its ids answer as unknown ones do, word for word, and its lists do not show them."""
    image_id, machine_id = other.new_image(), other.new_machine()
    own = tenant.new_image()
    for method, path, body in (
        ("GET", "/images/{image}", NOTHING),
        ("DELETE", "/images/{image}", NOTHING),
        ("POST", "/images/{image}/assign", {"machine_ids": [1]}),
        ("GET", "/machines/{machine}", NOTHING),
        ("POST", "/machines/{machine}/start", NOTHING),
        ("POST", "/machines/{machine}/stop", NOTHING),
    ):
        theirs = tenant.call(method, path.format(image=image_id, machine=machine_id), body)
        nobodys = tenant.call(method, path.format(image=UNKNOWN, machine=UNKNOWN), body)
        assert refused(theirs) == refused(nobodys)
        assert theirs.status_code == 404
    assert refused(tenant.call("POST", "/images", {"machine_id": machine_id}))[:2] == (404, 404)
    assert refused(tenant.call("POST", "/machines", {"image_id": image_id}))[:2] == (404, 404)
    assert refused(tenant.call("POST", f"/images/{own}/assign", {"machine_ids": [machine_id]}))[:2] == (400, 4211)
    assert (tenant.get("/images")["count"], tenant.get("/machines")["count"]) == (1, 0)


def test_the_order_of_refusals(tenant: OrganizationTenant) -> None:
    """401, 4710, 400, 404, and then each call's own codes."""
    image_id = tenant.new_image("building")
    assign = f"/images/{image_id}/assign"
    with tenant.new_signed("organization:read") as reader:
        unscoped = reader.post(f"{ORGANIZATION_API}{assign}", b"{", headers={})
        unsigned = reader.post(f"{ORGANIZATION_API}{assign}", b"{", authorization="HMAC a:b:c:d")
    seen = [refused(unsigned), refused(unscoped)]
    seen.append(refused(tenant.call("POST", f"/images/{UNKNOWN}/assign", {"machine_ids": "x"})))
    seen.append(refused(tenant.call("POST", f"/images/{UNKNOWN}/assign", {"machine_ids": []})))
    seen.append(refused(tenant.call("POST", assign, {"machine_ids": []})))
    tenant.succeed(tenant.build_of(image_id))
    imaged = tenant.new_machine(disk_gib=1)
    tenant.post("/images", {"machine_id": imaged})
    seen.append(refused(tenant.call("POST", assign, {"machine_ids": [imaged, UNKNOWN]})))
    seen.append(refused(tenant.call("POST", assign, {"machine_ids": [tenant.new_machine(disk_gib=1), imaged]})))
    codes = [(401, 401), (403, 4710), (400, 400), (404, 404), (400, 4210), (400, 4211), (400, 4214)]
    assert [(status, code) for status, code, _ in seen] == codes


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/images"),
        ("POST", "/images/install"),
        ("POST", "/images/1/assign"),
        ("DELETE", "/images/1"),
        ("POST", "/machines"),
        ("POST", "/machines/1/start"),
        ("POST", "/machines/1/stop"),
    ],
)
def test_readers_change_nothing(tenant: OrganizationTenant, method: str, path: str) -> None:
    """A key that only reads is refused with 4710, and a key that writes reads as well."""
    before = tenant.kept()
    with tenant.new_signed("organization:read") as reader, tenant.new_signed("organization:write") as writer:
        assert refused(reader.request(method, ORGANIZATION_API + path))[:2] == (403, 4710)
        lists = [client.get(ORGANIZATION_API + "/images").status_code for client in (reader, writer)]
    assert lists == [200, 200]
    assert tenant.kept() == {**before, "api_keys": before["api_keys"] + 2}


def test_keys_of_other_contracts(tenant: OrganizationTenant) -> None:
    """A key for builds reads nothing here."""
    with tenant.new_signed("builds:write", "pods:write") as builder:
        for path in ("/images", "/images/1", "/machines", "/machines/1", "/software"):
            assert refused(builder.get(ORGANIZATION_API + path))[:2] == (403, 4710)
