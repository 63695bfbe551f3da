"""container-images as its published SDK uses it, unchanged: three variables, and the server is Kiln."""

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from prime_sandboxes import APIClient, ImageClient
from prime_sandboxes.core.client import APIError
from prime_sandboxes.models import BuildImageRequest, ImageVisibility, UpdateImagesRequest

from support.api_server import RunningApi, plain_client, settings_for
from support.archives import archive
from support.containers import ARCHIVE, KilnsRegistry, Owner, kilns_registry
from support.dev_temporal import DevTemporal
from support.moto import DUMMY_KEY, REGION, running_moto

BUCKET = "contexts"
LIMIT = 4096


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KilnsRegistry]:
    with kilns_registry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, temporal: DevTemporal, registry: KilnsRegistry
) -> Iterator[RunningApi]:
    changes = {
        "registry": registry.host,
        "registry_token_key": registry.key_file,
        # Allowed by the operator: their names are not looked up.
        "transfer_registries": ("docker.io", "ghcr.io"),
    }
    with RunningApi(settings_for(tmp_path_factory.mktemp("api"), temporal.port, **changes)) as api:
        yield api


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory: pytest.TempPathFactory, temporal: DevTemporal) -> Iterator[RunningApi]:
    """A server whose contexts go to (simulated) S3."""
    with running_moto() as moto, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", DUMMY_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", DUMMY_KEY)
        patch.setenv("AWS_DEFAULT_REGION", REGION)
        boto3.client("s3", endpoint_url=moto.url).create_bucket(Bucket=BUCKET)
        changes = {"objects": f"s3://{BUCKET}/kiln", "s3_endpoint": moto.url, "max_context_bytes": LIMIT}
        with RunningApi(settings_for(tmp_path_factory.mktemp("s3"), temporal.port, **changes)) as api:
            yield api


@pytest.fixture
def owner(server: RunningApi) -> Iterator[Owner]:
    owner = Owner(server)
    yield owner
    owner.close()


def client_of(owner: Owner, patch: pytest.MonkeyPatch, home: Path) -> ImageClient:
    """The SDK as its users set it up."""
    patch.setenv("HOME", str(home))
    patch.setenv("PRIME_API_BASE_URL", owner.api.url)
    patch.setenv("PRIME_API_KEY", owner.key)
    patch.setenv("PRIME_TEAM_ID", "")
    return ImageClient(APIClient())


