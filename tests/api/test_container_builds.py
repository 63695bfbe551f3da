"""Container builds over HTTP: the order, its upload, its start, what becomes of it, and what is refused."""

import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from kiln.catalog import attempts
from kiln.models import Api, BuildEnd, BuildStatus, ErrorCode, Failure
from support.api_server import RunningApi, settings_for
from support.archives import archive, packed
from support.cloud import Kept
from support.containers import ARCHIVE, BUILD, IMAGES, Owner
from support.dev_temporal import DevTemporal
from support.rows import rewrite
from support.tenants import on_both_databases

UNKNOWN_ID = "550e8400-e29b-41d4-a716-446655440000"
ADMIN_ONLY = "platform images are changed with an admin's API key only"


@pytest.fixture
def owner(api: RunningApi) -> Iterator[Owner]:
    owner = Owner(api)
    yield owner
    owner.close()


@pytest.fixture
def stranger(api: RunningApi) -> Iterator[Owner]:
    stranger = Owner(api)
    yield stranger
    stranger.close()


@pytest.fixture(scope="module")
def copying_api(tmp_path_factory: pytest.TempPathFactory, temporal: DevTemporal) -> Iterator[RunningApi]:
    """A server whose operator allows some registries himself: their names are not looked up."""
    changes = {"transfer_registries": ("docker.io", "ghcr.io", "quay.io")}
    with RunningApi(settings_for(tmp_path_factory.mktemp("copying"), temporal.port, **changes)) as api:
        yield api


@pytest.fixture
def copier(copying_api: RunningApi) -> Iterator[Owner]:
    """An organization of that server."""
    copier = Owner(copying_api)
    yield copier
    copier.close()


def refusal(answer: httpx.Response) -> tuple[int, str]:
    """Status and message of an error in container-images' shape, and in no other."""
    assert list(answer.json()) == ["detail"], answer.text
    return answer.status_code, answer.json()["detail"]


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
def test_an_uploaded_build_starts_once(owner: Owner) -> None:
    """409 before the upload, 200 after it and again; then no upload replaces it."""
    order = owner.ordered()
    build_id, url = order["build_id"], order["upload_url"]
    assert refusal(owner.start(build_id)) == (409, "the build context has not been uploaded yet")
    uploaded = owner.put(url)
    assert (uploaded.status_code, uploaded.json()["sizeBytes"]) == (200, len(ARCHIVE))
    first, second = owner.start(build_id), owner.start(build_id)
    assert (first.status_code, first.json()["status"]) == (200, "PENDING")
    assert (second.status_code, second.json()) == (200, first.json())
    assert refusal(owner.put(url)) == (409, "the build has begun with the context that it has")
    row = owner.row(build_id)
    assert (row.context_sha256, row.status) == (uploaded.json()["sha256"], "queued")


def test_an_upload_before_the_start_replaces_the_one_before(owner: Owner) -> None:
    """One that is refused replaces nothing."""
    order = owner.ordered()
    owner.put(order["upload_url"])
    other = archive({"Dockerfile": b"FROM scratch\n", "other": b"2"})
    latest = owner.put(order["upload_url"], other).json()["sha256"]
    assert refusal(owner.put(order["upload_url"], b"no archive"))[0] == 422
    kept = Path(owner.api.settings.home_dir) / "objects" / "contexts" / order["build_id"]
    assert (kept.read_bytes(), owner.row(order["build_id"]).context_sha256) == (other, latest)


def test_an_upload_that_ends_after_the_start_changes_nothing(owner: Owner) -> None:
    """The build is made from the context that was there when it was started."""
    order = owner.ordered()
    first = owner.put(order["upload_url"]).json()["sha256"]

    def late() -> Iterator[bytes]:
        other = archive({"Dockerfile": b"FROM scratch\n", "other": b"2"})
        yield other[:20]
        assert owner.start(order["build_id"]).status_code == 200
        yield other[20:]

    assert refusal(owner.put(order["upload_url"], late()))[0] == 409
    kept = Path(owner.api.settings.home_dir) / "objects" / "contexts" / order["build_id"]
    assert (kept.read_bytes(), owner.row(order["build_id"]).context_sha256) == (ARCHIVE, first)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"no archive", "gzip"),
        (packed(b"no tar" * 200), "tar"),
        (archive({"other": b""}), "Dockerfile"),
        (archive({"Dockerfile": b"", "../out": b""}), "../out"),
        (ARCHIVE[:-20], ""),
    ],
)
def test_what_cannot_be_built_from_is_not_kept(owner: Owner, content: bytes, says: str) -> None:
    """422 with the rule that it breaks; the build goes on waiting."""
    order = owner.ordered()
    before = Kept(owner.api)
    status, message = refusal(owner.put(order["upload_url"], content))
    assert (status, Kept(owner.api)) == (422, before)
    assert says in message
    assert owner.status(order["build_id"])["status"] == "UPLOADING"


