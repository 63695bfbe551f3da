"""container-images end to end: the published SDK, a real engine, a real registry, and somebody else's registry."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prime_sandboxes import APIClient, ImageClient
from prime_sandboxes.models import BuildImageRequest, UpdateImagesRequest

from support.container_rig import Caller, ContainerRig, busybox, container_rig, context
from support.oci_images import Pusher, image, index
from support.processes import eventually
from support.registry import running_registry

pytestmark = [pytest.mark.docker, pytest.mark.slow]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Somebody else's registry, by its host and port."""
    with running_registry(tmp_path_factory.mktemp("foreign")) as host:
        yield host


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, foreign: str) -> Iterator[ContainerRig]:
    with container_rig(tmp_path_factory.mktemp("kiln"), KILN_TRANSFER_REGISTRIES=foreign) as rig:
        yield rig


@pytest.fixture(scope="module")
def acme(rig: ContainerRig) -> Caller:
    return rig.caller("acme")


@pytest.fixture
def sdk(rig: ContainerRig, acme: Caller, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ImageClient:
    """The SDK as its users set it up: by three variables."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PRIME_API_BASE_URL", rig.stack.api_url)
    monkeypatch.setenv("PRIME_API_KEY", acme.key)
    monkeypatch.setenv("PRIME_TEAM_ID", "")
    return ImageClient(APIClient())


def built(rig: ContainerRig, sdk: ImageClient, acme: Caller, archive: bytes, **fields: object) -> str:
    """The id of a build that went the SDK's way: order, upload, start."""
    answer = sdk.initiate_build(BuildImageRequest(**fields))
    put = httpx.put(
        answer.upload_url, content=archive, headers={"Content-Type": "application/octet-stream"}, trust_env=False
    )
    assert put.status_code == 200, put.text
    sdk.start_build(answer.build_id)
    acme.wait(answer.build_id)
    return answer.build_id


def test_the_published_sdk_builds_an_image(rig: ContainerRig, sdk: ImageClient, acme: Caller) -> None:
    """Ordered, uploaded, started and listed; the Dockerfile lies where the client put it."""
    archive = context("FROM scratch\nCOPY busybox /b\n", at=".__prime_dockerfile__")
    fields = {"image_name": "tools/first", "image_tag": "v1", "dockerfile_path": ".__prime_dockerfile__"}
    build_id = built(rig, sdk, acme, archive, **fields)
    status = sdk.get_build_status(build_id)
    assert status["status"] == "COMPLETED", acme.log(build_id)
    assert status["fullImagePath"] == f"{rig.registry}/acme/tools/first:v1"
    assert status["visibility"] == "PRIVATE"
    assert status["sizeBytes"] > 500_000
    (row,) = [row for row in sdk.list(search="first").data if row.image_tag == "v1"]
    assert (row.id, row.image_name, str(row.status.value)) == (build_id, "tools/first", "COMPLETED")
    assert rig.tags("acme/tools/first") == ["v1"]
    assert eventually(lambda: rig.contexts == [])


def test_a_build_without_upload_is_waited_for_and_cancelled(rig: ContainerRig, sdk: ImageClient, acme: Caller) -> None:
    """It reads UPLOADING, and leaves nothing when it is cancelled."""
    answer = sdk.initiate_build(BuildImageRequest(image_name="never", image_tag="v1"))
    assert sdk.get_build_status(answer.build_id)["status"] == "UPLOADING"
    cancelled = acme.http.post(f"/api/v1/images/build/{answer.build_id}/cancel")
    assert cancelled.status_code == 202
    acme.wait(answer.build_id, "cancelled")
    assert sdk.get_build_status(answer.build_id)["status"] == "CANCELLED"
    late = httpx.put(answer.upload_url, content=busybox(), trust_env=False)
    assert late.status_code == 409
    assert rig.contexts == []


def test_a_rename_moves_the_tag_and_a_deletion_removes_the_manifest(
    rig: ContainerRig, sdk: ImageClient, acme: Caller
) -> None:
    """A retag in the registry, not a rebuild; the manifest goes with the last tag that needs it."""
    built(rig, sdk, acme, busybox("RUN echo renamed"), image_name="old", image_tag="v1")
    digest = rig.digest_of("acme/old", "v1")
    answer = sdk.update_images(
        UpdateImagesRequest(
            mode="explicit",
            updates=[{"source": {"reference": "acme/old:v1"}, "set": {"name": "new", "tag": "v2"}}],
        )
    )
    assert answer.success, answer
    assert rig.digest_of("acme/new", "v2") == digest
    assert (rig.tags("acme/old"), rig.revisions("acme/old")) == ([], [])
    deleted = acme.http.delete("/api/v1/images/new/v2")
    assert (deleted.status_code, deleted.json()["success"]) == (200, True)
    assert (rig.tags("acme/new"), rig.revisions("acme/new")) == ([], [])


def test_a_shared_manifest_outlives_one_of_its_tags(rig: ContainerRig, sdk: ImageClient, acme: Caller) -> None:
    """Two tags of one digest: deleting one leaves the other."""
    archive = busybox("RUN echo shared")
    for tag in ("one", "two"):
        built(rig, sdk, acme, archive, image_name="shared", image_tag=tag)
    digest = rig.digest_of("acme/shared", "two")
    assert acme.http.delete("/api/v1/images/shared/one").status_code == 200
    assert rig.tags("acme/shared") == ["two"]
    assert rig.digest_of("acme/shared", "two") == digest
    assert rig.revisions("acme/shared") == [digest] or digest in rig.revisions("acme/shared")


def test_a_transfer_copies_every_platform(rig: ContainerRig, sdk: ImageClient, acme: Caller, foreign: str) -> None:
    """skopeo copies an index of two platforms byte by byte."""
    digest = _push_index(foreign, "tools/both", "v1")
    answer = sdk.transfer_image(f"{foreign}/tools/both:v1")
    seen = acme.wait(answer.build_id, "succeeded")
    assert rig.digest_of("acme/both", "v1") == digest
    assert seen["image"]["digest"] == digest
    assert answer.full_image_path == f"{rig.registry}/acme/both:v1"


def test_several_sources_are_answered_one_by_one(rig: ContainerRig, acme: Caller, foreign: str) -> None:
    """What is allowed is copied; what is not has its own error."""
    _push_index(foreign, "tools/both", "v2")
    body = {"source_image": f"{foreign}/tools/both:v2,10.0.0.7/secret:v1"}
    answer = acme.http.post("/api/v1/images/build", json=body).json()
    good, bad = answer["results"]
    assert (good["error"], bad["build"]) == (None, None)
    assert bad["error"]
    assert answer["buildIds"] == [good["build"]["build_id"]]
    acme.wait(good["build"]["build_id"], "succeeded")


def test_a_missing_source_fails_with_its_reason(acme: Caller, foreign: str) -> None:
    """The build says that the image is not there."""
    answer = acme.http.post("/api/v1/images/build", json={"source_image": f"{foreign}/no/such:thing"}).json()
    seen = acme.wait(answer["build_id"], "failed")
    assert seen["error"]["code"] == "source_unavailable"


def _push_index(host: str, repository: str, tag: str) -> str:
    """Pushes an index of two platforms to a registry without authentication; returns its digest."""
    pusher = Pusher(host)
    try:
        made = index(image("one"), image("two", "linux/arm64"))
        return pusher.push(repository, made, tag).digest
    finally:
        pusher.close()
