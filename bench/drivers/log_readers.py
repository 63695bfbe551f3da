"""Follows a log as browsers do, many readers at once, and reads a whole log as one."""

import asyncio
import re
import time

from bench.children import Answer, Order, serve
from bench.figures import MeasurementError
from bench.http_client import Connection
from kiln.adapters.logs import LogStore

STAMP = re.compile(rb'"line": "(\d+)"')
EVENT_END = b"\n\n"
LINE_EVENT = b"event: line\n"
END_EVENT = b"event: end\n"
PAGE_LINES = 1000


class Readers:
    def __init__(self, key: str, logs_dsn: str) -> None:
        self._key = key
        self._store = LogStore(logs_dsn)
        self._connections: list[Connection] = []

    async def open(self, port: int, path: str, readers: int) -> Answer:
        """Returns once every reader's stream has begun."""
        self._connections = [await Connection.open(port, self._key) for _ in range(readers)]
        await asyncio.gather(*(connection.get_stream(path) for connection in self._connections))
        return {}

    async def read_stamps(self, count: int) -> Answer:
        """How long each line took to each reader (`latencies`, in seconds)."""
        of_readers = await asyncio.gather(*(_latencies(each, count) for each in self._connections))
        for connection in self._connections:
            await connection.close()
        return {"latencies": [latency for latencies in of_readers for latency in latencies]}

    async def catch_up(self, port: int, path: str, count: int) -> Answer:
        """The `seconds` that one reader takes from its request to the end of a finished log."""
        connection = await Connection.open(port, self._key)
        began = time.perf_counter()
        await connection.get_stream(path)
        seen = await _count_lines(connection)
        seconds = time.perf_counter() - began
        await connection.close()
        return {"seconds": seconds, "lines": _all_of(count, seen)}

    async def read_store(self, build_id: str, count: int) -> Answer:
        """The `seconds` that reading the same lines takes where they are kept."""
        began = time.perf_counter()
        seen = 0
        while page := self._store.read(build_id, seen, PAGE_LINES):
            seen += len(page)
        return {"seconds": time.perf_counter() - began, "lines": _all_of(count, seen)}


async def _latencies(connection: Connection, count: int) -> list[float]:
    latencies: list[float] = []
    rest = b""
    while len(latencies) < count:
        data = await connection.read()
        now = time.monotonic_ns()
        if not data:
            raise MeasurementError(f"a log's stream ended after {len(latencies)} of {count} lines")
        whole, separator, rest = (rest + data).rpartition(EVENT_END)
        latencies += [(now - int(stamp)) / 1e9 for stamp in STAMP.findall(whole + separator)]
    return latencies


async def _count_lines(connection: Connection) -> int:
    """The `line` events up to the `end` event."""
    lines, rest = 0, b""
    while data := await connection.read():
        whole, separator, rest = (rest + data).rpartition(EVENT_END)
        lines += whole.count(LINE_EVENT)
        if END_EVENT in whole + separator:
            break
    return lines


def _all_of(count: int, seen: int) -> int:
    if seen != count:
        raise MeasurementError(f"{seen} lines came instead of {count}")
    return seen


async def make(setup: Order) -> Readers:
    """`setup`: a `key`, and the log store's `logs_dsn`."""
    return Readers(setup["key"], setup["logs_dsn"])


if __name__ == "__main__":
    serve(make)
