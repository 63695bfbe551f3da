"""The shims of a runner's host: starts them, and finds them again after the worker was replaced.

A pod's shim has the directory `ROOT/KEY/shim`, which is the record that there was one; what else stands in `ROOT/KEY` is
not looked at. `pod_shim.py` says what it holds.
"""

import asyncio
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from math import ceil
from pathlib import Path
from typing import Any
from uuid import uuid4

from kiln.adapters import pod_shim, pod_shim_cgroups
from kiln.adapters.pod_shim import EndReason
from kiln.adapters.pod_shim_control import Message
from kiln.adapters.pod_shim_spool import first_line, segment_path
from kiln.adapters.pod_shim_tree import write_json
from kiln.errors import OperationOverError
from kiln.models import PodResult
from kiln.ports.pods import ShimOrder, SpooledLine

DIRECTORY = "shim"
SPOOL_BYTES = 64 * 1024 * 1024
MOST_LINES = 500
MOST_LINES_BYTES = 1024 * 1024
ANSWER_SECONDS = 10.0
ANSWER_BYTES = 64 * 1024
PAUSE_SECONDS = 0.05
LIMITS = {"memory": "memory_mb", "pids": "processes"}
ERRORS = {
    EndReason.TERMINATED: "terminated",
    EndReason.TIMED_OUT: "pod timed out after {minutes} minutes",
    EndReason.LEASE_ENDED: "no worker came back within {lease_seconds:g} seconds",
    EndReason.OUT_OF_MEMORY: "the agent was killed at the limit of {memory_mb} MB of memory",
    EndReason.NOT_STARTED: "cannot start the agent: {problem}",
    EndReason.SHIM_LOST: "the agent's shim died: {problem}",
}
EPOCH = datetime.fromtimestamp(0, UTC)


class HostShims:
    """The shims below one directory, which must be this host's own. Each may keep `spool_bytes` of unshipped output."""

    def __init__(self, root: Path, *, spool_bytes: int = SPOOL_BYTES) -> None:
        self._root = root
        self._spool_bytes = spool_bytes

    async def start(self, key: str, order: ShimOrder) -> "HostShim":
        """Raises FileExistsError if the pod has had one here already. An agent that cannot be started is a shim whose
        `wait` says so. A cancel leaves either nothing or a shim that `find` finds."""
        return await asyncio.to_thread(self._start, self._root / key, order)

    def find(self, key: str) -> "HostShim | None":
        """The pod's shim, alive or ended, or one whose start was interrupted; None if it never had one here."""
        directory = self._root / key / DIRECTORY
        return HostShim(directory) if directory.is_dir() else None

    def keys(self) -> frozenset[str]:
        """Pods that have a directory here."""
        with suppress(FileNotFoundError):
            return frozenset(entry.name for entry in self._root.iterdir() if entry.is_dir())
        return frozenset()

    def limits(self) -> list[str]:
        """Those of `PodLimits` that this host can enforce on a pod as a whole."""
        probe = pod_shim_cgroups.make(f"kiln-probe-{uuid4().hex}")
        probe.remove()
        return [LIMITS[controller] for controller in probe.paths]

    def _start(self, pod: Path, order: ShimOrder) -> "HostShim":
        directory = pod / DIRECTORY
        # The agent's user must get through to a sandbox beside the shim; the shim's own directory is closed to it.
        pod.mkdir(parents=True, exist_ok=True)
        lock = _settle_in(directory, order)
        try:
            _launch(directory, _as_message(order, self._spool_bytes), lock)
        finally:
            os.close(lock)
        return HostShim(directory)


