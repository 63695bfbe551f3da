"""The processes below a pod's shim or keeper, as their subreaper sees them."""

import json
import os
import select
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

from kiln.adapters.guard import (
    FIRST_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    PR_SET_CHILD_SUBREAPER,
    PR_SET_PDEATHSIG,
    _descendants,
    _drain,
    _now,
    _prctl,
    _restore_signals,
    _wake_on_child_exit,
)

__all__ = ["PR_SET_PDEATHSIG", "Tree", "now", "prctl", "reserve_json", "restore_signals", "write_json"]

MOST_STOP_ROUNDS = 50
RESERVED_BYTES = 4096

now = _now
prctl = _prctl
restore_signals = _restore_signals


class Tree:
    """All that is started below this process: what loses its parent becomes its own child and is found again.

    `woken` is a descriptor that can be read whenever a child has ended.
    """

    def __init__(self) -> None:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        self.woken = _wake_on_child_exit()
        self._statuses: dict[int, int] = {}

    def status(self, pid: int) -> int | None:
        """A child's wait status (wait(2)), once it has ended."""
        return self._statuses.get(pid)

    def settle(self) -> None:
        """Empties `woken`."""
        _drain(self.woken)

    def reap(self, keep: int = 0) -> bool:
        """Takes note of children that ended, of `keep` only for good; returns whether any are left."""
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return True
                if pid == keep:
                    self._statuses[pid] = status
        return False

    def signal(self, number: int) -> None:
        for pid in _descendants(os.getpid()):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)

    def kill(self, keep: int = 0) -> None:
        """SIGKILL to all, until none is left."""
        pause = FIRST_PAUSE_SECONDS
        while self.reap(keep):
            self._stop()
            self.signal(signal.SIGKILL)
            if select.select([self.woken], [], [], pause)[0]:
                self.settle()
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)

    def _stop(self) -> None:
        """Halts all, so that those who multiply as fast as they are killed do not get the room to."""
        stopped: set[int] = set()
        for _ in range(MOST_STOP_ROUNDS):
            fresh = set(_descendants(os.getpid())) - stopped
            if not fresh:
                return
            for pid in fresh:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGSTOP)
            stopped |= fresh


def reserve_json(path: Path) -> None:
    """Has the file's place on the disk be there when this process writes it: an agent may have filled the disk by then."""
    _fresh(path).write_bytes(bytes(RESERVED_BYTES))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file that is seen whole or not at all, also after the host's crash."""
    fresh = _fresh(path)
    with fresh.open("r+" if fresh.exists() else "w") as file:
        json.dump(content, file)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _fresh(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")
