"""The log's writer: batches in the background, and nothing lost silently."""

import asyncio
import sqlite3
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from kiln.adapters.log_writer import LogWriter, WriterTerms
from kiln.adapters.logs import Head, LogFenced, LogLine, LogStore
from kiln.errors import UnavailableError
from support.logs import START, cut_connections, engine, outage, texts

BUILD = "build-1"
NEVER = timedelta(minutes=10)
NOW = timedelta(0)


@pytest.fixture
def stream(store: LogStore) -> LogStore:
    """A store with one open stream."""
    store.open_attempt(BUILD, 1)
    return store


def writer_of(store: LogStore, **terms: Any) -> LogWriter:
    return LogWriter(store, BUILD, 1, WriterTerms(**terms))


def lines_of(store: LogStore) -> list[LogLine]:
    found: list[LogLine] = []
    while page := store.read(BUILD, len(found), 1000):
        found += [item for item in page if isinstance(item, LogLine)]
    return found


async def stored(store: LogStore, count: int) -> bool:
    """Whether so many lines are there in time."""
    for _ in range(1000):
        if (await asyncio.to_thread(store.heads, [BUILD]))[BUILD].lines >= count:
            return True
        await asyncio.sleep(0.01)
    return False


async def test_close_writes_all(stream: LogStore):
    """Leaving the context writes every line, in order, with its stream."""
    async with writer_of(stream) as log:
        for number in range(100):
            await log.write("stderr" if number % 2 else "stdout", f"line {number}")
    assert [(line.stream, line.text) for line in lines_of(stream)] == [
        ("stderr" if number % 2 else "stdout", f"line {number}") for number in range(100)
    ]


async def test_times(stream: LogStore):
    """A line has the time that it is given, or that of its writing."""
    before = datetime.now(UTC)
    async with writer_of(stream) as log:
        await log.write("stdout", "given", START)
        await log.write("stdout", "now")
    given, now = lines_of(stream)
    assert given.time == START
    assert before <= now.time <= datetime.now(UTC)


async def test_first_line_at_once(stream: LogStore):
    """A line that comes when all is quiet is written at once."""
    async with writer_of(stream, interval=NEVER) as log:
        await log.write("stdout", "one")
        assert await stored(stream, 1)


async def test_lines_collect(stream: LogStore):
    """Lines that come soon after a batch wait for the next, or for the end."""
    async with writer_of(stream, interval=NEVER) as log:
        await log.write("stdout", "one")
        assert await stored(stream, 1)
        await log.write("stdout", "two")
        await asyncio.sleep(0.2)
        assert stream.heads([BUILD]) == {BUILD: Head(1, None)}
    assert texts(lines_of(stream)) == ["one", "two"]


@pytest.mark.parametrize(("count", "size"), [(1000, 1), (3, 100_000)])
async def test_whole_batch_at_once(stream: LogStore, count: int, size: int):
    """A whole batch, by lines or by bytes, does not wait."""
    async with writer_of(stream, interval=NEVER) as log:
        await log.write("stdout", "one")
        assert await stored(stream, 1)
        for _ in range(count):
            await log.write("stdout", "x" * size)
        assert await stored(stream, 1 + count)


async def test_few_chunks(stream: LogStore, log_url: str):
    """Many lines at once make few chunks."""
    async with writer_of(stream) as log:
        for number in range(2000):
            await log.write("stdout", f"line {number}")
    database = engine(log_url)
    with database.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM chunks")) <= 4
    database.dispose()


async def test_hundred_thousand_lines(stream: LogStore):
    """100,000 lines and one of a megabyte pass in order."""
    async with writer_of(stream) as log:
        for number in range(100_000):
            await log.write("stdout", f"line {number}")
        await log.write("stdout", "x" * 1_000_000)
    assert texts(lines_of(stream)) == [*(f"line {number}" for number in range(100_000)), "x" * 1_000_000]


async def test_nothing_written(stream: LogStore):
    """A writer without lines closes, and writes nothing."""
    async with writer_of(stream):
        pass
    assert stream.heads([BUILD]) == {BUILD: Head(0, None)}


async def test_write_after_close(stream: LogStore):
    """A closed writer takes no lines, rather than losing them."""
    log = writer_of(stream)
    await log.aclose()
    with pytest.raises(RuntimeError):
        await log.write("stdout", "late")


