"""Runners: worker processes on some host that run pods. A token is `krt_` and 80 hex digits; only its hash is kept.

A runner is there as long as it says so every few seconds. By the database's clock: all that ask agree on it.
"""

import hashlib
import secrets
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import ColumnElement, Row, Select, case, func, literal, or_, select, update
from sqlalchemy.orm import Session

from kiln.catalog.pod_tables import Pod, Runner
from kiln.catalog.session import database_now
from kiln.catalog.tables import Organization, UtcDateTime
from kiln.errors import InvalidRequestError, RefusedError
from kiln.models import OPEN_POD_STATUSES, RunnerStatus
from kiln.ports.pods import HostReport, RunnerProcess

RUNNER_PREFIX = "krt_"
TOKEN_HEX_DIGITS = 80
HINT_LENGTH = 12
NAME_LENGTH = 255
# Three missed beats: a runner that is merely slow is not called gone.
PRESENCE_LIMIT = timedelta(seconds=20)
OPEN_PODS = tuple(status.value for status in OPEN_POD_STATUSES)


@dataclass(frozen=True)
class KnownRunner:
    """A runner's row, its status, and how many of its places are taken: by pods at work, or about to be."""

    runner: Runner
    status: RunnerStatus
    current_pods: int


def create(tx: Session, organization: Organization, name: str) -> tuple[Runner, str]:
    """A new runner's row and its token, which nobody can read again. Raises InvalidRequestError for its name."""
    _check_name(tx, organization.id, name)
    token = RUNNER_PREFIX + secrets.token_hex(TOKEN_HEX_DIGITS // 2)
    row = Runner(
        id=str(uuid.uuid4()),
        organization_id=organization.id,
        name=name,
        token_hash=_hash(token),
        hint=token[:HINT_LENGTH],
        created_at=datetime.now(UTC),
    )
    tx.add(row)
    tx.flush()
    return row, token


def _check_name(tx: Session, organization_id: str, name: str) -> None:
    if not name.strip() or len(name) > NAME_LENGTH:
        raise InvalidRequestError("name", f"must have 1 to {NAME_LENGTH} characters, and not only spaces")
    same = select(Runner.id).where(Runner.organization_id == organization_id, Runner.name == name)
    if tx.scalar(same) is not None:
        raise InvalidRequestError("name", f"this organization has a runner {name} already")


def disable(tx: Session, runner_id: str) -> bool:
    """Shuts a runner's token for good; False if there is no such runner. Disabling twice keeps the first time."""
    if tx.get(Runner, runner_id) is None:
        return False
    shut = update(Runner).where(Runner.id == runner_id, Runner.disabled_at.is_(None))
    tx.execute(shut.values(disabled_at=datetime.now(UTC)))
    return True


def identify(session: Session, token: str) -> Runner | None:
    """Whose token this is; None if it is nobody's, or was disabled."""
    mine = (Runner.token_hash == _hash(token), Runner.disabled_at.is_(None))
    return session.scalars(select(Runner).where(*mine)).first()


def register(tx: Session, runner_id: str, report: HostReport) -> None:
    """Makes the report's incarnation the runner's process, and takes what it says of its host. The runner keeps the name
    that it was created with; the report's stands in `host_info`. Raises RefusedError if the token was disabled."""
    registered = tx.execute(
        update(Runner)
        .where(Runner.id == runner_id, Runner.disabled_at.is_(None))
        .values(
            incarnation=report.incarnation,
            seen_at=database_now(tx),
            max_concurrent_pods=report.max_concurrent_pods,
            allows_custom_commands=report.allows_custom_commands,
            available_agents=list(report.available_agents),
            limits=list(report.limits),
            host_info={"name": report.name, **report.host_info},
        )
        .returning(Runner.id)
    )
    if registered.first() is None:
        raise RefusedError("this runner's token is no more")


def note_presence(tx: Session, process: RunnerProcess) -> None:
    """Writes that the runner is there now. Raises RefusedError unless the process is the one that registered last."""
    seen = update(Runner).where(*_is_current(process)).values(seen_at=database_now(tx)).returning(Runner.id)
    if tx.execute(seen).first() is None:
        raise _superseded()


def require_current(session: Session, process: RunnerProcess, *, lock: bool = False) -> None:
    """Raises RefusedError unless the process is the one that registered last. With `lock`, no other one registers until
    the transaction's end; whoever locks a pod's row as well does so afterwards."""
    current = select(Runner.id).where(*_is_current(process))
    if session.execute(current.with_for_update(read=True) if lock else current).first() is None:
        raise _superseded()


def find(session: Session, organization_id: str, id_or_name: str) -> KnownRunner | None:
    """An organization's runner, by its id, else by its name. One that was disabled is `offline`."""
    named = or_(Runner.id == id_or_name, Runner.name == id_or_name)
    query = _rows(session).where(Runner.organization_id == organization_id, named)
    row = session.execute(query.order_by((Runner.id == id_or_name).desc()).limit(1)).first()
    return None if row is None else _known(row)


def of_organization(session: Session, organization_id: str) -> list[KnownRunner]:
    """An organization's runners by name, less those that were disabled."""
    own = (Runner.organization_id == organization_id, Runner.disabled_at.is_(None))
    return [_known(row) for row in session.execute(_rows(session).where(*own).order_by(Runner.name))]


def listing(session: Session) -> list[tuple[KnownRunner, str]]:
    """Every runner with its organization's slug, oldest first."""
    query = _rows(session).add_columns(Organization.slug).join(Organization, Organization.id == Runner.organization_id)
    rows = session.execute(query.order_by(Runner.created_at, Runner.id))
    return [
        (KnownRunner(row[0], RunnerStatus(row[1]), min(row[2], row[0].max_concurrent_pods)), row[3]) for row in rows
    ]


def presence_horizon(session: Session) -> datetime:
    """Who was last seen before it is offline now. Read once, it means the same in every statement."""
    horizon: datetime | None = session.scalar(select(database_now(session, ahead=-PRESENCE_LIMIT)))
    if horizon is None:
        raise TypeError("the database has no clock")
    return horizon


def is_offline(horizon: datetime) -> ColumnElement[bool]:
    """Whether a runner is not there: not seen since the horizon, or its token was disabled."""
    unseen = or_(Runner.seen_at.is_(None), Runner.seen_at < literal(horizon, UtcDateTime))
    return or_(Runner.disabled_at.is_not(None), unseen)


def _rows(session: Session) -> Select[Runner, str, int]:
    taken = (
        select(func.count())
        .where(Pod.runner_id == Runner.id, Pod.status.in_(OPEN_PODS))
        .correlate(Runner)
        .scalar_subquery()
    )
    status = case(
        (is_offline(presence_horizon(session)), RunnerStatus.OFFLINE.value),
        (taken >= Runner.max_concurrent_pods, RunnerStatus.BUSY.value),
        else_=RunnerStatus.ONLINE.value,
    )
    return select(Runner, status, taken)


def _known(row: Row[Runner, str, int]) -> KnownRunner:
    """Pods that wait for a place have none."""
    return KnownRunner(row[0], RunnerStatus(row[1]), min(row[2], row[0].max_concurrent_pods))


def _is_current(process: RunnerProcess) -> tuple[ColumnElement[bool], ...]:
    return (
        Runner.id == process.runner_id,
        Runner.incarnation == process.incarnation,
        Runner.disabled_at.is_(None),
    )


def _superseded() -> RefusedError:
    return RefusedError("another process has registered as this runner, or its token is no more")


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
