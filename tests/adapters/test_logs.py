"""The log store: lines in order, numbered without a gap, each attempt fenced by the next."""

import random
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from kiln.adapters.log_payload import CorruptPayloadError, decode, encode
from kiln.adapters.logs import Gap, Head, LogFenced, LogLine, LogSchemaError, LogStore
from kiln.errors import UnavailableError
from support.logs import START, engine, entries, numbers, read_all, texts

BUILD = "build-1"
ALL = 1_000_000


@pytest.fixture
def stream(store: LogStore) -> LogStore:
    """A store with one open stream."""
    store.open_attempt(BUILD, 1)
    return store


@pytest.fixture
def database(log_url: str, store: LogStore) -> Iterator[Engine]:
    """The database behind the store."""
    found = engine(log_url)
    yield found
    found.dispose()


# Writing and reading


def test_lines_as_they_were_written(stream: LogStore):
    """A line comes back with its number, time, stream and text."""
    stream.append(
        BUILD, 1, [(START, "stdout", "one"), (START + timedelta(microseconds=1), "stderr", ""), (START, "kiln", "ü")]
    )
    assert stream.read(BUILD, 0, 10) == [
        LogLine(1, START, "stdout", "one"),
        LogLine(2, START + timedelta(microseconds=1), "stderr", ""),
        LogLine(3, START, "kiln", "ü"),
    ]


@pytest.mark.parametrize("content", ["", "\0", "\ud800", "😀\u2028", "\\x00", "x" * 1_000_000, "é" * 1_000_000])
def test_any_text(stream: LogStore, content: str):
    """Any text is kept as it is, also what databases do not take as text."""
    stream.append(BUILD, 1, [(START, "stdout", content)])
    assert texts(stream.read(BUILD, 0, 1)) == [content]


def test_times_are_utc(stream: LogStore):
    """A time in another zone comes back in UTC, as the same moment."""
    elsewhere = START.astimezone(timezone(timedelta(hours=-7)))
    stream.append(BUILD, 1, [(elsewhere, "stdout", "x")])
    [line] = stream.read(BUILD, 0, 1)
    assert isinstance(line, LogLine)
    assert (line.time, line.time.tzinfo) == (START, UTC)


def test_numbers_without_a_gap(stream: LogStore):
    """Lines are numbered from 1 without a gap over all appends, and each append returns its last number."""
    assert [stream.append(BUILD, 1, entries(count)) for count in (1, 5, 2500, 1)] == [1, 6, 2506, 2507]
    assert numbers(read_all(stream, BUILD)) == list(range(1, 2508))


def test_builds_are_apart(stream: LogStore):
    """Each build has numbers and lines of its own."""
    stream.open_attempt("build-2", 1)
    stream.append(BUILD, 1, entries(3, word="a"))
    stream.append("build-2", 1, entries(2, word="b"))
    assert (texts(read_all(stream, BUILD)), texts(read_all(stream, "build-2"))) == (
        ["a 1", "a 2", "a 3"],
        ["b 1", "b 2"],
    )


def test_nothing_to_append(stream: LogStore):
    """An append of nothing changes nothing."""
    stream.append(BUILD, 1, entries(2))
    assert (stream.append(BUILD, 1, []), len(read_all(stream, BUILD))) == (2, 2)


def test_unknown_stream_name(stream: LogStore):
    """A line of a stream that does not exist is refused, and nothing is written."""
    with pytest.raises(ValueError, match="tuple"):
        stream.append(BUILD, 1, [(START, "stdin", "x")])
    assert stream.heads([BUILD]) == {BUILD: Head(0, None)}


def test_hundred_thousand_lines(stream: LogStore):
    """100,000 lines in one append come back in order, in pages of bounded size."""
    stream.append(BUILD, 1, entries(100_000))
    found = read_all(stream, BUILD)
    assert texts(found) == [f"line {number}" for number in range(1, 100_001)]


def test_pages_are_bounded(stream: LogStore):
    """A page has no more items than asked for, and stops at about a megabyte, but never before its first line."""
    stream.append(BUILD, 1, [(START, "stdout", "x" * 700_000)] * 5)
    assert [len(stream.read(BUILD, 0, limit)) for limit in (1, 2, 5)] == [1, 2, 2]
    assert numbers(read_all(stream, BUILD)) == [1, 2, 3, 4, 5]


