"""What a build's workflow and its attempts write. Every change of status is one compare-and-set on status and attempt."""

from collections.abc import Collection
from datetime import UTC, datetime, timedelta

from sqlalchemy import ColumnElement, case, func, literal, or_, select, update
from sqlalchemy.orm import Session

from kiln.catalog.builds import OPEN
from kiln.catalog.session import database_now
from kiln.catalog.tables import Build, UtcDateTime
from kiln.errors import (
    AttemptLostError,
    BuildCancelledError,
    BuildNotFoundError,
    BuildOverError,
    ContextMissingError,
)
from kiln.models import BuildEnd, BuildStatus
from kiln.ports import Held

KNOWN_IDS_LIMIT = 200


def claim(tx: Session, build_id: str, run_id: str) -> Build | None:
    """Makes the build this run's own; None if it is another run's, closed, or no more. Repeating it is harmless."""
    return tx.scalars(
        update(Build)
        .where(Build.id == build_id, Build.status.in_(OPEN), or_(Build.run_id.is_(None), Build.run_id == run_id))
        .values(run_id=run_id)
        .returning(Build)
    ).first()


def begin(tx: Session, build_id: str, holder: str, lease: timedelta) -> Build | Held:
    """The next attempt, `queued` until its tool starts, holding the build for `lease`; or who still holds it.

    Raises BuildCancelledError, BuildOverError, ContextMissingError, BuildNotFoundError.
    """
    now = database_now(tx)
    row = tx.scalars(
        update(Build)
        .where(
            *_wants_work(build_id),
            Build.status != BuildStatus.AWAITING_CONTEXT.value,
            or_(Build.lease_until.is_(None), Build.lease_until <= now),
        )
        .values(
            attempt=Build.attempt + 1,
            status=BuildStatus.QUEUED.value,
            lease_holder=holder,
            lease_until=database_now(tx, ahead=lease),
            pending_image=None,
        )
        .returning(Build)
    ).first()
    if row is not None:
        return row
    open_row = _open_row(tx, build_id)
    if open_row.status == BuildStatus.AWAITING_CONTEXT.value:
        raise ContextMissingError(f"build {build_id} has not got its context yet")
    return Held(_remaining_lease(tx, open_row))


def holder_of(tx: Session, build_id: str) -> str | None:
    """Who began the last attempt and never gave the build up; None if that attempt ended in order."""
    return tx.scalar(select(Build.lease_holder).where(Build.id == build_id).with_for_update())


def renew(tx: Session, build_id: str, attempt: int, lease: timedelta) -> None:
    """Holds the build for another `lease`. Raises AttemptLostError, BuildCancelledError, BuildOverError."""
    renewed = tx.execute(
        update(Build)
        .where(
            *_wants_work(build_id),
            Build.attempt == attempt,
            Build.lease_until > database_now(tx),
        )
        .values(lease_until=database_now(tx, ahead=lease))
        .returning(Build.id)
    ).first()
    if renewed is None:
        _open_row(tx, build_id)
        raise AttemptLostError(f"attempt {attempt} of build {build_id} no longer holds it")


def release(tx: Session, build_id: str, attempt: int) -> None:
    """Gives the build up at once, so that a successor need not wait the lease out. Call it when the tool is gone."""
    tx.execute(
        update(Build).where(Build.id == build_id, Build.attempt == attempt).values(lease_until=None, lease_holder=None)
    )


def prepare(tx: Session, build_id: str, attempt: int, account: str) -> None:
    """Notes the account before anything is made in it. Raises AttemptLostError."""
    noted = tx.execute(
        update(Build)
        .where(*_wants_work(build_id), Build.attempt == attempt)
        .values(account=account)
        .returning(Build.id)
    )
    if noted.first() is None:
        raise AttemptLostError(f"attempt {attempt} of build {build_id} no longer holds it")


def tool_started(tx: Session, build_id: str, attempt: int, limit: timedelta) -> datetime:
    """Writes `building` and returns the build's deadline, which the first attempt's start sets for all of them.

    Raises AttemptLostError if another attempt came after this one.
    """
    now = datetime.now(UTC)
    row = tx.scalars(
        update(Build)
        .where(*_wants_work(build_id), Build.attempt == attempt)
        .values(
            status=BuildStatus.BUILDING.value,
            started_at=func.coalesce(Build.started_at, literal(now, UtcDateTime)),
            deadline_at=func.coalesce(Build.deadline_at, literal(now + limit, UtcDateTime)),
        )
        .returning(Build)
        .execution_options(populate_existing=True)
    ).first()
    if row is None or row.deadline_at is None:
        raise AttemptLostError(f"attempt {attempt} of build {build_id} no longer holds it")
    return row.deadline_at


def note_ids(tx: Session, build_id: str, ids: Collection[str]) -> None:
    """Remembers ids of resources that the tool named, for the cleanup; an AMI among them is the one being made."""
    row = tx.get(Build, build_id, with_for_update=True)
    if row is None:
        return
    row.known_ids = sorted({*row.known_ids, *ids})[:KNOWN_IDS_LIMIT]
    amis = [known for known in ids if known.startswith("ami-")]
    if amis:
        row.pending_image = amis[-1]


def fence(tx: Session, build_id: str) -> timedelta:
    """Takes the build away from every attempt; returns how long the holder's tool may still live."""
    row = row_of(tx, build_id, lock=True)  # a renewal that commits at this moment counts
    row.closing_at = row.closing_at or datetime.now(UTC)
    return _remaining_lease(tx, row)


