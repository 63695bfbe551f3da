"""Nonces of signed requests (`api/signed.py`): each is let in once, whichever API process it comes to."""

import hashlib
from datetime import UTC, datetime, timedelta
from typing import cast

from sqlalchemy import ColumnElement, Executable, Table, bindparam, delete, func, select, true
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from kiln.catalog.tables import Nonce

# A timestamp passes for 5 minutes either way, so for 10 in all; the rest is for hosts whose clocks differ.
LIFETIME = timedelta(minutes=11)


def remember(tx: Session, key_id: str, nonce: bytes) -> bool:
    """Whether the key's nonce is new; it is remembered then. Of two at the same moment, one is."""
    now = datetime.now(UTC)
    values = {"new_digest": _digest(key_id, nonce), "new_until": now + LIFETIME, "now": now}
    statement = _REMEMBER[tx.get_bind().dialect.name]
    return tx.connection().execute(statement, values).first() is not None


def forget_old(tx: Session) -> None:
    """Drops the nonces that no timestamp can bring back."""
    tx.execute(delete(Nonce).where(Nonce.until <= datetime.now(UTC)))


def _digest(key_id: str, nonce: bytes) -> str:
    # No key's id holds a colon, so no two pairs have the same text.
    return hashlib.sha256(key_id.encode() + b":" + nonce).hexdigest()


def _remembering(insert: type[postgresql.Insert] | type[sqlite.Insert], condition: ColumnElement[bool]) -> Executable:
    """A row for the nonce, or the old row of one that was forgotten; returns nothing for one that is remembered."""
    table = cast("Table", Nonce.__table__)
    digest, until = table.c.digest, table.c.until
    values = select(bindparam("new_digest", type_=digest.type), bindparam("new_until", type_=until.type))
    new = insert(table).from_select([digest, until], values.where(condition))
    forgotten = until <= bindparam("now", type_=until.type)
    kept = new.on_conflict_do_update(index_elements=[digest], set_={"until": new.excluded.until}, where=forgotten)
    return kept.returning(digest)


# PostgreSQL does not wait for the disk: its crash may forget a nonce of the last milliseconds, and nothing else. Said in
# the statement itself, which saves a round trip.
_NO_WAIT = func.set_config("synchronous_commit", "off", True) == "off"
# Built once, by the database's name: building them anew would take longer than they do.
_REMEMBER = {"sqlite": _remembering(sqlite.Insert, true()), "postgresql": _remembering(postgresql.Insert, _NO_WAIT)}
