"""Scripts as tools: real child processes under the process adapter."""

import os
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

from kiln.adapters.process import Command, Exit, Line, ToolProcess, start_tool
from kiln.redact import Redactor
from support.processes import MARK, children_of, read_proc

PATH = "/usr/bin:/bin"

# Besides itself: a child, one with its own session, one orphaned by a double fork, one orphaned in its own session.
TREE = """
    trap '' INT TERM HUP
    sleep 600 &
    setsid sleep 600 &
    (sleep 600 &)
    (setsid sh -c 'trap "" INT TERM HUP; sleep 600' &)
    echo ready
    while :; do sleep 600; done
"""
TREE_SIZE = 7


class Tools:
    """Starts shell and Python scripts as tools in the test's directory, under the test's mark."""

    def __init__(self, cwd: Path, mark: str) -> None:
        self.cwd = cwd
        self.env = {"PATH": PATH, MARK: mark}

    async def start(self, *argv: str, lease: float | None = None, secrets: tuple[str, ...] = ()) -> ToolProcess:
        command = Command(argv, self.env, self.cwd)
        term = None if lease is None else timedelta(seconds=lease)
        return await start_tool(command, redactor=Redactor(secrets), lease=term)

    @asynccontextmanager
    async def sh(self, script: str, *, lease: float | None = None) -> AsyncIterator[ToolProcess]:
        async with await self.start("sh", "-c", script, lease=lease) as tool:
            yield tool

    async def python(self, script: str, *, secrets: tuple[str, ...] = ()) -> tuple[list[Line], Exit]:
        """What the script prints, and how it ends."""
        async with await self.start(sys.executable, "-c", textwrap.dedent(script), secrets=secrets) as tool:
            lines = [line async for line in tool.lines()]
            return lines, await tool.wait()


async def first(lines: AsyncIterator[Line]) -> str:
    return (await anext(lines)).text


def parent_of(pid: int) -> int:
    """The pid of a process's parent."""
    return int(read_proc(pid, "stat").rpartition(b")")[2].split()[1])


def guards() -> set[int]:
    """The guards that this process has."""
    return {pid for pid in children_of(os.getpid()) if b"guard.py" in read_proc(pid, "cmdline")}


def descriptors() -> set[str]:
    """The descriptors that this process has open."""
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}