@pytest.fixture(scope="module")
def small_api(tmp_path_factory: pytest.TempPathFactory, temporal: DevTemporal) -> Iterator[RunningApi]:
    """A server with a public URL, that takes small contexts, for 1 second."""
    home = tmp_path_factory.mktemp("small")
    changes = {"max_context_bytes": 4096, "upload_seconds": 1, "public_url": "https://kiln.test/"}
    with RunningApi(settings_for(home, temporal.port, **changes)) as api:
        yield api


def at(api: RunningApi, url: str) -> str:
    """The same path and query at the server's own address."""
    place = urlsplit(url)
    return f"{api.url}{place.path}?{place.query}"


def test_an_upload_past_the_limit_is_refused_at_once(small_api: RunningApi) -> None:
    """413 before the whole is read, with its length announced or without; nothing is kept."""
    owner = Owner(small_api)
    order = owner.ordered()
    assert order["upload_url"].startswith("https://kiln.test/api/v1/images/uploads/")
    before = Kept(small_api)
    url = at(small_api, order["upload_url"])
    announced = owner.put(url, b"x" * 5000)
    # Incompressible, so that it is its length that is refused.
    streamed = owner.put(url, iter([archive({"Dockerfile": b"", "blob": bytes(small_noise(9000))})]))
    assert [refusal(answer)[0] for answer in (announced, streamed)] == [413, 413]
    assert Kept(small_api) == before
    owner.close()


def small_noise(length: int) -> Iterator[int]:
    state = 1
    for _ in range(length):
        state = state * 1103515245 + 12345 & 0x7FFFFFFF
        yield state >> 16 & 0xFF


def test_an_expired_url_takes_nothing(small_api: RunningApi) -> None:
    """403 once its time is over."""
    owner = Owner(small_api)
    url = at(small_api, owner.ordered()["upload_url"])
    time.sleep(max(0.0, int(parse_qs(urlsplit(url).query)["expires"][0]) - time.time()))
    assert refusal(owner.put(url)) == (403, "the upload URL has expired, or is not as it was given out")
    owner.close()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"signature=.", "signature=x"),
        (r"expires=\d", "expires=9"),
        (r"&signature=.*", ""),
        (r"expires=\d+", "expires="),
        (r"uploads/[^?]+", f"uploads/{UNKNOWN_ID}"),
        (r"uploads/[^?]+", "uploads/%00"),
        (r"signature=.*", "signature=%C3%A9"),
    ],
)
def test_an_altered_url_takes_nothing(owner: Owner, old: str, new: str) -> None:
    """403, whatever was altered."""
    order = owner.ordered()
    altered = re.sub(old, new, order["upload_url"])
    assert altered != order["upload_url"]
    assert refusal(owner.put(altered))[0] == 403
    assert not owner.row(order["build_id"]).context_uploaded_at


def test_a_cancelled_build_takes_no_context(owner: Owner) -> None:
    """The cancel reads CANCELLED at once, since nothing had begun; upload and start are 409."""
    order = owner.ordered()
    cancelled = owner.http.post(f"{BUILD}/{order['build_id']}/cancel")
    again = owner.http.post(f"{BUILD}/{order['build_id']}/cancel")
    assert (cancelled.status_code, again.status_code) == (202, 202)
    assert owner.status(order["build_id"])["id"] == again.json()["id"]
    assert refusal(owner.put(order["upload_url"]))[0] == 409
    assert refusal(owner.start(order["build_id"]))[0] == 409


@pytest.mark.parametrize("body", [{}, [], {"context_uploaded": False}, {"context_uploaded": "true"}, {"x": 1}, None])
def test_a_start_that_says_nothing_is_a_422(owner: Owner, body: Any) -> None:
    """`context_uploaded` must be true."""
    order = owner.ordered()
    owner.put(order["upload_url"])
    answer = owner.http.post(f"{BUILD}/{order['build_id']}/start", json=body)
    assert refusal(answer)[0] == 422
    assert owner.status(order["build_id"])["status"] == "UPLOADING"


def test_what_takes_no_upload_cannot_be_started(copier: Owner) -> None:
    """A copy, a build of cloud-builds, one that has ended: 409."""
    copy = copier.post(source_image="busybox").json()["build_id"]
    ended = copier.published(copier.target("ended"))
    for build_id in (copy, copier.waiting(api=Api.CLOUD_BUILDS), ended):
        assert refusal(copier.start(build_id))[0] == 409


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


def test_a_copy_needs_no_upload(copier: Owner) -> None:
    """One source: the flat answer, without an upload; its name is derived."""
    answer = copier.post(source_image="docker.io/library/busybox:1.36")
    build_id = answer.json()["build_id"]
    assert (answer.status_code, answer.json()) == (
        201,
        {
            "build_id": build_id,
            "fullImagePath": f"{copier.api.settings.registry_host}/{copier.slug}/busybox:1.36",
            "buildIds": [build_id],
            "upload_url": None,
            "expires_in": None,
            "visibility": "PRIVATE",
        },
    )
    assert copier.status(build_id)["status"] == "PENDING"
    spec = copier.row(build_id).spec
    assert (spec["kind"], spec["reference"]) == ("transfer", "docker.io/library/busybox:1.36")


DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({"source_image": "acme/tool"}, "acme/tool:latest"),
        ({"sourceImage": "ghcr.io/Acme/tool:V2"}, None),
        ({"sourceImage": "ghcr.io/acme/deep/tool:V2"}, "tool:V2"),
        ({"source_image": f"quay.io/acme/tool@{DIGEST}"}, "tool:sha256-abababababababab"),
        ({"source_image": f"quay.io/acme/tool:v1@{DIGEST}"}, "tool:v1"),
        ({"source_image": "busybox", "image_name": "a/b", "image_tag": "c"}, "a/b:c"),
        ({"source_image": "busybox,"}, "busybox:latest"),
    ],
)
def test_a_copys_name_is_derived(copier: Owner, body: dict[str, str], name: str | None) -> None:
    """From its source, where the order has none; a source that is no reference is a 422."""
    answer = copier.post(**body)
    if name is None:
        assert refusal(answer)[0] == 422
    else:
        assert answer.json()["fullImagePath"].partition("/")[2] == f"{copier.slug}/{name}"


@pytest.mark.parametrize(
    "source", ["10.0.0.7/app:v1", "127.0.0.1:5000/app", "localhost/app", "registry.internal/app", "a b", "http://x/y:z"]
)
def test_a_source_that_is_not_allowed_is_a_422(copier: Owner, source: str) -> None:
    """An IP address, another registry, no reference."""
    before = Kept(copier.api)
    status, message = refusal(copier.post(source_image=source))
    assert (status, message.partition(":")[0], Kept(copier.api)) == (422, "source_image", before)


def test_several_copies_are_answered_one_by_one(copier: Owner) -> None:
    """In the request's order, each with its build or its error; the flat fields are the first accepted one's."""
    answer = copier.post(source_image="10.0.0.7/app, busybox:1 ,alpine").json()
    bad, first, second = answer["results"]
    assert [one["sourceImage"] for one in answer["results"]] == ["10.0.0.7/app", "busybox:1", "alpine"]
    assert (bad["build"], bad["retryable"], type(bad["error"])) == (None, False, str)
    assert (first["error"], second["error"]) == (None, None)
    assert sorted(first["build"]) == ["buildIds", "build_id", "fullImagePath", "visibility"]
    assert answer["buildIds"] == [first["build"]["build_id"], second["build"]["build_id"]]
    assert {name: answer[name] for name in ("build_id", "fullImagePath", "visibility")} == {
        name: first["build"][name] for name in ("build_id", "fullImagePath", "visibility")
    }
    assert (answer["upload_url"], answer["expires_in"]) == (None, None)


def test_no_copy_accepted_is_still_an_answer(copier: Owner) -> None:
    """201 with the flat fields null; a name for several is a 422."""
    before = Kept(copier.api)
    answer = copier.post(source_image="10.0.0.7/a,10.0.0.7/b")
    flat = {name: value for name, value in answer.json().items() if name != "results"}
    nothing = dict.fromkeys(("build_id", "fullImagePath", "upload_url", "expires_in", "visibility"))
    assert (answer.status_code, flat) == (201, {**nothing, "buildIds": []})
    assert refusal(copier.post(source_image="a,b", image_name="c"))[0] == 422
    assert refusal(copier.post(source_image="a,b", image_tag="c"))[0] == 422
    assert Kept(copier.api) == before


def test_anybody_copies_platform_images_from_docker_hub(copier: Owner) -> None:
    """Under their own name; from elsewhere, or under another name, only an admin does."""
    scope = {"owner_scope": "platform", "visibility": "PUBLIC"}
    answer = copier.post(copier.writer, source_image="acme/tool:1", **scope)
    assert (answer.status_code, answer.json()["visibility"]) == (201, "PUBLIC")
    assert answer.json()["fullImagePath"].endswith("/platform/acme/tool:1")
    ghcr = {"source_image": "ghcr.io/acme/tool:2", **scope}
    for body in (ghcr, {"source_image": "acme/tool:1", "image_name": "base", **scope}):
        assert refusal(copier.post(copier.writer, **body))[0] == 403
        assert copier.post(**body).status_code == 201
    several = copier.post(copier.writer, **{**ghcr, "source_image": "ghcr.io/a/b,busybox"}).json()["results"]
    assert [one["build"] is None for one in several] == [True, False]


def test_an_order_of_an_ended_upload_time_says_so_at_the_start(owner: Owner) -> None:
    """A build that nobody uploaded to in time is not started."""
    order = owner.ordered()
    rewrite(owner.catalog, order["build_id"], upload_until=datetime.now(UTC) - timedelta(seconds=1))
    assert refusal(owner.start(order["build_id"]))[0] == 409
