"""Lines to write to a log, and the database behind it, to damage it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from sqlalchemy import Engine, create_engine, text
from sqlalchemy.engine import make_url

from kiln.adapters.logs import Gap, LogLine, LogStore

START = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def entries(count: int, *, first: int = 1, word: str = "line") -> list[tuple[datetime, str, str]]:
    """Lines `line 1`, `line 2`, … a millisecond apart."""
    numbers = range(first, first + count)
    return [(START + timedelta(milliseconds=number), "stdout", f"{word} {number}") for number in numbers]


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


def read_all(store: LogStore, build_id: str, *, limit: int = 1000) -> list[LogLine | Gap]:
    """What page after page gives."""
    found: list[LogLine | Gap] = []
    while page := store.read(build_id, numbers(found)[-1] if found else 0, limit):
        found += page
    return found


def engine(url: str) -> Engine:
    """A connection to the database beside the store's own."""
    parsed = make_url(url)
    return create_engine(parsed.set(drivername="postgresql+psycopg") if parsed.drivername == "postgresql" else parsed)


@contextmanager
def outage(url: str) -> Iterator[None]:
    """While the block lasts, the database does not serve the log store: every question fails."""
    if url.startswith("sqlite"):
        yield from _without_tables(url)
    else:
        yield from _without_connections(url)


def _without_tables(url: str) -> Iterator[None]:
    database = engine(url)
    _execute(database, "ALTER TABLE streams RENAME TO away")
    yield
    _execute(database, "ALTER TABLE away RENAME TO streams")
    database.dispose()


def _without_connections(url: str) -> Iterator[None]:
    name = make_url(url).database
    server = engine(make_url(url).set(database="postgres").render_as_string(hide_password=False))
    _execute(server, f"UPDATE pg_database SET datallowconn = false WHERE datname = '{name}'")
    cut_connections(url)
    yield
    _execute(server, f"UPDATE pg_database SET datallowconn = true WHERE datname = '{name}'")
    server.dispose()


def cut_connections(url: str) -> None:
    """Ends every connection to a PostgreSQL database, whatever it is doing."""
    name = make_url(url).database
    server = engine(make_url(url).set(database="postgres").render_as_string(hide_password=False))
    _execute(server, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
    server.dispose()


def _execute(database: Engine, statement: str) -> None:
    with database.begin() as connection:
        connection.execute(text(statement))
