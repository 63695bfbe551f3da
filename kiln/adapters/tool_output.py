"""Turns what a tool writes to its two pipes into lines of text with their secrets masked."""

import asyncio
import codecs
import os
import select
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from datetime import UTC, datetime
from io import FileIO
from typing import Literal, NamedTuple

from kiln.redact import Redactor

READ_BYTES = 64 * 1024
MAX_LINE_CHARS = 2 * 1024 * 1024

StreamName = Literal["stdout", "stderr"]


class Line(NamedTuple):
    """One line that the tool printed, secrets masked, with the time (UTC) at which it was read."""

    stream: StreamName
    text: str
    time: datetime


class ToolOutput:
    """The reading ends of the tool's pipes. `ended` is a descriptor that can be read once nobody in the tool's tree is
    left to write; all are this object's to close."""

    def __init__(self, pipes: Mapping[StreamName, FileIO], ended: int, redactor: Redactor) -> None:
        self._pipes = dict(pipes)
        self._framers = {name: LineFramer(redactor) for name in pipes}
        self._ended = ended
        self._reading = False
        self._closed = False
        for pipe in pipes.values():
            os.set_blocking(pipe.fileno(), False)

    async def lines(self) -> AsyncIterator[Line]:
        """Both pipes' lines in the order of their arrival. Reads no more than it is asked for."""
        self._reading = True
        live = set(self._pipes)
        try:
            while live:
                # Asked before the reads: what they do not find after that will never come, even if somebody outside
                # the tree, whom the tool handed its pipe, keeps it open.
                arrived = self._read(live, last_time=_is_readable(self._ended))
                for name, data in arrived.items():
                    for line in self._framed(name, data):
                        yield line
                live -= {name for name, data in arrived.items() if not data}
                await (asyncio.sleep(0) if arrived else readable(self._ended, *map(self._descriptor, live)))
        finally:
            self._reading = False
            if self._closed:
                self._release()

    def _read(self, live: Collection[StreamName], *, last_time: bool) -> dict[StreamName, bytes]:
        """What has arrived in the pipes that have something; nothing (`b""`) in those that are at their end."""
        data = {name: self._pipes[name].read(READ_BYTES) for name in self._pipes if name in live}
        return {name: part or b"" for name, part in data.items() if part is not None or last_time}

    def _framed(self, name: StreamName, data: bytes) -> Iterator[Line]:
        time = datetime.now(UTC)
        framer = self._framers[name]
        for text in framer.feed(data) if data else framer.finish():
            yield Line(name, text, time)

    def _descriptor(self, name: StreamName) -> int:
        return self._pipes[name].fileno()

    def close(self) -> None:
        """Closes the pipes, or has whoever is still in `lines` do it."""
        if not self._closed and not self._reading:
            self._release()
        self._closed = True

    def _release(self) -> None:
        os.close(self._ended)
        for pipe in self._pipes.values():
            pipe.close()


async def readable(*descriptors: int) -> None:
    """Returns once one of the descriptors can be read, or is at its end. One caller a descriptor at a time."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    for descriptor in descriptors:
        loop.add_reader(descriptor, wake)
    try:
        await ready
    finally:
        for descriptor in descriptors:
            loop.remove_reader(descriptor)


def _is_readable(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


class LineFramer:
    r"""Lines of one pipe, the same however its bytes are divided into reads.

    A line ends at LF, CR LF or a bare CR: each state of a progress bar is a line, and nothing waits for the LF that
    ends the last one. Runs of bare CRs make no empty lines. Bytes that are not UTF-8 show as `\xNN`. Lines of more
    than `max_line_chars` characters come in pieces, none of which ends within a secret.
    """

    def __init__(self, redactor: Redactor, max_line_chars: int = MAX_LINE_CHARS) -> None:
        self._redactor = redactor
        self._max = max_line_chars
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._pending: list[str] = []
        self._pending_chars = 0
        # Whether a part of the current line, which a bare CR ended, is out already.
        self._shown = False

    def feed(self, data: bytes) -> Iterator[str]:
        """The lines that these bytes complete."""
        return self._advance(self._decoder.decode(data))

    def finish(self) -> Iterator[str]:
        """What stands after the last line's end, at the end of the pipe."""
        yield from self._advance(self._decoder.decode(b"", final=True))
        if self._pending_chars:
            yield from self._pieces(self._take())

    def _advance(self, text: str) -> Iterator[str]:
        *ended, rest = text.split("\n")
        for line in ended:
            yield from self._end_line(line)
        yield from self._keep(rest)

    def _end_line(self, text: str) -> Iterator[str]:
        parts = _between_carriage_returns(self._take() + text)
        for part in parts or ([] if self._shown else [""]):
            yield from self._pieces(part)
        self._shown = False

    def _keep(self, text: str) -> Iterator[str]:
        """Holds a line's beginning, less what bare CRs end in it."""
        ended, carriage_return, rest = text.rpartition("\r")
        if carriage_return:
            for part in _between_carriage_returns(self._take() + ended):
                self._shown = True
                yield from self._pieces(part)
        self._pending.append(rest)
        self._pending_chars += len(rest)
        if self._pending_chars > self._max + self._redactor.longest:
            yield from self._overflow()

    def _overflow(self) -> Iterator[str]:
        text = self._take()
        while len(text) > self._max + self._redactor.longest:
            piece, text = self._cut(text)
            yield piece
        self._pending, self._pending_chars = [text], len(text)

    def _pieces(self, line: str) -> Iterator[str]:
        while len(line) > self._max:
            piece, line = self._cut(line)
            yield piece
        yield self._redactor.text(line)

    def _cut(self, text: str) -> tuple[str, str]:
        """The first piece of a long line, masked, and the rest of it."""
        at = self._redactor.cut(text[: self._max + self._redactor.longest], self._max)
        return self._redactor.text(text[:at]), text[at:]

    def _take(self) -> str:
        text = "".join(self._pending)
        self._pending, self._pending_chars = [], 0
        return text


def _between_carriage_returns(text: str) -> list[str]:
    return [part for part in text.split("\r") if part]
