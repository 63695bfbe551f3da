"""A client that signs its requests as the contract organization-images tells its callers to; it shares nothing with the
server."""

import hashlib
import hmac
import json as json_text
import time
import uuid
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import httpx

from support.api_server import plain_client

ORGANIZATION_API = "/organization-management/v1"


class _Nothing:
    """Neither a body nor a Content-Type."""


NOTHING = _Nothing()


def signature(secret: str, key: str, method: str, path: str, timestamp: str, nonce: str, body: bytes = b"") -> str:
    """HMAC-SHA256 in lower-case hex over the six one after the other; `path` without its query."""
    signed = f"{key}{method}{path}{timestamp}{nonce}".encode() + body
    return hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()


def milliseconds(ahead_seconds: float = 0) -> str:
    """A timestamp: now, or so much later."""
    return str(round((time.time() + ahead_seconds) * 1000))


class SignedClient:
    """Calls with one HMAC key. A `body` of bytes is sent as it is, another value as JSON, none at all by default."""

    def __init__(self, base_url: str, key: str, secret: str) -> None:
        self.key = key
        self.secret = secret
        self.http = plain_client(base_url)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.http.close()

    def get(self, path: str, **how: Any) -> httpx.Response:
        return self.request("GET", path, **how)

    def post(self, path: str, body: Any = NOTHING, **how: Any) -> httpx.Response:
        return self.request("POST", path, body, **how)

    def delete(self, path: str, **how: Any) -> httpx.Response:
        return self.request("DELETE", path, **how)

    def request(
        self,
        method: str,
        path: str,
        body: Any = NOTHING,
        *,
        headers: Mapping[str, str] | None = None,
        nonce: str | None = None,
        timestamp: str | None = None,
        authorization: str | None = None,
    ) -> httpx.Response:
        """`path` with its query; `authorization` sends that instead of this request's own signature."""
        content, sent = _sent(body, headers)
        request = self.http.build_request(method, path, content=content, headers=sent)
        raw_path = request.url.raw_path.decode().partition("?")[0]
        own = authorization is None
        credentials = self.authorize(method, raw_path, content or b"", nonce, timestamp) if own else authorization
        request.headers["Authorization"] = str(credentials)
        return self.http.send(request)

    def authorize(
        self, method: str, path: str, body: bytes = b"", nonce: str | None = None, timestamp: str | None = None
    ) -> str:
        """The Authorization header of a request; its nonce is a new one and its time is now unless they are given."""
        nonce = str(uuid.uuid4()) if nonce is None else nonce
        timestamp = milliseconds() if timestamp is None else timestamp
        return f"HMAC {self.key}:{signature(self.secret, self.key, method, path, timestamp, nonce, body)}:{nonce}:{timestamp}"


def _sent(body: Any, headers: Mapping[str, str] | None) -> tuple[bytes | None, dict[str, str]]:
    if isinstance(body, _Nothing):
        return None, dict(headers or {})
    if isinstance(body, bytes):
        return body, dict(headers or {})
    return json_text.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})}
