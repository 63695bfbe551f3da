"""Who may call: keys, where they stand in a request, and what they open."""

from datetime import UTC, datetime, timedelta

import httpx
import pytest

from kiln.catalog import keys
from support.api_server import RunningApi
from support.tenants import Tenant, error, shared_error

NO_KEY = "an API key is needed: Authorization: Bearer …, or X-API-Key"
BAD_KEY = "the API key is not known, or no longer usable"
LACKS_READ = "the API key lacks the scope builds:read"
LACKS_WRITE = "the API key lacks the scope builds:write"
UNKNOWN = "amk_" + "0" * 80
BUILD_ID = "550e8400-e29b-41d4-a716-446655440000"
IMAGE_ID = "ami-0abcdef1234567890"

READS = [
    "/api/v1/images",
    f"/api/v1/images/builds/{BUILD_ID}",
    f"/api/v1/images/builds/{BUILD_ID}/logs",
    "/api/v1/builds",
    f"/api/v1/builds/{BUILD_ID}",
    f"/api/v1/builds/{BUILD_ID}/logs",
]
WRITES = [
    ("POST", f"/api/v1/images/builds/{BUILD_ID}/cancel"),
    ("DELETE", f"/api/v1/images/{IMAGE_ID}"),
    ("POST", f"/api/v1/builds/{BUILD_ID}/cancel"),
]
ALL = [("GET", path) for path in READS] + WRITES


def call(api: RunningApi, method: str, path: str, **headers: str) -> httpx.Response:
    sent = {name.replace("_", "-"): value.encode("latin-1") for name, value in headers.items()}
    return api.http.request(method, path, headers=sent)


@pytest.mark.parametrize(("method", "path"), ALL)
def test_no_key_is_a_401(api: RunningApi, method: str, path: str) -> None:
    """A request without a key is refused before anything of it is looked at."""
    answer = call(api, method, path)
    assert (answer.status_code, answer.json()) == (401, error("unauthorized", NO_KEY))
    assert answer.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize(("method", "path"), ALL)
def test_an_unknown_key_is_a_401(api: RunningApi, method: str, path: str) -> None:
    """A key that nobody has is refused."""
    answer = call(api, method, path, X_API_Key=UNKNOWN)
    assert (answer.status_code, answer.json()) == (401, error("unauthorized", BAD_KEY))


@pytest.mark.parametrize(("headers", "message"), [({}, NO_KEY), ({"X_API_Key": UNKNOWN}, BAD_KEY)])
def test_a_build_without_a_usable_key_is_a_401_in_both_shapes(
    api: RunningApi, headers: dict[str, str], message: str
) -> None:
    """Whose the POST would be is not known yet, so its refusal carries both contracts' errors."""
    answer = call(api, "POST", "/api/v1/images/build", **headers)
    assert (answer.status_code, answer.json()) == (401, shared_error("unauthorized", message))


@pytest.mark.parametrize(
    "credentials",
    ["", "Bearer", "Basic YTpi", "HMAC key:signature:nonce:1", "Bearer \xe9\xfc", "Bearer a b", "Bearer " + "x" * 5000],
)
def test_credentials_that_are_no_key_are_a_401(api: RunningApi, credentials: str) -> None:
    """Whatever stands in Authorization, what is no key opens nothing and breaks nothing."""
    answer = call(api, "GET", "/api/v1/images", Authorization=credentials)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")


@pytest.mark.parametrize("path", ["/api/v1/images", "/api/v1/builds"])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_a_bearer_token_opens(tenant: Tenant, path: str, scheme: str) -> None:
    """The scheme's name has no case (RFC 9110)."""
    assert call(tenant.api, "GET", path, Authorization=f"{scheme} {tenant.key}").status_code == 200


@pytest.mark.parametrize("path", ["/api/v1/images", "/api/v1/builds"])
def test_an_x_api_key_opens(tenant: Tenant, path: str) -> None:
    """X-API-Key carries the same key."""
    assert call(tenant.api, "GET", path, X_API_Key=tenant.key).status_code == 200


@pytest.mark.parametrize("path", ["/api/v1/images", "/api/v1/builds"])
def test_a_bearer_token_goes_before_x_api_key(tenant: Tenant, path: str) -> None:
    """Where both are sent, the Bearer token alone decides."""
    good, bad = f"Bearer {tenant.key}", f"Bearer {UNKNOWN}"
    assert call(tenant.api, "GET", path, Authorization=good, X_API_Key=UNKNOWN).status_code == 200
    assert call(tenant.api, "GET", path, Authorization=bad, X_API_Key=tenant.key).status_code == 401
    assert call(tenant.api, "GET", path, Authorization="Bearer", X_API_Key=tenant.key).status_code == 401