class HostShim:
    """One pod's shim, or what it left. Any number of processes may hold one at once; it has no state of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._place: tuple[int, Path, int] | None = None

    async def prompt(self, text: str, number: int | None = None) -> None:
        """Queues a prompt for the agent's terminal. One with a `number` not above the last one's was taken already, and
        is not taken twice. Raises OperationOverError if the agent has ended, or reads nothing of what it is sent."""
        await self._ask({"do": "prompt", "text": text, "number": number})

    async def prompted(self) -> int:
        """The number of the last prompt that it has. Raises OperationOverError if it is no more."""
        return int((await self.status())["prompted"])

    async def terminate(self) -> None:
        """Asks for the agent's end: SIGTERM, and after the grace SIGKILL for its whole tree."""
        with suppress(OperationOverError):
            await self._ask({"do": "terminate"})

    async def renew(self, seconds: float) -> None:
        """Lets the agent live for so many seconds more without a worker."""
        with suppress(OperationOverError):
            await self._ask({"do": "renew", "seconds": seconds})

    async def acknowledge(self, number: int) -> None:
        """Lets go of the lines up to this one, which makes room for others."""
        with suppress(OperationOverError):
            await self._ask({"do": "ack", "number": number})

    async def status(self) -> Message:
        """What the shim says of itself. Raises OperationOverError if it is no more."""
        return await self._ask({"do": "status"})

    async def wait(self) -> PodResult:
        """How it ended. A shim that died without a word is told of as such, after what it left has been killed."""
        while self.is_alive():
            async for _ in self._news():
                pass
            await asyncio.sleep(PAUSE_SECONDS)
        result = self._result()
        if result.get("reason") is None:
            await asyncio.to_thread(self._clear_up)
        return _pod_result(result, self._order(), half_started=(self._directory / pod_shim.STARTING).exists())

    async def arrived(self, after: int, seconds: float) -> bool:
        """Waits so long for a line numbered above `after`, or for the end; whether there is such a line."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.is_alive():
                    async for last in self._news():
                        if last > after:
                            return True
                    await asyncio.sleep(PAUSE_SECONDS)
        return bool(self.lines(after))

    def is_alive(self) -> bool:
        """Whether the shim, or who clears up after it, still runs."""
        with suppress(FileNotFoundError), (self._directory / "alive").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def lines(self, after: int) -> Sequence[SpooledLine]:
        """What the agent has printed since, at most some hundred lines; without those that were let go of."""
        found: list[SpooledLine] = []
        size = 0
        for line, length in self._read(after):
            found.append(line)
            size += length
            if len(found) == MOST_LINES or size >= MOST_LINES_BYTES:
                break
        return found

    def last(self) -> int:
        """The number of the last line that the agent has printed, which may have been let go of; 0 without any."""
        paths = sorted(self._directory.glob("spool-*.jsonl"))
        # The last file may be empty: its name tells what came before it.
        last = first_line(paths[-1]) - 1 if paths else 0
        while lines := self.lines(last):
            last = lines[-1].number
        return last

    def _read(self, after: int) -> Iterator[tuple[SpooledLine, int]]:
        """Lines numbered above `after`, each with its size; remembers where the last one ended."""
        for path, begin in self._segments(after):
            with suppress(FileNotFoundError), path.open("rb") as file:
                offset = file.seek(begin)
                for data in file:
                    # The shim is in the middle of it.
                    if not data.endswith(b"\n"):
                        break
                    offset += len(data)
                    line = _spooled(data)
                    if line.number > after:
                        self._place = line.number, path, offset
                        yield line, len(data)

    def _segments(self, after: int) -> list[tuple[Path, int]]:
        """The spool's files from where line `after` ends, each with the byte to begin at."""
        paths = sorted(self._directory.glob("spool-*.jsonl"))
        if self._place and self._place[0] == after and self._place[1] in paths:
            _, path, offset = self._place
            return [(path, offset), *((later, 0) for later in paths if later > path)]
        first = max((path for path in paths if path <= segment_path(self._directory, after + 1)), default=None)
        return [(path, 0) for path in paths if first is None or path >= first]

    async def _news(self) -> AsyncIterator[int]:
        """The last line's number, again whenever it has grown, until the shim hangs up."""
        with suppress(OSError, ValueError):
            async with self._connection() as (reader, writer):
                writer.write(b'{"do": "follow"}\n')
                while answer := await reader.readline():
                    yield json.loads(answer)["last"]

    async def _ask(self, request: Message) -> Message:
        """The shim's answer. Raises OperationOverError if there is none, or it is no."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS), self._connection() as (reader, writer):
                writer.write(json.dumps(request).encode() + b"\n")
                await writer.drain()
                answer: Message = json.loads(await reader.readline())
        except (OSError, ValueError) as error:
            raise OperationOverError("the pod's agent has ended") from error
        if not answer["ok"]:
            raise OperationOverError(f"the pod's agent cannot be reached: {answer['error']}")
        return answer

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """By way of a descriptor: the path of a socket may have 107 bytes, that of a directory more."""
        directory = os.open(self._directory, os.O_PATH)
        try:
            path = f"/proc/self/fd/{directory}/{pod_shim.CONTROL}"
            reader, writer = await asyncio.open_unix_connection(path, limit=ANSWER_BYTES)
        finally:
            os.close(directory)
        try:
            yield reader, writer
        finally:
            writer.close()

    def _result(self) -> dict[str, Any]:
        return _read_json(self._directory / pod_shim.RESULT)

    def _order(self) -> dict[str, Any]:
        return _read_json(self._directory / "order.json")

    def _clear_up(self) -> None:
        """Shim and keeper are dead: what is left of the agent's tree is found by its control groups."""
        paths = _read_json(self._directory / pod_shim.CGROUPS)
        pod_shim_cgroups.Cgroups({controller: Path(path) for controller, path in paths.items()}).remove()


