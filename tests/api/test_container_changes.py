"""Renaming and deleting container images over HTTP, with a real registry behind the catalog."""

from collections.abc import Iterator
from typing import Any

import pytest

from activities.errands import carry_out
from api.errands import CatalogTags
from kiln.catalog import tags
from kiln.catalog.errands import done
from kiln.models import OwnerType, Target
from kiln.ports import Errand, Manifest
from support.api_server import RunningApi, settings_for
from support.containers import IMAGES, KilnsRegistry, Owner, kilns_registry, waiting_errands
from support.dev_temporal import DevTemporal
from support.oci_images import Made
from support.ports import free_ports
from support.tenants import row_counts


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KilnsRegistry]:
    with kilns_registry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, temporal: DevTemporal, registry: KilnsRegistry
) -> Iterator[RunningApi]:
    changes = {"registry": registry.host, "registry_token_key": registry.key_file}
    with RunningApi(settings_for(tmp_path_factory.mktemp("api"), temporal.port, **changes)) as api:
        yield api


@pytest.fixture(scope="module")
def lonely_server(
    tmp_path_factory: pytest.TempPathFactory, temporal: DevTemporal, registry: KilnsRegistry
) -> Iterator[RunningApi]:
    """A server whose registry does not answer."""
    changes = {"registry": f"127.0.0.1:{free_ports(1)[0]}", "registry_token_key": registry.key_file}
    with RunningApi(settings_for(tmp_path_factory.mktemp("lonely"), temporal.port, **changes)) as api:
        yield api


class Keeper(Owner):
    """An organization whose published images are in the registry."""

    def __init__(self, api: RunningApi, registry: KilnsRegistry) -> None:
        super().__init__(api)
        self.registry = registry

    def image(self, name: str = "app", tag: str = "v1", text: str = "an image", **changes: Any) -> Made:
        """A published image."""
        to = self.target(name, tag, **changes)
        made = self.registry.push(to.repository, tag, text)
        self.published(to, made)
        return made

    def in_registry(self, repository: str, reference: str) -> Manifest | None:
        return self.api.parts.containers.registry.manifest(repository, reference)

    def digest(self, repository: str, tag: str) -> str | None:
        found = self.in_registry(repository, tag)
        return found.digest if found else None

    def listed(self, to: Target) -> bool:
        with self.catalog.read() as session:
            return tags.find(session, to.owner, to.name, to.tag) is not None


@pytest.fixture
def keeper(server: RunningApi, registry: KilnsRegistry) -> Iterator[Keeper]:
    keeper = Keeper(server, registry)
    yield keeper
    keeper.close()
    assert waiting_errands(server, keeper.slug) == []


@pytest.fixture
def stranger(server: RunningApi, registry: KilnsRegistry) -> Iterator[Keeper]:
    stranger = Keeper(server, registry)
    yield stranger
    stranger.close()


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


def test_what_is_not_ones_own_is_not_changed(keeper: Keeper, stranger: Keeper) -> None:
    """A stranger's image is not found, the platform's is an admin's, an image without a tag is no reference."""
    stranger.published(stranger.target(visibility="PUBLIC"))
    name = f"base-{keeper.slug}"
    platform = keeper.target(name, owner_type=OwnerType.PLATFORM, owner="platform", visibility="PUBLIC")
    keeper.published(platform)
    team = {"owner": {"type": "team", "teamId": stranger.slug}, "name": "app", "tag": "v1"}
    sources = [f"{stranger.slug}/app:v1", team, f"platform/{name}:v1", "app", personal("\0")]
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


def test_a_rename_without_the_registry_changes_nothing(lonely_server: RunningApi) -> None:
    """Its update fails; one that needs no registry does not."""
    owner = Owner(lonely_server)
    owner.published()
    owner.published(owner.target("other"))
    results = owner.results((personal(), {"tag": "v2"}), (personal("other"), {"visibility": "PUBLIC"}))
    assert codes(results) == ["unavailable", None]
    assert sorted(owner.refs()) == ["app:v1", "other:v1"]
    owner.close()


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


def test_a_deletion_names_its_owner_in_the_path_or_the_query(keeper: Keeper, stranger: Keeper) -> None:
    """The team's by `teamId` or its segment, the platform's by an admin alone, a stranger's not at all."""
    team_owner = f"team-{keeper.organization_id}"
    for tag in ("v1", "v2"):
        keeper.published(keeper.target(tag=tag, owner_type=OwnerType.TEAM, owner=team_owner))
    platform = f"gone-{keeper.slug}"
    keeper.published(keeper.target(platform, owner_type=OwnerType.PLATFORM, owner="platform", visibility="PUBLIC"))
    stranger.published(theirs := stranger.target(visibility="PUBLIC"))

    def delete(path: str, **query: str) -> int:
        return keeper.writer.delete(f"{IMAGES}/{path}", params=query).status_code

    assert delete("app/v1") == 404
    assert delete("app/v1", teamId=stranger.slug) == 403
    assert delete("app/v1", teamId=keeper.slug) == 200
    assert delete(f"prime/{team_owner}/app/v2") == 200
    assert delete(f"platform/{platform}/v1") == 403
    assert keeper.http.delete(f"{IMAGES}/platform/{platform}/v1").status_code == 200
    assert delete(f"{stranger.slug}/app/v1") == 404
    assert stranger.listed(theirs)
    for odd in ("%00/v1", "a/%00", "A/v1", "%2F/%2F", "../../v1"):
        assert delete(odd) == 404


def test_a_failed_builds_tag_is_deleted_without_the_registry(lonely_server: RunningApi) -> None:
    """There is nothing that the registry would have to do."""
    owner = Owner(lonely_server)
    build_id = owner.waiting()
    owner.http.post(f"{IMAGES}/build/{build_id}/cancel")
    assert owner.http.delete(f"{IMAGES}/app/v1").status_code == 200
    assert (owner.refs(), waiting_errands(lonely_server, owner.slug)) == ([], [])
    owner.close()


def test_a_deletion_without_the_registry_is_remembered(lonely_server: RunningApi, keeper: Keeper) -> None:
    """200 at once; what the registry has to do is kept, and done when it answers again."""
    owner = Owner(lonely_server)
    to = owner.target()
    made = keeper.registry.push(to.repository, "v1")
    owner.published(to, made)
    assert owner.http.delete(f"{IMAGES}/app/v1").status_code == 200
    (row,) = waiting_errands(lonely_server, owner.slug)
    assert keeper.digest(to.repository, "v1") == made.digest
    errand = Errand(row.id, row.repository, row.tag, row.digest, row.source_repository)
    carry_out(keeper.api.parts.containers.registry, CatalogTags(lonely_server.catalog), errand)
    assert keeper.in_registry(to.repository, made.digest) is None
    with lonely_server.catalog.transaction() as tx:
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
