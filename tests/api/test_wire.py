"""What HTTP itself allows: unknown paths and methods, odd characters, repeated headers, and bytes that are no request."""

import http.client
import re
import socket
from typing import Any
from urllib.parse import urlsplit

import pytest

from support.api_server import RunningApi
from support.tenants import Tenant, error, on_both_databases, row_counts

NOT_FOUND = error("not_found", "Not Found")
NOT_ALLOWED = error("method_not_allowed", "Method Not Allowed")
BUILD_ID = "550e8400-e29b-41d4-a716-446655440000"
ROUTES = {
    "/api/v1/images": ("GET", "PATCH"),
    "/api/v1/images/build": ("POST",),
    f"/api/v1/images/build/{BUILD_ID}": ("GET",),
    f"/api/v1/images/build/{BUILD_ID}/start": ("POST",),
    f"/api/v1/images/build/{BUILD_ID}/cancel": ("POST",),
    f"/api/v1/images/uploads/{BUILD_ID}": ("PUT",),
    "/api/v1/images/name/tag/more": ("DELETE",),
    f"/api/v1/images/builds/{BUILD_ID}": ("GET",),
    f"/api/v1/images/builds/{BUILD_ID}/cancel": ("POST",),
    f"/api/v1/images/builds/{BUILD_ID}/logs": ("GET",),
    "/api/v1/images/ami-0abcdef1234567890": ("DELETE",),
    "/api/v1/builds": ("GET",),
    f"/api/v1/builds/{BUILD_ID}": ("GET",),
    f"/api/v1/builds/{BUILD_ID}/cancel": ("POST",),
    f"/api/v1/builds/{BUILD_ID}/logs": ("GET",),
    "/healthz": ("GET",),
    "/readyz": ("GET",),
    "/metrics": ("GET",),
}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY")
# A DELETE of two segments or more is a container image's, whatever they are.
IMAGE = re.compile("/api/v1/images/.+/.+")
UNLISTED = [
    (method, path)
    for path, listed in ROUTES.items()
    for method in METHODS
    if method not in listed and not (method == "DELETE" and IMAGE.fullmatch(path))
]


def raw(api: RunningApi, request: bytes) -> bytes:
    """Everything that the server answers to these bytes until it closes, or has nothing more to say."""
    place = urlsplit(api.url)
    with socket.create_connection((place.hostname, place.port), timeout=2) as connection:
        connection.sendall(request)
        answer = b""
        try:
            while piece := connection.recv(65536):
                answer += piece
        except TimeoutError:
            pass
        return answer


def with_headers(
    tenant: Tenant, method: str, path: str, *headers: tuple[str, str], body: bytes = b""
) -> tuple[int, str]:
    """A request with exactly these headers, repeated ones too."""
    place = urlsplit(tenant.api.url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=10)
    connection.putrequest(method, path)
    for name, value in (("Content-Length", str(len(body))), *headers):
        connection.putheader(name, value.encode("latin-1"))
    connection.endheaders(body)
    answer = connection.getresponse()
    found = answer.status, answer.read().decode()
    connection.close()
    return found


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/api",
        "/api/v1",
        "/api/v2/images",
        "/api/v1/images/",
        "/api/v1/images/build/",
        "/api/v1/images/builds/",
        f"/api/v1/images/builds/{BUILD_ID}/",
        "/api/v1/builds/",
        f"/api/v1/builds/{BUILD_ID}/cancel/now",
        "/api/v1//images",
        "/api/v1/%00",
        "/%F0%9F%94%A5",
        "/healthz/",
        "/redoc",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_an_unlisted_path_is_a_404(tenant: Tenant, method: str, path: str) -> None:
    """In machine-images' shape, and never a redirect."""
    answer = tenant.http.request(method, path)
    assert (answer.status_code, answer.json()) == (404, NOT_FOUND)


@pytest.mark.parametrize(("method", "path"), UNLISTED)
def test_an_unlisted_method_is_a_405(tenant: Tenant, method: str, path: str) -> None:
    """In machine-images' shape, with the methods that the path knows."""
    answer = tenant.http.request(method, path)
    assert (answer.status_code, answer.headers["Allow"]) == (405, ", ".join(ROUTES[path]))
    assert method == "HEAD" or answer.json() == NOT_ALLOWED
    assert answer.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize("path", [f"/api/v1/builds/{BUILD_ID}/cancel", f"/api/v1/images/builds/{BUILD_ID}/cancel"])
@pytest.mark.parametrize("body", [b"", b"{", b"\x00\xff", b"x" * 100_000])
def test_calls_without_a_body_ignore_one(tenant: Tenant, path: str, body: bytes) -> None:
    """A cancel needs nothing to be said."""
    assert tenant.http.post(path, content=body).status_code == 404


