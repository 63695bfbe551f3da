"""One HTTP request and its reply as the EC2 proxy passes them on, and the simulated EC2 that answers."""

import http.client
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from http import HTTPStatus
from urllib.parse import parse_qsl, urlencode, urlsplit

EC2_API_VERSION = "2016-11-15"
UPSTREAM_TIMEOUT_SECONDS = 60.0
CREDENTIAL_SCOPE = re.compile(r"Credential=[^/]+/\d+/([^/]+)/")
# Headers that speak of one connection (RFC 9110, 7.6.1), and the length, which is counted anew.
PER_CONNECTION = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length"})
BODILESS = frozenset({HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED})

Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Request:
    """A request as it came; if it came in chunks, they are put together and its length is given."""

    method: str
    target: str
    headers: Headers
    body: bytes

    @cached_property
    def params(self) -> Mapping[str, str]:
        """Parameters of the AWS query protocol, from query string and form body; empty for S3 and others."""
        pairs = parse_qsl(urlsplit(self.target).query, keep_blank_values=True)
        if self._header("content-type").startswith("application/x-www-form-urlencoded"):
            pairs += parse_qsl(self.body.decode("utf-8", "replace"), keep_blank_values=True)
        return dict(pairs)

    @property
    def action(self) -> str:
        """EC2's name of the call (`RunInstances`), or method and path (`PUT /bucket/key`) if it has none."""
        return self.params.get("Action") or f"{self.method} {urlsplit(self.target).path}"

    @property
    def is_ec2(self) -> bool:
        return "Action" in self.params and self.params.get("Version") == EC2_API_VERSION

    @property
    def region(self) -> str:
        scope = CREDENTIAL_SCOPE.search(self._header("authorization"))
        return scope.group(1) if scope else "us-east-1"

    def with_body(self, body: bytes) -> "Request":
        return Request(self.method, self.target, _sized(self.headers, body), body)

    def asking(self, params: Mapping[str, str]) -> "Request":
        """This caller's call of EC2 with other parameters; moto doesn't check its signature."""
        return self.with_body(urlencode(params).encode())

    def _header(self, wanted: str) -> str:
        return next((value for name, value in self.headers if name.lower() == wanted), "")


@dataclass(frozen=True)
class Reply:
    """An answer. `fault` names the fault that made it, and is None for the simulated EC2's own."""

    status: int
    reason: str
    headers: Headers
    body: bytes
    fault: str | None = None

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300

    def with_body(self, body: bytes) -> "Reply":
        return replace(self, headers=_sized(self.headers, body), body=body)


@dataclass(frozen=True)
class Upstream:
    """The simulated EC2 behind the proxy, `http://host:port`."""

    url: str

    def send(self, request: Request) -> Reply:
        """Have `request` executed. Raises OSError or http.client.HTTPException when nobody answers."""
        address = urlsplit(self.url)
        host, port = address.hostname or "", address.port
        connection = http.client.HTTPConnection(host, port, timeout=UPSTREAM_TIMEOUT_SECONDS)
        try:
            connection.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers:
                connection.putheader(name, value)
            connection.endheaders(request.body)
            return _reply_of(connection.getresponse())
        finally:
            connection.close()


def _reply_of(response: http.client.HTTPResponse) -> Reply:
    body = response.read()
    headers = _lasting(tuple(response.getheaders()))
    if response.status not in BODILESS:
        # The answer to HEAD gives the length of what GET would send.
        length = response.getheader("Content-Length") or str(len(body))
        headers = (*headers, ("Content-Length", length))
    return Reply(response.status, response.reason, headers, body)


def _sized(headers: Headers, body: bytes) -> Headers:
    return (*_lasting(headers), ("Content-Length", str(len(body))))


def _lasting(headers: Headers) -> Headers:
    return tuple((name, value) for name, value in headers if name.lower() not in PER_CONNECTION)
