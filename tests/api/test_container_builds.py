"""Container builds over HTTP: the order, what becomes of it, and what is refused."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from kiln.catalog import attempts
from kiln.models import Api, BuildEnd, BuildStatus, ErrorCode, Failure
from support.api_server import RunningApi, settings_for
from support.cloud import Kept
from support.containers import BUILD, IMAGES, UNKNOWN_ID, Owner, refusal
from support.dev_temporal import DevTemporal
from support.tenants import on_both_databases

ADMIN_ONLY = "platform images are changed with an admin's API key only"


@on_both_databases
def test_an_order_waits_for_its_context(owner: Owner) -> None:
    """201 with where the image will be and where its context goes; the build is UPLOADING."""
    answer = owner.ordered("tools/app", "v1")
    build_id = answer.pop("build_id")
    url = urlsplit(answer.pop("upload_url"))
    host = owner.api.settings.registry_host
    assert answer == {
        "fullImagePath": f"{host}/{owner.slug}/tools/app:v1",
        "buildIds": [build_id],
        "expires_in": 3600,
        "visibility": "PRIVATE",
    }
    assert f"{url.scheme}://{url.netloc}{url.path}" == f"{owner.api.url}/api/v1/images/uploads/{build_id}"
    status = owner.status(build_id)
    assert datetime.fromisoformat(status.pop("createdAt")) <= datetime.now(UTC)
    assert status == {
        "id": build_id,
        "imageName": "tools/app",
        "imageTag": "v1",
        "fullImagePath": f"{host}/{owner.slug}/tools/app:v1",
        "status": "UPLOADING",
        "errorMessage": None,
        "startedAt": None,
        "completedAt": None,
        "sizeBytes": None,
        "visibility": "PRIVATE",
    }


@on_both_databases
def test_a_builds_life_in_this_contracts_words(owner: Owner) -> None:
    """PENDING, BUILDING, COMPLETED with its size; FAILED with its reason, also for a time-out; CANCELLED."""
    assert owner.status(owner.waiting(owner.target("a")))["status"] == "PENDING"
    assert owner.status(owner.running(owner.target("b")))["status"] == "BUILDING"
    done = owner.status(owner.published(owner.target("c")))
    assert (done["status"], done["sizeBytes"] > 0, done["errorMessage"]) == ("COMPLETED", True, None)
    assert done["createdAt"] <= done["startedAt"] <= done["completedAt"]
    for status, word in ((BuildStatus.FAILED, "FAILED"), (BuildStatus.TIMED_OUT, "FAILED")):
        build_id = owner.running(owner.target(status.value))
        failure = Failure(code=ErrorCode.TOOL_FAILED, message="exit code: 7")
        with owner.catalog.transaction() as tx:
            attempts.finish(tx, build_id, BuildEnd(status=status, error=failure))
        seen = owner.status(build_id)
        assert (seen["status"], seen["errorMessage"]) == (word, "exit code: 7")
    cancelling = owner.running(owner.target("d"))
    answer = owner.http.post(f"{BUILD}/{cancelling}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (202, "BUILDING")
    owner.end_cancelled(cancelling)
    assert owner.status(cancelling)["status"] == "CANCELLED"


def test_only_the_organizations_own_container_builds_are_known(owner: Owner, stranger: Owner) -> None:
    """A stranger's, a machine's, an unknown or a malformed id is a 404; a build of cloud-builds is known."""
    assert owner.status(owner.waiting(api=Api.CLOUD_BUILDS))["status"] == "PENDING"
    message = (404, "no build of this organization has this id")
    for build_id in (stranger.waiting(), owner.queued(), UNKNOWN_ID, "x", "%00"):
        assert refusal(owner.http.get(f"{BUILD}/{build_id}")) == message
        assert refusal(owner.http.post(f"{BUILD}/{build_id}/cancel")) == message
        assert refusal(owner.start(build_id)) == message


def test_the_teams_namespace_is_named_by_id_or_slug(owner: Owner, stranger: Owner) -> None:
    """In either spelling; another organization's is a 403."""
    path = f"{owner.api.settings.registry_host}/team-{owner.organization_id}/app:v1"
    for spelling in ("team_id", "teamId"):
        for team in (owner.organization_id, owner.slug):
            assert owner.ordered(**{spelling: team})["fullImagePath"] == path
        answer = owner.post(image_name="app", image_tag="v1", **{spelling: stranger.organization_id})
        assert refusal(answer) == (403, "the team is not this API key's organization")


