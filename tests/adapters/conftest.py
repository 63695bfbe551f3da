"""Every test of the log store runs on SQLite and on PostgreSQL, on a database of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.rows import fresh_database

from kiln.adapters.logs import LogStore


@pytest.fixture(params=["sqlite", "postgresql"])
def log_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'logs.db'}"
        return
    with fresh_database(request.getfixturevalue("postgres_url")) as url:
        yield url


@pytest.fixture
def store(log_url: str) -> Iterator[LogStore]:
    """A log store with its tables."""
    store = LogStore(log_url)
    store.create()
    yield store
    store.close()
