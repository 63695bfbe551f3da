"""The list of container images over HTTP: pages, namespaces, search, and the tag that a row is."""

from typing import Any

import pytest

from kiln.models import Api, OwnerType
from support.containers import IMAGES, Owner
from support.tenants import on_both_databases


def team(owner: Owner, name: str) -> Any:
    return owner.target(name, owner_type=OwnerType.TEAM, owner=f"team-{owner.organization_id}")


@on_both_databases
def test_a_row_is_a_tag_with_its_newest_build(owner: Owner) -> None:
    """Whoever's API built it; what it points at is the last image that was published."""
    first = owner.published(api=Api.CLOUD_BUILDS)
    published = owner.page()
    newest = owner.running()
    page = owner.page()
    assert {name: value for name, value in page.items() if name != "data"} == {
        "totalCount": 1,
        "offset": 0,
        "limit": 50,
    }
    (row,) = page["data"]
    created = {name: row.pop(name) for name in ("createdAt", "startedAt", "pushedAt", "sizeBytes")}
    assert row == {
        "id": newest,
        "artifactType": "VM_SANDBOX",
        "imageName": "app",
        "imageTag": "v1",
        "status": "BUILDING",
        "errorMessage": None,
        "completedAt": None,
        "fullImagePath": f"{owner.api.settings.registry_host}/{owner.slug}/app:v1",
        "displayRef": f"{owner.slug}/app:v1",
        "visibility": "PRIVATE",
        "teamId": None,
        "ownerType": "personal",
    }
    assert published["data"][0]["id"] == first
    assert created["pushedAt"] == published["data"][0]["pushedAt"] is not None
    assert created["sizeBytes"] == published["data"][0]["sizeBytes"] > 0


@on_both_databases
def test_pages_are_newest_first_and_count_all(owner: Owner) -> None:
    """`offset` and `limit` cut; `totalCount` does not."""
    for number in range(5):
        owner.waiting(owner.target(f"app{number}"))
    assert owner.refs() == [f"app{number}:v1" for number in (4, 3, 2, 1, 0)]
    page = owner.page(offset=1, limit=2)
    assert [row["imageName"] for row in page["data"]] == ["app3", "app2"]
    assert (page["totalCount"], page["offset"], page["limit"]) == (5, 1, 2)
    assert owner.page(offset=2**53)["data"] == []
    only_offset = owner.http.get(IMAGES, params={"offset": 4}).json()
    assert (len(only_offset["data"]), only_offset["limit"]) == (1, 50)


@on_both_databases
def test_each_namespace_has_its_own_list(owner: Owner, stranger: Owner) -> None:
    """Personal, the team's, and the platform's, which every key sees; never a stranger's."""
    owner.waiting(owner.target("mine"))
    owner.waiting(team(owner, "ours"))
    platform = owner.target("everybodys", owner_type=OwnerType.PLATFORM, owner="platform", visibility="PUBLIC")
    owner.published(platform)
    stranger.published(stranger.target("theirs", visibility="PUBLIC"))
    assert owner.refs() == ["mine:v1"]
    (row,) = owner.page(teamId=owner.slug)["data"]
    assert (row["imageName"], row["teamId"], row["ownerType"]) == ("ours", owner.organization_id, "team")
    assert owner.refs(teamId=owner.organization_id) == ["ours:v1"]
    seen = stranger.page(ownerScope="platform", search="everybodys")["data"]
    assert {(one["ownerType"], one["teamId"], one["visibility"]) for one in seen} == {("platform", None, "PUBLIC")}


@on_both_databases
@pytest.mark.parametrize(
    ("search", "found"),
    [
        ("LUNA", {"luna:v1"}),
        ("v2", {"mars:v2-rc"}),
        ("s:v", {"mars:v2-rc"}),
        ("_", {"a_b:v1"}),
        ("%", set()),
        ("\\", set()),
        ("' OR 1=1 --", set()),
        ("luna\0", set()),
        ("", {"luna:v1", "mars:v2-rc", "a_b:v1"}),
    ],
)
def test_a_search_is_literal_and_of_any_case(owner: Owner, search: str, found: set[str]) -> None:
    """Over name, tag and reference; the count is of what was found."""
    for name, tag in (("luna", "v1"), ("mars", "v2-rc"), ("a_b", "v1")):
        owner.waiting(owner.target(name, tag))
    page = owner.page(search=search)
    assert {row["displayRef"].partition("/")[2] for row in page["data"]} == found
    assert page["totalCount"] == len(found)


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=251",
        "limit=-1",
        "limit=",
        "limit=x",
        "limit=1.5",
        "offset=-1",
        "offset=x",
        "offset=9007199254740993",
        "limit=1&offset=x",
        "limit=1&ownerScope=team",
        "limit=1&ownerScope=platform&teamId={slug}",
    ],
)
def test_a_number_out_of_range_is_a_422(owner: Owner, query: str) -> None:
    """Never clamped; in container-images' shape."""
    answer = owner.http.get(f"{IMAGES}?{query.format(slug=owner.slug)}")
    assert (answer.status_code, list(answer.json())) == (422, ["detail"])


def test_anothers_team_is_a_403(owner: Owner, stranger: Owner) -> None:
    """By its id as by its slug."""
    for name in (stranger.organization_id, stranger.slug, "nobody"):
        answer = owner.http.get(IMAGES, params={"limit": 1, "teamId": name})
        assert (answer.status_code, list(answer.json())) == (403, ["detail"])


def test_without_paging_it_is_the_machines_list(owner: Owner) -> None:
    """Whatever else the query holds."""
    owner.waiting()
    answer = owner.http.get(IMAGES, params={"search": "app", "teamId": "x", "ownerScope": "platform"})
    assert (answer.status_code, answer.json()) == (200, {"images": []})
