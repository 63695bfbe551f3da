"""The catalog's connection: SQLite by default, PostgreSQL in production, one way of using both."""

import contextlib
import sqlite3
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Interval,
    create_engine,
    event,
    func,
    insert,
    literal,
    select,
    text,
)
from sqlalchemy.exc import IntegrityError, InternalError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from kiln.catalog.tables import Installation, UtcDateTime
from kiln.dsn import database_url, postgres_options
from kiln.errors import KilnError, UnavailableError

MIGRATIONS = Path(__file__).parent / "migrations"
SQLITE_BUSY_SECONDS = 30
SQLITE_BUSY_PAUSE_SECONDS = 0.01
READING = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
# Any number will do, so long as it is Kiln's own: two processes that migrate at once wait for each other.
MIGRATION_LOCK = 0x6B696C6E


# What the floors above call it: only the catalog knows SQLAlchemy.
Transaction = Session


class AlreadyThereError(KilnError):
    """Another transaction wrote a row that must be unique first. The same transaction again will see it."""


class Catalog:
    """Opens transactions. A read sees one consistent state; a write is serialised from its first statement on SQLite.

    Both raise UnavailableError when the database does not answer.
    """

    def __init__(self, dsn: str, *, pool_size: int = 20) -> None:
        """Opens nothing yet. Raises KilnError if `dsn` is no database that Kiln knows."""
        self._dsn = database_url(dsn, "KILN_CATALOG_URL").render_as_string(hide_password=False)
        self.engine = _make_engine(self._dsn, pool_size)

    @property
    def writes_one_by_one(self) -> bool:
        """Whether a transaction waits until no other one writes."""
        return self.engine.dialect.name == "sqlite"

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """A session for reading only. Whatever it is made to write, SQLite rolls back, and PostgreSQL refuses."""
        with self._session() as session:
            if self.engine.dialect.name == "postgresql":
                session.connection(execution_options=READING)
            self._begin(session, "BEGIN")
            yield session
            session.expunge_all()  # a rollback would forget what the rows say
            if self.engine.dialect.name == "postgresql":
                session.commit()  # at a rollback, psycopg forgets the statements that it has prepared
            else:
                session.rollback()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Session]:
        """A session that commits at the end of the block, or rolls back if the block raises."""
        with self._session() as session:
            self._begin(session, "BEGIN IMMEDIATE")
            yield session
            session.commit()

    def _begin(self, session: Session, statement: str) -> None:
        if self.engine.dialect.name == "sqlite":
            session.execute(text(statement))

    @contextlib.contextmanager
    def _session(self) -> Iterator[Session]:
        with _answering(), Session(self.engine, expire_on_commit=False) as session:
            yield session

    def migrate(self) -> str:
        """Brings the tables up to date and returns the installation's id, which the first call makes.

        Processes that migrate at once wait for each other. Raises UnavailableError.
        """
        with _answering(), self.engine.connect() as connection, connection.begin():
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            else:
                connection.execute(text("BEGIN IMMEDIATE"))
            config = Config()
            config.set_main_option("script_location", str(MIGRATIONS))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            return _ensure_installation(connection)

    def installation(self) -> str:
        """This installation's id. Raises UnavailableError before the first `migrate`."""
        known: str | None = None
        with contextlib.suppress(ProgrammingError), self.read() as session:  # PostgreSQL's word for a missing table
            known = session.scalar(select(Installation.id))
        if known is None:
            raise UnavailableError("the catalog has no tables yet")
        return known

    def ping(self) -> None:
        """Raises UnavailableError unless the catalog answers and has its tables."""
        self.installation()

    def close(self) -> None:
        """Closes every pooled connection."""
        self.engine.dispose()


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except (OperationalError, InternalError, PoolTimeoutError) as error:
        cause = getattr(error, "orig", error)
        raise UnavailableError(f"the catalog does not answer (KILN_CATALOG_URL): {type(cause).__name__}") from error
    except IntegrityError as error:
        raise AlreadyThereError("another transaction wrote the same first") from error


def _ensure_installation(connection: Connection) -> str:
    """The one installation's id. The caller holds the migration's lock, so that nobody makes a second one."""
    known: str | None = connection.scalar(select(Installation.id))
    if known is not None:
        return known
    made = str(uuid.uuid4())
    connection.execute(insert(Installation).values(id=made, created_at=datetime.now(UTC)))
    return made


def database_now(session: Session, ahead: timedelta = timedelta(0)) -> ColumnElement[datetime]:
    """Now, or so much later, by the one clock that all workers share: PostgreSQL's own, or this host's for SQLite."""
    if session.get_bind().dialect.name == "postgresql":
        return func.clock_timestamp(type_=UtcDateTime) + literal(ahead, Interval)
    return literal(datetime.now(UTC) + ahead, UtcDateTime)


def _make_engine(dsn: str, pool_size: int) -> Engine:
    if not dsn.startswith("sqlite"):
        return create_engine(
            dsn, connect_args=postgres_options(), pool_size=pool_size, max_overflow=pool_size, pool_pre_ping=True
        )
    engine = create_engine(
        dsn, connect_args={"timeout": SQLITE_BUSY_SECONDS}, pool_size=pool_size, max_overflow=pool_size
    )
    event.listen(engine, "connect", _set_up_sqlite)
    return engine


def _set_up_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # The driver's own transaction handling begins late and deferred; Kiln begins its transactions itself.
    connection.isolation_level = None
    _switch_to_wal(connection)
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    """SQLite itself does not wait for others here: of two processes that open a new file at once, one would fail."""
    until = time.monotonic() + SQLITE_BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(SQLITE_BUSY_PAUSE_SECONDS)
        else:
            return
