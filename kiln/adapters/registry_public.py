"""Other people's registries, read without credentials, and which of them Kiln may be sent to.

Whoever names a registry, or is one, must not get Kiln to call on the private network that it stands in: names are
looked up before each request, and the address that a connection then has is looked at once more.
"""

import contextlib
import ipaddress
import json
import re
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from kiln.adapters import registry_manifests as manifests
from kiln.adapters.registry_http import (
    ANSWER_SECONDS,
    CONNECT_SECONDS,
    base_url,
    blob_path,
    is_loopback,
    manifest_path,
    read_bounded,
)
from kiln.errors import SourceUnavailableError, UnavailableError
from kiln.ports import ImageFacts, Manifest
from kiln.references import DOCKER_HUB, Reference, parse_reference

DEFAULT_REGISTRIES: Final = frozenset(
    {DOCKER_HUB, "ghcr.io", "quay.io", "public.ecr.aws", "registry.k8s.io", "mcr.microsoft.com"}
)
DOCKER_HUB_API: Final = "registry-1.docker.io"
# For all that one image takes: a registry may be slow, but not for ever.
FACTS_SECONDS: Final = 60.0
REDIRECT_LIMIT: Final = 5
TOKEN_LIMIT_BYTES: Final = 1024**2

_BEARER: Final = re.compile(r"\bbearer\s+(.*)", re.IGNORECASE)
_PARAMETER: Final = re.compile(r'([A-Za-z_]+)="([^"]*)"')
_TRANSLATION_NETWORK: Final = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: an IPv4 address stands at its end
_NOT_THERE: Final = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND})

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str], Collection[str]]


def resolve(name: str) -> Collection[str]:
    """The addresses of a host name; none if it has none now."""
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return ()


def source_address_problem(host: str, allowed: Collection[str], resolve: Resolve = resolve) -> str | None:
    """Why images may not be copied from `host` (with its port), in one sentence; None if they may.

    `allowed` are the hosts that the operator added: they may be anywhere. A name that has no address now may be asked
    later. Blocks while the name is looked up.
    """
    if _is_among(host, allowed):
        return None
    if _address(_name_of(host)) is not None:
        return f"images are copied from registries by name, not from the IP address {host}"
    if host not in DEFAULT_REGISTRIES:
        return f"images are not copied from {host}; the registries are {', '.join(sorted({*DEFAULT_REGISTRIES, *allowed}))}"
    if _is_private_name(_api_host(host), resolve):
        return f"{host} resolves to a private address"
    return None


class AnonymousRegistries:
    """Implements the port `PublicRegistries`. For any number of threads.

    `allowed` are the hosts, with their ports, that the operator added: only they may have private addresses. So a
    private registry's token service or blob store must be among them, too, if it is another host.
    """

    def __init__(self, allowed: Collection[str] = (), resolve: Resolve = resolve) -> None:
        self._reach = _Reach(frozenset(name.lower().removesuffix(":443") for name in allowed), resolve)
        self._http = httpx.Client(
            timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS), headers={"Accept-Encoding": "identity"}
        )

    def close(self) -> None:
        """Closes every pooled connection."""
        self._http.close()

    def problem(self, host: str) -> str | None:
        """Why images may not be taken from this host, in one sentence; None if they may. Blocks for its address."""
        return source_address_problem(host, self._reach.allowed, self._reach.resolve)

    def facts(self, reference: str) -> ImageFacts:
        return _Reading(self._http, self._reach, parse_reference(reference, "image")).facts()


@dataclass(frozen=True)
class _Reach:
    """Where Kiln may be sent: by TLS to public addresses, and anyhow to `allowed` hosts."""

    allowed: frozenset[str]
    resolve: Resolve

    def check(self, url: httpx.URL) -> None:
        """Raises SourceUnavailableError unless this may be asked."""
        host = url.netloc.decode()
        if host in self.allowed:
            return
        if _is_private_name(_wire_name(url), self.resolve):
            raise _private(host)
        if url.scheme != "https":
            raise SourceUnavailableError(f"the registry leads to {host} without TLS")

    def guard(self, url: httpx.URL) -> Mapping[str, Any]:
        """Request extensions that look at the address of a connection before anything is sent over it."""
        return {} if url.netloc.decode() in self.allowed else {"trace": _AddressGuard(_wire_name(url))}


