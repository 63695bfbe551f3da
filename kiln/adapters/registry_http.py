"""What Kiln's own registry and other people's have in common on the wire: paths, clients, bounded bodies.

Protocol: https://github.com/opencontainers/distribution-spec
"""

import ipaddress
import time
from typing import Final
from urllib.parse import quote, urlsplit

import httpx

from kiln.errors import SourceUnavailableError

CONNECT_SECONDS: Final = 5.0
ANSWER_SECONDS: Final = 30.0
CHUNK_BYTES: Final = 1024**2


def is_loopback(host: str) -> bool:
    """Whether `host`, with or without a port, is this machine by its name alone: there Kiln speaks plain HTTP."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def base_url(host: str, *, insecure: bool = False) -> str:
    """HTTPS, except on loopback and where it is said to be `insecure`."""
    return f"{'http' if insecure or is_loopback(host) else 'https'}://{host}"


def manifest_path(repository: str, reference: str) -> str:
    """Of a tag or a digest."""
    return f"/v2/{quote(repository)}/manifests/{quote(reference, safe=':')}"


def blob_path(repository: str, digest: str) -> str:
    return f"/v2/{quote(repository)}/blobs/{quote(digest, safe=':')}"


def uploads_path(repository: str) -> str:
    return f"/v2/{quote(repository)}/blobs/uploads/"


def tags_path(repository: str) -> str:
    return f"/v2/{quote(repository)}/tags/list"


def read_bounded(response: httpx.Response, limit_bytes: int, until: float | None = None) -> bytes:
    """A streamed body as it came. `until` is a time of `time.monotonic`.

    Raises SourceUnavailableError past the limit, httpx.ReadTimeout past that time.
    """
    body = bytearray()
    for piece in response.iter_raw(CHUNK_BYTES):
        body += piece
        if len(body) > limit_bytes:
            raise SourceUnavailableError(f"the registry's answer has more than {limit_bytes} bytes")
        if until is not None and time.monotonic() > until:
            raise httpx.ReadTimeout("the answer takes too long", request=response.request)
    return bytes(body)
