"""Lines to write to a log, and the database behind it, to damage it."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from sqlalchemy import Engine, create_engine
from sqlalchemy.engine import make_url

from kiln.adapters.logs import Gap, LogLine

START = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def entries(count: int, *, first: int = 1, text: str = "line") -> list[tuple[datetime, str, str]]:
    """Lines `line 1`, `line 2`, … a millisecond apart."""
    numbers = range(first, first + count)
    return [(START + timedelta(milliseconds=number), "stdout", f"{text} {number}") for number in numbers]


def texts(items: Sequence[object]) -> list[str]:
    """The texts of the lines among the items."""
    return [item.text for item in items if isinstance(item, LogLine)]


def numbers(items: Sequence[object]) -> list[int]:
    """The numbers of lines and gaps, in order."""
    return [
        number
        for item in items
        if isinstance(item, LogLine | Gap)
        for number in ([item.number] if isinstance(item, LogLine) else range(item.first, item.last + 1))
    ]


def engine(url: str) -> Engine:
    """A connection to the database beside the store's own."""
    parsed = make_url(url)
    return create_engine(parsed.set(drivername="postgresql+psycopg") if parsed.drivername == "postgresql" else parsed)
