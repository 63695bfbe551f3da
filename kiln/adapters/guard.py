"""Runs one tool, and ends it with all its descendants when it must.

A program of its own, which `process.py` starts as `python -I -S -X utf8 guard.py FD`. FD is one end of a socket pair;
the worker alone holds the other. One JSON object a line goes each way:

    worker   {"argv": […], "env": {…}, "cwd": "…", "lease": seconds | null, "stdin": "…" | null}    what to run, first
             {"do": "renew", "seconds": s} | {"do": "interrupt"} | {"do": "kill"}
    guard    {"pid": n} | {"failed": {"step": "…", "problem": "…"}}
             {"code": n | null, "signal": n | null, "reason": ExitReason}      last, once no descendant is left

The guard is the subreaper of all that the tool starts (prctl(2)), so that what leaves the tool's session or is orphaned
is still found below it. Standard library only, and little of it: it starts in some 20 ms.
"""

import ctypes
import json
import os
import select
import signal
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from enum import StrEnum
from typing import Any, NoReturn

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
# poll(2) does not count the time that the host sleeps, the lease does.
LONGEST_POLL_SECONDS = 1.0
FIRST_PAUSE_SECONDS = 0.001
LONGEST_PAUSE_SECONDS = 0.5
CANNOT_EXECUTE = 127


class ExitReason(StrEnum):
    """Why a tool ended: by itself, by itself after an interrupt, or killed (by order, or for want of a worker)."""

    EXITED = "exited"
    INTERRUPTED = "interrupted"
    KILLED = "killed"
    LEASE_ENDED = "lease_ended"
    WORKER_GONE = "worker_gone"


class Channel:
    """Lines of JSON over the worker's socket."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self._socket = socket.socket(fileno=fd)
        self._received = b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self) -> list[Any] | None:
        """The messages that have arrived, after waiting for some data; None if the worker is gone."""
        try:
            data = self._socket.recv(1 << 16)
        except OSError:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        return [json.loads(line) for line in lines] if data else None

    def send(self, message: dict[str, Any]) -> None:
        # Nobody is left to tell if this fails.
        with suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")


class Guard:
    """One tool from its start to the end of its last descendant."""

    def __init__(self, worker: Channel) -> None:
        self._worker = worker
        self._woken = _wake_on_child_exit()
        self._tool = 0
        self._status: int | None = None
        self._lease_end: float | None = None
        self._interrupted = False
        self._verdict: ExitReason | None = None

    def run(self) -> None:
        messages = self._first_messages()
        if not messages:
            return
        order, *rest = messages
        try:
            failure = self._start(order)
            self._worker.send({"failed": failure} if failure else {"pid": self._tool})
            if not failure:
                self._obey(rest)
                self._watch()
        finally:
            self._kill_tree()
        if not failure:
            self._worker.send(self._report())

    def _first_messages(self) -> list[Any] | None:
        """What to run, and what came with it; a large environment arrives in pieces."""
        messages: list[Any] | None = []
        while messages == []:
            messages = self._worker.receive()
        return messages

    def _start(self, order: dict[str, Any]) -> dict[str, str] | None:
        """Starts the tool; returns the step that failed and the problem, if one did."""
        self._renew(order["lease"])
        problem_out, problem_in = os.pipe()
        guard = os.getpid()
        self._tool = os.fork()
        if not self._tool:
            _become_tool(order, guard, problem_in)
        os.close(problem_in)
        _let_go_of_output()
        with open(problem_out, "rb") as pipe:  # noqa: PTH123  a descriptor, not a path
            problem = pipe.read()
        return dict(json.loads(problem)) if problem else None

    def _watch(self) -> None:
        """Returns once the tool has ended, or must be ended."""
        poll = select.poll()
        poll.register(self._worker, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        while not self._is_over():
            ready = {fd for fd, _ in poll.poll(self._patience() * 1000)}
            if self._woken in ready:
                _drain(self._woken)
            # A lease that is over stays over: a worker that was stopped may renew it the moment it goes on.
            if not self._is_over() and self._worker.fileno() in ready:
                self._obey(self._worker.receive())

    def _is_over(self) -> bool:
        self._reap()
        if self._status is not None:
            self._verdict = ExitReason.INTERRUPTED if self._interrupted else ExitReason.EXITED
        elif self._verdict is None and self._lease_end is not None and _now() >= self._lease_end:
            self._verdict = ExitReason.LEASE_ENDED
        return self._verdict is not None

    def _patience(self) -> float:
        if self._lease_end is None:
            return LONGEST_POLL_SECONDS
        return min(max(self._lease_end - _now(), 0) + 0.001, LONGEST_POLL_SECONDS)

    def _obey(self, messages: list[Any] | None) -> None:
        if messages is None:
            self._verdict = ExitReason.WORKER_GONE
            return
        for message in messages:
            match message["do"]:
                case "renew":
                    self._renew(message["seconds"])
                case "interrupt":
                    self._interrupt()
                case "kill":
                    self._verdict = ExitReason.KILLED

    def _renew(self, seconds: float | None) -> None:
        self._lease_end = None if seconds is None else _now() + seconds

    def _interrupt(self) -> None:
        """SIGINT to the tool's process group: Packer swallows one that comes to its pid alone."""
        self._reap()
        if self._status is None:
            self._interrupted = True
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._tool, signal.SIGINT)

    def _kill_tree(self) -> None:
        """Kills until no child is left: what loses its parent becomes the guard's own child and is found again."""
        pause = FIRST_PAUSE_SECONDS
        while self._reap():
            for pid in _descendants(os.getpid()):
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            if select.select([self._woken], [], [], pause)[0]:
                _drain(self._woken)
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)

    def _reap(self) -> bool:
        """Takes note of children that ended; returns whether any are left."""
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return True
                if pid == self._tool:
                    self._status = status
        return False

    def _report(self) -> dict[str, Any]:
        code = os.waitstatus_to_exitcode(self._status) if self._status is not None else None
        by_signal = code is not None and code < 0
        return {
            "code": None if by_signal else code,
            "signal": -code if code is not None and by_signal else None,
            "reason": self._verdict,
        }


