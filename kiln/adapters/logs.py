"""The log store: every build's lines, numbered from 1 without a gap, in a database of their own.

A stream belongs to one attempt at a time. `open_attempt` fences the earlier ones: what they append from then on is
refused, so that a dead attempt that comes back cannot interleave. A stream that has ended stays as it is.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from sqlalchemy import Connection, delete, exc, insert, select, update
from sqlalchemy.sql.dml import ReturningInsert

from kiln.adapters import log_payload
from kiln.adapters.log_database import LogDatabase, LogSchemaError, chunks, schema, streams
from kiln.adapters.log_payload import CorruptPayloadError, Entry
from kiln.errors import KilnError, UnavailableError
from kiln.ports import Gap, LogLine

__all__ = ["Gap", "Head", "LogFenced", "LogLine", "LogSchemaError", "LogStore"]

# One read gives at least one line, and stops at the first that goes beyond this.
READ_BYTES = 1024 * 1024
CHUNKS_A_QUERY = 8
# Whose log is numbered by who sends it has no attempts that follow each other.
ONLY_ATTEMPT = 1

MISSING = "these lines are missing from the log store"
UNREADABLE = "these lines are damaged in the log store"


class LogFenced(KilnError):  # noqa: N818  the field's word for it
    """The stream is another attempt's by now, or has ended."""


class Head(NamedTuple):
    """How far a stream has come: the number of its last line, and the build's status once it has ended."""

    lines: int
    ended_status: str | None


class LogStore:
    """Reads and writes logs; blocks, and may be used from any thread. All calls raise UnavailableError."""

    def __init__(self, url: str) -> None:
        """`url` is SQLAlchemy's: `sqlite:///…` with a file's path, or `postgresql://…`."""
        self._database = LogDatabase(url)

    def create(self) -> None:
        """Makes the tables; harmless if they are there or if others do it meanwhile. Raises LogSchemaError."""
        self._database.create()

    def close(self) -> None:
        """Closes all connections."""
        self._database.close()

    def ping(self) -> None:
        """Raises UnavailableError unless the store answers and has its tables."""
        try:
            with self._database.reading() as connection:
                known = connection.scalar(select(schema.c.version))
        except exc.ProgrammingError:  # PostgreSQL's word for a missing table
            known = None
        if known is None:
            raise UnavailableError("the log store has no tables yet")

    def open_attempt(self, build_id: str, attempt: int) -> None:
        """Gives the stream, which is made if need be, to this attempt. Repeating it is harmless.

        Raises LogFenced if a later attempt has it, or if it has ended.
        """
        new = self._database.upsert(streams).values(build_id=build_id, attempt=attempt, lines=0)
        statement = new.on_conflict_do_update(
            index_elements=[streams.c.build_id],
            set_={"attempt": new.excluded.attempt},
            where=(streams.c.attempt <= new.excluded.attempt) & streams.c.ended_status.is_(None),
        ).returning(streams.c.attempt)
        with self._database.writing() as connection:
            if connection.scalar(statement) is None:
                raise _fenced(build_id, attempt)

    def append(self, build_id: str, attempt: int, lines: Sequence[Entry], *, batch: str | None = None) -> int:
        """Adds lines (time with its zone, stream, text) in one transaction; returns the number of the last.

        Lines of a named `batch` that are there already are not added again: an append whose answer was lost may be
        repeated. Raises LogFenced if the attempt does not have the stream (any more).
        """
        parts = _encoded(lines)
        own = (streams.c.build_id == build_id) & (streams.c.attempt == attempt) & streams.c.ended_status.is_(None)
        count = update(streams).where(own).values(lines=streams.c.lines + len(lines)).returning(streams.c.lines)
        try:
            with self._database.writing() as connection:
                last: int | None = connection.scalar(count)
                if last is None:
                    raise _fenced(build_id, attempt)
                for row in _numbered(parts, last - len(lines) + 1):
                    connection.execute(insert(chunks).values(build_id=build_id, attempt=attempt, batch=batch, **row))
                    batch = None  # the first chunk carries it: all of an append are there, or none
                return last
        except exc.IntegrityError:
            return self._first_line(build_id, batch) + len(lines) - 1

    def keep(self, pod_id: str, first: int, lines: Sequence[Entry]) -> int:
        """Adds lines that were numbered from `first` on by who sends them, less those whose numbers are there already:
        it may be repeated, also by two at once. What is skipped shows as a gap. A stream that has ended takes none.

        Returns the number of the last: none of them need be sent again.
        """
        last = first + len(lines) - 1
        parts = _encoded(lines)
        with self._database.writing() as connection:
            there, ended_status = connection.execute(self._hold(pod_id)).one()
            if ended_status is not None or last <= there:
                return last
            if first <= there:
                parts = _encoded(lines[there + 1 - first :])
            own = streams.c.build_id == pod_id
            connection.execute(update(streams).where(own).values(lines=last))
            for row in _numbered(parts, max(first, there + 1)):
                connection.execute(insert(chunks).values(build_id=pod_id, attempt=ONLY_ATTEMPT, **row))
        return last

    def _hold(self, pod_id: str) -> ReturningInsert[int, str | None]:
        """Makes the stream if need be, keeps it from everybody else until the transaction's end, and says how far it is."""
        new = self._database.upsert(streams).values(build_id=pod_id, attempt=ONLY_ATTEMPT, lines=0)
        held = new.on_conflict_do_update(index_elements=[streams.c.build_id], set_={"lines": streams.c.lines})
        return held.returning(streams.c.lines, streams.c.ended_status)

    def end(self, build_id: str, status: str) -> None:
        """Ends the stream with the build's status; the first end stands."""
        new = self._database.upsert(streams).values(build_id=build_id, attempt=0, lines=0, ended_status=status)
        statement = new.on_conflict_do_update(
            index_elements=[streams.c.build_id],
            set_={"ended_status": new.excluded.ended_status},
            where=streams.c.ended_status.is_(None),
        )
        with self._database.writing() as connection:
            connection.execute(statement)

    def read(self, build_id: str, after: int, limit: int) -> list[LogLine | Gap]:
        """What is there after line `after`, in order: at most `limit` items, and about 1 MiB.

        Lines that are not there or are damaged show as a gap.
        """
        head = self.heads([build_id]).get(build_id, Head(0, None))
        found = _Page(after, limit)
        with self._database.reading() as connection:
            while found.next_line <= head.lines and not found.full:
                rows = _chunks_from(connection, build_id, found.next_line)
                for row in rows:
                    found.add(row)
                if not rows:
                    # The head was read first, so these had been written.
                    found.miss(head.lines, MISSING)
        return found.items

    def heads(self, build_ids: Collection[str]) -> dict[str, Head]:
        """How far streams have come; builds without one are left out."""
        wanted = select(streams.c.build_id, streams.c.lines, streams.c.ended_status)
        with self._database.reading() as connection:
            rows = connection.execute(wanted.where(streams.c.build_id.in_(list(build_ids)))).all()
        return {build_id: Head(lines, ended_status) for build_id, lines, ended_status in rows}

    def delete(self, build_id: str) -> None:
        """Forgets a stream, ended or not."""
        with self._database.writing() as connection:
            for table in (streams, chunks):
                connection.execute(delete(table).where(table.c.build_id == build_id))

    def _first_line(self, build_id: str, batch: str | None) -> int:
        known = select(chunks.c.first_line).where(chunks.c.build_id == build_id, chunks.c.batch == batch)
        with self._database.reading() as connection:
            return int(connection.execute(known).scalar_one())


