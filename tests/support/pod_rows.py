"""Runners and pods to test the catalog with."""

import itertools
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import select, update

from kiln.catalog import pods, runners
from kiln.catalog.pod_tables import Pod, PodPrompt, Runner
from kiln.catalog.pods import KnownPod, NewPod
from kiln.catalog.runners import KnownRunner
from kiln.catalog.session import Catalog
from kiln.catalog.tables import Organization
from kiln.models import PodRef, PodSpec
from kiln.ports.pods import HostReport, RunnerProcess

POD_LEASE = timedelta(minutes=5)
AWAY = timedelta(minutes=1)

_numbers = itertools.count(1)


def report(incarnation: str = "", **changes: Any) -> HostReport:
    values: dict[str, Any] = {
        "name": "host-1",
        "max_concurrent_pods": 2,
        "allows_custom_commands": True,
        "available_agents": ["claude-code"],
        "limits": ["memory_mb"],
        "host_info": {"os": "linux"},
    }
    return HostReport(incarnation=incarnation or str(uuid.uuid4()), **{**values, **changes})


def create_runner(catalog: Catalog, organization_id: str, name: str = "") -> tuple[Runner, str]:
    """A runner's row, which nobody has registered as yet, and its token."""
    with catalog.transaction() as tx:
        organization = tx.get_one(Organization, organization_id)
        return runners.create(tx, organization, name or f"runner-{next(_numbers)}")


def register(catalog: Catalog, runner_id: str, **changes: Any) -> RunnerProcess:
    """A new process of a runner."""
    said = report(**changes)
    with catalog.transaction() as tx:
        runners.register(tx, runner_id, said)
    return RunnerProcess(runner_id, said.incarnation)


def add_runner(catalog: Catalog, organization_id: str, **changes: Any) -> RunnerProcess:
    """A runner that is there."""
    return register(catalog, create_runner(catalog, organization_id)[0].id, **changes)


def runner_of(catalog: Catalog, organization_id: str, id_or_name: str) -> KnownRunner:
    with catalog.read() as session:
        known = runners.find(session, organization_id, id_or_name)
    assert known is not None
    return known


def go_away(catalog: Catalog, runner_id: str, by: timedelta = AWAY) -> None:
    """As if the runner had said nothing for so long."""
    with catalog.transaction() as tx:
        tx.execute(update(Runner).where(Runner.id == runner_id).values(seen_at=datetime.now(UTC) - by))


def add_pod(
    catalog: Catalog, organization_id: str, runner_id: str, *, spec: PodSpec | None = None, **changes: Any
) -> PodRef:
    """A new pod, `creating`."""
    new = NewPod(organization_id, runner_id, spec or PodSpec(), created_by="a-key", **changes)
    with catalog.transaction() as tx:
        return pods.pod_ref(pods.insert(tx, new))


def pod_row(catalog: Catalog, key: str) -> Pod:
    with catalog.read() as session:
        return session.scalars(select(Pod).where(Pod.key == key)).one()


def pod_of(catalog: Catalog, organization_id: str, key: str) -> KnownPod:
    with catalog.read() as session:
        known = pods.find(session, organization_id, key)
    assert known is not None
    return known


def rewrite_pod(catalog: Catalog, key: str, **values: Any) -> None:
    """Changes columns of a pod behind everybody's back."""
    with catalog.transaction() as tx:
        tx.execute(update(Pod).where(Pod.key == key).values(**values))


def prompt(catalog: Catalog, ref: PodRef, text: str) -> int:
    with catalog.transaction() as tx:
        return pods.prompt(tx, ref.organization_id, ref.key, text)


def prompts_of(catalog: Catalog, ref: PodRef) -> list[PodPrompt]:
    with catalog.read() as session:
        query = select(PodPrompt).where(PodPrompt.pod_id == ref.pod_id).order_by(PodPrompt.number)
        return list(session.scalars(query))


def terminate(catalog: Catalog, ref: PodRef) -> PodRef:
    with catalog.transaction() as tx:
        return pods.terminate(tx, ref.organization_id, ref.key)