def test_a_visibility_that_is_inherited_is_the_tags_own(owner: Owner) -> None:
    """A new tag is PRIVATE, an existing one keeps its own, unless the order says otherwise."""
    owner.published(owner.target(visibility="PUBLIC"))
    assert owner.ordered("new")["visibility"] == "PRIVATE"
    assert owner.ordered()["visibility"] == owner.ordered(visibility="INHERIT")["visibility"] == "PUBLIC"
    order = owner.ordered(visibility="PRIVATE")
    assert (order["visibility"], owner.status(order["build_id"])["visibility"]) == ("PRIVATE", "PRIVATE")


def test_a_platform_build_needs_an_admin(owner: Owner) -> None:
    """It is PUBLIC and has no team; in either spelling."""
    for spelling in ("owner_scope", "ownerScope"):
        scope = {spelling: "platform", "visibility": "PUBLIC"}
        answer = owner.ordered("base/os", **scope)
        assert answer["fullImagePath"] == f"{owner.api.settings.registry_host}/platform/base/os:v1"
        assert answer["visibility"] == "PUBLIC"
        assert refusal(owner.post(owner.writer, image_name="os", image_tag="v1", **scope)) == (403, ADMIN_ONLY)
        for changes in ({"visibility": "PRIVATE"}, {"visibility": None}, {"team_id": owner.slug}):
            assert refusal(owner.post(image_name="os", image_tag="v1", **{**scope, **changes}))[0] == 422


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"image_name": "app"}, "image_tag"),
        ({"image_name": "app", "image_tag": None}, "image_tag"),
        ({"image_name": "App"}, "image_name"),
        ({"image_name": ""}, "image_name"),
        ({"image_name": "a//b"}, "image_name"),
        ({"image_name": "a/../b"}, "image_name"),
        ({"image_name": "app:v2"}, "image_name"),
        ({"image_name": 7}, "image_name"),
        ({"image_name": "a" * 300}, "image_name"),
        ({"image_name": "platform/app"}, "image_name"),
        ({"image_name": "prime/platform/app"}, "image_name"),
        ({"image_tag": ".v1"}, "image_tag"),
        ({"image_tag": "a" * 129}, "image_tag"),
        ({"image_tag": "v 1"}, "image_tag"),
        ({"dockerfile_path": "/Dockerfile"}, "dockerfile_path"),
        ({"dockerfile_path": "a/../../b"}, "dockerfile_path"),
        ({"dockerfile_path": ""}, "dockerfile_path"),
        ({"dockerfile_path": "docker/"}, "dockerfile_path"),
        ({"dockerfile_path": "a\0b"}, "dockerfile_path"),
        ({"platform": "linux/riscv64"}, "platform"),
        ({"visibility": "SECRET"}, "visibility"),
        ({"owner_scope": "team"}, "owner_scope"),
        ({"ownerScope": "team"}, "ownerScope"),
        ({"team_id": "a", "teamId": "b"}, "team_id"),
        ({"source_image": "a", "sourceImage": "b"}, "source_image"),
        ({"source_image": ""}, "source_image"),
        ({"source_image": " , "}, "source_image"),
    ],
)
def test_a_bad_order_is_a_422_that_names_the_field(owner: Owner, body: dict[str, Any], field: str) -> None:
    """In container-images' shape; nothing is kept."""
    sent = {**({} if "source_image" in body else {"image_name": "app"}), "image_tag": "v1", **body}
    if body == {"image_name": "app"}:
        del sent["image_tag"]
    before = Kept(owner.api)
    status, message = refusal(owner.post(**sent))
    assert (status, message.partition(":")[0], Kept(owner.api)) == (422, field, before)