class _Chunk(NamedTuple):
    first_line: int
    last_line: int
    payload: bytes


class _Page:
    """What one read collects."""

    def __init__(self, after: int, limit: int) -> None:
        self.items: list[LogLine | Gap] = []
        self.next_line = after + 1
        self._limit = limit
        self._bytes = 0

    @property
    def full(self) -> bool:
        return len(self.items) >= self._limit or self._bytes >= READ_BYTES

    def add(self, chunk: _Chunk) -> None:
        """A chunk's lines as far as there is room; a gap for what is missing before it."""
        first, last, payload = chunk
        self.miss(first - 1, MISSING)
        try:
            entries = log_payload.decode(payload, last - first + 1)
        except CorruptPayloadError:
            self.miss(last, UNREADABLE)
            return
        for time, stream, text in entries[self.next_line - first :]:
            if self.full:
                return
            self.items.append(LogLine(self.next_line, time, stream, text))
            self.next_line += 1
            self._bytes += len(text)

    def miss(self, last: int, reason: str) -> None:
        """A gap up to `last`, if there is anything to miss and there is room to say so."""
        if self.next_line <= last and not self.full:
            self.items.append(Gap(self.next_line, last, reason))
            self.next_line = last + 1


def _chunks_from(connection: Connection, build_id: str, line: int) -> list[_Chunk]:
    """The first chunks that reach to `line` or beyond."""
    wanted = select(chunks.c.first_line, chunks.c.last_line, chunks.c.payload)
    wanted = wanted.where(chunks.c.build_id == build_id, chunks.c.last_line >= line)
    return [_Chunk(*row) for row in connection.execute(wanted.order_by(chunks.c.last_line).limit(CHUNKS_A_QUERY))]


def _encoded(lines: Sequence[Entry]) -> list[tuple[int, bytes]]:
    """Payloads, with how many lines each has."""
    return [(len(group), log_payload.encode(group)) for group in log_payload.in_chunks(lines)]


def _numbered(parts: Sequence[tuple[int, bytes]], first_line: int) -> Iterator[dict[str, object]]:
    """Numbers of lines, one after the other, for payloads of so many lines each."""
    for count, payload in parts:
        yield {"first_line": first_line, "last_line": first_line + count - 1, "payload": payload}
        first_line += count


def _fenced(build_id: str, attempt: int) -> LogFenced:
    return LogFenced(
        f"the log of build {build_id} is not attempt {attempt}'s to write: a later one has it, or it ended"
    )


def line_number(item: LogLine | Gap) -> int:
    """The last line that an item stands for: where the next read begins after."""
    return item.last if isinstance(item, Gap) else item.number
