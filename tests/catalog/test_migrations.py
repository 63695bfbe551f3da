"""How the tables come about, and who may make them at once."""

import subprocess
import sys
import uuid

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import func, inspect, select

from kiln.catalog.session import Catalog
from kiln.catalog.tables import Base, Installation
from kiln.errors import KilnError, UnavailableError
from support.parallel import in_parallel

MIGRATE = "import sys; from kiln.catalog.session import Catalog; print(Catalog(sys.argv[1]).migrate())"
AT_ONCE = 3


@pytest.fixture
def empty(database: str) -> Catalog:
    return Catalog(database)


def test_migrating_an_empty_database_makes_every_table(empty: Catalog) -> None:
    """After `migrate` every mapped table is there."""
    empty.migrate()
    assert set(Base.metadata.tables) <= set(inspect(empty.engine).get_table_names())
    empty.close()


def test_migrating_names_the_installation(empty: Catalog) -> None:
    """The first `migrate` makes the installation's id, a UUID."""
    assert uuid.UUID(empty.migrate()).version == 4
    empty.close()


def test_migrating_again_keeps_the_installation(catalog: Catalog) -> None:
    """A second `migrate` changes nothing, and says the same id as the first."""
    known = catalog.installation()
    assert catalog.migrate() == known


def test_the_models_are_what_the_migrations_make(catalog: Catalog) -> None:
    """Alembic finds no difference between the migrated tables and the mapped classes."""
    with catalog.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_processes_that_migrate_at_once_agree(database: str) -> None:
    """Several processes that begin on an empty database all succeed, and say one installation."""
    processes = [
        subprocess.Popen([sys.executable, "-c", MIGRATE, database], stdout=subprocess.PIPE, text=True)
        for _ in range(AT_ONCE)
    ]
    said = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0] * AT_ONCE
    assert len(said) == 1


def test_threads_that_migrate_at_once_leave_one_installation(database: str) -> None:
    """However many begin at once, one row names the installation."""
    catalogs = [Catalog(database) for _ in range(AT_ONCE)]
    outcomes = in_parallel([catalog.migrate for catalog in catalogs])
    assert not [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    with catalogs[0].read() as session:
        assert session.scalar(select(func.count()).select_from(Installation)) == 1
    for catalog in catalogs:
        catalog.close()


def test_a_catalog_without_tables_is_unavailable(empty: Catalog) -> None:
    """Before the first `migrate`, asking for the installation says that the catalog cannot serve yet."""
    with pytest.raises(UnavailableError):
        empty.installation()
    empty.close()


@pytest.mark.parametrize("url", ["catalog.db", "mysql://127.0.0.1/kiln", "postgresql://host:port/kiln"])
def test_an_unknown_database_is_refused_by_its_setting(url: str) -> None:
    """A URL that is no SQLite or PostgreSQL database is refused in one line that names the setting."""
    with pytest.raises(KilnError, match="KILN_CATALOG_URL"):
        Catalog(url)


def test_a_database_that_does_not_answer_is_unavailable() -> None:
    """A server that is not there is reported as such, not as a fault of the driver."""
    nowhere = Catalog("postgresql://kiln@127.0.0.1:1/kiln")
    with pytest.raises(UnavailableError, match="catalog"):
        nowhere.migrate()
    nowhere.close()
