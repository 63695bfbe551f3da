"""What tests of more than one folder share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.loopback import refusal, refuse_other_hosts
from support.postgres import DEBIAN_PROGRAMS, postgres_server


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a PostgreSQL server of this session's own; a test makes itself a database on it."""
    if not Path(DEBIAN_PROGRAMS).exists():
        pytest.skip(f"PostgreSQL's server is not installed ({DEBIAN_PROGRAMS})")
    with postgres_server(tmp_path_factory.mktemp("postgres")) as url:
        yield url


def pytest_configure() -> None:
    reason = refusal(os.environ)
    if reason is not None:
        pytest.exit(reason, returncode=2)
    refuse_other_hosts()