async def test_close_cancelled(stream: LogStore):
    """What is left is written although the closing was cancelled."""
    log = writer_of(stream)
    for number in range(10):
        await log.write("stdout", f"line {number}")
    closing = asyncio.create_task(log.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    assert await stored(stream, 10)


async def test_wrong_line(stream: LogStore):
    """A line that cannot be kept comes back as an error to the writer's owner."""
    log = writer_of(stream)
    await log.write("stdin", "x")
    with pytest.raises(ValueError, match="tuple"):
        await log.aclose()


# Fencing


async def test_fenced(stream: LogStore):
    """A writer whose stream has become another attempt's says so, refuses lines, and writes none of them."""
    log = writer_of(stream)
    stream.open_attempt(BUILD, 2)
    await log.write("stdout", "late")
    await asyncio.wait_for(log.fenced.wait(), 10)
    with pytest.raises(LogFenced):
        await log.write("stdout", "later")
    with pytest.raises(LogFenced):
        await log.aclose()
    assert stream.heads([BUILD]) == {BUILD: Head(0, None)}


async def test_fenced_while_waiting_for_room(stream: LogStore, log_url: str):
    """A writer that waits for room when its stream becomes another attempt's does not wait on."""
    log = writer_of(stream, backlog_bytes=1000)
    with outage(log_url):
        waiting = asyncio.create_task(_write_many(log, 20))
        await asyncio.sleep(0.1)
        assert not waiting.done()
    stream.open_attempt(BUILD, 2)
    with pytest.raises(LogFenced):
        await asyncio.wait_for(waiting, 10)
    with pytest.raises(LogFenced):
        await log.aclose()


async def _write_many(log: LogWriter, count: int) -> None:
    for number in range(count):
        await log.write("stdout", f"line {number}")


# A store that is away


async def test_outage(stream: LogStore, log_url: str):
    """Lines that come while the store is away are written once it is back, in order, each once."""
    async with writer_of(stream) as log:
        await log.write("stdout", "line 0")
        assert await stored(stream, 1)
        with outage(log_url):
            for number in range(1, 50):
                await log.write("stdout", f"line {number}")
                await asyncio.sleep(0.01)
        await log.write("stdout", "line 50")
    assert texts(lines_of(stream)) == [f"line {number}" for number in range(51)]


async def test_back_pressure(stream: LogStore, log_url: str):
    """While the store is away, writes wait as soon as the backlog is full, and nothing is lost."""
    async with writer_of(stream, backlog_bytes=2000, patience=NEVER) as log:
        with outage(log_url):
            writing = asyncio.create_task(_write_many(log, 100))
            await asyncio.sleep(0.5)
            assert not writing.done()
        await asyncio.wait_for(writing, 10)
    assert texts(lines_of(stream)) == [f"line {number}" for number in range(100)]


async def test_out_of_patience(stream: LogStore, log_url: str):
    """Lines for which there was neither room nor hope are counted by a line of Kiln's own, where they are missing."""
    async with writer_of(stream, backlog_bytes=2000, patience=NOW) as log:
        with outage(log_url):
            await log.write("stdout", "line 0")
            await asyncio.sleep(0.3)
            await _write_many(log, 100)
        assert await stored(stream, 3)
        await log.write("stdout", "after")
    *kept, notice, after = lines_of(stream)
    lost = int(notice.text.split()[0])
    assert (notice.stream, notice.text) == (
        "kiln",
        f"{lost} lines are missing here: the log store did not answer in time",
    )
    assert texts(kept) == ["line 0", *(f"line {number}" for number in range(100 - lost))]
    assert lost > 80
    assert after.text == "after"


async def test_close_without_store(stream: LogStore, log_url: str):
    """Closing while the store stays away does not last for ever, and does not pass for success."""
    log = writer_of(stream, patience=timedelta(seconds=0.2))
    with outage(log_url):
        await log.write("stdout", "lost")
        with pytest.raises(UnavailableError):
            await asyncio.wait_for(log.aclose(), 10)


class LossyStore(LogStore):
    """A log store whose first answers are lost on their way back, after the lines are written."""

    losses = 3

    def append(self, *arguments: Any, **options: Any) -> int:
        last = super().append(*arguments, **options)
        if self.losses:
            self.losses -= 1
            raise UnavailableError("the answer was lost")
        return last


async def test_lost_answer(log_url: str):
    """A batch whose answer was lost is not written again."""
    store = LossyStore(log_url)
    store.create()
    store.open_attempt(BUILD, 1)
    async with writer_of(store) as log:
        await _write_many(log, 10)
    assert texts(lines_of(store)) == [f"line {number}" for number in range(10)]
    store.close()


@pytest.mark.parametrize("log_url", ["postgresql"], indirect=True)
async def test_connections_cut(stream: LogStore, log_url: str):
    """Connections that break at any moment, also while a transaction commits, neither lose nor double a line."""
    async with writer_of(stream, interval=timedelta(milliseconds=1)) as log:
        for number in range(300):
            await log.write("stdout", f"line {number}")
            await asyncio.sleep(0.002)
            if number % 10 == 0:
                await asyncio.to_thread(cut_connections, log_url)
    assert texts(lines_of(stream)) == [f"line {number}" for number in range(300)]


@pytest.mark.parametrize("log_url", ["sqlite"], indirect=True)
async def test_locked_file(stream: LogStore, log_url: str):
    """A SQLite file that another process has locked for a while is waited for."""
    other = sqlite3.connect(str(make_url(log_url).database), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    async with writer_of(stream) as log:
        await log.write("stdout", "line")
        await asyncio.sleep(0.3)
        other.execute("ROLLBACK")
        other.close()
        assert await stored(stream, 1)
