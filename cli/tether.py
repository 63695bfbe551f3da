"""Becomes a program that the kernel ends when its parent dies: `python -I -S tether.py PARENT SIGNAL PROGRAM [ARG …]`.

The kernel sends SIGNAL when the *thread* that started this process ends (PR_SET_PDEATHSIG, prctl(2)); the setting
outlives execve(2). A program of its own, since code between fork and exec is unsafe in a process with threads.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
CANNOT_EXECUTE = 127


def main() -> int:
    """Does not return unless the program cannot be executed, or the parent is gone already."""
    parent, number = int(sys.argv[1]), int(sys.argv[2])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        return CANNOT_EXECUTE
    # Python ignores these, and what is ignored stays so in the program.
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execv(sys.argv[3], sys.argv[3:])  # noqa: S606  no shell is wanted
    except OSError as error:
        print(f"{sys.argv[3]}: {error.strerror}", file=sys.stderr)  # noqa: T201
    return CANNOT_EXECUTE


if __name__ == "__main__":
    sys.exit(main())
