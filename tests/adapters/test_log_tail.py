"""Following logs: each line once, live, for any number of readers."""

import asyncio
import random
from collections.abc import AsyncIterator, Collection
from contextlib import aclosing

import pytest
from sqlalchemy.exc import ProgrammingError

from kiln.adapters.log_tail import LogTail
from kiln.adapters.log_writer import LogWriter
from kiln.adapters.logs import Gap, Head, LogLine, LogStore
from kiln.ports import End
from support.logs import START, entries, numbers, outage, texts

BUILD = "build-1"
Item = LogLine | Gap | End


class CountingStore(LogStore):
    """The log store, which also counts the questions that it is asked."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.asked_heads: list[list[str]] = []
        self.reads = 0

    def heads(self, build_ids: Collection[str]) -> dict[str, Head]:
        self.asked_heads.append(sorted(build_ids))
        return super().heads(build_ids)

    def read(self, build_id: str, after: int, limit: int) -> list[LogLine | Gap]:
        self.reads += 1
        return super().read(build_id, after, limit)


@pytest.fixture
def store(log_url: str, request: pytest.FixtureRequest) -> CountingStore:
    store = CountingStore(log_url)
    request.addfinalizer(store.close)
    store.create()
    store.open_attempt(BUILD, 1)
    return store


@pytest.fixture
async def tail(store: CountingStore) -> AsyncIterator[LogTail]:
    tail = LogTail(store)
    yield tail
    await tail.aclose()


async def follow(tail: LogTail, after: int = 0, build_id: str = BUILD) -> list[Item]:
    """All that a reader gets until the end."""
    return [item async for item in tail.follow(build_id, after)]


async def test_from_the_beginning_to_the_end(store: CountingStore, tail: LogTail):
    """A reader gets the lines that are there, those that follow, and the end last."""
    store.append(BUILD, 1, entries(3))
    reading = tail.follow(BUILD, 0)
    assert texts([await anext(reading) for _ in range(3)]) == ["line 1", "line 2", "line 3"]
    store.append(BUILD, 1, entries(2, first=4))
    store.end(BUILD, "succeeded")
    rest = [item async for item in reading]
    assert (texts(rest), rest[-1]) == (["line 4", "line 5"], End("succeeded"))


async def test_line_by_line(store: CountingStore, tail: LogTail):
    """A reader has each line before the next one is written: no line waits for another."""
    reading = tail.follow(BUILD, 0)
    async with aclosing(reading), LogWriter(store, BUILD, 1) as log:
        for number in range(1, 31):
            await log.write("stdout", f"line {number}")
            assert texts([await asyncio.wait_for(anext(reading), 10)]) == [f"line {number}"]


@pytest.mark.parametrize(("after", "expected"), [(0, [1, 2, 3]), (2, [3]), (3, []), (7, [])])
async def test_after_the_end(store: CountingStore, tail: LogTail, after: int, expected: list[int]):
    """A reader of a log that has ended gets the rest of it and the end."""
    store.append(BUILD, 1, entries(3))
    store.end(BUILD, "failed")
    found = await follow(tail, after)
    assert (numbers(found), found[-1]) == (expected, End("failed"))


@pytest.mark.parametrize("seed", range(5))
async def test_resume_while_lines_come(store: CountingStore, tail: LogTail, seed: int):
    """Readers who leave anywhere and come back after their last line get each line once, none twice."""
    rng = random.Random(seed)
    writing = asyncio.create_task(_write(store, 1500, rng))
    found: list[Item] = []
    while not (found and isinstance(found[-1], End)):
        stay = rng.randint(1, 200)
        async with aclosing(tail.follow(BUILD, len(found))) as reading:
            async for item in reading:
                found.append(item)
                stay -= 1
                if not stay:
                    break
    await writing
    assert texts(found) == [f"line {number}" for number in range(1500)]
    assert numbers(found) == list(range(1, 1501))


async def _write(store: LogStore, count: int, rng: random.Random) -> None:
    async with LogWriter(store, BUILD, 1) as log:
        for number in range(count):
            await log.write("stdout", f"line {number}")
            if rng.random() < 0.05:
                await asyncio.sleep(rng.random() * 0.02)
    await asyncio.to_thread(store.end, BUILD, "succeeded")


async def test_hundred_thousand_lines(store: CountingStore, tail: LogTail):
    """100,000 lines and one of a megabyte reach a reader in order."""
    store.append(BUILD, 1, [*entries(100_000), (START, "stdout", "x" * 1_000_000)])
    store.end(BUILD, "succeeded")
    found = await follow(tail)
    assert numbers(found) == list(range(1, 100_002))
    assert texts(found)[-2:] == ["line 100000", "x" * 1_000_000]


async def test_gap(store: CountingStore, tail: LogTail):
    """A gap reaches the reader in its place."""
    store.append(BUILD, 1, entries(2))
    store.end(BUILD, "failed")
    with store._database.writing() as connection:
        connection.exec_driver_sql("DELETE FROM chunks")
    assert await follow(tail) == [Gap(1, 2, "these lines are missing from the log store"), End("failed")]


async def test_log_that_does_not_exist_yet(store: CountingStore, tail: LogTail):
    """A reader may come before the first line, and before there is a log at all."""
    reading = asyncio.create_task(follow(tail, 0, "build-2"))
    await asyncio.sleep(0.1)
    store.open_attempt("build-2", 1)
    store.append("build-2", 1, entries(1))
    store.end("build-2", "cancelled")
    found = await asyncio.wait_for(reading, 10)
    assert (texts(found), found[-1]) == (["line 1"], End("cancelled"))


async def test_deleted_log(store: CountingStore, tail: LogTail):
    """A log that is deleted under its readers has no more to say."""
    store.append(BUILD, 1, entries(2))
    reading = tail.follow(BUILD, 0)
    assert texts([await anext(reading), await anext(reading)]) == ["line 1", "line 2"]
    store.delete(BUILD)
    assert await asyncio.wait_for(anext(reading, None), 10) is None


async def test_readers_share(store: CountingStore, tail: LogTail):
    """Twenty readers at the same place get the same lines for one reader's reads."""
    readers = [tail.follow(BUILD, 0) for _ in range(20)]
    for number in range(1, 11):
        waiting = [asyncio.create_task(anext(reader)) for reader in readers]
        store.append(BUILD, 1, entries(1, first=number))
        assert texts(await asyncio.gather(*waiting)) == [f"line {number}"] * 20
    assert store.reads == 10
    for reader in readers:
        await reader.aclose()