def test_nothing_beyond_the_end(stream: LogStore):
    """Reading after the last line, or in a build without log, gives nothing."""
    stream.append(BUILD, 1, entries(3))
    assert (stream.read(BUILD, 3, 10), stream.read(BUILD, 99, 10), stream.read("build-2", 0, 10)) == ([], [], [])


@pytest.mark.parametrize("seed", range(10))
def test_resume_anywhere(stream: LogStore, seed: int):
    """Readers who stop anywhere and go on after their last line get each line once."""
    rng = random.Random(seed)
    for first in range(1, 1201, 40):
        stream.append(BUILD, 1, entries(40, first=first, word="x" * rng.choice([1, 20_000])))
    found: list[LogLine | Gap] = []
    while page := stream.read(BUILD, len(found), rng.randint(1, 150)):
        found += page[: rng.randint(1, len(page))]
    assert [item.text.split()[1] for item in found if isinstance(item, LogLine)] == [str(n) for n in range(1, 1201)]
    assert numbers(found) == list(range(1, 1201))


# Damage


def damage(database: Engine, statement: str, **values: object) -> None:
    with database.begin() as connection:
        assert connection.execute(text(statement), values).rowcount == 1


@pytest.fixture
def three_chunks(stream: LogStore) -> LogStore:
    """Lines 1 to 4, 5 to 8, 9 to 12 in a chunk each."""
    for first in (1, 5, 9):
        stream.append(BUILD, 1, entries(4, first=first))
    return stream


@pytest.mark.parametrize("payload", [b"", b"J", b"garbage", b"Z" + zlib.crc32(b"Zx").to_bytes(4) + b"x"])
def test_damaged_chunk(three_chunks: LogStore, database: Engine, payload: bytes):
    """A chunk that cannot be read is a gap of exactly its lines."""
    damage(database, "UPDATE chunks SET payload = :payload WHERE first_line = 5", payload=payload)
    found = three_chunks.read(BUILD, 0, ALL)
    assert found[4] == Gap(5, 8, "these lines are damaged in the log store")
    assert (len(found), numbers(found)) == (9, list(range(1, 13)))


@pytest.mark.parametrize("first", [1, 5, 9])
def test_missing_chunk(three_chunks: LogStore, database: Engine, first: int):
    """A chunk that is gone is a gap of exactly its lines, also at the beginning and at the end."""
    damage(database, "DELETE FROM chunks WHERE first_line = :first", first=first)
    found = three_chunks.read(BUILD, 0, ALL)
    assert Gap(first, first + 3, "these lines are missing from the log store") in found
    assert numbers(found) == list(range(1, 13))


def test_all_chunks_missing(stream: LogStore, database: Engine):
    """A stream without any of its chunks is one gap."""
    stream.append(BUILD, 1, entries(7))
    damage(database, "DELETE FROM chunks")
    assert read_all(stream, BUILD) == [Gap(1, 7, "these lines are missing from the log store")]


def test_resume_within_a_gap(three_chunks: LogStore, database: Engine):
    """A reader who resumes within a gap is told the rest of it."""
    damage(database, "UPDATE chunks SET payload = :payload WHERE first_line = 5", payload=b"")
    assert three_chunks.read(BUILD, 6, 1) == [Gap(7, 8, "these lines are damaged in the log store")]