def test_a_name_does_not_begin_with_its_owner(owner: Owner) -> None:
    """Its own slug or team is a 422, a stranger's is a part of the name; `prime/` is dropped."""
    for segment in (owner.slug, f"team-{owner.organization_id}"):
        assert refusal(owner.post(image_name=f"{segment}/app", image_tag="v1"))[0] == 422
    host = owner.api.settings.registry_host
    assert owner.ordered("team-x/app")["fullImagePath"] == f"{host}/{owner.slug}/team-x/app:v1"
    assert owner.ordered("prime/app")["fullImagePath"] == f"{host}/{owner.slug}/app:v1"


def test_unknown_fields_are_ignored_and_a_machines_fields_lose(owner: Owner) -> None:
    """Clients send extras; container-images wins when a body is both's; any path in the context may be the Dockerfile."""
    order = owner.ordered(provider="codex", colour="red", dockerfile_path="./.__prime_dockerfile__")
    spec = owner.row(order["build_id"]).spec
    assert (spec["kind"], spec["dockerfile"]) == ("container", ".__prime_dockerfile__")


def test_a_repeated_order_is_answered_as_the_first(owner: Owner) -> None:
    """Under the same Idempotency-Key; with another body it is a 409."""
    headers = {"Idempotency-Key": "once"}
    body = {"image_name": "app", "image_tag": "v1"}
    first, second = (owner.http.post(BUILD, json=body, headers=headers) for _ in range(2))
    assert (first.status_code, second.status_code, second.json()) == (201, 201, first.json())
    other = owner.http.post(BUILD, json={**body, "image_tag": "v2"}, headers=headers)
    assert refusal(other)[0] == 409


def test_keys_and_scopes_in_this_contracts_shape(owner: Owner) -> None:
    """401 and 403 as `{"detail"}`; a POST without a known key carries both contracts' errors."""
    reader = {"Authorization": f"Bearer {owner.new_key('builds:read')}"}
    calls = [("GET", f"{BUILD}/{UNKNOWN_ID}"), ("POST", f"{BUILD}/{UNKNOWN_ID}/start"), ("PATCH", IMAGES)]
    calls += [("POST", f"{BUILD}/{UNKNOWN_ID}/cancel"), ("DELETE", f"{IMAGES}/a/b"), ("GET", f"{IMAGES}?limit=1")]
    for method, path in calls:
        assert refusal(owner.api.http.request(method, path))[0] == 401
        if method != "GET":
            answer = owner.api.http.request(method, path, headers=reader)
            assert refusal(answer) == (403, "the API key lacks the scope builds:write")
    body = {"image_name": "app", "image_tag": "v1"}
    assert refusal(owner.api.http.post(BUILD, json=body, headers=reader))[0] == 403
    assert sorted(owner.api.http.post(BUILD, json=body).json()) == ["detail", "error"]


def test_a_message_holds_no_status_that_it_is_not(owner: Owner) -> None:
    """Clients look for 404 and 403 in it."""
    answer = owner.http.get(f"{IMAGES}?limit=404")
    assert refusal(answer)[0] == 422
    message = owner.http.request("PATCH", IMAGES, content=b"x", headers={"Content-Type": "text/403"}).json()["detail"]
    assert "403" not in message


def test_a_server_without_container_builds_says_why(tmp_path: Path, temporal: DevTemporal) -> None:
    """503 with the reason, and when to ask again; what is wrong with a body is still said first."""
    changes = {"containers_off": "no Docker engine was found"}
    with RunningApi(settings_for(tmp_path / "home", temporal.port, **changes)) as api:
        owner = Owner(api)
        answer = owner.post(image_name="app", image_tag="v1")
        assert refusal(answer) == (503, "container builds are off: no Docker engine was found")
        assert int(answer.headers["Retry-After"]) > 0
        assert owner.post(image_name="App", image_tag="v1").status_code == 422
        owner.close()
