"""Every test of the catalog runs on SQLite and on PostgreSQL, on a database of its own."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kiln.catalog.ledger import CatalogLedger
from kiln.catalog.machine_ledger import CatalogMachineLedger
from kiln.catalog.pod_ledger import CatalogPodLedger
from kiln.catalog.session import Catalog
from kiln.models import Claim
from kiln.sealing import Sealer
from support.pod_rows import POD_LEASE
from support.rows import add_organization, empty_tables, fresh_database


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest) -> str:
    """Where databases are made: the URL of a PostgreSQL server, or "" for SQLite."""
    return "" if request.param == "sqlite" else str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def database(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an empty database."""
    with _database(server, tmp_path_factory) as url:
        yield url


@pytest.fixture(scope="session")
def migrated(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a database with its tables: migrating one for every test would take most of the time."""
    with _database(server, tmp_path_factory) as url:
        catalog = Catalog(url)
        catalog.migrate()
        catalog.close()
        yield url


@pytest.fixture
def catalog(server: str, migrated: str, tmp_path: Path) -> Iterator[Catalog]:
    """A catalog with its tables and nothing in them but the installation."""
    catalog = Catalog(_emptied(migrated) if server else _copied(migrated, tmp_path))
    yield catalog
    catalog.close()


@contextmanager
def _database(server: str, folders: pytest.TempPathFactory) -> Iterator[str]:
    if not server:
        yield f"sqlite:///{folders.mktemp('migrated') / 'catalog.db'}"
        return
    with fresh_database(server) as url:
        yield url


def _emptied(url: str) -> str:
    empty_tables(url)
    return url


def _copied(url: str, folder: Path) -> str:
    copy = shutil.copy(url.removeprefix("sqlite:///"), folder / "catalog.db")
    return f"sqlite:///{copy}"


@pytest.fixture
def organization(catalog: Catalog) -> str:
    """The id of an organization."""
    return add_organization(catalog)


@pytest.fixture
def sealer() -> Sealer:
    return Sealer(Sealer.new_key())


@pytest.fixture
def ledger(catalog: Catalog, sealer: Sealer) -> CatalogLedger:
    return CatalogLedger(catalog, sealer, Claim(mine=False, heartbeat_timeout_seconds=7, max_attempts=5))


@pytest.fixture
def machine_ledger(catalog: Catalog) -> CatalogMachineLedger:
    return CatalogMachineLedger(catalog)


@pytest.fixture
def pod_ledger(catalog: Catalog, sealer: Sealer) -> CatalogPodLedger:
    return CatalogPodLedger(catalog, sealer, POD_LEASE)
