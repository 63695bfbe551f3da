"""Container images made by hand, byte by byte, and their way into a registry."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from kiln.adapters.registry_manifests import DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST
from kiln.registry_tokens import Access, RegistryTokens

OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
REQUEST_SECONDS = 10.0


@dataclass(frozen=True)
class Made:
    """A manifest with what it needs. `platform` as an index would have it."""

    content: bytes
    media_type: str
    platform: dict[str, str] = field(default_factory=dict)
    blobs: tuple[bytes, ...] = ()
    children: tuple["Made", ...] = ()

    @property
    def digest(self) -> str:
        return digest(self.content)

    @property
    def size_bytes(self) -> int:
        return sum(len(blob) for blob in self.blobs)


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def layer(text: str) -> bytes:
    """A layer of one file, whose content is the text."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        info = tarfile.TarInfo("note")
        info.size = len(text.encode())
        archive.addfile(info, io.BytesIO(text.encode()))
    return gzip.compress(raw.getvalue(), mtime=0)


def image(text: str, platform: str = "linux/amd64", *, docker: bool = False, shared: bytes = b"") -> Made:
    """An image of one layer, in the OCI's format or Docker's; with a first layer that it has in common with others."""
    system, architecture, *variant = platform.split("/")
    named = {"os": system, "architecture": architecture} | ({"variant": variant[0]} if variant else {})
    layers = [shared, layer(text)] if shared else [layer(text)]
    diff_ids = [digest(gzip.decompress(one)) for one in layers]
    config = json.dumps({**named, "config": {}, "rootfs": {"type": "layers", "diff_ids": diff_ids}}).encode()
    types = (DOCKER_MANIFEST, DOCKER_CONFIG, DOCKER_LAYER) if docker else (OCI_MANIFEST, OCI_CONFIG, OCI_LAYER)
    said = {
        "schemaVersion": 2,
        "mediaType": types[0],
        "config": descriptor(types[1], config),
        "layers": [descriptor(types[2], one) for one in layers],
    }
    # Not the form that a JSON library would write again: what is copied must be the bytes themselves.
    return Made(json.dumps(said, indent=3).encode() + b"\n", types[0], named, (config, *layers))


def index(*images: Made, docker: bool = False) -> Made:
    """Several images under one name."""
    media_type = DOCKER_LIST if docker else OCI_INDEX
    manifests = [{**descriptor(one.media_type, one.content), "platform": one.platform} for one in images]
    said = {"schemaVersion": 2, "mediaType": media_type, "manifests": manifests}
    return Made(json.dumps(said, indent=3).encode(), media_type, children=images)


def descriptor(media_type: str, content: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest(content), "size": len(content)}


class Pusher:
    """Pushes as any client would, with a token of `tokens` where the registry wants one."""

    def __init__(self, host: str, tokens: RegistryTokens | None = None) -> None:
        self._tokens = tokens
        self.http = httpx.Client(base_url=f"http://{host}", trust_env=False, verify=False, timeout=REQUEST_SECONDS)

    def close(self) -> None:
        self.http.close()

    def push(self, repository: str, made: Made, tag: str | None = None) -> Made:
        """The image, which then has the tag, or its digest only."""
        for child in made.children:
            self.push(repository, child)
        for blob in made.blobs:
            self._push_blob(repository, blob)
        path = f"/v2/{repository}/manifests/{tag or made.digest}"
        self._send(repository, self.http.put, path, content=made.content, headers={"Content-Type": made.media_type})
        return made

    def blob(self, repository: str, blob_digest: str) -> bytes:
        """What the registry has under this digest in this repository."""
        return self._send(repository, self.http.get, f"/v2/{repository}/blobs/{blob_digest}").content

    def _push_blob(self, repository: str, blob: bytes) -> None:
        place = self._send(repository, self.http.post, f"/v2/{repository}/blobs/uploads/").headers["Location"]
        url = httpx.URL(place).copy_merge_params({"digest": digest(blob)})
        self._send(repository, self.http.put, url, content=blob)

    def _send(self, repository: str, send: Callable[..., httpx.Response], url: Any, **options: Any) -> httpx.Response:
        headers = dict(options.pop("headers", {}))
        if self._tokens is not None:
            token = self._tokens.issue("test", [Access(repository, ("pull", "push"))])
            headers["Authorization"] = f"Bearer {token}"
        return send(url, headers=headers, **options).raise_for_status()
