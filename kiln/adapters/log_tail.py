"""Live reading of logs: one question to the store for all readers of a process, and shared reads."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

from kiln.adapters.logs import Head, LogStore, line_number
from kiln.errors import UnavailableError
from kiln.ports import End, Gap, LogLine

INTERVAL = timedelta(milliseconds=40)
LONGEST_RETRY = timedelta(seconds=1)
READ_LINES = 1000
# Readers of one build who stand at the same line share a read; this many are remembered for each build.
REMEMBERED_READS = 4
THREADS = 4

T = TypeVar("T")
Page = list[LogLine | Gap]


class LogTail:
    """Follows any number of logs.

    It asks the store how far they have come every `interval`, and only while anybody follows one. A store that does not
    answer is waited for.
    """

    def __init__(self, store: LogStore, interval: timedelta = INTERVAL) -> None:
        self._store = store
        self._interval = interval
        self._threads = ThreadPoolExecutor(THREADS, "log-tail")
        self._feeds: dict[str, _Feed] = {}
        self._joined = asyncio.Event()
        self._polling: asyncio.Task[None] | None = None
        self._closed = False

    async def follow(self, build_id: str, after: int) -> AsyncIterator[LogLine | Gap | End]:
        """Every line after `after`: those that are there, then live, and the end once all is sent.

        Without an end if the log is deleted, or this object closed. To be closed (`aclose`) by whoever leaves early.
        """
        feed = self._join(build_id)
        position = after
        try:
            while (head := await feed.head_beyond(position)) is not None:
                if head.ended_status is not None and head.lines <= position:
                    yield End(head.ended_status)
                    return
                for item in await feed.read(position):
                    yield item
                    position = line_number(item)
        finally:
            self._leave(feed)

    async def aclose(self) -> None:
        """Ends every `follow`."""
        self._closed = True
        for feed in self._feeds.values():
            feed.stop()
        if self._polling is not None:
            self._polling.cancel()
            await asyncio.gather(self._polling, return_exceptions=True)
        await asyncio.to_thread(self._threads.shutdown)

    def _join(self, build_id: str) -> "_Feed":
        feed = self._feeds.get(build_id)
        if feed is None:
            feed = self._feeds[build_id] = _Feed(build_id, self._load)
        if self._closed:
            feed.stop()
        elif self._polling is None or self._polling.done():
            self._polling = asyncio.create_task(self._poll())
        feed.readers += 1
        self._joined.set()
        return feed

    def _leave(self, feed: "_Feed") -> None:
        feed.readers -= 1
        if not feed.readers:
            feed.stop()
            del self._feeds[feed.build_id]

    async def _poll(self) -> None:
        """The background task, while there are readers."""
        try:
            while self._feeds:
                self._joined.clear()
                asked = list(self._feeds.values())
                heads = await self._answer(self._store.heads, [feed.build_id for feed in asked])
                for feed in asked:
                    feed.update(heads.get(feed.build_id))
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._interval.total_seconds()):
                        await self._joined.wait()
        except Exception as error:  # noqa: BLE001  it is raised where somebody sees it
            for feed in self._feeds.values():
                feed.stop(error)

    async def _load(self, build_id: str, after: int) -> Page:
        return await self._answer(self._store.read, build_id, after, READ_LINES)

    async def _answer(self, question: Callable[..., T], *arguments: object) -> T:
        """What the store answers, as soon as it answers."""
        delay = self._interval
        while True:
            try:
                return await asyncio.get_running_loop().run_in_executor(self._threads, question, *arguments)
            except UnavailableError:
                await asyncio.sleep(delay.total_seconds())
                delay = min(delay * 2, LONGEST_RETRY)


class _Feed:
    """One build's log, for all who follow it."""

    def __init__(self, build_id: str, load: Callable[[str, int], Coroutine[None, None, Page]]) -> None:
        self.build_id = build_id
        self.readers = 0
        self._load = load
        self._head: Head | None = None
        self._stopped = False
        self._error: Exception | None = None
        self._changed = asyncio.Event()
        self._reads: dict[int, asyncio.Task[Page]] = {}

    def update(self, head: Head | None) -> None:
        """Takes note of how far the log has come; one that was there and is not any more has been deleted."""
        if head is None and self._head is not None:
            self.stop()
        elif head != self._head:
            self._head = head
            self._wake()

    def stop(self, error: Exception | None = None) -> None:
        """Nothing more is to come."""
        self._stopped = True
        self._error = error
        for read in self._reads.values():
            read.cancel()
        self._wake()

    async def head_beyond(self, line: int) -> Head | None:
        """The log's head once it is beyond the line or has ended; None if nothing more is to come."""
        while not self._stopped:
            if self._head is not None and (self._head.lines > line or self._head.ended_status is not None):
                return self._head
            await self._changed.wait()
        if self._error is not None:
            raise self._error
        return None

    async def read(self, after: int) -> Page:
        """The lines after a line, of which there are some; the same page for all who ask at about the same time."""
        page = self._reads.pop(after, None)
        if page is None or (page.done() and (page.cancelled() or page.exception() or not page.result())):
            page = asyncio.create_task(self._load(self.build_id, after))
        self._reads[after] = page
        for line in [line for line, read in self._reads.items() if read.done()][:-REMEMBERED_READS]:
            del self._reads[line]
        # Not awaited itself: neither may a reader's cancel end the others' page, nor this feed's stop cancel a reader.
        await asyncio.wait([page])
        return [] if page.cancelled() else page.result()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
