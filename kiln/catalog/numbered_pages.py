"""Pages by number, with an exact total: what is read for one is at most two scans of an index."""

from typing import Final

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

# What matches so few rows is counted by reading their ids, which saves the second scan.
READ_AT_ONCE: Final = 500


def page_of_ids(
    session: Session, ids: Select[int], number: int, size: int, *, newest_first: bool = False
) -> tuple[list[int], int]:
    """The ids on the `number`th page (from 1 on) of `size`, in their order, and how many `ids` selects in all."""
    skipped = (number - 1) * size
    first = _some(session, ids, 0, READ_AT_ONCE, descending=newest_first)
    if len(first) < READ_AT_ONCE:
        return first[skipped : skipped + size], len(first)
    total = session.scalar(select(func.count()).select_from(ids.subquery())) or 0
    if skipped + size <= READ_AT_ONCE:
        return first[skipped : skipped + size], total
    beyond = max(0, total - skipped - size)
    if skipped <= beyond:
        return _some(session, ids, skipped, size, descending=newest_first), total
    # It is nearer to the end, and counted from there.
    last = _some(session, ids, beyond, total - skipped - beyond, descending=not newest_first)
    return last[::-1], total


def _some(session: Session, ids: Select[int], skipped: int, limit: int, *, descending: bool) -> list[int]:
    if limit <= 0:
        return []
    (key,) = ids.selected_columns
    ordered = ids.order_by(key.desc() if descending else key.asc())
    return list(session.scalars(ordered.offset(skipped).limit(limit)))
