"""What stands in a manifest: its blobs, its children and their platforms, for Docker's formats and the OCI's.

Formats: https://github.com/opencontainers/image-spec and https://distribution.github.io/distribution/spec/manifest-v2-2/
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from kiln.errors import SourceUnavailableError
from kiln.ports import ImageFacts, Manifest

OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
ACCEPT: Final = f"{OCI_INDEX}, {DOCKER_LIST}, {OCI_MANIFEST}, {DOCKER_MANIFEST}"

# Registries refuse manifests that are longer: https://distribution.github.io/distribution/spec/manifest-v2-2/
MANIFEST_LIMIT_BYTES: Final = 4 * 1024**2
CONFIG_LIMIT_BYTES: Final = 8 * 1024**2
_TREE_LIMIT_BYTES: Final = 16 * 1024**2
_TREE_LIMIT: Final = 200

_INDEXES: Final = frozenset({OCI_INDEX, DOCKER_LIST})
_IMAGE_CONFIGS: Final = frozenset(
    {"application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"}
)
# Blobs that their owner lets nobody copy: registries do not ask for them, and mostly do not have them.
_FOREIGN_MARKS: Final = (".nondistributable.", ".foreign.")
_ATTESTATION_PLATFORM: Final = "unknown/unknown"
# The variant that is meant where none is said, and is therefore not said: containerd's rule.
_PLAIN_VARIANTS: Final = frozenset({("arm64", "v8"), ("amd64", "v1")})


@dataclass(frozen=True)
class Descriptor:
    """A manifest's or index's word on one of its parts. `platform` as an index has it, else None."""

    digest: str
    media_type: str
    size_bytes: int
    platform: str | None = None

    @property
    def is_foreign(self) -> bool:
        return any(mark in self.media_type for mark in _FOREIGN_MARKS)


@dataclass(frozen=True)
class Parts:
    """A manifest taken apart: an index has `children` only, an image `config` and `layers`."""

    children: tuple[Descriptor, ...] = ()
    config: Descriptor | None = None
    layers: tuple[Descriptor, ...] = ()

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        return self.layers if self.config is None else (self.config, *self.layers)


@dataclass(frozen=True)
class Node:
    """One manifest of a tree. `platform` is what the index above it says."""

    manifest: Manifest
    parts: Parts
    platform: str | None = None


def digest_of(content: bytes, like: str = "sha256:") -> str:
    """The digest of these bytes, by the algorithm of another digest. Raises SourceUnavailableError for an unknown one."""
    algorithm = like.partition(":")[0]
    if algorithm not in {"sha256", "sha512"}:
        raise SourceUnavailableError(f"the digest algorithm {algorithm[:20]} is not known")
    return f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}"


def parse(manifest: Manifest) -> Parts:
    """The parts of a manifest. Raises SourceUnavailableError for what is none, or is of Docker's first format."""
    try:
        said = json.loads(manifest.content)
        if manifest.media_type in _INDEXES:
            return Parts(children=tuple(_descriptor(one) for one in said.get("manifests") or ()))
        layers = tuple(_descriptor(one) for one in said.get("layers") or ())
        return Parts(config=_descriptor(said["config"]), layers=layers)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SourceUnavailableError(
            f"the manifest {manifest.digest} is of no format that Kiln reads ({manifest.media_type[:100]})"
        ) from None


def walk(root: Manifest, fetch: Callable[[str], Manifest], *, attestations: bool) -> Iterator[Node]:
    """A manifest and all below it, children first; what BuildKit attests to an image only with `attestations`.

    `fetch` gets a child by its digest. Raises what it raises, and SourceUnavailableError for a tree that is too large.
    """
    return _Walk(fetch, attestations=attestations).below(root, None)


def image_facts(root: Manifest, fetch: Callable[[str], Manifest], read_config: Callable[[str], bytes]) -> ImageFacts:
    """Platforms and size of a manifest, of which `fetch` gets children and `read_config` configs by digest."""
    sizes: dict[str, int] = {}
    platforms: dict[str, None] = {}
    for node in walk(root, fetch, attestations=False):
        sizes.update({blob.digest: blob.size_bytes for blob in node.parts.blobs})
        config = node.parts.config
        platform = node.platform
        if platform is None and config is not None and config.media_type in _IMAGE_CONFIGS:
            platform = _config_platform(read_config(config.digest))
        if platform is not None and config is not None:
            platforms[platform] = None
    return ImageFacts(root.digest, root.media_type, tuple(platforms), sum(sizes.values()))


class _Walk:
    """Counts what it sees: an index may name one child many times, and nest."""

    def __init__(self, fetch: Callable[[str], Manifest], *, attestations: bool) -> None:
        self._fetch = fetch
        self._attestations = attestations
        self._known: dict[str, Manifest] = {}
        self._count = 0
        self._size_bytes = 0

    def below(self, manifest: Manifest, platform: str | None) -> Iterator[Node]:
        self._count += 1
        if self._count > _TREE_LIMIT:
            raise SourceUnavailableError(f"the image has more than {_TREE_LIMIT} manifests")
        parts = parse(manifest)
        for child in parts.children:
            if self._attestations or child.platform != _ATTESTATION_PLATFORM:
                yield from self.below(self._get(child.digest), child.platform)
        yield Node(manifest, parts, platform)

    def _get(self, digest: str) -> Manifest:
        if digest not in self._known:
            found = self._fetch(digest)
            self._size_bytes += len(found.content)
            if self._size_bytes > _TREE_LIMIT_BYTES:
                raise SourceUnavailableError(f"the image's manifests have more than {_TREE_LIMIT_BYTES} bytes")
            self._known[digest] = found
        return self._known[digest]


def _descriptor(said: Mapping[str, Any]) -> Descriptor:
    digest, media_type, size_bytes = said["digest"], said.get("mediaType", ""), said["size"]
    if not isinstance(digest, str) or not isinstance(media_type, str):
        raise TypeError("a descriptor's digest and media type are text")
    if not isinstance(size_bytes, int) or size_bytes < 0:
        raise ValueError("a descriptor's size is a count of bytes")
    platform = said.get("platform")
    return Descriptor(digest, media_type, size_bytes, _platform(platform) if platform else None)


def _config_platform(content: bytes) -> str | None:
    """What an image's config says; None if it says nothing."""
    try:
        said = json.loads(content)
        return _platform(said) if said.get("os") and said.get("architecture") else None
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def _platform(said: Mapping[str, Any]) -> str:
    """`linux/arm/v7`; `linux/arm64` without the variant that every arm64 has."""
    parts = [said.get("os"), said.get("architecture"), said.get("variant") or ""]
    system, architecture, variant = (part if isinstance(part, str) else "unknown" for part in parts)
    if architecture == "arm" and not variant:
        variant = "v7"
    plain = not variant or (architecture, variant) in _PLAIN_VARIANTS
    return f"{system}/{architecture}" if plain else f"{system}/{architecture}/{variant}"
