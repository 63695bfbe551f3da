"""Which workers are alive, as they themselves say every few seconds."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from kiln.catalog.tables import Worker

PRESENCE_INTERVAL = timedelta(seconds=5)
# Three missed notes: a worker that is merely slow is not called dead.
PRESENCE_LIMIT = timedelta(seconds=16)
FORGET_AFTER = timedelta(hours=1)


@dataclass(frozen=True)
class Presence:
    """What a worker says of itself. `slots` is how many builds it takes at once, over all its queues."""

    worker_id: str
    role: str
    queues: tuple[str, ...]
    slots: int


def note(tx: Session, presence: Presence) -> None:
    """Writes that the worker is alive now, and forgets those that have not been seen for an hour."""
    now = datetime.now(UTC)
    row = tx.get(Worker, presence.worker_id) or Worker(id=presence.worker_id)
    row.role, row.queues, row.slots, row.seen_at = presence.role, list(presence.queues), presence.slots, now
    tx.add(row)
    tx.execute(delete(Worker).where(Worker.seen_at < now - FORGET_AFTER))


def leave(tx: Session, worker_id: str) -> None:
    """Takes a worker off the list at its orderly end."""
    tx.execute(delete(Worker).where(Worker.id == worker_id))


def living(session: Session) -> Sequence[Worker]:
    """Workers seen within the limit."""
    return session.scalars(select(Worker).where(Worker.seen_at >= datetime.now(UTC) - PRESENCE_LIMIT)).all()


def serves(session: Session, queue: str) -> bool:
    """Whether any living worker polls this queue."""
    return any(queue in worker.queues for worker in living(session))
