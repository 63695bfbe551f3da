"""Looks at real processes: who lives, by a mark in the environment that every descendant inherits."""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

MARK = "KILN_TEST_MARK"
POLL_SECONDS = 0.01


def marked(mark: str, name: str = MARK) -> set[int]:
    """The processes whose environment carries the mark, less those that are dead and only unreaped."""
    wanted = f"{name}={mark}".encode()
    return {pid for pid in _pids() if wanted in read_proc(pid, "environ").split(b"\0")}


def state_of(pid: int) -> str:
    """The process's state as proc(5) has it (`R`, `S`, `T`, `Z`, …); "" if it is gone."""
    stat = read_proc(pid, "stat").decode(errors="replace").rpartition(")")[2].split()
    return stat[0] if stat else ""


def children_of(parent: int) -> set[int]:
    """The direct children of a process, zombies too."""
    return {pid for pid in _pids() if read_proc(pid, "stat").rpartition(b")")[2].split()[1:2] == [str(parent).encode()]}


def descendants(pid: int) -> set[int]:
    """Every live process below this one."""
    found: set[int] = set()
    fresh = children_of(pid)
    while fresh:
        found |= fresh
        fresh = {child for parent in fresh for child in children_of(parent)} - found
    return found


def read_proc(pid: int, name: str) -> bytes:
    """The file /proc/PID/NAME; nothing if the process is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def eventually(condition: Callable[[], object], seconds: float = 10) -> bool:
    """Whether the condition comes true in time; blocks."""
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
    return bool(met)


async def soon(condition: Callable[[], object], seconds: float = 10) -> bool:
    """Whether the condition comes true in time."""
    return await asyncio.to_thread(eventually, condition, seconds)


def _pids() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