@pytest.fixture
def sdk(owner: Owner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ImageClient:
    return client_of(owner, monkeypatch, tmp_path)


def upload(url: str, content: bytes) -> int:
    """As the command line that stands on this SDK does it."""
    with plain_client("") as http:
        headers = {"Content-Type": "application/octet-stream"}
        return http.put(url, content=content, headers=headers).status_code


def test_a_build_is_ordered_uploaded_started_and_watched(owner: Owner, sdk: ImageClient) -> None:
    """By `initiate_build`, a PUT, `start_build` and `get_build_status`."""
    request = BuildImageRequest(image_name="app", image_tag="v1", dockerfile_path=".__prime_dockerfile__")
    order = sdk.initiate_build(request)
    assert order.full_image_path == f"{owner.api.settings.registry_host}/{owner.slug}/app:v1"
    assert (order.expires_in, order.visibility, order.build_ids) == (3600, ImageVisibility.PRIVATE, [order.build_id])
    with pytest.raises(APIError, match="HTTP 409: the build context has not been uploaded yet"):
        sdk.start_build(order.build_id)
    assert upload(order.upload_url, archive({".__prime_dockerfile__": b"FROM scratch\n"})) == 200
    assert sdk.start_build(order.build_id)["status"] == "PENDING"
    assert sdk.get_build_status(order.build_id)["status"] == "PENDING"


def test_a_transfer_of_one_source(sdk: ImageClient, owner: Owner) -> None:
    """From Docker Hub it is the platform's, as the SDK asks; from elsewhere one's own."""
    hub = sdk.transfer_image("busybox:1.36")
    assert (hub.full_image_path.partition("/")[2], hub.visibility) == ("platform/busybox:1.36", "PUBLIC")
    own = sdk.transfer_image("ghcr.io/acme/tool:2", image_name="tool", image_tag="new", team_id=owner.slug)
    assert own.full_image_path.partition("/")[2] == f"team-{owner.organization_id}/tool:new"
    assert (own.upload_url, own.visibility) == (None, "PRIVATE")


def test_a_transfer_of_several_sources(sdk: ImageClient) -> None:
    """Each has its own result."""
    answer = sdk.transfer_image("ghcr.io/acme/one,10.0.0.7/two:v2,ghcr.io/acme/three")
    assert [one.source_image for one in answer.results] == ["ghcr.io/acme/one", "10.0.0.7/two:v2", "ghcr.io/acme/three"]
    assert [one.build is None for one in answer.results] == [False, True, False]
    assert "IP address" in answer.results[1].error


def test_images_are_listed_and_updated(sdk: ImageClient, owner: Owner, registry: KilnsRegistry) -> None:
    """The list's rows and the updates' results are as the SDK's models have them."""
    made = registry.push(f"{owner.slug}/app", "v1")
    build_id = owner.published(made=made)
    page = sdk.list(search="app")
    (row,) = page.data
    assert (row.id, row.image_name, row.status.value, page.total_count) == (build_id, "app", "COMPLETED", 1)
    assert row.size_bytes == made.size_bytes
    updates = [
        {"source": {"owner": {"type": "personal"}, "name": "app", "tag": "v1"}, "set": {"tag": "v2"}},
        {"source": {"reference": f"{owner.slug}/app:v2"}, "set": {"visibility": "PUBLIC"}},
        {"source": {"reference": "nothing:v1"}, "set": {"owner": {"type": "team", "teamId": owner.slug}}},
    ]
    answer = sdk.update_images(UpdateImagesRequest(updates=updates))
    assert [one.success for one in answer.results] == [True, True, False]
    assert answer.results[2].error.code == "image_not_found"
    (row,) = sdk.list().data
    assert (row.image_tag, row.visibility, row.display_ref) == ("v2", "PUBLIC", f"{owner.slug}/app:v2")


def test_errors_are_told_in_words(sdk: ImageClient) -> None:
    """The SDK shows the status and the sentence."""
    with pytest.raises(APIError, match=r"^HTTP 422: image_name: must be lower-case"):
        sdk.initiate_build(BuildImageRequest(image_name="App", image_tag="v1"))
    with pytest.raises(APIError, match=r"^HTTP 403: the team is not this API key's organization$"):
        sdk.list(team_id="nobody")


def test_a_context_in_s3_is_checked_at_the_start(
    s3_server: RunningApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The upload goes past Kiln: 409 before it, 413 or 422 for one that cannot be built from, which fails the build."""
    owner = Owner(s3_server)
    sdk = client_of(owner, monkeypatch, tmp_path)
    orders = [sdk.initiate_build(BuildImageRequest(image_name="app", image_tag=f"v{number}")) for number in range(3)]
    with pytest.raises(APIError, match="HTTP 409"):
        sdk.start_build(orders[0].build_id)
    contents = (ARCHIVE, b"x" * (LIMIT + 1), b"no archive")
    for order, content in zip(orders, contents, strict=True):
        assert upload(order.upload_url, content) == 200
    assert sdk.start_build(orders[0].build_id)["status"] == "PENDING"
    for order, status in zip(orders[1:], (413, 422), strict=True):
        with pytest.raises(APIError, match=f"HTTP {status}"):
            sdk.start_build(order.build_id)
        seen = sdk.get_build_status(order.build_id)
        assert seen["status"] == "FAILED"
        assert seen["errorMessage"]
        assert owner.row(order.build_id).error_code == "context_invalid"
    owner.close()
