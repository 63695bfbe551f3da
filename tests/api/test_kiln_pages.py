"""The contract kiln: pages of builds, and what they are narrowed to."""

import time
from datetime import UTC, datetime
from typing import Any

import pytest

from support.rows import new_ami_id, rewrite
from support.tenants import Tenant, error, on_both_databases

BAD_CURSOR = error("invalid_request", "cursor: must be the next_cursor of an earlier page")
PAST_THE_PATIENCE = 2.5

pytestmark = on_both_databases


def page(tenant: Tenant, **query: object) -> dict[str, Any]:
    answer = tenant.http.get("/api/v1/builds", params={name: str(value) for name, value in query.items()})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    assert set(body) == {"builds", "next_cursor"}
    return body


def ids(body: dict[str, Any]) -> list[str]:
    return [build["id"] for build in body["builds"]]


def cancel(tenant: Tenant, build_id: str) -> None:
    assert tenant.http.post(f"/api/v1/builds/{build_id}/cancel").status_code == 202


def test_a_page_of_live_builds_waits_no_longer_than_one(tenant: Tenant) -> None:
    """Fifty builds are asked at once."""
    for _ in range(50):
        tenant.submit()
    began = time.monotonic()
    body = page(tenant, limit=50)
    assert time.monotonic() - began < PAST_THE_PATIENCE
    assert [build["progress"] for build in body["builds"]] == [None] * 50
    assert all(build["workflow_url"] for build in body["builds"])


def test_the_newest_build_comes_first(tenant: Tenant) -> None:
    """Without a limit, fifty to a page."""
    made = [tenant.queued() for _ in range(51)]
    body = page(tenant)
    assert ids(body) == made[:0:-1]
    rest = page(tenant, cursor=body["next_cursor"])
    assert (ids(rest), rest["next_cursor"]) == (made[:1], None)


@pytest.mark.parametrize("limit", [1, 2, 3, 6, 7, 500])
def test_pages_hold_every_build_once(tenant: Tenant, limit: int) -> None:
    """Also where several builds came at the same moment."""
    made = [tenant.queued() for _ in range(6)]
    moment = datetime.now(UTC)
    for build_id in made[:4]:
        rewrite(tenant.catalog, build_id, created_at=moment)
    found: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        body = page(tenant, limit=limit, **cursor)
        found += ids(body)
        if body["next_cursor"] is None:
            break
        assert len(body["builds"]) == limit
        cursor = {"cursor": body["next_cursor"]}
    assert sorted(found) == sorted(made)
    assert found == ids(page(tenant))


def test_a_build_that_arrives_meanwhile_is_on_no_later_page(tenant: Tenant) -> None:
    """Pages go on where the last one ended, whatever comes before it."""
    made = [tenant.queued() for _ in range(4)]
    first = page(tenant, limit=2)
    tenant.queued()
    second = page(tenant, limit=2, cursor=first["next_cursor"])
    assert ids(first) + ids(second) == made[::-1]


def test_a_last_full_page_has_no_cursor(tenant: Tenant) -> None:
    """Nobody is sent to an empty page."""
    for _ in range(2):
        tenant.queued()
    assert page(tenant, limit=2)["next_cursor"] is None


def test_filter_by_status(tenant: Tenant) -> None:
    """One status or several; `cancelling` is one, and what is cancelling is neither queued nor building."""
    queued, building, succeeded = tenant.queued(), tenant.building(), tenant.succeeded()
    failed, late, cancelling, dropped = (
        tenant.failed("no"),
        tenant.failed("x", timed_out=True),
        tenant.building(),
        tenant.queued(),
    )
    cancel(tenant, cancelling)
    cancel(tenant, dropped)
    by_status = {
        "queued": queued,
        "building": building,
        "succeeded": succeeded,
        "failed": failed,
        "timed_out": late,
        "cancelling": cancelling,
        "cancelled": dropped,
    }
    for status, build_id in by_status.items():
        assert ids(page(tenant, status=status)) == [build_id]
    assert set(ids(page(tenant, status="queued,cancelling, failed"))) == {queued, cancelling, failed}
    assert set(ids(page(tenant, status=",".join(by_status)))) == set(by_status.values())


def test_an_unknown_name_in_a_filter_matches_nothing(tenant: Tenant) -> None:
    """It takes nothing away from the known ones beside it."""
    build_id = tenant.queued()
    for name in ("status", "kind", "api", "image"):
        assert ids(page(tenant, **{name: "nonsense"})) == []
    assert ids(page(tenant, status="nonsense,queued")) == [build_id]
    assert ids(page(tenant, kind="pod,machine")) == [build_id]


def test_filter_by_kind(tenant: Tenant) -> None:
    """Every build of machine-images is of kind `machine`."""
    build_id = tenant.queued()
    assert ids(page(tenant, kind="machine")) == [build_id]
    assert ids(page(tenant, kind="container,transfer,snapshot,registration")) == []


def test_filter_by_api(tenant: Tenant) -> None:
    """By the contract through which a build came."""
    build_id = tenant.queued()
    rewrite(tenant.catalog, build_id, api="cloud-builds")
    assert ids(page(tenant, api="cloud-builds,pods")) == [build_id]
    assert ids(page(tenant, api="machine-images")) == []


