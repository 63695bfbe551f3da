"""Runs a program as a pod's user, with less than the agent had: `python -I -S run_as.py UID MEMORY_MB PROCESSES PROGRAM…`.

Without a PROGRAM it kills every process of that user instead: all at once, so that none can multiply meanwhile.
Standard library only, and those modules of Kiln's that need no more.
"""

import os
import resource
import signal
import sys
from pathlib import Path

if not __package__:
    # Isolated Python knows the standard library alone; Kiln comes last, so that it hides nothing.
    sys.path.append(str(Path(__file__).parents[2]))

from kiln.adapters.pod_shim_account import Account, drop_to

MEGABYTE = 1024 * 1024
MAX_FILE_BYTES = 4 * 1024 * MEGABYTE
CANNOT_EXECUTE = 127


def main() -> None:
    """Does not return."""
    uid, memory_mb, processes = map(int, sys.argv[1:4])
    program = sys.argv[4:]
    _limit(memory_mb * MEGABYTE, processes)
    drop_to(Account(uid, uid, (), listed=False))
    if program:
        os.execvp(program[0], program)  # noqa: S606  no shell
    # Of root's processes, none may ever be meant.
    if os.getresuid() == (uid, uid, uid) and uid:
        os.kill(-1, signal.SIGKILL)


def _limit(memory_bytes: int, processes: int) -> None:
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: MAX_FILE_BYTES,
        resource.RLIMIT_DATA: memory_bytes,
        resource.RLIMIT_NPROC: processes,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


if __name__ == "__main__":
    main()
