"""Writes logs as a worker does, and the same lines to a socket of its own, without store or API, to compare with."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from bench.children import Answer, Order, serve
from kiln.adapters.log_book import StoreLogBook

ATTEMPT = 1
STREAM = "stdout"
LOST_SECONDS = 1.0
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
# As long as Packer's lines are at the median.
FILLER = "==> amazon-ebs.agent: Creating temporary keypair: kiln-0000"


class Writer:
    def __init__(self, logs: StoreLogBook, server: asyncio.Server, listeners: list[asyncio.StreamWriter]) -> None:
        self._logs = logs
        self._server = server
        self._listeners = listeners

    async def port(self) -> Answer:
        return {"port": self._server.sockets[0].getsockname()[1]}

    async def write_stamps(self, build_id: str, count: int, every_seconds: float) -> Answer:
        """Lines whose text is their time (CLOCK_MONOTONIC in ns, the same for all processes), to the log store."""
        async with self._logs.writing(build_id, ATTEMPT) as log:
            await _at_intervals(lambda stamp: log.write(STREAM, stamp), count, every_seconds)
        return {}

    async def send_stamps(self, count: int, every_seconds: float) -> Answer:
        """The same lines in the same bytes, straight to whoever is connected, who is then let go."""
        await _at_intervals(self._send, count, every_seconds)
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        return {}

    async def fill(self, build_id: str, count: int) -> Answer:
        """A log that has ended, and the `seconds` that writing it took."""
        began = time.perf_counter()
        async with self._logs.writing(build_id, ATTEMPT) as log:
            for number in range(count):
                await log.write(STREAM, f"{FILLER}{number:07}")
        seconds = time.perf_counter() - began
        self._logs.end(build_id, "succeeded")
        return {"seconds": seconds}

    async def _send(self, stamp: str) -> None:
        event = f'id: 1\nevent: line\ndata: {{"line": "{stamp}", "time": "", "stream": "{STREAM}"}}\n\n'.encode()
        for listener in self._listeners:
            listener.write(event)


async def _at_intervals(write: Callable[[str], Awaitable[None]], count: int, every_seconds: float) -> None:
    due = time.monotonic()
    for _ in range(count):
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        await write(str(time.monotonic_ns()))
        due += every_seconds
    await asyncio.sleep(LOST_SECONDS / 10)


async def make(setup: Order) -> Writer:
    """`setup`: the log store's `logs_dsn`."""
    listeners: list[asyncio.StreamWriter] = []

    async def welcome(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD)
        listeners.append(writer)

    server = await asyncio.start_server(welcome, "127.0.0.1", 0)
    return Writer(StoreLogBook(setup["logs_dsn"]), server, listeners)


if __name__ == "__main__":
    serve(make)
