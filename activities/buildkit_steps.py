"""One step of a BuildKit build (a vertex of its graph): its name, its output put together to lines, how it went."""

import base64
import codecs
import re
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

from kiln.redact import MASK, Redactor

LogLine = tuple[str, str]

LINE_LENGTH = 64 * 1024
TAIL_LINES = 5
TAIL_LENGTH = 1024
MOST_STATUSES = 1000
STREAMS = {1: "stdout", 2: "stderr"}
LINE_END = re.compile(r"\r*\n|\r+")
# ECMA-48: control sequences, operating system commands, and the other escapes.
ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
CANCELED = re.compile(r"context canceled|code = Canceled")
UNITS = ("B", "kB", "MB", "GB")


class Step:
    """A step from its first mention on. `number` is the one that its lines begin with, 0 until it starts; `source` the
    image that it reads, if it reads one."""

    def __init__(self, redactor: Redactor) -> None:
        self.name = ""
        self.source = ""
        self.number = 0
        self.error = ""
        self._redactor = redactor
        self._started = 0.0
        self._spoke = 0.0
        self._spent: dict[float, float] = {}
        self._lines: dict[int, LineJoiner] = {}
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._sizes: dict[str, int] = {}
        self._reported: set[str] = set()
        self._open = True

    @property
    def last_lines(self) -> list[str]:
        """The last that it printed, at most 5 lines and a kilobyte together."""
        kept: list[str] = []
        room = TAIL_LENGTH
        for line in reversed(self._tail):
            if room > 0:
                kept.insert(0, line[-room:])
            room -= len(line)
        return kept

    def started(self, vertex: Mapping[str, Any]) -> None:
        self._started = _seconds(vertex.get("started"))

    def output(self, log: Mapping[str, Any]) -> Iterator[LogLine]:
        """The lines that this piece of output completes."""
        stream = 2 if log.get("stream") == 2 else 1
        joiner = self._lines.setdefault(stream, LineJoiner(self._redactor))
        self._spoke = max(0.0, _seconds(log.get("timestamp")) - self._started)
        for line in joiner.feed(decoded(str(log.get("data") or ""))):
            yield self._said(stream, line)

    def flush(self) -> Iterator[LogLine]:
        """What it printed without ending the line."""
        for stream, joiner in self._lines.items():
            for line in joiner.finish():
                yield self._said(stream, line)

    def progress(self, item: Mapping[str, Any]) -> Iterator[str]:
        """One line for a part of the step, such as a layer that is pushed, once that is done."""
        name = str(item.get("id") or "")
        if name in self._reported or (name not in self._sizes and len(self._sizes) >= MOST_STATUSES):
            return
        self._sizes[name] = max(self._sizes.get(name, 0), _number(item.get("current")), _number(item.get("total")))
        if item.get("completed"):
            self._reported.add(name)
            self._open = True
            seconds = _seconds(item["completed"]) - _seconds(item.get("started"))
            size = f" {_size(self._sizes[name])}" if self._sizes[name] else ""
            yield f"#{self.number} {self._redactor.text(plain(name))}{size} {max(0.0, seconds):.1f}s done"

    def ended(self, vertex: Mapping[str, Any], *, is_cache: bool) -> Iterator[str]:
        """How it went; nothing if that is known and no news. BuildKit ends a step again for each part of its work."""
        started = _seconds(vertex.get("started"))
        self._spent[started] = max(0.0, _seconds(vertex.get("completed")) - started)
        if not self._open:
            return
        self._open = False
        if CANCELED.search(self.error):
            yield f"#{self.number} CANCELED"
        elif self.error:
            problem = "no cache to use" if is_cache else "ERROR"
            yield f"#{self.number} {problem}: {' '.join(self.error.split())}"
        else:
            self._tail.clear()
            yield (
                f"#{self.number} CACHED" if vertex.get("cached") else f"#{self.number} DONE {self._seconds_spent:.1f}s"
            )

    @property
    def _seconds_spent(self) -> float:
        return sum(self._spent.values())

    def _said(self, stream: int, line: str) -> LogLine:
        self._open = True
        if line.strip():
            self._tail.append(line[-TAIL_LENGTH:])
        return STREAMS[stream], f"#{self.number} {self._spoke:.3f} {line}"


