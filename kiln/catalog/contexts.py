"""Build contexts: whether a build's archive has come, and whether the build may begin with it."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, func, literal, select, update
from sqlalchemy.orm import Session

from kiln.catalog import attempts
from kiln.catalog.builds import OPEN, shown_status
from kiln.catalog.tables import Build, UtcDateTime
from kiln.models import BuildEnd, BuildStatus, Failure
from kiln.ports import ContextFacts

# SQLite limits the parameters of one statement.
IDS_A_QUERY = 500


@dataclass(frozen=True)
class ContextRow:
    """What the catalog knows of a build's context. `upload_until` is None for a build whose context came with it;
    `status` in the words of `kiln.md`."""

    build_id: str
    organization_id: str
    dockerfile: str
    upload_until: datetime | None
    uploaded: bool
    started: bool
    open: bool
    status: BuildStatus


def of(session: Session, build_id: str) -> ContextRow | None:
    """The context of a build, whoever's it is; None if there is no such build, or it is built from no context."""
    row = session.get(Build, build_id)
    if row is None or "dockerfile" not in row.spec:
        return None
    return ContextRow(
        build_id=row.id,
        organization_id=row.organization_id,
        dockerfile=row.spec["dockerfile"],
        upload_until=row.upload_until,
        uploaded=row.context_uploaded_at is not None,
        started=row.context_started_at is not None,
        open=row.status in OPEN,
        status=shown_status(row),
    )


def note_uploaded(tx: Session, build_id: str, facts: ContextFacts) -> bool:
    """Notes an archive, in the place of one that came before. False, and nothing changes, once the build has begun
    or ended."""
    noted = tx.execute(
        update(Build)
        .where(*_awaits(build_id))
        .values(context_uploaded_at=datetime.now(UTC), **_columns(facts))
        .returning(Build.id)
    )
    return noted.first() is not None


def start(tx: Session, build_id: str, facts: ContextFacts | None) -> bool:
    """Lets a build begin with its context: `queued` from now on. Repeating it is harmless.

    `facts` are of an archive that nobody noted, because it did not come through Kiln. False if the build is over, being
    cancelled, or no archive has come.
    """
    row = tx.get(Build, build_id, with_for_update=True, populate_existing=True)
    if row is None or row.status not in OPEN:
        return False
    if row.context_started_at is not None:
        return True
    if facts is None and row.context_uploaded_at is None:
        return False
    return _queue(tx, build_id, facts)


def reject(tx: Session, build_id: str, failure: Failure) -> bool:
    """Fails a build whose context came past Kiln, and is none that it can be built from. False if it waits for none."""
    if tx.scalar(select(Build.id).where(*_awaits(build_id)).with_for_update()) is None:
        return False
    attempts.finish(tx, build_id, BuildEnd(status=BuildStatus.FAILED, error=failure))
    return True


def _queue(tx: Session, build_id: str, facts: ContextFacts | None) -> bool:
    now = datetime.now(UTC)
    uploaded_at = func.coalesce(Build.context_uploaded_at, literal(now, UtcDateTime))
    queued = tx.execute(
        update(Build)
        .where(*_awaits(build_id))
        .values(
            status=BuildStatus.QUEUED.value,
            context_started_at=now,
            context_uploaded_at=uploaded_at,
            **(_columns(facts) if facts else {}),
        )
        .returning(Build.id)
    )
    return queued.first() is not None


def over(session: Session, keys: Collection[str]) -> set[str]:
    """Those of these build ids whose build is closed, or that no build has."""
    wanted = sorted(set(keys))
    needed: set[str] = set()
    for start_at in range(0, len(wanted), IDS_A_QUERY):
        chunk = wanted[start_at : start_at + IDS_A_QUERY]
        needed |= set(session.scalars(select(Build.id).where(Build.id.in_(chunk), Build.status.in_(OPEN))))
    return set(wanted) - needed


def _awaits(build_id: str) -> tuple[ColumnElement[bool], ...]:
    return (
        Build.id == build_id,
        Build.status == BuildStatus.AWAITING_CONTEXT.value,
        Build.cancel_requested_at.is_(None),
        Build.closing_at.is_(None),
    )


def _columns(facts: ContextFacts) -> dict[str, Any]:
    return {"context_sha256": facts.sha256, "context_bytes": facts.size_bytes}
