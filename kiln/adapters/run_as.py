"""Runs a program as a pod's user, with less than the agent had: `python -I -S run_as.py UID MEMORY_MB PROCESSES PROGRAM…`.

Without a PROGRAM it kills every process of that user instead: all at once, so that none can multiply meanwhile. So it does
if whoever started it dies before the PROGRAM has ended, in which an agent's code may run. Ends as the PROGRAM did.
Standard library only, and those modules of Kiln's that need no more.
"""

import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

if not __package__:
    # Isolated Python knows the standard library alone; Kiln comes last, so that it hides nothing.
    sys.path.append(str(Path(__file__).parents[2]))

from kiln.adapters.pod_shim_account import Account, drop_to
from kiln.adapters.pod_shim_tree import PR_SET_PDEATHSIG, prctl, restore_signals

MEGABYTE = 1024 * 1024
MAX_FILE_BYTES = 4 * 1024 * MEGABYTE
CANNOT_EXECUTE = 127


def main() -> None:
    """Ends as the program did."""
    uid, memory_mb, processes = map(int, sys.argv[1:4])
    program = sys.argv[4:]
    if program:
        _end_as(_watched(uid, partial(_become, program, uid, memory_mb * MEGABYTE, processes)))
    else:
        kill_all(uid)


def kill_all(uid: int) -> None:
    """Kills every process of a user, whose process this becomes."""
    drop_to(Account(uid, uid, (), listed=False))
    # Of root's processes, none may ever be meant.
    if os.getresuid() == (uid, uid, uid) and uid:
        os.kill(-1, signal.SIGKILL)


def _watched(uid: int, become: Callable[[], NoReturn]) -> int:
    """The wait status (wait(2)) of a child that becomes the program."""
    parent = os.getppid()
    signal.signal(signal.SIGTERM, lambda *_: _clear_up(uid))
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(CANNOT_EXECUTE)
    child = os.fork()
    if not child:
        try:
            become()
        finally:
            os._exit(CANNOT_EXECUTE)
    return os.waitpid(child, 0)[1]


def _clear_up(uid: int) -> NoReturn:
    kill_all(uid)
    os._exit(CANNOT_EXECUTE)


def _become(program: list[str], uid: int, memory_bytes: int, processes: int) -> NoReturn:
    restore_signals()
    _limit(memory_bytes, processes)
    drop_to(Account(uid, uid, (), listed=False))
    os.execvp(program[0], program)  # noqa: S606  no shell


def _end_as(status: int) -> NoReturn:
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with suppress(OSError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(abs(code))


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