async def test_one_question_for_all_builds(store: CountingStore, tail: LogTail):
    """One question serves the readers of several builds."""
    builds = [f"build-{number}" for number in range(1, 6)]
    readers = [asyncio.create_task(follow(tail, 0, build)) for build in builds]
    await asyncio.sleep(0.2)
    assert builds in store.asked_heads
    for build in builds:
        store.end(build, "failed")
    assert await asyncio.gather(*readers) == [[End("failed")]] * 5


async def test_no_readers_no_questions(store: CountingStore, tail: LogTail):
    """Nothing is asked while nobody reads, before the first reader and after the last."""
    await asyncio.sleep(0.1)
    assert store.asked_heads == []
    store.end(BUILD, "failed")
    await follow(tail)
    await asyncio.sleep(0.1)
    asked = len(store.asked_heads)
    await asyncio.sleep(0.2)
    assert len(store.asked_heads) == asked


async def test_one_reader_leaves(store: CountingStore, tail: LogTail):
    """A reader who is cancelled takes nothing from the others."""
    leaving, staying = (asyncio.create_task(follow(tail)) for _ in range(2))
    await asyncio.sleep(0.1)
    leaving.cancel()
    store.append(BUILD, 1, entries(3))
    store.end(BUILD, "succeeded")
    assert numbers(await asyncio.wait_for(staying, 10)) == [1, 2, 3]
    assert leaving.cancelled()


async def test_close(store: CountingStore, log_url: str):
    """Closing the tail ends its readers without an end of the log, also those who come later."""
    tail = LogTail(store)
    store.append(BUILD, 1, entries(2))
    reading = asyncio.create_task(follow(tail))
    await asyncio.sleep(0.1)
    await tail.aclose()
    assert texts(await asyncio.wait_for(reading, 10)) == ["line 1", "line 2"]
    assert await asyncio.wait_for(follow(tail), 10) == []


async def test_outage(store: CountingStore, tail: LogTail, log_url: str):
    """Readers wait while the store is away, and miss nothing."""
    store.append(BUILD, 1, entries(1))
    reading = tail.follow(BUILD, 0)
    assert texts([await anext(reading)]) == ["line 1"]
    with outage(log_url):
        next_line = asyncio.create_task(anext(reading))
        await asyncio.sleep(0.2)
        assert not next_line.done()
    store.append(BUILD, 1, entries(1, first=2))
    assert texts([await asyncio.wait_for(next_line, 10)]) == ["line 2"]
    await reading.aclose()


@pytest.mark.parametrize("log_url", ["postgresql"], indirect=True)
async def test_broken_store(store: CountingStore, tail: LogTail):
    """A store that is not away but broken is an error to the readers."""
    reading = asyncio.create_task(follow(tail))
    await asyncio.sleep(0.1)
    with store._database.writing() as connection:
        connection.exec_driver_sql("DROP TABLE streams")
    with pytest.raises(ProgrammingError):
        await asyncio.wait_for(reading, 10)