def _become_tool(order: dict[str, Any], guard: int, problem_in: int) -> NoReturn:
    """In the forked child: the tool, in a session of its own, or the reason why not."""
    step = "guard"
    try:
        os.setsid()
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:
            os._exit(CANNOT_EXECUTE)
        _restore_signals()
        step = "cwd"
        os.chdir(order["cwd"])
        step = "stdin"
        _read_from(order.get("stdin"))
        step = "program"
        os.execvpe(order["argv"][0], order["argv"], order["env"])  # noqa: S606
    except BaseException as error:  # noqa: BLE001  this is a copy of the guard: nothing may escape from it
        problem = (isinstance(error, OSError) and error.strerror) or str(error)
        os.write(problem_in, json.dumps({"step": step, "problem": problem}).encode())
    os._exit(CANNOT_EXECUTE)


def _read_from(path: str | None) -> None:
    """Makes a file the standard input, in the place of the guard's, which is at its end."""
    if path is not None:
        file = os.open(path, os.O_RDONLY)
        os.dup2(file, 0)
        os.close(file)


def _restore_signals() -> None:
    """What is ignored here, or was by the worker, would stay ignored in the tool."""
    for number in signal.valid_signals():
        if signal.getsignal(number) == signal.SIG_IGN:
            with suppress(OSError):
                signal.signal(number, signal.SIG_DFL)


def _let_go_of_output() -> None:
    """The tool has the pipes now; they end with its last descendant, not with the guard."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.close(null)


def _wake_on_child_exit() -> int:
    """A descriptor that can be read whenever a child has ended."""
    woken, waker = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    return woken


def _drain(fd: int) -> None:
    with suppress(BlockingIOError):
        while os.read(fd, 1 << 12):
            pass


def _descendants(ancestor: int) -> Iterator[int]:
    children: dict[int, list[int]] = defaultdict(list)
    for entry in os.listdir("/proc"):  # noqa: PTH208  pathlib would double the time to start
        if entry.isdigit():
            children[_parent_of(entry)].append(int(entry))
    waiting = [ancestor]
    while waiting:
        found = children[waiting.pop()]
        yield from found
        waiting.extend(found)


def _parent_of(pid: str) -> int:
    """The parent's pid as /proc/PID/stat has it (proc(5)); 0 if the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:  # noqa: PTH123  as above
            return int(stat.read().rpartition(b")")[2].split()[1])
    except OSError:
        return 0


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl: {os.strerror(number)}")


def _now() -> float:
    """Seconds that no change of the wall clock moves, and that count while the host sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def main() -> None:
    for number in TERMINAL_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    worker = Channel(int(sys.argv[1]))
    try:
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        Guard(worker).run()
    except Exception as error:
        worker.send({"failed": {"step": "guard", "problem": repr(error)}})
        raise


if __name__ == "__main__":
    main()
