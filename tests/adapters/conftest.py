"""What the adapters' tests share. Every test of the log store runs on SQLite and on PostgreSQL."""

import os
import signal
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kiln.adapters.logs import LogStore
from support.processes import marked
from support.rows import fresh_database
from support.tools import Tools


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


@pytest.fixture
def mark() -> Iterator[str]:
    """A mark for this test's tools; whatever still carries it at the end is killed."""
    mark = uuid.uuid4().hex
    yield mark
    for pid in marked(mark):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def tools(tmp_path: Path, mark: str) -> Tools:
    return Tools(tmp_path, mark)
