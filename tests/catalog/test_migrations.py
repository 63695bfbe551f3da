"""How the tables come about, and who may make them at once."""

import subprocess
import sys
import uuid
from contextlib import nullcontext
from datetime import UTC, datetime

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Column, MetaData, Table, func, inspect, select
from sqlalchemy.orm import make_transient

from kiln.catalog.session import MIGRATIONS, AlreadyThereError, Catalog
from kiln.catalog.tables import Base, Build, Image, Installation
from kiln.errors import KilnError, UnavailableError
from support.parallel import in_parallel

MIGRATE = "import sys; from kiln.catalog.session import Catalog; print(Catalog(sys.argv[1]).migrate())"
AT_ONCE = 3


NOON = datetime(2026, 3, 25, 12, 0, tzinfo=UTC)
AMI = "ami-0abcdef1234567890"


def to_revision(catalog: Catalog, revision: str) -> None:
    """Brings an empty database to the tables of an earlier Kiln."""
    with catalog.engine.begin() as connection:
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


def fill_the_first_tables(catalog: Catalog) -> tuple[str, str]:
    """The ids of a build and of its AMI, written with the columns that the database has."""
    rows = {
        "organizations": {"id": "an-organization", "slug": "acme"},
        "builds": {
            "id": "a-build", "organization_id": "an-organization", "kind": "machine", "api": "machine-images",
            "platform": "linux/amd64", "status": "succeeded", "spec": {"region": "x"}, "created_by": "a-key",
            "attempt": 1, "known_ids": [],
        },
        "images": {
            "id": "an-image", "organization_id": "an-organization", "build_id": "a-build", "kind": "ami",
            "api": "machine-images", "reference": AMI, "account": "1", "region": "x", "platform": "linux/amd64",
            "provider": "codex", "size_bytes": 1, "snapshot_ids": ["snap-1"], "kept_snapshot_ids": [],
            "simulated": True, "status": "available",
        },
    }  # fmt: skip
    with catalog.engine.begin() as connection:
        for table, values in rows.items():
            columns = {**values, "created_at": NOON}
            mapped = Base.metadata.tables[table]
            connection.execute(
                Table(table, MetaData(), *(Column(n, mapped.c[n].type) for n in columns)).insert(), columns
            )
    return "a-build", "an-image"


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


def test_rows_of_the_first_tables_are_carried_over(empty: Catalog) -> None:
    """A catalog that knew no container images keeps its builds and its AMIs, and takes both kinds of image."""
    to_revision(empty, "0001")
    build, image = fill_the_first_tables(empty)
    empty.migrate()
    with empty.read() as session:
        kept_build, kept_image = session.get_one(Build, build), session.get_one(Image, image)
        assert (kept_build.status, kept_build.spec, kept_build.created_at) == ("succeeded", {"region": "x"}, NOON)
        assert (kept_build.agent_id, kept_build.repository, kept_build.publishing_at) == (None, None, None)
        assert (kept_image.reference, kept_image.snapshot_ids, kept_image.created_at) == (AMI, ["snap-1"], NOON)
        assert (kept_image.build_id, kept_image.digest, kept_image.platforms) == (build, None, None)
    empty.close()


@pytest.mark.parametrize(("kind", "refused"), [("ami", True), ("container", False)])
def test_only_amis_are_there_once(empty: Catalog, kind: str, *, refused: bool) -> None:
    """Two builds may make the same container image; an AMI is made once."""
    to_revision(empty, "0001")
    fill_the_first_tables(empty)
    empty.migrate()
    with pytest.raises(AlreadyThereError) if refused else nullcontext(), empty.transaction() as tx:
        build = tx.scalars(select(Build)).one()
        make_transient(build)
        build.id = "another-build"
        image = tx.scalars(select(Image)).one()
        make_transient(image)
        image.id, image.build_id, image.kind = "another-image", build.id, kind
        tx.add(build)
        tx.flush()
        tx.add(image)
    empty.close()


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
