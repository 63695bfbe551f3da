"""Who may call pods: key, organization, match, scope, in this order."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from kiln.catalog import keys
from support.api_server import RunningApi
from support.pod_tenants import EXT, PodTenant, pod_refusal
from support.tenants import on_both_databases

UNKNOWN_KEY = "amk_" + "0" * 80
KEY = "pod-000000000000"
CALLS = [
    ("GET", "/pods", "pods:read"),
    ("POST", "/pods", "pods:write"),
    ("GET", f"/pods/{KEY}", "pods:read"),
    ("POST", f"/pods/{KEY}/prompt", "pods:write"),
    ("POST", f"/pods/{KEY}/terminate", "pods:write"),
    ("GET", f"/pods/{KEY}/logs", "pods:read"),
    ("GET", "/runners", "runners:read"),
    ("GET", "/runners/local", "runners:read"),
]
PAST = datetime.now(UTC) - timedelta(minutes=1)


@pytest.fixture
def tenant(api: RunningApi) -> Iterator[PodTenant]:
    tenant = PodTenant(api)
    yield tenant
    tenant.close()


def called(tenant: PodTenant, path: str = "/pods", *, base: str = "", **headers: str) -> httpx.Response:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return tenant.api.http.get((base or tenant.base) + path, headers=sent)


def disable(tenant: PodTenant, plain: str) -> None:
    with tenant.catalog.transaction() as tx:
        known = keys.identify(tx, plain)
        assert known is not None
        keys.disable(tx, known.identity.key_id)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X_API_Key": ""},
        {"X_API_Key": "sk_live"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer hk_1"},
        {"Authorization": "Basic amk_1"},
        {"Authorization": UNKNOWN_KEY},
    ],
)
def test_without_a_key_nobody_is_let_in(tenant: PodTenant, headers: dict[str, str]) -> None:
    """Neither with what is no key of this kind; and the scheme to use is named."""
    answer = called(tenant, **headers)
    assert pod_refusal(answer)[:2] == (401, "AUTH_REQUIRED")
    assert answer.headers["WWW-Authenticate"] == "Bearer"


@on_both_databases
def test_a_key_that_is_shut_is_told_apart(tenant: PodTenant) -> None:
    """Unknown and expired ones are 401, a disabled one is 403, also if it has expired as well."""
    expired, both = (tenant.new_key("admin", expires_at=PAST) for _ in range(2))
    disabled = tenant.new_key("admin")
    disable(tenant, disabled)
    disable(tenant, both)
    found = {key: pod_refusal(called(tenant, X_API_Key=key))[:2] for key in (UNKNOWN_KEY, expired, disabled, both)}
    assert found == {
        UNKNOWN_KEY: (401, "INVALID_TOKEN"),
        expired: (401, "TOKEN_EXPIRED"),
        disabled: (403, "API_KEY_DISABLED"),
        both: (403, "API_KEY_DISABLED"),
    }


def test_either_header_carries_the_key(tenant: PodTenant) -> None:
    """X-API-Key goes before Bearer."""
    assert called(tenant, X_API_Key=tenant.key).status_code == 200
    assert called(tenant, Authorization=f"Bearer {tenant.key}").status_code == 200
    assert called(tenant, X_API_Key=tenant.key, Authorization="Bearer amk_x").status_code == 200
    both = called(tenant, X_API_Key=UNKNOWN_KEY, Authorization=f"Bearer {tenant.key}")
    assert pod_refusal(both)[:2] == (401, "INVALID_TOKEN")


@on_both_databases
def test_the_organization_must_be_there_and_the_keys_own(tenant: PodTenant, api: RunningApi) -> None:
    """An unknown one is a 404, another one a 403; its id does not stand for its slug."""
    other = PodTenant(api)
    key = {"X_API_Key": tenant.new_key("builds:read")}
    for slug in ("nobody", "%00", "%2F", tenant.organization_id):
        assert pod_refusal(called(tenant, base=f"{EXT}/{slug}", **key))[:2] == (404, "RESOURCE_NOT_FOUND")
    assert pod_refusal(called(tenant, base=other.base, **key))[:2] == (403, "API_KEY_ORG_MISMATCH")
    other.close()


def test_the_checks_come_in_the_contracts_order(tenant: PodTenant, api: RunningApi) -> None:
    """Key, organization, match, scope, and only then the request's own form."""
    other, wrong = PodTenant(api), "/pods?limit=x"
    nobody, poor = f"{EXT}/nobody", tenant.new_key("builds:read")
    steps = [
        called(tenant, wrong, base=nobody),
        called(tenant, wrong, base=nobody, X_API_Key=UNKNOWN_KEY),
        called(tenant, wrong, base=nobody, X_API_Key=poor),
        called(tenant, wrong, base=other.base, X_API_Key=poor),
        called(tenant, wrong, X_API_Key=poor),
        called(tenant, wrong, X_API_Key=tenant.key),
    ]
    assert [pod_refusal(answer)[1] for answer in steps] == [
        "AUTH_REQUIRED",
        "INVALID_TOKEN",
        "RESOURCE_NOT_FOUND",
        "API_KEY_ORG_MISMATCH",
        "INSUFFICIENT_SCOPE",
        "VALIDATION_FAILED",
    ]
    other.close()


@pytest.mark.parametrize(("method", "path", "scope"), CALLS)
def test_each_call_needs_its_scope(tenant: PodTenant, method: str, path: str, scope: str) -> None:
    """What is lacking is named; `pods:write` is enough to read pods, and neither opens the runners."""
    others: dict[str, Any] = {"pods:read": ["runners:read"], "pods:write": ["pods:read", "runners:read"]}
    with tenant.client(*others.get(scope, ["pods:write"])) as client:
        answer = client.request(method, tenant.base + path, content=b"{")
        assert pod_refusal(answer)[:2] == (403, "INSUFFICIENT_SCOPE")
        assert answer.json()["required_scopes"] == [scope]
    for enough in {scope, scope.replace("pods:read", "pods:write"), "admin"}:
        with tenant.client(enough) as client:
            assert client.request(method, tenant.base + path, content=b"{").status_code in (200, 400, 404)
