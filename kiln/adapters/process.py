"""Runs a tool as a child process that ends, with all its descendants, when its worker says so, stops or dies."""

import asyncio
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from io import FileIO
from pathlib import Path
from typing import Any, Self, cast

from kiln.adapters import guard
from kiln.adapters.guard import ExitReason
from kiln.adapters.tool_output import Line, ToolOutput, readable
from kiln.errors import KilnError
from kiln.redact import Redactor

__all__ = [
    "Command",
    "Exit",
    "ExitReason",
    "GuardLostError",
    "Line",
    "ToolNotStartedError",
    "ToolProcess",
    "start_tool",
]

MESSAGE_BYTES = 64 * 1024


class ToolNotStartedError(KilnError):
    """The tool could not be started. `missing` says that it is the program that cannot be found or executed."""

    def __init__(self, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


class GuardLostError(KilnError):
    """The tool's guard died (out of memory, an operator's kill): how the tool ended is unknown.

    The kernel has killed the tool's first process, and Kiln its process group; what had left both may live on.
    """


@dataclass(frozen=True)
class Command:
    """What to run. A bare program name is looked up in the PATH of `env`, which is all that the tool gets to see.

    `stdin` is a file that the tool reads as its standard input; without one that is at its end.
    """

    argv: tuple[str, ...] = field(repr=False)
    env: Mapping[str, str] = field(repr=False)
    cwd: Path
    stdin: Path | None = None


@dataclass(frozen=True)
class Exit:
    """How a tool ended: its exit code or the signal that ended it, and why."""

    code: int | None
    signal: int | None
    reason: ExitReason


class ToolProcess:
    """A running tool, made by `start_tool`. Leaving the context kills what is left of it and waits until it is gone."""

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor
        self._guard = _GuardProcess()
        self._output = self._guard.output(redactor)
        self._waiting = asyncio.Lock()
        self._exit: Exit | GuardLostError | None = None
        self.pid = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def renew(self, seconds: float) -> None:
        """Lets the tool live for so many seconds from now; without another renewal its guard kills it then."""
        await self._guard.send({"do": "renew", "seconds": seconds})

    async def interrupt(self) -> None:
        """SIGINT to the tool's process group."""
        await self._guard.send({"do": "interrupt"})

    async def kill(self) -> None:
        """SIGKILL to the tool and all its descendants; returns before they are gone."""
        await self._guard.send({"do": "kill"})

    async def stop(self, grace: timedelta) -> Exit:
        """Interrupts, and kills if the tool is not gone after `grace`. Raises GuardLostError.

        Somebody must go on reading `lines` meanwhile: a tool that cannot print cannot end.
        """
        await self.interrupt()
        try:
            async with asyncio.timeout(grace.total_seconds()):
                return await self.wait()
        except TimeoutError:
            await self.kill()
            return await self.wait()

    async def wait(self) -> Exit:
        """How the tool ended, once it and all its descendants are gone. Raises GuardLostError."""
        async with self._waiting:
            if self._exit is None:
                self._exit = await self._hear_exit()
        if isinstance(self._exit, GuardLostError):
            raise self._exit
        return self._exit

    def lines(self) -> AsyncIterator[Line]:
        """Both pipes' lines in the order of their arrival, until both are at their end. For one reader, once.

        No more is read than is asked for: a tool whose reader is slow waits in its writes.
        """
        return self._output.lines()

    async def begin(self, command: Command, lease: timedelta | None) -> None:
        """Has the guard start the tool. Raises ToolNotStartedError."""
        await self._guard.send(
            {
                "argv": command.argv,
                "env": dict(command.env),
                "cwd": str(command.cwd),
                "lease": None if lease is None else lease.total_seconds(),
                "stdin": None if command.stdin is None else str(command.stdin),
            }
        )
        answer = await self._guard.hear() or {"failed": {"step": "guard", "problem": "it died"}}
        if "failed" in answer:
            raise _not_started(command, answer["failed"], self._redactor)
        self.pid = answer["pid"]

    async def close(self) -> None:
        """Kills what is left of the tool, and returns once that is gone; a cancel comes through only then."""
        cancel: asyncio.CancelledError | None = None
        while True:
            try:
                await self._end()
                break
            except asyncio.CancelledError as error:
                cancel = error
        self._guard.close()
        self._output.close()
        if cancel is not None:
            raise cancel

    async def _end(self) -> None:
        if self.pid:
            await self.kill()
        self._guard.hang_up()
        with suppress(GuardLostError):
            await (self.wait() if self.pid else self._guard.gone())

    async def _hear_exit(self) -> Exit | GuardLostError:
        report = await self._guard.hear()
        await self._guard.gone()
        if report is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            return GuardLostError(f"the guard of process {self.pid} died")
        return Exit(report["code"], report["signal"], ExitReason(report["reason"]))


async def start_tool(command: Command, *, redactor: Redactor, lease: timedelta | None) -> ToolProcess:
    """Starts a tool, to be used as a context manager. Without a `lease` it needs no renewals.

    Raises ToolNotStartedError. If this is cancelled, nothing is left.
    """
    tool = ToolProcess(redactor)
    try:
        await tool.begin(command, lease)
    except BaseException:
        await tool.close()
        raise
    return tool


def _not_started(command: Command, failure: dict[str, str], redactor: Redactor) -> ToolNotStartedError:
    step = failure["step"]
    places = {
        "cwd": f"a tool in {command.cwd}",
        "stdin": f"a tool that reads {command.stdin}",
        "program": shlex.join(command.argv),
    }
    what = places.get(step, "the guard of a tool")
    return ToolNotStartedError(redactor.text(f"cannot start {what}: {failure['problem']}"), missing=step == "program")


class _GuardProcess:
    """The guard, and the worker's end of the socket to it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        self._sending = asyncio.Lock()
        self._received = b""
        with theirs:
            self._process = _launch(theirs)
        self._pidfd = os.pidfd_open(self._process.pid)

    def output(self, redactor: Redactor) -> ToolOutput:
        """What the tool will print."""
        stdout, stderr = cast("tuple[FileIO, FileIO]", (self._process.stdout, self._process.stderr))
        return ToolOutput({"stdout": stdout, "stderr": stderr}, os.dup(self._pidfd), redactor)

    async def send(self, message: dict[str, Any]) -> None:
        """Without effect if the guard is gone, as the tool is then."""
        data = json.dumps(message).encode() + b"\n"
        async with self._sending:
            with suppress(OSError):
                await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def hear(self) -> dict[str, Any] | None:
        """The guard's next message; None if it is gone. A cancel loses nothing that has arrived."""
        while b"\n" not in self._received:
            try:
                data = self._socket.recv(MESSAGE_BYTES)
            except BlockingIOError:
                await readable(self._socket.fileno())
                continue
            except ConnectionError:
                return None
            if not data:
                return None
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return dict(json.loads(line))

    def hang_up(self) -> None:
        """Shows the guard that nobody is left, which ends it and its tree."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    async def gone(self) -> None:
        """Returns once the guard has ended, and with it all that it guarded."""
        while self._process.poll() is None:
            await readable(self._pidfd)

    def close(self) -> None:
        if self._pidfd >= 0:
            self._socket.close()
            os.close(self._pidfd)
            self._pidfd = -1


def _launch(theirs: socket.socket) -> subprocess.Popen[bytes]:
    """An environment of its own keeps the worker's secrets out of the guard's, and a session its terminal's signals."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-X", "utf8", guard.__file__, str(theirs.fileno())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        pass_fds=[theirs.fileno()],
        env={},
        cwd="/",
        start_new_session=True,
    )
