"""A worker that freezes inside a transaction does not hold its build for as long as it is frozen."""

from collections.abc import Iterator
from datetime import timedelta

import pytest

from kiln import dsn
from kiln.catalog import attempts
from kiln.catalog.session import Catalog
from kiln.errors import UnavailableError
from support.rows import add_build, add_organization, fresh_database

LEASE = timedelta(seconds=10)


@pytest.fixture
def postgres_catalog(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Catalog]:
    """PostgreSQL only: SQLite's lock is the process's own, which nobody else can break (docs/adr/0007)."""
    monkeypatch.setattr(dsn, "IDLE_TRANSACTION_MILLISECONDS", 300)
    with fresh_database(postgres_url) as url:
        catalog = Catalog(url)
        catalog.migrate()
        yield catalog
        catalog.close()


def test_another_attempt_gets_at_the_row_that_a_frozen_one_locked(postgres_catalog: Catalog) -> None:
    """The server ends the idle session: its transaction is rolled back, and the next attempt begins."""
    build_id = add_build(postgres_catalog, add_organization(postgres_catalog))
    with pytest.raises(UnavailableError), postgres_catalog.transaction() as frozen:
        attempts.begin(frozen, build_id, "frozen", LEASE)
        with postgres_catalog.transaction() as tx:
            begun = attempts.begin(tx, build_id, "alive", LEASE)
        assert getattr(begun, "lease_holder", None) == "alive"