def _settle_in(directory: Path, order: ShimOrder) -> int:
    """Makes a shim's directory, whole at once, and a lock in it that is held already. Raises FileExistsError."""
    fresh = Path(tempfile.mkdtemp(prefix=".shim-", dir=directory.parent))
    lock = os.open(fresh / "alive", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (fresh / pod_shim.STARTING).touch()
        write_json(fresh / "order.json", _without_secrets(order))
        # Fails if the other is there and holds something, and a shim's directory always does.
        fresh.rename(directory)
    except OSError as error:
        os.close(lock)
        shutil.rmtree(fresh)
        if directory.exists():
            raise FileExistsError(f"there has been a shim in {directory} already") from error
        raise
    return lock


def _launch(directory: Path, order: Message, lock: int) -> None:
    """Returns once the agent runs, or cannot. The lock is held by the shim's processes from here on."""
    subprocess.run(
        [sys.executable, "-I", "-S", "-X", "utf8", pod_shim.__file__, str(directory), str(lock)],
        input=json.dumps(order).encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=[lock],
        env={},
        cwd="/",
        start_new_session=True,
        check=False,
    )


def _as_message(order: ShimOrder, spool_bytes: int) -> Message:
    return {**asdict(order), "cwd": str(order.cwd), "spool_bytes": spool_bytes}


def _without_secrets(order: ShimOrder) -> Message:
    """Arguments too may hold secrets."""
    secret = {"argv", "environment", "secrets"}
    return {name: value for name, value in _as_message(order, 0).items() if name not in secret}


def _pod_result(result: dict[str, Any], order: dict[str, Any], *, half_started: bool) -> PodResult:
    reason = result.get("reason")
    if reason is None:
        error = "its start was interrupted" if half_started else "the agent's shim died"
        return PodResult(error=error)
    return PodResult(
        exit_code=result["exit_code"],
        error=_error(EndReason(reason), result, order),
        ended_at=datetime.fromisoformat(result["ended_at"]),
    )


def _error(reason: EndReason, result: dict[str, Any], order: dict[str, Any]) -> str | None:
    if reason == EndReason.EXITED:
        return _exit_error(result)
    minutes = ceil((order["limit_seconds"] or 0) / 60)
    return ERRORS[reason].format_map({**order, **result, "minutes": minutes})


def _exit_error(result: dict[str, Any]) -> str | None:
    if result["signal"] is not None:
        return f"the agent was ended by {signal.Signals(result['signal']).name}"
    return f"the agent exited with code {result['exit_code']}" if result["exit_code"] else None


def _spooled(data: bytes) -> SpooledLine:
    line = json.loads(data)
    return SpooledLine(line["n"], EPOCH + timedelta(microseconds=line["t"]), line["s"], line["x"])


def _read_json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing if it is not there."""
    with suppress(FileNotFoundError):
        return dict(json.loads(path.read_text()))
    return {}
