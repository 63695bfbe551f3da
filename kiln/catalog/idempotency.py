"""Answers that were given under an `Idempotency-Key`, for 24 hours."""

from datetime import UTC, datetime, timedelta

from sqlalchemy import delete
from sqlalchemy.orm import Session

from kiln.catalog.tables import IdempotencyKey

LIFETIME = timedelta(hours=24)


def find(tx: Session, organization_id: str, key: str) -> IdempotencyKey | None:
    """The answer under this key, unless it is older than a day: then the key is free again."""
    row = tx.get(IdempotencyKey, (organization_id, key))
    if row is not None and row.created_at <= datetime.now(UTC) - LIFETIME:
        tx.delete(row)
        tx.flush()
        return None
    return row


def remember(tx: Session, answer: IdempotencyKey) -> None:
    """Keeps an answer, in the transaction that writes its build. A second one under the same key waits, then fails."""
    tx.add(answer)
    tx.flush()


def forget_old(tx: Session) -> None:
    """Drops answers that are past their day."""
    tx.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at <= datetime.now(UTC) - LIFETIME))
