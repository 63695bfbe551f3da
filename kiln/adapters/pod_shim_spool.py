r"""What an agent prints, made into numbered lines that wait on the disk until they are taken away.

The spool is a row of files `spool-FIRST.jsonl`, FIRST being the number of the file's first line. A line is
`{"n": number, "t": microseconds since 1970, "s": "stdout" | "kiln", "x": text}`; `kiln` is the shim's own word.
"""

import codecs
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from kiln.redact import Redactor

SEGMENTS = 8
MAX_LINE_CHARS = 32 * 1024
TERMINAL = "stdout"
OWN_WORD = "kiln"
_LINE_END = re.compile(r"\r*\n|\r+(?=[^\r\n])")


class TerminalLines:
    """The lines of a terminal's output, the same however its bytes are divided into reads.

    A line ends at LF, CR LF or bare CRs, of which a run makes no empty lines. Bytes that are not UTF-8, and NUL, show as
    U+FFFD. Lines of more than 32 Ki characters come in pieces. Secrets are masked; no piece ends within one.
    """

    def __init__(self, secrets: Sequence[str]) -> None:
        self._redactor = Redactor(secrets)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending = ""
        # A piece of the current line is out already: what ends it is no line of its own.
        self._begun = False

    @property
    def waiting(self) -> bool:
        """Whether a line has begun and not ended."""
        return bool(self._pending)

    def feed(self, data: bytes) -> Iterator[str]:
        """The lines that these bytes complete."""
        self._pending += self._decoder.decode(data)
        start = 0
        for end in _LINE_END.finditer(self._pending):
            text = self._pending[start : end.start()]
            if text or ("\n" in end[0] and not self._begun):
                yield from self._pieces(text)
            self._begun = "\n" not in end[0]
            start = end.end()
        self._pending = self._pending[start:]
        yield from self._overflow()

    def flush(self) -> Iterator[str]:
        """The beginning of a line that nobody goes on with, less what may be a secret's beginning."""
        text = self._pending.rstrip("\r")
        kept = self._redactor.begun(text)
        shown, self._pending = text[: len(text) - kept], text[len(text) - kept :]
        if shown:
            self._begun = True
            yield from self._pieces(shown)

    def finish(self) -> Iterator[str]:
        """What is left at the end."""
        text = (self._pending + self._decoder.decode(b"", final=True)).rstrip("\r")
        self._pending = ""
        if text:
            yield from self._pieces(text)

    def _overflow(self) -> Iterator[str]:
        while len(self._pending) > MAX_LINE_CHARS + self._redactor.longest:
            cut = self._redactor.cut(self._pending, MAX_LINE_CHARS)
            text, self._pending = self._pending[:cut], self._pending[cut:]
            self._begun = True
            yield self._masked(text)

    def _pieces(self, text: str) -> Iterator[str]:
        while len(text) > MAX_LINE_CHARS:
            cut = self._redactor.cut(text, MAX_LINE_CHARS)
            yield self._masked(text[:cut])
            text = text[cut:]
        yield self._masked(text)

    def _masked(self, text: str) -> str:
        return self._redactor.text(text).replace("\0", "\ufffd")


class Spool:
    """Numbers lines from 1 without a gap, and keeps them within `limit_bytes` of disk.

    Lines that were taken away make room. While there is none, or none on the disk, new lines get no number and are lost;
    how many is said in the next line that finds room.
    """

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self._directory = directory
        self._limit = limit_bytes
        self._segments: list[tuple[int, int]] = []
        self._file = -1
        self._full = False
        self._lost = 0
        self.last = 0
        self.acknowledged = 0
        self.lost = 0

    def add(self, stream: str, text: str) -> None:
        if self._lost and not self._full:
            # The disk was full, and may not be so any more.
            self._tell_loss()
        if self._lost or not self._write(stream, text):
            self._lost += 1
            self.lost += 1

    def acknowledge(self, number: int) -> None:
        """Lets go of the files whose lines are all numbered up to this."""
        self.acknowledged = max(self.acknowledged, min(number, self.last))
        while len(self._segments) > 1 and self._segments[1][0] <= self.acknowledged + 1:
            first, _ = self._segments.pop(0)
            segment_path(self._directory, first).unlink(missing_ok=True)
            self._full = False
        if not self._full:
            self._tell_loss()

    def close(self, *remarks: str) -> None:
        """The shim's last words, which find room even if there is none."""
        self._limit += 1 << 20
        self._full = False
        self._tell_loss()
        for remark in remarks:
            self.add(OWN_WORD, remark)

    def _tell_loss(self) -> None:
        text = f"[{self._lost} lines of output are lost: the runner had no room for more]"
        if self._lost and self._write(OWN_WORD, text):
            self._lost = 0

    def _write(self, stream: str, text: str) -> bool:
        line = {"n": self.last + 1, "t": time.time_ns() // 1000, "s": stream, "x": text}
        data = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        if sum(size for _, size in self._segments) + len(data) > self._limit:
            self._full = True
            return False
        with suppress(OSError):
            self._open_segment(len(data))
            first, size = self._segments[-1]
            if os.write(self._file, data) == len(data):
                self._segments[-1] = first, size + len(data)
                self.last += 1
                return True
            # The disk is full: half a line must not stand before the next one.
            os.ftruncate(self._file, size)
        return False

    def _open_segment(self, more: int) -> None:
        if self._segments and self._segments[-1][1] + more <= self._limit // SEGMENTS:
            return
        if self._segments and not self._segments[-1][1]:
            return
        path = segment_path(self._directory, self.last + 1)
        fresh = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if self._file >= 0:
            os.close(self._file)
        self._file = fresh
        self._segments.append((self.last + 1, 0))


def segment_path(directory: Path, first: int) -> Path:
    """The file that begins with this line."""
    return directory / f"spool-{first:012}.jsonl"


def first_line(path: Path) -> int:
    """The line with which a file of the spool begins."""
    return int(path.stem.rpartition("-")[2])
