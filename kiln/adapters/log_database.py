"""The log store's tables, and its connections to SQLite or PostgreSQL."""

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    exc,
    insert,
    select,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects import sqlite as sqlite_dialect

from kiln.dsn import database_url, postgres_options
from kiln.errors import KilnError, UnavailableError

SCHEMA_VERSION = 1
SQLITE_BUSY_SECONDS = 10
SQLITE_BUSY_PAUSE_SECONDS = 0.01
CONNECTIONS = 8
# Any number will do, so long as it is the log store's own: processes that make the tables at once wait for each other.
CREATION_LOCK = 0x6B696C6E6C6F67

metadata = MetaData()

schema = Table("log_schema", metadata, Column("version", Integer, primary_key=True, autoincrement=False))

streams = Table(
    "streams",
    metadata,
    Column("build_id", Text, primary_key=True),
    Column("attempt", Integer, nullable=False),
    Column("lines", BigInteger, nullable=False),
    Column("ended_status", Text),
)

# Readers ask for what ends after a line, hence the key. `batch` names the append that made the chunk.
chunks = Table(
    "chunks",
    metadata,
    Column("build_id", Text, primary_key=True),
    Column("last_line", BigInteger, primary_key=True, autoincrement=False),
    Column("first_line", BigInteger, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("batch", Text),
    Column("payload", LargeBinary, nullable=False),
    UniqueConstraint("build_id", "batch"),
)


class LogSchemaError(KilnError):
    """The log store's tables are of another version of Kiln."""


class LogDatabase:
    """Transactions on one log database, from any thread. All raise UnavailableError if it does not answer."""

    def __init__(self, url: str) -> None:
        """`url` is SQLAlchemy's, of a SQLite file or a PostgreSQL database."""
        self._engine = _make_engine(url)
        self._is_sqlite = self._engine.dialect.name == "sqlite"
        # SQLite lets one write at a time and has the others look again later: within a process, a queue is faster.
        self._turn = threading.Lock() if self._is_sqlite else nullcontext()

    def create(self) -> None:
        """Makes what is missing of the tables. Raises LogSchemaError."""
        with self.writing() as connection:
            if not self._is_sqlite:
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({CREATION_LOCK})")
            metadata.create_all(connection)
            version = connection.scalar(select(schema.c.version))
            if version is None:
                connection.execute(insert(schema).values(version=SCHEMA_VERSION))
            elif version != SCHEMA_VERSION:
                raise LogSchemaError(f"the log store has version {version}, this Kiln knows {SCHEMA_VERSION}")

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """One transaction, committed at the end of the block."""
        with _answering(), self._turn, self._engine.begin() as connection:
            if self._is_sqlite:
                # A transaction that begins with a read may find its way to a write closed.
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection for reads, each of which sees the latest."""
        options = {} if self._is_sqlite else {"isolation_level": "AUTOCOMMIT"}
        with _answering(), self._engine.execution_options(**options).connect() as connection:
            yield connection

    def upsert(self, table: Table) -> sqlite_dialect.Insert | postgresql.Insert:
        """An insert that can say what to do on conflict, which both dialects spell alike."""
        return sqlite_dialect.insert(table) if self._is_sqlite else postgresql.insert(table)

    def close(self) -> None:
        self._engine.dispose()


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except (exc.OperationalError, exc.InternalError, exc.InterfaceError, exc.TimeoutError) as error:
        cause = getattr(error, "orig", None) or error
        raise UnavailableError(f"the log store does not answer (KILN_LOGS_URL): {type(cause).__name__}") from error


def _make_engine(url: str) -> Engine:
    parsed = database_url(url, "KILN_LOGS_URL")
    if parsed.get_backend_name() != "sqlite":
        return create_engine(
            parsed,
            connect_args=postgres_options(),
            pool_size=CONNECTIONS,
            max_overflow=CONNECTIONS,
            pool_pre_ping=True,
        )
    engine = create_engine(
        parsed, pool_size=CONNECTIONS, max_overflow=CONNECTIONS, connect_args={"timeout": SQLITE_BUSY_SECONDS}
    )
    event.listen(engine, "connect", _set_up_sqlite)
    return engine


def _set_up_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # Transactions begin where this module says so, not where the driver sees a write.
    connection.isolation_level = None
    until = time.monotonic() + SQLITE_BUSY_SECONDS
    while not _is_in_wal_mode(connection) and time.monotonic() < until:
        time.sleep(SQLITE_BUSY_PAUSE_SECONDS)
    # A crash of the host may cost the last moments of a log; it does not harm the file.
    connection.execute("PRAGMA synchronous=NORMAL")


def _is_in_wal_mode(connection: sqlite3.Connection) -> bool:
    """Switches to WAL. SQLite does not wait for others here, so that it may be busy although there is a time-out."""
    try:
        return bool(connection.execute("PRAGMA journal_mode=WAL").fetchone()[0] == "wal")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
            raise
        return False
