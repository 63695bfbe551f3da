"""Kiln's registry adapter against Docker's registry, which takes Kiln's tokens and nobody else's."""

import contextlib
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http import HTTPStatus
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from kiln.adapters.registry import KilnRegistry
from kiln.adapters.registry_manifests import DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST
from kiln.errors import SourceUnavailableError, UnavailableError
from kiln.registry_tokens import RegistryTokens, make_key_file
from support.oci_images import Made, Pusher, digest, image, index, layer
from support.ports import free_ports
from support.registry import half_write, running_registry, without_mounts

REALM = "http://127.0.0.1:9/registry/token"
MISSING = f"sha256:{'0' * 64}"
ATTESTED = {"os": "unknown", "architecture": "unknown"}


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "token.pem"
    make_key_file(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the registry keeps its data."""
    return tmp_path_factory.mktemp("registry")


@pytest.fixture(scope="module")
def host(folder: Path, key_file: Path) -> Iterator[str]:
    with running_registry(folder, key_file, REALM) as host:
        yield host


@pytest.fixture(scope="module")
def registry(host: str, key_file: Path) -> Iterator[KilnRegistry]:
    registry = KilnRegistry(host, RegistryTokens(key_file))
    yield registry
    registry.close()


@pytest.fixture(scope="module")
def pusher(host: str, key_file: Path) -> Iterator[Pusher]:
    pusher = Pusher(host, RegistryTokens(key_file))
    yield pusher
    pusher.close()


def two_platforms() -> Made:
    """An index of two images that share a layer, with what BuildKit attests to the first."""
    shared = layer("shared")
    attestation = image("provenance")
    return index(
        image("amd64", shared=shared),
        image("arm", "linux/arm/v7", shared=shared),
        Made(attestation.content, attestation.media_type, ATTESTED, attestation.blobs),
    )


def has_whole(registry: KilnRegistry, pusher: Pusher, repository: str, made: Made) -> bool:
    """Whether the repository has the manifests byte for byte, and all their blobs."""
    found = registry.manifest(repository, made.digest)
    assert found is not None
    assert (found.content, found.media_type, found.digest) == (made.content, made.media_type, made.digest)
    blobs = all(pusher.blob(repository, one) for one in map(digest, made.blobs))
    return blobs and all(has_whole(registry, pusher, repository, child) for child in made.children)


def test_the_registry_takes_kilns_tokens(registry: KilnRegistry) -> None:
    """A token that Kiln signs itself opens the registry, which is closed without one."""
    with httpx.Client(trust_env=False) as stranger:
        assert stranger.get(f"http://{registry.host}/v2/").status_code == HTTPStatus.UNAUTHORIZED
    registry.ping()


def test_the_registry_refuses_another_keys_tokens(host: str, tmp_path: Path) -> None:
    """A registry that trusts another key is an outage that says so."""
    make_key_file(tmp_path / "other.pem")
    stranger = KilnRegistry(host, RegistryTokens(tmp_path / "other.pem"))
    with pytest.raises(UnavailableError, match="does not take Kiln's tokens"):
        stranger.ping()
    stranger.close()


def test_a_registry_that_is_down_is_an_outage(key_file: Path) -> None:
    """Nothing listens: the call can be repeated later."""
    absent = KilnRegistry(f"127.0.0.1:{free_ports(1)[0]}", RegistryTokens(key_file))
    with pytest.raises(UnavailableError, match="the registry does not answer"):
        absent.manifest("acme/app", "v1")
    absent.close()


@pytest.mark.parametrize(
    ("docker", "platform", "media_type"),
    [
        (False, "linux/arm/v7", OCI_MANIFEST),
        (True, "linux/arm64", DOCKER_MANIFEST),
        (True, "linux/amd64", DOCKER_MANIFEST),
    ],
)
def test_facts_of_one_image(
    registry: KilnRegistry, pusher: Pusher, docker: bool, platform: str, media_type: str
) -> None:
    """Of either format: the platform stands in the config, and the size is that of config and layers."""
    made = pusher.push("acme/single", image("one", platform, docker=docker), "v1")
    facts = registry.facts("acme/single", "v1")
    assert facts is not None
    assert (facts.digest, facts.media_type) == (made.digest, media_type)
    assert (facts.platforms, facts.size_bytes) == ((platform,), made.size_bytes)


def test_the_variant_that_every_arm64_has_is_not_said(registry: KilnRegistry, pusher: Pusher) -> None:
    """`arm64/v8` is `arm64`, as everybody writes it."""
    made = pusher.push("acme/variant", image("v8", "linux/arm64/v8"))
    facts = registry.facts("acme/variant", made.digest)
    assert facts is not None
    assert facts.platforms == ("linux/arm64",)


def test_facts_of_an_index(registry: KilnRegistry, pusher: Pusher) -> None:
    """All platforms, each blob counted once, and nothing of what is only attested."""
    made = pusher.push("acme/multi", two_platforms(), "v1")
    facts = registry.facts("acme/multi", made.digest)
    assert facts is not None
    assert (facts.media_type, facts.platforms) == (OCI_INDEX, ("linux/amd64", "linux/arm/v7"))
    assert facts.size_bytes == sum(child.size_bytes for child in made.children[:2]) - len(layer("shared"))


def test_what_is_not_there_is_none(registry: KilnRegistry, pusher: Pusher) -> None:
    """Neither a tag, nor a digest, nor a whole repository."""
    pusher.push("acme/known", image("known"), "v1")
    for repository, reference in (("acme/known", "v2"), ("acme/known", MISSING), ("acme/unknown", "v1")):
        assert registry.manifest(repository, reference) is None
        assert registry.facts(repository, reference) is None
    assert registry.tags("acme/unknown") == []


def test_a_copy_is_the_same_bytes_under_no_tag(registry: KilnRegistry, pusher: Pusher) -> None:
    """An index with all below it comes to another repository, what is attested included; twice is harmless."""
    made = pusher.push("kiln-staging/copy", two_platforms(), "attempt-1")
    registry.copy("kiln-staging/copy", made.digest, "acme/copied")
    registry.copy("kiln-staging/copy", made.digest, "acme/copied")
    assert has_whole(registry, pusher, "acme/copied", made)
    assert registry.tags("acme/copied") == []


def test_a_copy_outlives_its_source(registry: KilnRegistry, pusher: Pusher) -> None:
    """When the staged manifests are deleted, the published image stays whole."""
    made = pusher.push("kiln-staging/gone", image("kept"), "attempt-1")
    registry.copy("kiln-staging/gone", made.digest, "acme/kept")
    registry.delete("kiln-staging/gone", made.digest)
    assert has_whole(registry, pusher, "acme/kept", made)


def test_a_registry_that_mounts_nothing_gets_the_blobs(host: str, key_file: Path, pusher: Pusher) -> None:
    """Where a blob cannot be mounted, it is moved."""
    made = pusher.push("kiln-staging/moved", image("x" * 100_000), "attempt-1")
    with without_mounts(host) as proxy:
        registry = KilnRegistry(proxy, RegistryTokens(key_file))
        registry.copy("kiln-staging/moved", made.digest, "acme/moved")
        assert has_whole(registry, pusher, "acme/moved", made)
        registry.close()


def test_a_copy_needs_its_source(registry: KilnRegistry) -> None:
    """What the source does not have is no outage: waiting would not help."""
    with pytest.raises(SourceUnavailableError):
        registry.copy("kiln-staging/nothing", MISSING, "acme/nothing")


def test_a_tag_points_where_it_is_told(registry: KilnRegistry, pusher: Pusher) -> None:
    """A tag is set, set again, and moved."""
    first, second = (pusher.push("acme/tagged", image(text)) for text in ("first", "second"))
    for made in (first, first, second):
        registry.tag("acme/tagged", made.digest, "v1")
        facts = registry.facts("acme/tagged", "v1")
        assert facts is not None
        assert facts.digest == made.digest
    assert registry.tags("acme/tagged") == ["v1"]


def test_a_tag_needs_its_manifest(registry: KilnRegistry, pusher: Pusher) -> None:
    """A digest that the repository does not have gets no tag."""
    pusher.push("acme/untaggable", image("other"))
    with pytest.raises(SourceUnavailableError):
        registry.tag("acme/untaggable", MISSING, "v1")


def test_untagging_leaves_the_other_tags(registry: KilnRegistry, pusher: Pusher) -> None:
    """One of two tags of a digest goes, in a registry that deletes digests only; a second time is harmless."""
    made = pusher.push("acme/twice", image("twice"), "v1")
    registry.tag("acme/twice", made.digest, "v2")
    registry.untag("acme/twice", "v1")
    registry.untag("acme/twice", "v1")
    assert registry.tags("acme/twice") == ["v2"]
    assert has_whole(registry, pusher, "acme/twice", made)


def test_an_untagged_name_is_free_again(registry: KilnRegistry, pusher: Pusher) -> None:
    """The same tag can be set and taken away again."""
    made = pusher.push("acme/again", image("again"), "v1")
    for _ in range(2):
        registry.untag("acme/again", "v1")
        assert registry.manifest("acme/again", "v1") is None
        registry.tag("acme/again", made.digest, "v1")
    assert registry.tags("acme/again") == ["v1"]


def test_a_half_written_tag_goes_alone(registry: KilnRegistry, pusher: Pusher, folder: Path) -> None:
    """A tag that is listed and has no manifest is taken away as any other; a second time is harmless."""
    made = pusher.push("acme/halved", image("whole"), "v1")
    half_write(folder, "acme/halved", "v2")
    assert (sorted(registry.tags("acme/halved")), registry.manifest("acme/halved", "v2")) == (["v1", "v2"], None)
    registry.untag("acme/halved", "v2")
    registry.untag("acme/halved", "v2")
    assert registry.tags("acme/halved") == ["v1"]
    assert has_whole(registry, pusher, "acme/halved", made)


def test_deleting_a_digest_takes_its_tags(registry: KilnRegistry, pusher: Pusher) -> None:
    """The manifest goes with every tag of it, other digests stay; a second time is harmless."""
    made = pusher.push("acme/deleted", image("deleted"), "v1")
    registry.tag("acme/deleted", made.digest, "v2")
    other = pusher.push("acme/deleted", image("other"), "v3")
    registry.delete("acme/deleted", made.digest)
    registry.delete("acme/deleted", made.digest)
    assert registry.manifest("acme/deleted", made.digest) is None
    assert registry.tags("acme/deleted") == ["v3"]
    assert has_whole(registry, pusher, "acme/deleted", other)


@pytest.mark.parametrize("name", ["../v2/acme/other", "acme/x/../other", "acme/other?x=", "acme/other#", "acme//other"])
def test_a_name_that_is_none_opens_no_other_repository(registry: KilnRegistry, pusher: Pusher, name: str) -> None:
    """Whatever a name would mean in a URL, it finds nothing, or the registry refuses it."""
    pusher.push("acme/other", image("other"), "v1")
    with contextlib.suppress(UnavailableError):
        assert registry.manifest(name, "v1") is None


def test_one_adapter_serves_many_threads(registry: KilnRegistry, pusher: Pusher) -> None:
    """Calls of many threads at once share connections and tokens."""
    made = pusher.push("acme/threads", image("threads"), "v1")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: registry.facts("acme/threads", "v1"), range(40)))
    assert {facts.digest for facts in found if facts is not None} == {made.digest}
    assert None not in found


def test_the_key_file_is_made_once_and_is_nobody_elses(tmp_path: Path) -> None:
    """Processes that make it at once end with one key; its mode is 0600, and its certificate lasts for years."""
    path = tmp_path / "new" / "token.pem"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: make_key_file(path), range(4)))
    content = path.read_bytes()
    make_key_file(path)
    certificate = x509.load_pem_x509_certificate(content)
    assert path.read_bytes() == content
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert certificate.public_key() == load_pem_private_key(content, None).public_key()
    assert certificate.not_valid_after_utc - certificate.not_valid_before_utc > timedelta(days=3650)


@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_key_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    """A missing or broken key file is refused by the setting's name."""
    path = tmp_path / "token.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnavailableError, match="KILN_REGISTRY_TOKEN_KEY"):
        RegistryTokens(path).check()