class LineJoiner:
    """Lines out of pieces of one stream's bytes: they end at LF, CR LF or a bare CR, so that each state of a progress
    bar is a line. Very long ones come in parts, none of which ends within a secret."""

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending: list[str] = []
        self._pending_length = 0
        # An LF that follows belongs to it.
        self._carriage_return = False

    def feed(self, data: bytes) -> Iterator[str]:
        """The lines that these bytes complete."""
        text = self._decoder.decode(data)
        if self._carriage_return and text:
            text = f"\r{text}"
            self._carriage_return = False
        complete = text.rstrip("\r")
        self._carriage_return |= complete != text
        yield from self._split(complete)

    def finish(self) -> Iterator[str]:
        """What stands after the last line's end."""
        yield from self._split(self._decoder.decode(b"", final=True))
        self._carriage_return = False
        if self._pending_length:
            yield from self._parts(self._take(""))

    def _split(self, text: str) -> Iterator[str]:
        begin = 0
        for end in LINE_END.finditer(text):
            line = self._take(text[begin : end.start()])
            begin = end.end()
            if line or "\n" in end[0]:
                yield from self._parts(line)
        self._pending.append(text[begin:])
        self._pending_length += len(text) - begin
        if self._pending_length > LINE_LENGTH + self._redactor.longest:
            *parts, rest = self._cut(self._take(""))
            self._pending, self._pending_length = [rest], len(rest)
            yield from map(self._masked, parts)

    def _take(self, end: str) -> str:
        text = "".join([*self._pending, end])
        self._pending, self._pending_length = [], 0
        return text

    def _parts(self, line: str) -> Iterator[str]:
        return map(self._masked, self._cut(line))

    def _cut(self, text: str) -> list[str]:
        parts: list[str] = []
        while len(text) > LINE_LENGTH + self._redactor.longest:
            at = self._redactor.cut(text[: LINE_LENGTH + self._redactor.longest], LINE_LENGTH)
            parts.append(text[:at])
            text = text[at:]
        return [*parts, text]

    def _masked(self, text: str) -> str:
        return self._redactor.text(plain(text))


def plain(text: str) -> str:
    """A text without terminal escapes, and without characters that no database or terminal should get."""
    if not text.isprintable():
        text = CONTROL.sub("", ESCAPE.sub("", text))
        text = text.encode(errors="replace").decode()
    return text


def decoded(data: str) -> bytes:
    """What base64 stands for, also if secrets in it were masked: then what is around them, as far as it can be told.

    Characters that stand for bits of a secret and of its neighbour are dropped. Between two masks nobody knows where a
    group of four begins, so that all of it is masked.
    """
    before, mask, rest = data.partition(MASK)
    if not mask:
        return _decoded(before)
    after = rest.rpartition(MASK)[2]
    return _decoded(before) + MASK.encode() + _decoded_end(after)


def _decoded(data: str) -> bytes:
    with suppress(ValueError):
        whole, rest = data[: len(data) // 4 * 4], data[len(data) // 4 * 4 :]
        return base64.b64decode(whole) + (base64.b64decode(rest.ljust(4, "=")) if len(rest) > 1 else b"")
    return b"[output that cannot be read]"


def _decoded_end(data: str) -> bytes:
    """The end of base64, whose groups of four are counted from there."""
    known = len(data) % 4
    filled = base64.b64decode("A" * (4 - known) + data[:known]) if known else b""
    # Of n known characters at a group's end, all bits of the last n - 1 bytes are known.
    return (filled[4 - known :] if known else b"") + _decoded(data[known:])


def _seconds(time: object) -> float:
    try:
        return datetime.fromisoformat(str(time)).timestamp()
    except ValueError:
        return 0.0


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _size(count: int) -> str:
    """In powers of 1000, as Docker writes sizes."""
    amount, unit = float(count), 0
    while amount >= 1000 and unit < len(UNITS) - 1:
        amount, unit = amount / 1000, unit + 1
    return f"{count}B" if not unit else f"{amount:.2f}{UNITS[unit]}"
