"""Deleting container images over HTTP, with a real registry behind the catalog."""

from typing import Any

import pytest

from activities.errands import carry_out
from api.errands import CatalogTags
from kiln.catalog.errands import done
from kiln.models import OwnerType
from kiln.ports import Errand
from support.api_server import RunningApi
from support.containers import IMAGES, Keeper, Owner, waiting_errands


def test_a_deleted_image_is_gone_from_list_and_registry(keeper: Keeper) -> None:
    """200 with a message; again, a 404."""
    made = keeper.image("deep/app")
    answer = keeper.http.delete(f"{IMAGES}/deep/app/v1")
    assert (answer.status_code, answer.json()["success"], type(answer.json()["message"])) == (200, True, str)
    assert keeper.refs() == []
    assert keeper.in_registry(f"{keeper.slug}/deep/app", "v1") is None
    assert keeper.in_registry(f"{keeper.slug}/deep/app", made.digest) is None
    again = keeper.http.delete(f"{IMAGES}/deep/app/v1")
    assert (again.status_code, list(again.json())) == (404, ["detail"])


def test_a_manifest_stays_while_another_tag_needs_it(keeper: Keeper) -> None:
    """The deleted tag goes alone."""
    made = keeper.image(tag="v1", text="same")
    keeper.image(tag="v2", text="same")
    assert keeper.http.delete(f"{IMAGES}/app/v1").status_code == 200
    assert keeper.in_registry(f"{keeper.slug}/app", "v1") is None
    assert keeper.digest(f"{keeper.slug}/app", "v2") == made.digest


def test_a_deletion_names_its_owner_in_the_path_or_the_query(keeper: Keeper, rival: Keeper) -> None:
    """The team's by `teamId` or its segment, the platform's by an admin alone, a stranger's not at all."""
    team_owner = f"team-{keeper.organization_id}"
    for tag in ("v1", "v2"):
        keeper.published(keeper.target(tag=tag, owner_type=OwnerType.TEAM, owner=team_owner))
    platform = f"gone-{keeper.slug}"
    keeper.published(keeper.target(platform, owner_type=OwnerType.PLATFORM, owner="platform", visibility="PUBLIC"))
    rival.published(theirs := rival.target(visibility="PUBLIC"))

    def delete(path: str, **query: str) -> int:
        return keeper.writer.delete(f"{IMAGES}/{path}", params=query).status_code

    assert delete("app/v1") == 404
    assert delete("app/v1", teamId=rival.slug) == 403
    assert delete("app/v1", teamId=keeper.slug) == 200
    assert delete(f"prime/{team_owner}/app/v2") == 200
    assert delete(f"platform/{platform}/v1") == 403
    assert keeper.http.delete(f"{IMAGES}/platform/{platform}/v1").status_code == 200
    assert delete(f"{rival.slug}/app/v1") == 404
    assert rival.listed(theirs)
    for odd in ("%00/v1", "a/%00", "A/v1", "%2F/%2F", "../../v1"):
        assert delete(odd) == 404


def test_a_failed_builds_tag_is_deleted_without_the_registry(lonely_api: RunningApi) -> None:
    """There is nothing that the registry would have to do."""
    owner = Owner(lonely_api)
    build_id = owner.waiting()
    owner.http.post(f"{IMAGES}/build/{build_id}/cancel")
    assert owner.http.delete(f"{IMAGES}/app/v1").status_code == 200
    assert (owner.refs(), waiting_errands(lonely_api, owner.slug)) == ([], [])
    owner.close()


def test_a_deletion_without_the_registry_is_remembered(lonely_api: RunningApi, keeper: Keeper) -> None:
    """200 at once; what the registry has to do is kept, and done when it answers again."""
    owner = Owner(lonely_api)
    to = owner.target()
    made = keeper.registry.push(to.repository, "v1")
    owner.published(to, made)
    assert owner.http.delete(f"{IMAGES}/app/v1").status_code == 200
    (row,) = waiting_errands(lonely_api, owner.slug)
    assert keeper.digest(to.repository, "v1") == made.digest
    errand = Errand(row.id, row.repository, row.tag, row.digest, row.source_repository)
    carry_out(keeper.api.parts.containers.registry, CatalogTags(lonely_api.catalog), errand)
    assert keeper.in_registry(to.repository, made.digest) is None
    with lonely_api.catalog.transaction() as tx:
        done(tx, row.id)
    owner.close()


class Interrupted(CatalogTags):
    """A catalog in which something happens after it was first asked for what an errand is about."""

    def __init__(self, keeper: Keeper, happens: Any) -> None:
        super().__init__(keeper.catalog)
        self._happens = happens

    def needed(self, repository: str, digest: str) -> list[str]:
        found = super().needed(repository, digest)
        self._happen()
        return found

    def tagged(self, repository: str, tag: str) -> str | None:
        found = super().tagged(repository, tag)
        self._happen()
        return found

    def _happen(self) -> None:
        happens, self._happens = self._happens, None
        if happens is not None:
            happens()


@pytest.mark.parametrize("tag", ["v1", "v2"])
def test_a_manifest_that_is_published_anew_while_it_is_deleted_comes_back(keeper: Keeper, tag: str) -> None:
    """Under the old tag or another: what the catalog has in the end, the registry has too."""
    repository = f"{keeper.slug}/app"
    made = keeper.registry.push(repository, "v1", "back again")
    registry = keeper.api.parts.containers.registry

    def publish() -> None:
        keeper.published(keeper.target(tag=tag), made)
        registry.tag(repository, made.digest, tag)

    errand = Errand("11111111-1111-4111-8111-111111111111", repository, "v1", made.digest)
    carry_out(registry, Interrupted(keeper, publish), errand)
    assert keeper.digest(repository, tag) == made.digest
    assert keeper.in_registry(repository, "v1" if tag == "v2" else "v2") is None
    assert keeper.in_registry(f"kiln-staging/errand-{errand.id}", made.digest) is None


def test_a_tag_that_is_published_anew_while_it_is_taken_away_comes_back(keeper: Keeper) -> None:
    """At its new digest."""
    repository = f"{keeper.slug}/app"
    old = keeper.image(tag="v0", text="old")
    keeper.api.parts.containers.registry.tag(repository, old.digest, "v1")
    new = keeper.registry.push(repository, "other", "new")

    class Late(CatalogTags):
        def tagged(self, repository: str, tag: str) -> str | None:
            found = super().tagged(repository, tag)
            if found is None:
                keeper.published(keeper.target(), new)
            return found

    errand = Errand("22222222-2222-4222-8222-222222222222", repository, "v1", old.digest)
    carry_out(keeper.api.parts.containers.registry, Late(keeper.catalog), errand)
    assert keeper.digest(repository, "v1") == new.digest
    assert keeper.digest(repository, "v0") == old.digest