def test_another_organizations_builds_are_not_listed(tenant: Tenant, neighbour: Tenant) -> None:
    """Whatever is asked for."""
    neighbour.queued()
    image = neighbour.image_of(neighbour.succeeded()).reference
    assert ids(page(tenant)) == ids(page(tenant, image=image)) == []


def test_filter_by_image(tenant: Tenant) -> None:
    """By the exact AMI id, one or several, also of an image that is gone."""
    names = [new_ami_id() for _ in range(3)]
    made = [tenant.succeeded(name) for name in names]
    tenant.mark_gone(made[0], "gone")
    assert ids(page(tenant, image=names[0])) == [made[0]]
    assert set(ids(page(tenant, image=f"{names[1]},{names[2]}"))) == set(made[1:])
    assert ids(page(tenant, image=names[1][:-1])) == []
    assert ids(page(tenant, image=names[1].upper())) == []


def test_filters_narrow_together_and_over_pages(tenant: Tenant) -> None:
    """A cursor goes on within the same filters."""
    made = [tenant.queued() for _ in range(3)]
    tenant.succeeded()
    first = page(tenant, status="queued", kind="machine", limit=2)
    second = page(tenant, status="queued", kind="machine", limit=2, cursor=first["next_cursor"])
    assert ids(first) + ids(second) == made[::-1]
    assert second["next_cursor"] is None


def test_unknown_query_parameters_are_ignored(tenant: Tenant) -> None:
    """A parameter that nobody knows narrows nothing."""
    assert ids(page(tenant, colour="red", offset=7)) == ids(page(tenant))


@pytest.mark.parametrize("limit", ["0", "501", "-1", "abc", "", "1.5", "99999999999999999999", "%00", "NaN"])
def test_a_limit_out_of_range_is_a_422(tenant: Tenant, limit: str) -> None:
    """It is refused, never clamped."""
    answer = tenant.http.get(f"/api/v1/builds?limit={limit}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_request")
    assert answer.json()["error"]["message"].startswith("limit: ")


@pytest.mark.parametrize(
    "cursor",
    [
        "x",
        "%00",
        "%C3%BC",
        "550e8400-e29b-41d4-a716-446655440000",
        "1774449000000000",
        "1774449000000000-not-a-uuid",
        "177444900000000-550e8400-e29b-41d4-a716-446655440000",
        "17744490000000000-550e8400-e29b-41d4-a716-446655440000",
        "-774449000000000-550e8400-e29b-41d4-a716-446655440000",
        "1774449000000000-550e8400-e29b-41d4-a716-446655440000%0A",
        "%D9%A1774449000000000-550e8400-e29b-41d4-a716-446655440000",
        "x" * 10_000,
    ],
)
def test_a_cursor_of_nobodys_is_a_422(tenant: Tenant, cursor: str) -> None:
    """Only what an earlier page gave goes on."""
    answer = tenant.http.get(f"/api/v1/builds?cursor={cursor}")
    assert (answer.status_code, answer.json()) == (422, BAD_CURSOR)


def test_an_empty_parameter_is_none(tenant: Tenant) -> None:
    """What a form leaves empty narrows nothing."""
    build_id = tenant.queued()
    assert ids(page(tenant, kind="", status="", image="", api="", cursor="")) == [build_id]


def test_the_furthest_cursors_are_served(tenant: Tenant) -> None:
    """Before the first build there is nothing, and before the far future everything."""
    build_id = tenant.queued()
    zeros, nines = "0" * 16, "9" * 16
    assert ids(page(tenant, cursor=f"{zeros}-{build_id}")) == []
    assert ids(page(tenant, cursor=f"{nines}-{build_id}")) == [build_id]


def test_a_neighbours_cursor_shows_nothing_of_the_neighbours(tenant: Tenant, neighbour: Tenant) -> None:
    """A cursor is a place in time, not a right."""
    for _ in range(3):
        neighbour.queued()
    cursor = page(neighbour, limit=1)["next_cursor"]
    assert ids(page(tenant, cursor=cursor)) == []


@pytest.mark.parametrize("name", ["kind", "status", "image", "api"])
def test_a_nul_in_a_filter_is_a_422(tenant: Tenant, name: str) -> None:
    """No database compares with such text."""
    answer = tenant.http.get(f"/api/v1/builds?{name}=a%00b")
    message = f"{name}: must not hold a NUL character"
    assert (answer.status_code, answer.json()) == (422, error("invalid_request", message))


@pytest.mark.parametrize("value", ["%ff", "%ed%a0%80", "' OR 1=1 --", "%F0%9F%94%A5", "x" * 20_000])
def test_a_filter_may_hold_anything_else(tenant: Tenant, value: str) -> None:
    """What is not there is not found."""
    tenant.succeeded()
    assert tenant.http.get(f"/api/v1/builds?image={value}").json() == {"builds": [], "next_cursor": None}


@pytest.mark.parametrize("name", ["kind", "status", "image", "api"])
def test_too_many_names_in_a_filter_are_a_422(tenant: Tenant, name: str) -> None:
    """No database takes any number of them; the same name twice is one."""
    assert ids(page(tenant, **{name: "a," * 10_000})) == []
    names = ",".join(f"a{number}" for number in range(501))
    answer = tenant.http.get("/api/v1/builds", params={name: names})
    message = f"{name}: at most 500 names are served at once"
    assert (answer.status_code, answer.json()) == (422, error("invalid_request", message))
