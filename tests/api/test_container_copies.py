"""Copies of other registries' images over HTTP: one source or several, the names of what they become, what is refused."""

from collections.abc import Iterator

import pytest

from kiln.models import Api
from support.api_server import RunningApi, settings_for
from support.cloud import Kept
from support.containers import Owner, refusal
from support.dev_temporal import DevTemporal


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


def test_what_takes_no_upload_cannot_be_started(copier: Owner) -> None:
    """A copy, a build of cloud-builds, one that has ended: 409."""
    copy = copier.post(source_image="busybox").json()["build_id"]
    ended = copier.published(copier.target("ended"))
    for build_id in (copy, copier.waiting(api=Api.CLOUD_BUILDS), ended):
        assert refusal(copier.start(build_id))[0] == 409
