"""HTTP/1.1 with as little of it as load needs: the measuring must cost less than what is measured."""

import asyncio
from typing import Self

from bench.figures import MeasurementError

HEAD_END = b"\r\n\r\n"
READ_BYTES = 1024 * 1024
LENGTH_FIELD = b"\r\ncontent-length:"


class Connection:
    """One kept connection to a server on this host. Not for two requests at once."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fields: str) -> None:
        self._reader = reader
        self._writer = writer
        self._fields = fields

    @classmethod
    async def open(cls, port: int, key: str | None = None) -> Self:
        """A connection whose requests carry a plain key, unless it is None."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=READ_BYTES)
        bearer = "" if key is None else f"Authorization: Bearer {key}\r\n"
        return cls(reader, writer, f"Host: 127.0.0.1:{port}\r\n{bearer}")

    async def post(self, path: str, body: bytes, expected: int) -> bytes:
        """The answer's body, which must say its length. Raises MeasurementError for another status."""
        fields = f"{self._fields}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self._writer.write(f"POST {path} HTTP/1.1\r\n{fields}\r\n".encode() + body)
        return await self._body(expected)

    async def get(self, path: str, authorization: str | None = None) -> bytes:
        """The answer's body, as `post`. A connection without a key may send another Authorization with each request."""
        field = "" if authorization is None else f"Authorization: {authorization}\r\n"
        self._writer.write(f"GET {path} HTTP/1.1\r\n{self._fields}{field}\r\n".encode())
        return await self._body(200)

    async def get_stream(self, path: str) -> None:
        """Asks for a stream of events, and returns when it has begun."""
        self._writer.write(f"GET {path} HTTP/1.1\r\n{self._fields}Accept: text/event-stream\r\n\r\n".encode())
        await self._head(200)

    async def read(self) -> bytes:
        """What has come of the stream, with its chunks' marks; nothing at its end."""
        return await self._reader.read(READ_BYTES)

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    async def _body(self, expected: int) -> bytes:
        head = await self._head(expected)
        length = head.lower().partition(LENGTH_FIELD)[2].partition(b"\r\n")[0]
        return await self._reader.readexactly(int(length))

    async def _head(self, expected: int) -> bytes:
        head = await self._reader.readuntil(HEAD_END)
        status = int(head.split(b" ", 2)[1])
        if status != expected:
            raise MeasurementError(f"the answer was {status} instead of {expected}: {(await self.read())!r}")
        return head
