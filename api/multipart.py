"""Reading a multipart/form-data body as it comes in: texts bounded in memory, the file as a stream (RFC 7578)."""

from collections import deque
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from kiln.errors import ContextTooLargeError, InvalidRequestError

MEDIA_TYPE = "multipart/form-data"
TEXT_LIMIT_BYTES = 64 * 1024
# The texts of a form and what stands between its parts; more of it than this no form of Kiln's has.
AROUND_FILE_BYTES = 2 * 1024 * 1024
# A caller's own names are repeated to them, but not at any length.
NAME_LENGTH = 100


@dataclass(frozen=True)
class _Headers:
    """A part begins."""

    name: str | None


class _PartEnd:
    """A part is complete."""


class _FormEnd:
    """The last boundary was there."""


_Event = _Headers | bytes | _PartEnd | _FormEnd


class _Events:
    """What the parser found in the bytes that it was given, in order."""

    def __init__(self, boundary: bytes) -> None:
        self.ready: deque[_Event] = deque()
        self._field, self._value = bytearray(), bytearray()
        self._name: str | None = None
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._part_data,
                "on_part_end": lambda: self.ready.append(_PartEnd()),
                "on_end": lambda: self.ready.append(_FormEnd()),
            },
        )

    def feed(self, data: bytes) -> None:
        """Raises InvalidRequestError for what is no multipart body."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise InvalidRequestError("body", f"no valid {MEDIA_TYPE}: {error}") from None

    def _part_begin(self) -> None:
        self._name = None

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            # Clients write names in UTF-8, though headers are Latin-1.
            kind, options = parse_options_header(self._value.decode("latin-1"))
            if kind == b"form-data" and b"name" in options:
                self._name = options[b"name"].decode(errors="replace")
        self._field.clear()
        self._value.clear()

    def _headers_finished(self) -> None:
        self.ready.append(_Headers(self._name))

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self.ready.append(data[start:end])


class Form:
    """A form's parts, one after the other. Each part is read, by `text` or `chunks`, before the next is asked for.

    Every method may raise ClientDisconnect, InvalidRequestError, which names the part, and ContextTooLargeError once
    the body is longer than any form may be.
    """

    def __init__(self, request: Request, names: Collection[str], file_limit_bytes: int) -> None:
        """Raises InvalidRequestError unless the body is announced as a form, ContextTooLargeError if it is announced as
        too long for one."""
        self._limit_bytes = file_limit_bytes + AROUND_FILE_BYTES
        self._check_length(request)
        self._events = _Events(_boundary(request))
        self._stream = request.stream()
        self._known = names
        self._seen: set[str] = set()
        self._read_bytes = 0
        self._part = ""

    async def next_part(self) -> str | None:
        """The name of the next part; None at the form's end."""
        event = await self._next()
        if isinstance(event, _FormEnd):
            await self._epilogue()
            return None
        if not isinstance(event, _Headers):
            raise TypeError("the part before was not read to its end")
        self._part = self._checked(event.name)
        return self._part

    async def text(self) -> str:
        """The current part, which must be a short text."""
        content = bytearray()
        async for data in self.chunks():
            content += data
            if len(content) > TEXT_LIMIT_BYTES:
                raise InvalidRequestError(self._part, f"must have at most {TEXT_LIMIT_BYTES} bytes")
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise InvalidRequestError(self._part, "must be UTF-8 text") from None

    async def chunks(self) -> AsyncIterator[bytes]:
        """The current part as it comes in; nothing is read ahead of what is asked for."""
        while isinstance(data := await self._next(), bytes):
            yield data

    async def _next(self) -> _Event:
        while not self._events.ready:
            self._events.feed(await self._more())
        return self._events.ready.popleft()

    async def _more(self) -> bytes:
        data = await anext(self._stream, b"")
        if not data:
            place = f"in the middle of {self._part}" if self._part else "before its first part"
            raise InvalidRequestError(self._part or "body", f"the body ends {place}")
        self._count(data)
        return data

    async def _epilogue(self) -> None:
        """What follows the last boundary means nothing, and is read so that the next request can be."""
        async for data in self._stream:
            self._count(data)

    def _count(self, data: bytes) -> None:
        self._read_bytes += len(data)
        if self._read_bytes > self._limit_bytes:
            raise self._too_large()

    def _checked(self, name: str | None) -> str:
        if name is None:
            raise InvalidRequestError("body", "a part has no name")
        if name not in self._known:
            raise InvalidRequestError(name[:NAME_LENGTH], f"no such part; there are {', '.join(self._known)}")
        if name in self._seen:
            raise InvalidRequestError(name, "must be sent once")
        self._seen.add(name)
        return name

    def _check_length(self, request: Request) -> None:
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self._limit_bytes:
            raise self._too_large()

    def _too_large(self) -> ContextTooLargeError:
        return ContextTooLargeError(f"the form is longer than {self._limit_bytes} bytes")


def _boundary(request: Request) -> bytes:
    media_type, options = parse_options_header(request.headers.get("content-type", ""))
    if media_type.decode("latin-1") != MEDIA_TYPE:
        raise InvalidRequestError("Content-Type", f"must be {MEDIA_TYPE}")
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:  # RFC 2046, 5.1.1
        raise InvalidRequestError("Content-Type", "must name the boundary, in 1 to 70 characters")
    return boundary
