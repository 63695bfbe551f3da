"""What a session for reading does to the database."""

from contextlib import suppress

from sqlalchemy import select, text, update

from kiln.catalog.session import Catalog
from kiln.catalog.tables import Organization
from kiln.errors import UnavailableError
from support.rows import add_organization

# psycopg prepares a statement that it has sent five times.
REPEATED = 7


def test_what_a_read_writes_is_not_kept(catalog: Catalog) -> None:
    """SQLite takes it back at the read's end; PostgreSQL refuses it."""
    add_organization(catalog, "before")
    with suppress(UnavailableError), catalog.read() as session:
        session.execute(update(Organization).values(slug="after"))
    with catalog.read() as session:
        assert session.scalars(select(Organization.slug)).all() == ["before"]


def test_postgresql_keeps_the_statements_that_were_prepared(postgres_url: str) -> None:
    """A read's end is no reason to plan the same query anew at the next one."""
    catalog = Catalog(postgres_url, pool_size=1)
    for _ in range(REPEATED):
        with catalog.read() as session:
            prepared = session.scalars(text("SELECT statement FROM pg_prepared_statements")).all()
    catalog.close()
    assert "SELECT statement FROM pg_prepared_statements" in prepared
