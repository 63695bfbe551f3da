"""What the registry is still to do because the catalog says so. The row is written with the change that asks for it."""

import uuid
from datetime import UTC, datetime, timedelta

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from kiln.catalog.tables import RegistryErrand


def add(tx: Session, repository: str, tag: str, digest: str, source_repository: str | None = None) -> RegistryErrand:
    """Has a tag point at the digest that another repository holds; or, without a source, has the tag taken away."""
    row = RegistryErrand(
        id=str(uuid.uuid4()),
        repository=repository,
        tag=tag,
        digest=digest,
        source_repository=source_repository,
        created_at=datetime.now(UTC),
    )
    tx.add(row)
    tx.flush()
    return row


def waiting(session: Session, older_than: timedelta, limit: int) -> list[RegistryErrand]:
    """At most `limit` errands that have had `older_than` to get done, oldest first."""
    asked_before = datetime.now(UTC) - older_than
    query = select(RegistryErrand).where(RegistryErrand.created_at <= asked_before)
    return list(session.scalars(query.order_by(RegistryErrand.created_at, RegistryErrand.id).limit(limit)))


def done(tx: Session, errand_id: str) -> None:
    """Forgets an errand. Repeating it is harmless."""
    tx.execute(delete(RegistryErrand).where(RegistryErrand.id == errand_id))
