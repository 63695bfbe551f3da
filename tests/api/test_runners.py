"""Runners over HTTP, as an organization's keys see them."""

from collections.abc import Iterator

import pytest

from kiln.catalog import runners
from support.api_server import RunningApi
from support.pod_rows import create_runner, go_away, register
from support.pod_tenants import PodTenant, pod_refusal
from support.tenants import on_both_databases


@pytest.fixture
def tenant(api: RunningApi) -> Iterator[PodTenant]:
    tenant = PodTenant(api)
    yield tenant
    tenant.close()


@on_both_databases
def test_a_runner_is_shown_as_it_says(tenant: PodTenant) -> None:
    """R's keys and no more; by its id or its name."""
    row, token = create_runner(tenant.catalog, tenant.organization_id, "build host 7")
    register(tenant.catalog, row.id, available_agents=["aider", "codex"], host_info={"os": "linux"})
    shown = tenant.get(f"/runners/{row.id}")
    assert shown == {
        "runner": {
            "id": row.id,
            "name": "build host 7",
            "status": "online",
            "current_pods": 0,
            "max_concurrent_pods": 2,
            "available_agents": ["aider", "codex"],
            "host_info": {"name": "host-1", "os": "linux"},
        }
    }
    assert list(shown["runner"])[:4] == ["id", "name", "status", "current_pods"]
    assert tenant.get("/runners/build%20host%207") == shown
    assert token not in str(tenant.get("/runners"))


def test_a_runner_without_a_place_is_busy(tenant: PodTenant) -> None:
    """Pods that wait have no place yet, and do not count beyond it."""
    runner = tenant.runner(max_concurrent_pods=1)
    tenant.created(runner)
    tenant.created(runner)
    shown = tenant.get(f"/runners/{runner.runner_id}")["runner"]
    assert (shown["status"], shown["current_pods"]) == ("busy", 1)


def test_a_runner_that_says_nothing_is_offline(tenant: PodTenant) -> None:
    """Whether it has gone or never came."""
    gone = tenant.runner()
    go_away(tenant.catalog, gone.runner_id)
    create_runner(tenant.catalog, tenant.organization_id)
    assert [shown["status"] for shown in tenant.get("/runners")["runners"]] == ["offline", "offline"]


@on_both_databases
def test_only_the_organizations_own_are_shown(tenant: PodTenant, api: RunningApi) -> None:
    """By name, less those that were disabled; another's is a 404, as an unknown one is."""
    other = PodTenant(api)
    for name in ("b", "a", "shut"):
        create_runner(tenant.catalog, tenant.organization_id, name)
    theirs, _ = create_runner(other.catalog, other.organization_id, "theirs")
    with tenant.catalog.transaction() as tx:
        shut = runners.find(tx, tenant.organization_id, "shut")
        assert shut is not None
        runners.disable(tx, shut.runner.id)
    assert [shown["name"] for shown in tenant.get("/runners")["runners"]] == ["a", "b"]
    for name in (theirs.id, "theirs", "shut", "nobody", "%00"):
        refused = pod_refusal(tenant.http.get(f"{tenant.base}/runners/{name}"))
        assert refused[:2] == (404, "RESOURCE_NOT_FOUND")
    other.close()