def test_another_scheme_leaves_it_to_x_api_key(tenant: Tenant) -> None:
    """An Authorization that holds no Bearer token says nothing about the key beside it."""
    answer = call(tenant.api, "GET", "/api/v1/images", Authorization="Basic YTpi", X_API_Key=tenant.key)
    assert answer.status_code == 200


def test_a_disabled_key_is_a_401(tenant: Tenant) -> None:
    """A key that was shut opens nothing any more, and the answer does not tell it from an unknown one."""
    plain = tenant.new_key("admin")
    assert call(tenant.api, "GET", "/api/v1/images", X_API_Key=plain).status_code == 200
    with tenant.catalog.transaction() as tx:
        known = keys.identify(tx, plain)
        assert known is not None
        keys.disable(tx, known.identity.key_id)
    answer = call(tenant.api, "GET", "/api/v1/images", X_API_Key=plain)
    assert (answer.status_code, answer.json()) == (401, error("unauthorized", BAD_KEY))


def test_an_expired_key_is_a_401(tenant: Tenant) -> None:
    """A key opens until its expiry and not after."""
    now = datetime.now(UTC)
    expired = tenant.new_key("admin", expires_at=now - timedelta(seconds=1))
    living = tenant.new_key("admin", expires_at=now + timedelta(hours=1))
    answer = call(tenant.api, "GET", "/api/v1/images", X_API_Key=expired)
    assert (answer.status_code, answer.json()) == (401, error("unauthorized", BAD_KEY))
    assert call(tenant.api, "GET", "/api/v1/images", X_API_Key=living).status_code == 200


@pytest.mark.parametrize("path", READS)
@pytest.mark.parametrize("scopes", [["builds:read"], ["builds:write"], ["admin"], ["pods:read", "builds:read"]])
def test_scopes_that_let_read(tenant: Tenant, path: str, scopes: list[str]) -> None:
    """`builds:read` lets read; `builds:write` implies it, and `admin` implies all."""
    answer = call(tenant.api, "GET", path, X_API_Key=tenant.new_key(*scopes))
    assert answer.status_code == (404 if BUILD_ID in path else 200)


@pytest.mark.parametrize("path", READS)
@pytest.mark.parametrize("scopes", [[], ["organization:write", "pods:write", "runners:read"]])
def test_scopes_that_do_not_let_read(tenant: Tenant, path: str, scopes: list[str]) -> None:
    """Other APIs' scopes open no builds."""
    answer = call(tenant.api, "GET", path, X_API_Key=tenant.new_key(*scopes))
    assert (answer.status_code, answer.json()) == (403, error("insufficient_scope", LACKS_READ))


@pytest.mark.parametrize(("method", "path"), WRITES)
@pytest.mark.parametrize("scopes", [["builds:write"], ["admin"]])
def test_scopes_that_let_write(tenant: Tenant, method: str, path: str, scopes: list[str]) -> None:
    """`builds:write` and `admin` let change what is there."""
    assert call(tenant.api, method, path, X_API_Key=tenant.new_key(*scopes)).status_code == 404


@pytest.mark.parametrize(("method", "path"), WRITES)
def test_a_reader_cannot_write(tenant: Tenant, method: str, path: str) -> None:
    """`builds:read` changes nothing."""
    answer = call(tenant.api, method, path, X_API_Key=tenant.new_key("builds:read"))
    assert (answer.status_code, answer.json()) == (403, error("insufficient_scope", LACKS_WRITE))


def test_a_reader_cannot_build(tenant: Tenant) -> None:
    """A build needs `builds:write`; its body is a machine build's, so the refusal has one shape."""
    key = tenant.new_key("builds:read")
    answer = tenant.api.http.post("/api/v1/images/build", json={"provider": "codex"}, headers={"X-API-Key": key})
    assert (answer.status_code, answer.json()) == (403, error("insufficient_scope", LACKS_WRITE))


def test_a_writer_can_build(tenant: Tenant) -> None:
    """`builds:write` is all that a build needs."""
    key = tenant.new_key("builds:write")
    answer = tenant.api.http.post("/api/v1/images/build", json={"provider": "codex"}, headers={"X-API-Key": key})
    assert answer.status_code == 202


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"])
def test_operations_need_no_key(api: RunningApi, path: str) -> None:
    """Probes, metrics and documents hold nothing of any organization's."""
    assert call(api, "GET", path).status_code == 200
