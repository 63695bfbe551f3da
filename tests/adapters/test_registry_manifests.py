"""Manifests as strangers may write them: taken apart, or refused."""

import json
from typing import Any

import pytest

from kiln.adapters.registry_manifests import DOCKER_LIST, OCI_INDEX, OCI_MANIFEST, image_facts, parse
from kiln.errors import SourceUnavailableError
from kiln.ports import ImageFacts, Manifest
from support.oci_images import Made, digest, image, index

ONE = {"mediaType": "x", "digest": digest(b"x"), "size": 1}


def facts_of(made: Made) -> ImageFacts:
    """The facts as a registry that has all of it gives them."""
    known: dict[str, Made] = {}
    blobs: dict[str, bytes] = {}

    def note(one: Made) -> None:
        known[one.digest] = one
        blobs.update({digest(blob): blob for blob in one.blobs})
        for child in one.children:
            note(child)

    def manifest(wanted: str) -> Manifest:
        return Manifest(wanted, known[wanted].media_type, known[wanted].content)

    note(made)
    return image_facts(manifest(made.digest), manifest, blobs.__getitem__)


def test_an_index_of_indexes_has_the_platforms_of_both() -> None:
    """The OCI lets an index list another; Docker's list is read alike."""
    made = index(index(image("a"), docker=True), image("b", "linux/arm64"))
    assert facts_of(made).platforms == ("linux/amd64", "linux/arm64")


def test_a_manifest_under_two_platforms_counts_once() -> None:
    """Both platforms are told, and its blobs counted once."""
    once = image("a")
    again = Made(once.content, once.media_type, {"os": "linux", "architecture": "arm"}, once.blobs)
    facts = facts_of(index(once, again))
    assert (facts.platforms, facts.size_bytes) == (("linux/amd64", "linux/arm/v7"), once.size_bytes)


def test_what_is_no_image_has_no_platform() -> None:
    """An artifact (a chart, a signature) has a config of its own kind, which is not read."""
    content = json.dumps({"config": {**ONE, "mediaType": "application/vnd.example.v1+json"}, "layers": [ONE]})
    facts = facts_of(Made(content.encode(), OCI_MANIFEST))
    assert (facts.platforms, facts.size_bytes) == ((), 1)


def test_an_index_that_multiplies_is_refused() -> None:
    """Four levels of ten name ten thousand manifests in a few bytes."""
    made = image("a")
    for _ in range(4):
        made = index(*[made] * 10)
    with pytest.raises(SourceUnavailableError, match="more than 200 manifests"):
        facts_of(made)


@pytest.mark.parametrize(
    ("media_type", "said"),
    [
        (OCI_MANIFEST, []),
        (OCI_MANIFEST, None),
        (OCI_MANIFEST, {}),
        (OCI_MANIFEST, {"config": "x"}),
        (OCI_MANIFEST, {"config": {**ONE, "size": -1}}),
        (OCI_MANIFEST, {"config": {**ONE, "size": "1"}}),
        (OCI_MANIFEST, {"config": {**ONE, "digest": 1}}),
        (OCI_MANIFEST, {"config": ONE, "layers": {"a": 1}}),
        (OCI_INDEX, {"manifests": 7}),
        (DOCKER_LIST, {"manifests": [{}]}),
        (DOCKER_LIST, {"manifests": [{**ONE, "platform": "linux"}]}),
        ("application/vnd.docker.distribution.manifest.v1+prettyjws", {"schemaVersion": 1, "fsLayers": []}),
        ("text/html", {}),
    ],
)
def test_what_is_no_manifest_is_refused(media_type: str, said: Any) -> None:
    """Another format, and each way to get one wrong."""
    content = json.dumps(said).encode()
    with pytest.raises(SourceUnavailableError, match="of no format that Kiln reads"):
        parse(Manifest(digest(content), media_type, content))


@pytest.mark.parametrize("content", [b"", b"<html>", b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_refused(content: bytes) -> None:
    """Whatever a server sends in a manifest's place."""
    with pytest.raises(SourceUnavailableError, match="of no format that Kiln reads"):
        parse(Manifest(digest(content), OCI_MANIFEST, content))
