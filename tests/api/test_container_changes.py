"""Renaming container images over HTTP, with a real registry behind the catalog."""

from typing import Any

import pytest

from activities.errands import carry_out
from api.errands import CatalogTags
from kiln.models import OwnerType
from kiln.ports import Errand
from support.api_server import RunningApi
from support.containers import IMAGES, Keeper, Owner
from support.tenants import row_counts


def personal(name: str = "app", tag: str = "v1") -> dict[str, Any]:
    return {"owner": {"type": "personal"}, "name": name, "tag": tag}


def codes(results: list[dict[str, Any]]) -> list[str | None]:
    return [one["error"] and one["error"]["code"] for one in results]


def test_a_rename_moves_the_tag_and_its_manifest(keeper: Keeper) -> None:
    """To another name, tag, owner and visibility at once; nothing is left in the old place."""
    made = keeper.image()
    source = {**personal(), "colour": "red"}
    team = {"type": "team", "teamId": keeper.slug}
    changes = {"name": "deep/app", "tag": "v2", "owner": team, "visibility": "PUBLIC"}
    answer = keeper.patch((source, changes)).json()
    owner = {"type": "team", "teamId": keeper.organization_id}
    assert answer == {
        "success": True,
        "dryRun": False,
        "results": [
            {
                "source": personal(),
                "success": True,
                "before": {**personal(), "visibility": "PRIVATE"},
                "after": {"owner": owner, "name": "deep/app", "tag": "v2", "visibility": "PUBLIC"},
                "error": None,
            }
        ],
    }
    assert keeper.digest(f"team-{keeper.organization_id}/deep/app", "v2") == made.digest
    assert keeper.in_registry(f"{keeper.slug}/app", "v1") is None
    assert keeper.in_registry(f"{keeper.slug}/app", made.digest) is None
    (row,) = keeper.page(teamId=keeper.slug)["data"]
    assert (row["displayRef"], row["visibility"]) == (f"team-{keeper.organization_id}/deep/app:v2", "PUBLIC")
    assert keeper.refs() == []


def test_a_retag_within_a_repository_keeps_its_manifest(keeper: Keeper) -> None:
    """The old tag goes alone."""
    made = keeper.image()
    (result,) = keeper.results((f"{keeper.slug}/app:v1", {"tag": "v2"}))
    assert result["source"] == {"reference": f"{keeper.slug}/app:v1"}
    assert keeper.digest(f"{keeper.slug}/app", "v2") == made.digest
    assert keeper.in_registry(f"{keeper.slug}/app", "v1") is None


@pytest.mark.parametrize("prefix", ["", "{slug}/", "prime/", "prime/{slug}/"])
def test_a_reference_may_leave_its_owner_out(keeper: Keeper, prefix: str) -> None:
    """Then it is a personal image; `prime/` says nothing."""
    keeper.image()
    reference = f"{prefix.format(slug=keeper.slug)}app:v1"
    (result,) = keeper.results((reference, {"visibility": "PUBLIC"}))
    assert result["after"]["visibility"] == "PUBLIC"


def test_updates_run_one_by_one(keeper: Keeper) -> None:
    """In their order, each on what those before it made; one that fails stops none."""
    keeper.image("a")
    keeper.image("b")
    answer = keeper.patch(
        (personal("a"), {"name": "c"}),
        (personal("a"), {"name": "d"}),
        (personal("c"), {"name": "b"}),
        (personal("b"), {"tag": "v2"}),
        (personal("c"), {"name": "b"}),
    ).json()
    assert codes(answer["results"]) == [None, "image_not_found", "destination_exists", None, None]
    assert answer["success"] is False
    assert [one["before"] is None for one in answer["results"]] == [False, True, False, False, False]
    assert sorted(keeper.refs()) == ["b:v1", "b:v2"]


def test_a_rehearsal_writes_nothing(keeper: Keeper) -> None:
    """`dryRun` answers as the real run would, each update against those before it."""
    made = keeper.image("a")
    updates = [(personal("a"), {"name": "c"}), (personal("a"), {"name": "d"}), (personal("c"), {"tag": "v2"})]
    before = row_counts(keeper.catalog)
    rehearsed = keeper.patch(*updates, dryRun=True).json()
    assert (rehearsed["dryRun"], codes(rehearsed["results"])) == (True, [None, "image_not_found", None])
    assert rehearsed["results"][2]["after"] == {**personal("c", "v2"), "visibility": "PRIVATE"}
    assert (keeper.refs(), row_counts(keeper.catalog)) == (["a:v1"], before)
    assert keeper.in_registry(f"{keeper.slug}/c", made.digest) is None
    real = keeper.patch(*updates).json()
    assert real == {**rehearsed, "dryRun": False}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, "invalid_update"),
        ({"name": None, "colour": "red"}, "invalid_update"),
        ({"visibility": "INHERIT"}, "invalid_update"),
        ({"name": "App"}, "invalid_update"),
        ({"name": "platform/app"}, "invalid_update"),
        ({"tag": ".x"}, "invalid_update"),
        ({"tag": 7}, "invalid_update"),
        ({"owner": {"type": "team"}}, "invalid_update"),
        ({"owner": {"type": "nobody"}}, "invalid_update"),
        ({"owner": {"type": "platform"}, "visibility": "PRIVATE"}, "invalid_update"),
        ({"owner": {"type": "team", "teamId": "nobody"}}, "permission_denied"),
    ],
)
def test_a_change_that_cannot_be_is_its_updates_error(keeper: Keeper, changes: dict[str, Any], code: str) -> None:
    """With 200, and the image as it was."""
    keeper.published(keeper.target())
    (result,) = keeper.results((personal(), changes))
    assert (result["success"], codes([result]), result["after"]) == (False, [code], None)
    assert result["before"] == {**personal(), "visibility": "PRIVATE"}
    assert keeper.refs() == ["app:v1"]