class _AddressGuard:
    """A name may have another address when the connection is made than when it was looked up.

    A connection to the environment's proxy is let through: that one decides itself where it goes.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._to_host = False

    def __call__(self, event: str, info: Mapping[str, Any]) -> None:
        if event == "connection.connect_tcp.started":
            self._to_host = info["host"] == self._host
        elif event == "connection.connect_tcp.complete" and self._to_host:
            self._check(info["return_value"])

    def _check(self, stream: Any) -> None:
        try:
            address = _address(str(stream.get_extra_info("server_addr")[0]))
        except OSError:  # the other side is gone again
            address = None
        if address is None or _is_private(address):
            stream.close()
            raise _private(self._host)


@dataclass
class _Reading:
    """One image of one registry, with the token that its registry gave for it."""

    http: httpx.Client
    reach: _Reach
    reference: Reference
    until: float = field(default_factory=lambda: time.monotonic() + FACTS_SECONDS)
    token: str | None = None

    def facts(self) -> ImageFacts:
        try:
            return manifests.image_facts(self._manifest(self.reference.target), self._manifest, self._config)
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            raise UnavailableError(f"the registry {self.reference.host} does not answer") from error

    def _manifest(self, target: str) -> Manifest:
        path = manifest_path(self.reference.repository, target)
        content, media_type = self._read(path, manifests.MANIFEST_LIMIT_BYTES)
        digest = manifests.digest_of(content, target if ":" in target else "sha256:")
        if ":" in target and digest != target:
            raise SourceUnavailableError(f"{self.reference}: the registry's manifest is not what its digest says")
        return Manifest(digest, media_type, content)

    def _config(self, digest: str) -> bytes:
        return self._read(blob_path(self.reference.repository, digest), manifests.CONFIG_LIMIT_BYTES)[0]

    def _read(self, path: str, limit_bytes: int) -> tuple[bytes, str]:
        """A body and its media type; asks for a token where the registry wants one."""
        url = httpx.URL(base_url(_api_host(self.reference.host)) + path)
        with self._get(url) as answer:
            wants_token = answer.status_code == HTTPStatus.UNAUTHORIZED and self.token is None
            if not wants_token:
                return self._body(answer, limit_bytes)
            challenge = answer.headers.get("WWW-Authenticate", "")
        self.token = self._new_token(challenge)
        with self._get(url) as answer:
            return self._body(answer, limit_bytes)

    def _body(self, answer: httpx.Response, limit_bytes: int) -> tuple[bytes, str]:
        self._check(answer)
        media_type = str(answer.headers.get("Content-Type", "")).partition(";")[0].strip()
        return read_bounded(answer, limit_bytes, self.until), media_type

    def _check(self, answer: httpx.Response) -> None:
        status, host = answer.status_code, self.reference.host
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            raise UnavailableError(f"the registry {host} limits how often it is asked")
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise UnavailableError(f"the registry {host} does not answer (HTTP {status})")
        if status in _NOT_THERE:
            raise SourceUnavailableError(f"{self.reference} does not exist, or is not public")
        if status != HTTPStatus.OK:
            raise SourceUnavailableError(f"{self.reference}: the registry refuses it (HTTP {status})")

    def _new_token(self, challenge: str) -> str:
        """What the registry's token service gives to anybody. Raises as `facts`."""
        bearer = _BEARER.search(challenge)
        said = {name.lower(): value for name, value in _PARAMETER.findall(bearer[1])} if bearer else {}
        if "realm" not in said:
            raise SourceUnavailableError(f"{self.reference} does not exist, or is not public")
        asked = {"scope": f"repository:{self.reference.repository}:pull"}
        if "service" in said:
            asked["service"] = said["service"]
        with self._get(httpx.URL(said["realm"]).copy_merge_params(asked), authorized=False) as answer:
            self._check(answer)
            return _token(read_bounded(answer, TOKEN_LIMIT_BYTES, self.until), self.reference)

    @contextlib.contextmanager
    def _get(self, url: httpx.URL, *, authorized: bool = True) -> Iterator[httpx.Response]:
        """The answer at the end of all redirects. The token goes to the registry itself only."""
        home = url.netloc
        for _ in range(REDIRECT_LIMIT + 1):
            if time.monotonic() > self.until:
                raise httpx.ReadTimeout("the answer takes too long")
            self.reach.check(url)
            headers = {"Accept": manifests.ACCEPT} if authorized else {}
            if authorized and self.token is not None and url.netloc == home:
                headers["Authorization"] = f"Bearer {self.token}"
            request = self.http.build_request("GET", url, headers=headers, extensions=dict(self.reach.guard(url)))
            with contextlib.closing(self.http.send(request, stream=True, follow_redirects=False)) as answer:
                if not answer.has_redirect_location:
                    yield answer
                    return
                url = url.join(answer.headers["Location"])
        raise SourceUnavailableError(f"{self.reference}: the registry leads on and on")


def _token(body: bytes, reference: Reference) -> str:
    try:
        said = json.loads(body)
        token = said.get("token") or said["access_token"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        token = None
    # What is not printable ASCII is no token, and could not be sent as a header.
    if not isinstance(token, str) or not token.isascii() or not token.isprintable():
        raise SourceUnavailableError(f"{reference}: the registry's token service gives no token")
    return token


def _private(host: str) -> SourceUnavailableError:
    return SourceUnavailableError(f"the registry leads to {host}, which is a private address")


def _api_host(host: str) -> str:
    return DOCKER_HUB_API if host == DOCKER_HUB else host


def _wire_name(url: httpx.URL) -> str:
    """The host as a connection is made to it: in ASCII, without the port."""
    return url.raw_host.decode()


def _is_among(host: str, allowed: Collection[str]) -> bool:
    return host.lower() in {name.lower() for name in allowed}


def _name_of(host: str) -> str:
    """A host without its port; "" for what is no host."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_private_name(name: str, resolve: Resolve) -> bool:
    """Whether any address of a host, or the address that it is, is one that only this network reaches."""
    if is_loopback(name):
        return True
    own = _address(name)
    found = [own] if own is not None else [_address(text) for text in resolve(name)]
    return any(address is None or _is_private(address) for address in found)


def _address(text: str) -> Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _is_private(address: Address) -> bool:
    """Whether an address, or the IPv4 address inside it, is anything but a public host's."""
    inner = _embedded(address)
    if inner is not None:
        return _is_private(inner)
    return not address.is_global or address.is_multicast or address.is_reserved or _is_site_local(address)


def _embedded(address: Address) -> ipaddress.IPv4Address | None:
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in _TRANSLATION_NETWORK:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def _is_site_local(address: Address) -> bool:
    return isinstance(address, ipaddress.IPv6Address) and address.is_site_local
