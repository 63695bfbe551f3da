"""A shim's control socket: JSON lines from whoever may open it, which is the shim's own user alone.

    {"do": "prompt", "text": "…", "number": n | null}
                                       {"ok": true} once it is queued; a number that was there already is not again
    {"do": "terminate"}                {"ok": true}; the end comes later
    {"do": "renew", "seconds": s}      {"ok": true}
    {"do": "ack", "number": n}         {"ok": true}; the lines up to n may go
    {"do": "status"}                   {"ok": true, "last": n, …}
    {"do": "follow"}                   {"ok": true, "last": n}, and {"last": n} whenever there are more; the connection's
                                       end says that the agent and all that it started are gone

What cannot be done is answered `{"ok": false, "error": "…"}`.
"""

import json
import os
import selectors
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

MAX_CONNECTIONS = 64
MAX_REQUEST_BYTES = 64 * 1024 * 1024
READ_BYTES = 256 * 1024

Message = dict[str, Any]


class Control:
    """Listens at a path that is relative to the working directory, as absolute ones are often too long for a socket."""

    def __init__(self, path: Path, selector: selectors.BaseSelector, answer: Callable[[Message], Message]) -> None:
        self._selector = selector
        self._answer = answer
        self._connections: set[_Connection] = set()
        self._listener = socket.socket(socket.AF_UNIX)
        mask = os.umask(0o177)
        self._listener.bind(str(path))
        os.umask(mask)
        self._listener.listen()
        self._listener.setblocking(False)
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def tell(self, last: int) -> None:
        """Tells followers of the last line's number, if they do not know it yet."""
        for connection in list(self._connections):
            if connection.told is not None and connection.told < last and not connection.unsent:
                connection.told = last
                connection.unsent += _line({"last": last})
                self._send(connection)

    def _accept(self, _: int) -> None:
        with suppress(OSError):
            accepted, _address = self._listener.accept()
            if len(self._connections) >= MAX_CONNECTIONS:
                accepted.close()
                return
            accepted.setblocking(False)
            connection = _Connection(accepted)
            self._connections.add(connection)
            self._selector.register(accepted, selectors.EVENT_READ, partial(self._serve, connection))

    def _serve(self, connection: "_Connection", events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._send(connection)
        if events & selectors.EVENT_READ:
            for request in connection.receive():
                connection.unsent += _line(self._answered(connection, request))
            self._send(connection)

    def _answered(self, connection: "_Connection", line: bytes) -> Message:
        try:
            request = json.loads(line)
            answer = self._answer(request)
            if request["do"] == "follow":
                connection.told = answer["last"]
            return answer
        except (ValueError, KeyError, TypeError) as error:
            return {"ok": False, "error": f"not understood ({type(error).__name__})"}

    def _send(self, connection: "_Connection") -> None:
        with suppress(BlockingIOError):
            try:
                sent = connection.socket.send(connection.unsent) if connection.unsent else 0
                del connection.unsent[:sent]
            except BlockingIOError:
                pass
            except OSError:
                connection.over = True
        if connection.over:
            self._selector.unregister(connection.socket)
            self._connections.discard(connection)
            connection.socket.close()
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.unsent else 0)
        self._selector.modify(connection.socket, events, partial(self._serve, connection))


class _Connection:
    """One client. `told` is the last number that a follower knows; None if it does not follow."""

    def __init__(self, accepted: socket.socket) -> None:
        self.socket = accepted
        self.unsent = bytearray()
        self.told: int | None = None
        self.over = False
        self._received = bytearray()

    def receive(self) -> list[bytes]:
        """The requests that are complete."""
        try:
            data = self.socket.recv(READ_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        self._received += data
        self.over = not data or len(self._received) > MAX_REQUEST_BYTES
        if b"\n" not in data:
            return []
        *lines, rest = bytes(self._received).split(b"\n")
        self._received = bytearray(rest)
        return lines


def _line(message: Message) -> bytes:
    return json.dumps(message).encode() + b"\n"