def test_what_is_not_ones_own_is_not_changed(keeper: Keeper, rival: Keeper) -> None:
    """A stranger's image is not found, the platform's is an admin's, an image without a tag is no reference."""
    rival.published(rival.target(visibility="PUBLIC"))
    name = f"base-{keeper.slug}"
    platform = keeper.target(name, owner_type=OwnerType.PLATFORM, owner="platform", visibility="PUBLIC")
    keeper.published(platform)
    team = {"owner": {"type": "team", "teamId": rival.slug}, "name": "app", "tag": "v1"}
    sources = [f"{rival.slug}/app:v1", team, f"platform/{name}:v1", "app", personal("\0")]
    results = keeper.results(*((source, {"tag": "v2"}) for source in sources), client=keeper.writer)
    found = ["image_not_found", "permission_denied", "permission_denied", "invalid_update", "image_not_found"]
    assert codes(results) == found
    (private,) = keeper.results((f"platform/{name}:v1", {"visibility": "PRIVATE"}))
    assert codes([private]) == ["invalid_update"]


def test_an_admin_makes_an_image_the_platforms(keeper: Keeper) -> None:
    """It is PUBLIC from then on."""
    made = keeper.image(name := f"os-{keeper.slug}")
    (result,) = keeper.results((personal(name), {"owner": {"type": "platform"}}))
    assert result["after"] == {"owner": {"type": "platform"}, "name": name, "tag": "v1", "visibility": "PUBLIC"}
    assert keeper.digest(f"platform/{name}", "v1") == made.digest


def test_an_image_that_is_being_built_is_not_renamed(keeper: Keeper) -> None:
    """Nor deleted; but who may pull what is published already may change."""
    keeper.published()
    keeper.running()
    keeper.running(keeper.target("new"))
    results = keeper.results(
        (personal(), {"tag": "v2"}), (personal(), {"visibility": "PUBLIC"}), (personal("new"), {"visibility": "PUBLIC"})
    )
    assert codes(results) == ["image_building", None, "image_building"]
    answer = keeper.http.delete(f"{IMAGES}/app/v1")
    assert (answer.status_code, list(answer.json())) == (409, ["detail"])


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"updates": {}},
        {"updates": [{}]},
        {"updates": [{"source": personal()}]},
        {"updates": [{"source": personal(), "set": []}]},
        {"updates": [{"source": {**personal(), "reference": "a:b"}, "set": {"tag": "v2"}}]},
        {"updates": [{"source": {"name": "a", "tag": "b"}, "set": {"tag": "v2"}}]},
        {"updates": [{"source": {"owner": {"type": "team"}, "name": "a", "tag": "b"}, "set": {"tag": "v2"}}]},
        {"updates": [{"source": {}, "set": {"tag": "v2"}}]},
        {"mode": "search", "updates": []},
        {"dryRun": "yes", "updates": []},
        {"updates": [{"source": {"reference": "a:b"}, "set": {"tag": "v2"}}] * 101},
        [],
    ],
)
def test_a_body_that_cannot_be_understood_is_a_422(keeper: Keeper, body: Any) -> None:
    """As a whole, in container-images' shape."""
    answer = keeper.http.patch(IMAGES, json=body)
    assert (answer.status_code, list(answer.json())) == (422, ["detail"])


def test_a_rename_without_the_registry_changes_nothing(lonely_api: RunningApi) -> None:
    """Its update fails; one that needs no registry does not."""
    owner = Owner(lonely_api)
    owner.published()
    owner.published(owner.target("other"))
    results = owner.results((personal(), {"tag": "v2"}), (personal("other"), {"visibility": "PUBLIC"}))
    assert codes(results) == ["unavailable", None]
    assert sorted(owner.refs()) == ["app:v1", "other:v1"]
    owner.close()


def test_a_rename_that_died_half_way_is_undone(keeper: Keeper) -> None:
    """A copy that the catalog never came to name goes; the image stays where it was. Repeating it is harmless."""
    made = keeper.image()
    registry = keeper.api.parts.containers.registry
    old, new = f"{keeper.slug}/app", f"{keeper.slug}/new"
    registry.copy(old, made.digest, new)
    registry.tag(new, made.digest, "v2")
    errand = Errand("33333333-3333-4333-8333-333333333333", new, "v2", made.digest, old)
    for _ in range(2):
        carry_out(registry, CatalogTags(keeper.catalog), errand)
    assert keeper.in_registry(new, made.digest) is None
    assert keeper.digest(old, "v1") == made.digest