@on_both_databases
@pytest.mark.parametrize(
    "odd", ["%00", "%ff%fe", "%F0%9F%94%A5", "%E2%80%AE", "..%2f..", "%2F", "a%2Fb", "a%20b", "x" * 9_000]
)
def test_odd_ids_are_refused(tenant: Tenant, odd: str) -> None:
    """Whatever stands for an id in a path, the answer is a clean refusal."""
    calls = [
        ("GET", f"/api/v1/images/builds/{odd}"),
        ("POST", f"/api/v1/images/builds/{odd}/cancel"),
        ("DELETE", f"/api/v1/images/{odd}"),
        ("GET", f"/api/v1/builds/{odd}"),
        ("GET", f"/api/v1/builds/{odd}/logs"),
    ]
    slashes = "%2" in odd
    for method, path in calls:
        answer = tenant.http.request(method, path)
        # With a slash in it, an image's path is a container image's, which knows DELETE alone.
        is_container_image = slashes and path.startswith("/api/v1/images")
        assert answer.status_code in ((404, 405, 422) if is_container_image else (404, 422)), path
        if is_container_image and method == "DELETE" and "error" not in answer.json():
            assert answer.json() == {"detail": "no image of this organization has this name and tag"}
        else:
            assert answer.json()["error"]["code"] in ("not_found", "invalid_request", "method_not_allowed")


def test_the_first_of_two_keys_decides(tenant: Tenant) -> None:
    """A second Authorization or X-API-Key cannot bring a request in."""
    good, bad = f"Bearer {tenant.key}", "Bearer nobody"
    path = "/api/v1/images"
    assert with_headers(tenant, "GET", path, ("Authorization", good), ("Authorization", bad))[0] == 200
    assert with_headers(tenant, "GET", path, ("Authorization", bad), ("Authorization", good))[0] == 401
    assert with_headers(tenant, "GET", path, ("X-API-Key", tenant.key), ("X-API-Key", "nobody"))[0] == 200
    assert with_headers(tenant, "GET", path, ("X-API-Key", "nobody"), ("X-API-Key", tenant.key))[0] == 401


def test_an_idempotency_key_is_sent_once(tenant: Tenant) -> None:
    """Of two keys neither is known to be meant."""
    before = row_counts(tenant.catalog)
    headers = [("X-API-Key", tenant.key), ("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    status, body = with_headers(tenant, "POST", "/api/v1/images/build", *headers, body=b'{"provider": "codex"}')
    assert (status, '"Idempotency-Key: must be sent once"' in body) == (422, True)
    assert row_counts(tenant.catalog) == before


@pytest.mark.parametrize(
    "header", ["Authorization", "X-API-Key", "Idempotency-Key", "Last-Event-ID", "Accept", "Content-Type"]
)
@pytest.mark.parametrize("value", ["\xe9\xff", "\x80", "x" * 30_000, "a\tb"])
def test_odd_header_values_are_answered(tenant: Tenant, header: str, value: str) -> None:
    """A header may hold any octet; what makes no sense is refused or ignored."""
    key = ("X-API-Key", tenant.key) if header != "X-API-Key" else ("Accept", "*/*")
    build_id = tenant.queued()
    tenant.http.post(f"/api/v1/builds/{build_id}/cancel")
    found = [
        with_headers(tenant, "GET", "/api/v1/builds?limit=1", key, (header, value))[0],
        with_headers(tenant, "GET", f"/api/v1/builds/{build_id}/logs", key, (header, value))[0],
        with_headers(tenant, "POST", "/api/v1/images/build", key, (header, value), body=b'{"provider": "copilot"}')[0],
    ]
    assert set(found) <= {200, 401, 415, 422}


@pytest.mark.parametrize("length", [8_000, 60_000, 200_000])
def test_a_long_query_is_answered(tenant: Tenant, length: int) -> None:
    """It narrows to nothing, or is refused as it stands."""
    path = f"/api/v1/images?region={'x' * length}"
    assert with_headers(tenant, "GET", path, ("X-API-Key", tenant.key))[0] in (200, 400, 414, 431)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\r\n\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /api/v1/images HTTP/1.1\r\nHost: x\r\nX-API-Key: a\0b\r\n\r\n",
        b"POST /api/v1/images/build HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
        b"POST /api/v1/images/build HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_bytes_that_are_no_request_hurt_nobody(api: RunningApi, request_bytes: bytes) -> None:
    """They are refused, or answered with nothing; the server serves on."""
    answer = raw(api, request_bytes)
    assert answer == b"" or answer.split(b" ")[1][:1] == b"4"
    assert api.http.get("/healthz").status_code == 200


def test_a_caller_that_leaves_in_mid_body_leaves_nothing(tenant: Tenant) -> None:
    """Half an order is none."""
    before = row_counts(tenant.catalog)
    place = urlsplit(tenant.api.url)
    with socket.create_connection((place.hostname, place.port), timeout=2) as connection:
        head = f"POST /api/v1/images/build HTTP/1.1\r\nHost: x\r\nX-API-Key: {tenant.key}\r\nContent-Length: 21\r\n\r\n"
        connection.sendall(head.encode() + b'{"provider": ')
    assert tenant.http.get("/api/v1/images").status_code == 200
    assert row_counts(tenant.catalog) == before


def test_an_answer_of_json_says_so(tenant: Tenant) -> None:
    """Every body but a log's, a metric's and a page's is JSON, errors included."""
    found: dict[str, Any] = {
        f"{method} {path}": tenant.http.request(method, path).headers["Content-Type"]
        for path, methods in ROUTES.items()
        for method in methods
        if path != "/metrics"
    }
    assert set(found.values()) == {"application/json"}
