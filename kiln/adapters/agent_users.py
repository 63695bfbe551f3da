"""User ids for the agents of a host: each pod's agent has one of its own, so that none reads what another may.

A pod's id stands in the file `user` of its directory and is free again when that is gone. Runners of one host that are
root and keep their pods in different directories want ranges of their own.
"""

import fcntl
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kiln.errors import OperationFailedError

FILE = "user"
LOCK = ".users"


class AgentUsers:
    """The ids `uids` of a host, taken by the pods whose directories stand in `pods`. Without root there are none."""

    def __init__(self, pods: Path, uids: range) -> None:
        self._pods = pods
        self._uids = uids

    def take(self, key: str) -> int | None:
        """The pod's id, the same each time; None where this process cannot change users. Raises OperationFailedError if
        none is free."""
        if os.geteuid():
            return None
        with self._locked():
            uid = self.of(key)
            if uid is None:
                uid = self._free_one()
                self._write(key, uid)
        return uid

    def of(self, key: str) -> int | None:
        """The pod's id, if it has one."""
        if os.geteuid():
            return None
        with suppress(OSError, ValueError):
            return int((self._pods / key / FILE).read_text())
        return None

    def _free_one(self) -> int:
        """Any: what the last one with this id has left in /tmp should belong to nobody for as long as possible."""
        taken = {self.of(path.name) for path in self._pods.iterdir()} | _running()
        free = [uid for uid in self._uids if uid not in taken]
        if not free:
            raise OperationFailedError(f"all {len(self._uids)} user ids for agents are taken on this runner's host")
        return random.choice(free)  # noqa: S311  no secret

    def _write(self, key: str, uid: int) -> None:
        fresh = self._pods / key / f".{FILE}"
        fresh.write_text(str(uid))
        fresh.replace(self._pods / key / FILE)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._pods.parent / LOCK).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _running() -> set[int]:
    """The users of all processes."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                found.add(entry.stat().st_uid)
    return found