def finish(tx: Session, build_id: str, end: BuildEnd) -> Build:
    """Closes an open build and forgets its secrets; a closed one stays as it is, but for `cleaned_at`. Returns the row.

    One whose publication was begun has `succeeded`, whatever became of its workflow.
    """
    now = datetime.now(UTC)
    published = Build.publishing_at.is_not(None)
    tx.execute(
        update(Build)
        .where(Build.id == build_id, Build.status.in_(OPEN))
        .values(
            status=case((published, BuildStatus.SUCCEEDED.value), else_=end.status.value),
            completed_at=now,
            error_code=case((published, None), else_=end.error.code.value if end.error else None),
            error_message=case((published, None), else_=end.error.message if end.error else None),
        )
    )
    tx.execute(
        update(Build)
        .where(Build.id == build_id)
        .values(cleaned_at=now, secrets=None, lease_until=None, lease_holder=None, pending_image=None)
    )
    tx.flush()
    row = row_of(tx, build_id)
    tx.refresh(row)
    return row


def publish(tx: Session, build_id: str, attempt: int) -> Build:
    """Writes `succeeded` for the attempt that built the image.

    Raises BuildCancelledError, BuildOverError, AttemptLostError: then nothing may be published.
    """
    row = tx.scalars(
        update(Build)
        .where(*_wants_work(build_id), Build.attempt == attempt)
        .values(status=BuildStatus.SUCCEEDED.value, completed_at=datetime.now(UTC), pending_image=None, secrets=None)
        .returning(Build)
        .execution_options(populate_existing=True)
    ).first()
    if row is None:
        _open_row(tx, build_id)
        raise AttemptLostError(f"attempt {attempt} of build {build_id} no longer holds it")
    return row


def begin_publication(tx: Session, build_id: str, attempt: int) -> Build:
    """Writes that the attempt's image is public from now on, whatever comes; the build stays open until the registry
    has it. Repeating it is harmless.

    Raises BuildCancelledError, BuildOverError, AttemptLostError: then nothing may be published.
    """
    row = row_of(tx, build_id, lock=True)
    if row.publishing_at is not None and row.attempt == attempt:
        return row
    _open_row(tx, build_id)
    if row.attempt != attempt:
        raise AttemptLostError(f"attempt {attempt} of build {build_id} no longer holds it")
    row.publishing_at = datetime.now(UTC)
    row.pending_image = None
    tx.flush()
    return row


def finish_publication(tx: Session, build_id: str) -> Build:
    """Writes `succeeded` for a build whose image the registry has. Repeating it is harmless.

    Raises BuildOverError if its publication was never begun, BuildNotFoundError.
    """
    row = row_of(tx, build_id, lock=True)
    if row.publishing_at is None:
        raise BuildOverError(f"build {build_id} is not being published")
    if row.status in OPEN:
        row.status, row.completed_at, row.secrets = BuildStatus.SUCCEEDED.value, datetime.now(UTC), None
        tx.flush()
    return row


def open_builds(session: Session, older_than: timedelta) -> list[Build]:
    """Open builds that have had `older_than` to get going, oldest first, for the comparison with Temporal."""
    born_before = datetime.now(UTC) - older_than
    query = select(Build).where(Build.status.in_(OPEN), Build.created_at <= born_before)
    return list(session.scalars(query.order_by(Build.created_at)))


def requeue_lapsed(tx: Session) -> int:
    """Builds whose attempt's lease is over wait for another one: they read `queued` again. Returns how many."""
    rows = tx.execute(
        update(Build)
        .where(
            Build.status == BuildStatus.BUILDING.value,
            Build.publishing_at.is_(None),
            Build.lease_until <= database_now(tx),
        )
        .values(status=BuildStatus.QUEUED.value)
        .returning(Build.id)
    )
    return len(rows.all())


def _wants_work(build_id: str) -> tuple[ColumnElement[bool], ...]:
    return (
        Build.id == build_id,
        Build.status.in_(OPEN),
        Build.cancel_requested_at.is_(None),
        Build.closing_at.is_(None),
        Build.publishing_at.is_(None),
    )


def row_of(tx: Session, build_id: str, *, lock: bool = False) -> Build:
    """The build's row, kept from all others' writes until the transaction's end with `lock`.

    Raises BuildNotFoundError.
    """
    row = tx.get(Build, build_id, with_for_update=True if lock else None, populate_existing=lock)
    if row is None:
        raise BuildNotFoundError(f"build {build_id} is not in the catalog")
    return row


def _open_row(tx: Session, build_id: str) -> Build:
    """The row, if the build still wants work; raises what stands against it otherwise."""
    row = tx.get(Build, build_id, populate_existing=True)
    if row is None:
        raise BuildNotFoundError(f"build {build_id} is not in the catalog")
    if row.status not in OPEN or row.closing_at is not None:
        raise BuildOverError(f"build {build_id} is being closed, or closed already")
    if row.publishing_at is not None:
        raise BuildOverError(f"build {build_id} is being published")
    if row.cancel_requested_at is not None:
        raise BuildCancelledError("the build's cancellation was asked for")
    return row


def _remaining_lease(tx: Session, row: Build) -> timedelta:
    if row.lease_until is None:
        return timedelta(0)
    now = tx.scalar(select(database_now(tx)))
    return max(timedelta(0), row.lease_until - now) if now is not None else timedelta(0)
