"""Carries connections from an engine's network namespace to services on this host's loopback: registry and API.

The listeners stand on the same loopback address and port in the namespace, where the engine's daemons find them and
a build's RUN processes, which have a loopback of their own, do not. Standard library only.
"""

import asyncio
import ctypes
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress

from cli.engine_network import Place

CLONE_NEWNET = 0x40000000
CHUNK_BYTES = 256 * 1024


def listen_inside(pid: int, places: Iterable[Place]) -> list[tuple[socket.socket, Place]]:
    """Listeners in the network namespace of a process: a socket belongs where it was made. Raises OSError."""
    made: list[tuple[socket.socket, Place]] = []
    failures: list[OSError] = []

    def make() -> None:
        try:
            _enter_network(pid)
            made.extend((socket.create_server((place.address, place.port)), place) for place in places)
        except OSError as error:
            failures.append(error)

    # A thread of its own, which ends in the other namespace; this one's stays as it is (setns(2)).
    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return made


async def relay(listeners: Iterable[tuple[socket.socket, Place]]) -> None:
    """Serves until it is cancelled."""
    servers = [await asyncio.start_server(_handler(place), sock=listener) for listener, place in listeners]
    try:
        await asyncio.Event().wait()
    finally:
        for server in servers:
            server.close()


def _enter_network(pid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{pid}/ns/net", "rb") as namespace:  # noqa: PTH123  its descriptor is wanted
        if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _handler(place: Place) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(place.address, place.port)
        except OSError:
            writer.transport.abort()
            return
        try:
            with suppress(OSError):
                await asyncio.gather(_carry(reader, far_writer), _carry(far_reader, writer))
        finally:
            for end in (writer, far_writer):
                end.transport.abort()

    return handle


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(CHUNK_BYTES):
        writer.write(data)
        await writer.drain()
    with suppress(OSError):
        writer.write_eof()
