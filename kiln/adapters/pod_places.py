"""The pods' directories on a runner's host, and in each the pod's log on its way to Kiln.

`ROOT/KEY` holds, beside the shim's directory and the sandbox:

    nonce          the name of the pod's only shim        done           the agent's end, once Kiln was told (JSON)
    before.jsonl   lines of Kiln's own, numbered 1..B     after.jsonl    those after the agent's end
    acknowledged   a line's number, in 20 digits

A line is `{"n": number, "t": microseconds since 1970, "x": text}`. The shim's line n is B + n in the pod's log: B is fixed
once there is a shim.
"""

import asyncio
import json
import os
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from kiln.adapters.sandbox_files import make_passable
from kiln.adapters.shims import EPOCH, HostShim, HostShims
from kiln.models import PodResult
from kiln.ports.pods import SpooledLine

PREFIX = "pod-"
STREAM = "kiln"
MOST_LINES = 500
_MICROSECOND = timedelta(microseconds=1)


class HostPlaces:
    """The pods' directories below `root`, where the shims are too. One process at a time may use it."""

    def __init__(self, root: Path, shims: HostShims) -> None:
        self._root = root
        self._shims = shims

    def directory(self, key: str) -> Path:
        """The pod's directory, whether it is there or not."""
        if not key.startswith(PREFIX) or "/" in key:
            raise ValueError(f"{key} is no pod's key")
        return self._root / key

    def keys(self) -> frozenset[str]:
        """Pods that have a directory here."""
        return frozenset(key for key in self._shims.keys() if key.startswith(PREFIX))  # noqa: SIM118  no dictionary

    def nonce(self, key: str) -> str:
        """The name of the only shim that the pod may ever have here. Makes the pod's directory. Raises OSError."""
        directory = self.directory(key)
        make_passable(directory)
        file = directory / "nonce"
        with suppress(FileNotFoundError):
            return file.read_text()
        write_whole(file, str(uuid.uuid4()))
        return file.read_text()

    def journal(self, key: str) -> "HostJournal":
        """The pod's journal. Raises FileNotFoundError if it has no directory here."""
        directory = self.directory(key)
        if not directory.is_dir():
            raise FileNotFoundError(f"{key} has no directory here")
        return HostJournal(directory, key, self._shims)

    def done(self, key: str) -> PodResult | None:
        """How the pod's agent ended, once Kiln was told of it; None before that, and without a directory."""
        with suppress(FileNotFoundError):
            return PodResult.model_validate_json((self.directory(key) / "done").read_bytes())
        return None

    def note_done(self, key: str, result: PodResult) -> None:
        """Kiln was told: another process need not tell it again. Nothing happens without a directory."""
        with suppress(FileNotFoundError):
            write_whole(self.directory(key) / "done", result.model_dump_json())


class HostJournal:
    """A pod's log as its runner has it. One process holds it at a time, and one object in it."""

    def __init__(self, directory: Path, key: str, shims: HostShims) -> None:
        self._directory = directory
        self._key = key
        self._shims = shims
        self._found: HostShim | None = None
        self._before = _Lines(directory / "before.jsonl")
        self._after = _Lines(directory / "after.jsonl")
        self._said = asyncio.Event()

    async def say(self, text: str) -> None:
        """Adds a line of Kiln's own, before the agent's start or after its end. Raises OSError."""
        lines = text.splitlines()
        if self._shim() is None:
            self._before.add(len(self._before.lines) + 1, lines)
        elif self._after.lines:
            self._after.add(self._after.lines[-1].number + 1, lines)
        else:
            self._after.add(len(self._before.lines) + await asyncio.to_thread(self._count_printed) + 1, lines)
        self._said.set()

    async def lines(self, after: int) -> Sequence[SpooledLine]:
        """What comes next, at most some hundred lines."""
        shim, before = self._shim(), len(self._before.lines)
        if after < before:
            return self._before.lines[after : after + MOST_LINES]
        if shim is None:
            return ()
        # Asked first: what is printed before the end is not missed.
        lives = shim.is_alive()
        printed = await asyncio.to_thread(shim.lines, after - before)
        if printed or lives:
            return [replace(line, number=line.number + before) for line in printed]
        return [line for line in self._after.lines if line.number > after][:MOST_LINES]

    async def arrived(self, after: int, seconds: float) -> bool:
        """Waits so long for a line numbered above `after`, or for the agent's end; whether there is such a line.

        A wait that begins before there is a shim hears nothing of what that prints: one starts anew then.
        """
        self._said.clear()
        if await self.lines(after):
            return True
        shim = self._shim()
        if shim is not None and shim.is_alive():
            return await shim.arrived(max(after - len(self._before.lines), 0), seconds)
        with suppress(TimeoutError):
            # Not wait_for: that of Python 3.11 may forget that it was cancelled.
            async with asyncio.timeout(seconds):
                await self._said.wait()
        return bool(await self.lines(after))

    async def acknowledge(self, number: int) -> None:
        """Lets go of the lines up to this one."""
        # A disk that is full must not keep the pod from its end: lines that are sent again harm nothing.
        with suppress(OSError):
            (self._directory / "acknowledged").write_text(f"{number:020}\n")
        shim, before = self._shim(), len(self._before.lines)
        if shim is not None and number > before:
            await shim.acknowledge(number - before)

    def acknowledged(self) -> int:
        """Lines up to this one were acknowledged, perhaps more."""
        # Half a number is what a host leaves that lost its power.
        with suppress(FileNotFoundError, ValueError):
            return int((self._directory / "acknowledged").read_text())
        return 0

    def _shim(self) -> HostShim | None:
        self._found = self._found or self._shims.find(self._key)
        return self._found

    def _count_printed(self) -> int:
        """How many lines the agent printed."""
        shim = HostShim(self._directory / "shim")
        if shim.is_alive():
            raise RuntimeError(f"{self._key}: its agent's last line has no number yet")
        return shim.last()


class _Lines:
    """A file of Kiln's own lines; `lines` are those that it has."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.lines: list[SpooledLine] = []
        self._size = 0
        with suppress(FileNotFoundError):
            whole = [data for data in path.read_bytes().splitlines(keepends=True) if data.endswith(b"\n")]
            self.lines = [_line_of(data) for data in whole]
            self._size = sum(map(len, whole))

    def add(self, first: int, texts: Sequence[str]) -> None:
        """Adds lines numbered from `first` on. Raises OSError, and has none of them then."""
        now = time.time_ns() // 1000
        fresh = [json.dumps({"n": n, "t": now, "x": text}).encode() + b"\n" for n, text in enumerate(texts, first)]
        with self._path.open("ab") as file:
            # What a process wrote before it died over it, or before the disk was full, must not stand before the next.
            file.truncate(self._size)
            file.write(b"".join(fresh))
        self._size += sum(map(len, fresh))
        self.lines += [_line_of(data) for data in fresh]


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is seen whole or not at all, also after the host's crash."""
    fresh = path.with_name(f".{path.name}")
    with fresh.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _line_of(data: bytes) -> SpooledLine:
    line = json.loads(data)
    return SpooledLine(line["n"], EPOCH + line["t"] * _MICROSECOND, STREAM, line["x"])
