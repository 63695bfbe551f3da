"""Starts a pod's agent: on a terminal of its own, as its own user, with nothing but what it is given."""

import fcntl
import json
import os
import resource
import signal
import struct
import termios
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

from kiln.adapters.pod_shim_account import Account, Failure, account_of, drop_to, list_account, show_accounts
from kiln.adapters.pod_shim_cgroups import MEGABYTE, Cgroups
from kiln.adapters.pod_shim_tree import PR_SET_PDEATHSIG, prctl, restore_signals

ROWS_AND_COLUMNS = (50, 200)
UMASK = 0o022
CANNOT_EXECUTE = 127


@dataclass(frozen=True)
class Order:
    """What the worker wrote to the shim's standard input: `ShimOrder`, and how much the spool may hold."""

    shim: str
    argv: Sequence[str]
    cwd: str
    environment: Mapping[str, str] = field(repr=False)
    secrets: Sequence[str] = field(repr=False)
    user: str | None
    limit_seconds: float | None
    grace_seconds: float
    lease_seconds: float
    memory_mb: int | None
    processes: int | None
    prompted: int
    spool_bytes: int


class Terminal:
    """A pseudo-terminal. Its agent's side stays open here too, so that it outlives each of those who use it.

    It prints what it is given as it is, and does not repeat what is written to it, unless the agent wants it to.
    """

    def __init__(self) -> None:
        self.control, self.agents = os.openpty()
        mode = termios.tcgetattr(self.agents)
        mode[1] &= ~termios.OPOST
        mode[3] &= ~termios.ECHO
        termios.tcsetattr(self.agents, termios.TCSANOW, mode)
        fcntl.ioctl(self.agents, termios.TIOCSWINSZ, struct.pack("HHHH", *ROWS_AND_COLUMNS, 0, 0))
        os.set_blocking(self.control, False)

    def take_over(self) -> None:
        """Makes it the calling process's standard streams, and the terminal of its new session."""
        os.setsid()
        fcntl.ioctl(self.agents, termios.TIOCSCTTY, 0)
        for descriptor in range(3):
            os.dup2(self.agents, descriptor)

    def read(self, size_bytes: int) -> bytes:
        """What has been printed; nothing if there is no more at the moment."""
        with suppress(OSError):
            return os.read(self.control, size_bytes)
        return b""


@dataclass(frozen=True)
class Limits:
    """How a pod's limits are enforced: `cgroup`, or, where none can be had, `process` (each process alone)."""

    memory_mb: int | None
    processes: int | None
    by_cgroup: frozenset[str]

    def report(self) -> dict[str, str]:
        wanted = {"memory": self.memory_mb, "pids": self.processes}
        ways = {name: "cgroup" if name in self.by_cgroup else "process" for name in wanted}
        return {name: ways[name] for name, limit in wanted.items() if limit is not None}

    def remarks(self) -> list[str]:
        """What whoever reads the pod's log should know."""
        report = self.report()
        remarks = {
            "memory": f"[the limit of {self.memory_mb} MB of memory holds for each process alone: no control group]",
            "pids": f"[the limit of {self.processes} processes holds for the agent's user as a whole: no control group]",
        }
        return [remark for name, remark in remarks.items() if report.get(name) == "process"]

    def apply(self) -> None:
        """In the process that becomes the agent."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        report = self.report()
        if self.memory_mb is not None and report["memory"] == "process":
            _lower(resource.RLIMIT_DATA, self.memory_mb * MEGABYTE)
        if self.processes is not None and report["pids"] == "process":
            _lower(resource.RLIMIT_NPROC, self.processes)


def start_agent(order: Order, terminal: Terminal, limits: Limits, cgroups: Cgroups) -> int:
    """The agent's pid. Raises Failure."""
    account = account_of(order.user)
    if account:
        os.fchown(terminal.agents, account.uid, account.gid)
    lists_users = list_account(account, order.environment)
    problem_out, problem_in = os.pipe()
    shim = os.getpid()
    pid = os.fork()
    if not pid:
        _become_agent(order, terminal, _Place(account, lists_users, limits, cgroups, shim), problem_in)
    os.close(problem_in)
    with open(problem_out, "rb") as pipe:  # noqa: PTH123  a descriptor, not a path
        problem = pipe.read()
    if problem:
        raise Failure(**json.loads(problem))
    return pid


@dataclass(frozen=True)
class _Place:
    account: Account | None
    lists_users: bool
    limits: Limits
    cgroups: Cgroups
    shim: int


def _become_agent(order: Order, terminal: Terminal, place: _Place, problem_in: int) -> NoReturn:
    """In the forked child: the agent, or the reason why not."""
    step = "terminal"
    try:
        terminal.take_over()
        step = "limits"
        place.cgroups.enter()
        place.limits.apply()
        step = "user"
        if place.lists_users:
            show_accounts()
        drop_to(place.account)
        step = "shim"
        # Only now: a change of user forgets it.
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != place.shim:
            os._exit(CANNOT_EXECUTE)
        restore_signals()
        os.umask(UMASK)
        step = "cwd"
        os.chdir(order.cwd)
        step = "program"
        os.execvpe(order.argv[0], list(order.argv), dict(order.environment))  # noqa: S606
    except BaseException as error:  # noqa: BLE001  this is a copy of the shim: nothing may escape from it
        os.write(problem_in, json.dumps({"step": step, "problem": problem_of(error)}).encode())
    os._exit(CANNOT_EXECUTE)


def problem_of(error: BaseException) -> str:
    """An error in words that hold no value of the agent's: those of the system, or the error's kind."""
    return (isinstance(error, OSError) and error.strerror) or type(error).__name__


def _lower(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def end_of(status: int | None) -> dict[str, Any]:
    """A wait status as exit code and signal, one of them None."""
    code = os.waitstatus_to_exitcode(status) if status is not None else None
    by_signal = code is not None and code < 0
    return {"exit_code": None if by_signal else code, "signal": -code if code is not None and by_signal else None}
