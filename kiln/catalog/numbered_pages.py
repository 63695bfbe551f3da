"""Pages by number, with an exact total: whichever page it is, an index is gone through once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Select, func, select
from sqlalchemy.orm import InstrumentedAttribute, Session

# What matches so few rows is counted by reading their ids, which saves the second query.
READ_AT_ONCE: Final = 500


def page_of_ids(  # noqa: PLR0913
    session: Session,
    ids: Select[int],
    number: int,
    size: int,
    *,
    newest_first: bool = False,
    behind: Sequence[InstrumentedAttribute[Any]] = (),
) -> tuple[list[int], int]:
    """The ids on the `number`th page (from 1 on) of `size`, in their order, and how many `ids` selects in all.

    The session is to see one state of the database. `behind` names the columns behind which the id stands in its index
    and which `ids` wants to be null: unless they are in the order too, PostgreSQL does not see that the index has it.
    """
    walk = _Walk(session, ids, newest_first, behind)
    skipped = (number - 1) * size
    first = walk.read(READ_AT_ONCE)
    if len(first) < READ_AT_ONCE:
        return first[skipped : skipped + size], len(first)
    shown = first[skipped : skipped + size]
    if skipped + size <= READ_AT_ONCE:
        return shown, len(first) + walk.count(first[-1])
    shown += walk.read(size - len(shown), first[-1], max(0, skipped - len(first)))
    if not shown:
        return [], len(first) + walk.count(first[-1])
    return shown, skipped + len(shown) + walk.count(shown[-1])


@dataclass(frozen=True)
class _Walk:
    """Through `ids` in their order, along the index that has it."""

    session: Session
    ids: Select[int]
    newest_first: bool
    behind: Sequence[InstrumentedAttribute[Any]]

    def read(self, limit: int, after: int | None = None, skipped: int = 0) -> list[int]:
        """The ids that come after one, or from the first on."""
        return list(self.session.scalars(self._ordered(after).offset(skipped).limit(limit)))

    def count(self, after: int) -> int:
        """How many ids come after one. They are ordered for it, lest PostgreSQL read the whole table instead."""
        rest = self._ordered(after).subquery()
        return self.session.scalar(select(func.count()).select_from(rest)) or 0

    def _ordered(self, after: int | None) -> Select[int]:
        (key,) = self.ids.selected_columns
        order = [column.desc() if self.newest_first else column.asc() for column in (*self.behind, key)]
        ids = self.ids.order_by(*order)
        return ids if after is None else ids.where(key < after if self.newest_first else key > after)