@pytest.mark.parametrize("count", [3, 500])
def test_every_changed_byte_is_noticed(count: int):
    """A payload of which any byte has changed is not read as something else."""
    payload = encode(entries(count))
    for at in range(0, len(payload), max(1, len(payload) // 100)):
        changed = payload[:at] + bytes([payload[at] ^ 0x15]) + payload[at + 1 :]
        with pytest.raises(CorruptPayloadError):
            decode(changed, count)


# Attempts


def test_older_attempt_is_fenced(stream: LogStore):
    """Once a later attempt has the stream, an earlier one's lines are refused, and the numbers go on."""
    stream.append(BUILD, 1, entries(2, word="first"))
    stream.open_attempt(BUILD, 2)
    with pytest.raises(LogFenced):
        stream.append(BUILD, 1, entries(1, word="late"))
    assert stream.append(BUILD, 2, entries(1, word="second")) == 3
    assert texts(read_all(stream, BUILD)) == ["first 1", "first 2", "second 1"]


def test_older_attempt_cannot_come_back(stream: LogStore):
    """An earlier attempt cannot take the stream back."""
    stream.open_attempt(BUILD, 3)
    with pytest.raises(LogFenced):
        stream.open_attempt(BUILD, 2)
    assert stream.append(BUILD, 3, entries(1)) == 1


def test_opening_again(stream: LogStore):
    """Opening the same attempt again changes nothing."""
    stream.append(BUILD, 1, entries(2))
    stream.open_attempt(BUILD, 1)
    assert stream.append(BUILD, 1, entries(1)) == 3


def test_attempt_that_was_not_opened(store: LogStore):
    """A stream that nobody opened takes no lines."""
    with pytest.raises(LogFenced):
        store.append(BUILD, 1, entries(1))


def test_repeated_batch(stream: LogStore):
    """A batch that is there already is not added again, and its last number is returned again."""
    stream.append(BUILD, 1, entries(2))
    assert stream.append(BUILD, 1, entries(3000, word="batch"), batch="b") == 3002
    stream.append(BUILD, 1, entries(1))
    assert stream.append(BUILD, 1, entries(3000, word="batch"), batch="b") == 3002
    assert stream.heads([BUILD]) == {BUILD: Head(3003, None)}
    assert len(read_all(stream, BUILD)) == 3003


# Ends


def test_end(stream: LogStore):
    """An ended stream keeps its lines and its first status, and takes neither lines nor attempts."""
    stream.append(BUILD, 1, entries(2))
    stream.end(BUILD, "succeeded")
    stream.end(BUILD, "failed")
    with pytest.raises(LogFenced):
        stream.append(BUILD, 1, entries(1))
    with pytest.raises(LogFenced):
        stream.open_attempt(BUILD, 2)
    assert (stream.heads([BUILD]), len(read_all(stream, BUILD))) == ({BUILD: Head(2, "succeeded")}, 2)


def test_end_of_what_never_began(store: LogStore):
    """A build that never wrote a line has an end as well."""
    store.end(BUILD, "cancelled")
    assert store.heads([BUILD]) == {BUILD: Head(0, "cancelled")}


def test_heads(stream: LogStore):
    """One question tells how far many builds have come, and leaves out those without log."""
    stream.append(BUILD, 1, entries(2))
    stream.end("build-2", "failed")
    asked = [BUILD, "build-2", *(f"none-{number}" for number in range(2000))]
    assert stream.heads(asked) == {BUILD: Head(2, None), "build-2": Head(0, "failed")}
    assert stream.heads([]) == {}


def test_delete(stream: LogStore):
    """A deleted log is gone; another build's stays."""
    stream.open_attempt("build-2", 1)
    stream.append("build-2", 1, entries(1))
    stream.append(BUILD, 1, entries(2))
    stream.delete(BUILD)
    assert (stream.heads([BUILD, "build-2"]), read_all(stream, BUILD)) == ({"build-2": Head(1, None)}, [])


# The store as a whole


def test_create_twice(stream: LogStore, log_url: str):
    """Making the tables again changes nothing."""
    stream.append(BUILD, 1, entries(1))
    other = LogStore(log_url)
    other.create()
    assert texts(read_all(other, BUILD)) == ["line 1"]
    other.close()


def test_other_version(store: LogStore, database: Engine):
    """Tables of another version are refused."""
    damage(database, "UPDATE log_schema SET version = 99")
    with pytest.raises(LogSchemaError, match="99"):
        store.create()


def test_ping(store: LogStore, log_url: str):
    """A store with its tables answers; one without says so."""
    store.ping()
    with engine(log_url).begin() as connection:
        connection.execute(text("DROP TABLE log_schema"))
    with pytest.raises(UnavailableError):
        store.ping()


def test_store_out_of_reach(tmp_path: Path):
    """A store that cannot be reached is unavailable, whatever is asked."""
    for url in (f"sqlite:///{tmp_path}/no/such/folder/logs.db", "postgresql://kiln@127.0.0.1:1/kiln"):
        store = LogStore(url)
        for question in (store.ping, store.create, lambda: store.heads([BUILD]), lambda: store.end(BUILD, "failed")):  # noqa: B023
            with pytest.raises(UnavailableError):
                question()
        store.close()


def test_now_has_a_zone():
    """A time without zone is refused rather than guessed."""
    with pytest.raises(TypeError):
        encode([(datetime(2026, 1, 1), "stdout", "x")])  # noqa: DTZ001
