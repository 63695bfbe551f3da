"""The catalog's connection: SQLite by default, PostgreSQL in production, one way of using both."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import ColumnElement, Engine, create_engine, event, func, literal, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session

from kiln.catalog.tables import Installation, UtcDateTime
from kiln.errors import UnavailableError

MIGRATIONS = Path(__file__).parent / "migrations"
SQLITE_BUSY_SECONDS = 30
# Any number will do, so long as it is Kiln's own: two processes that migrate at once wait for each other.
MIGRATION_LOCK = 0x6B696C6E


class Catalog:
    """Opens transactions. A read sees one consistent state; a write is serialised from its first statement on SQLite.

    Both raise UnavailableError when the database does not answer.
    """

    def __init__(self, dsn: str, *, pool_size: int = 20) -> None:
        self._dsn = _with_driver(dsn)
        self.engine = _make_engine(self._dsn, pool_size)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session for reading only; whatever it is made to write is rolled back."""
        with self._session() as session:
            self._begin(session, "BEGIN")
            yield session
            session.rollback()

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """A session that commits at the end of the block, or rolls back if the block raises."""
        with self._session() as session:
            self._begin(session, "BEGIN IMMEDIATE")
            yield session
            session.commit()

    def _begin(self, session: Session, statement: str) -> None:
        if self.engine.dialect.name == "sqlite":
            session.execute(text(statement))

    @contextmanager
    def _session(self) -> Iterator[Session]:
        try:
            with Session(self.engine, expire_on_commit=False) as session:
                yield session
        except OperationalError as error:
            raise UnavailableError(f"the catalog does not answer: {type(error.orig).__name__}") from error

    def migrate(self) -> str:
        """Brings the tables up to date and returns the installation's id, which the first call makes."""
        with self.engine.connect() as connection, connection.begin():
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            else:
                connection.execute(text("BEGIN IMMEDIATE"))
            config = Config()
            config.set_main_option("script_location", str(MIGRATIONS))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
        return self._make_installation()

    def _make_installation(self) -> str:
        try:
            with self.transaction() as tx:
                known = tx.scalar(select(Installation.id))
                if known is None:
                    known = str(uuid.uuid4())
                    tx.add(Installation(id=known, created_at=datetime.now(UTC)))
                return known
        except IntegrityError:  # another process was first
            return self.installation()

    def installation(self) -> str:
        """This installation's id. Raises UnavailableError before the first `migrate`."""
        with self.read() as session:
            known = session.scalar(select(Installation.id).order_by(Installation.created_at, Installation.id).limit(1))
        if known is None:
            raise UnavailableError("the catalog has no tables yet")
        return known

    def ping(self) -> None:
        """Raises UnavailableError unless the catalog answers and has its tables."""
        self.installation()

    def close(self) -> None:
        """Closes every pooled connection."""
        self.engine.dispose()


def database_now(session: Session) -> ColumnElement[datetime]:
    """Now, by the one clock that all workers share: PostgreSQL's own, or this host's for SQLite."""
    if session.get_bind().dialect.name == "postgresql":
        return func.clock_timestamp(type_=UtcDateTime)
    return literal(datetime.now(UTC), UtcDateTime)


def _with_driver(dsn: str) -> str:
    url = make_url(dsn)
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    return url.render_as_string(hide_password=False)


def _make_engine(dsn: str, pool_size: int) -> Engine:
    if not dsn.startswith("sqlite"):
        return create_engine(dsn, pool_size=pool_size, max_overflow=pool_size, pool_pre_ping=True)
    engine = create_engine(
        dsn, connect_args={"timeout": SQLITE_BUSY_SECONDS}, pool_size=pool_size, max_overflow=pool_size
    )
    event.listen(engine, "connect", _set_up_sqlite)
    return engine


def _set_up_sqlite(connection: object, _record: object) -> None:
    # The driver's own transaction handling begins late and deferred; Kiln begins its transactions itself.
    connection.isolation_level = None  # type: ignore[attr-defined]
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")  # type: ignore[attr-defined]
