"""The guard by itself, as its worker sees it: one process, one socket, lines of JSON."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kiln.adapters import guard
from support.processes import MARK, children_of, eventually, marked, state_of

KILLED = {"code": None, "signal": signal.SIGKILL}


class Worker:
    """The other end of a guard's socket."""

    def __init__(self, cwd: Path, mark: str) -> None:
        self._env = {"PATH": "/usr/bin:/bin", MARK: mark}
        self._cwd = cwd
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(20)
        self._answers = self.socket.makefile("rb")
        with theirs:
            self.guard = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={},
                start_new_session=True,
            )

    def order(self, *argv: str, lease: float | None = None, **env: str) -> bytes:
        return message(argv=argv, env=self._env | env, cwd=str(self._cwd), lease=lease)

    def start(self, *argv: str, lease: float | None = None) -> int:
        """The tool's pid."""
        self.socket.sendall(self.order(*argv, lease=lease))
        return int(self.answer()["pid"])

    def say(self, **words: object) -> None:
        self.socket.sendall(message(**words))

    def answer(self) -> dict[str, Any]:
        return dict(json.loads(self._answers.readline()))

    def hang_up(self) -> None:
        self._answers.close()
        self.socket.close()

    def end(self) -> None:
        self.hang_up()
        self.guard.wait(20)


def message(**words: object) -> bytes:
    return json.dumps(words).encode() + b"\n"


@pytest.fixture
def worker(tmp_path: Path, mark: str) -> Iterator[Worker]:
    worker = Worker(tmp_path, mark)
    yield worker
    worker.end()


def test_exit(worker: Worker, tmp_path: Path):
    """A guard tells its tool's pid and its exit code, and ends."""
    pid = worker.start("sh", "-c", "echo $$ >pid; exit 3")
    assert worker.answer() == {"code": 3, "signal": None, "reason": "exited"}
    assert worker.guard.wait(20) == 0
    assert int((tmp_path / "pid").read_text()) == pid


def test_order_in_pieces(worker: Worker, tmp_path: Path):
    """A large environment arrives whole, however the socket divides it."""
    value = "x" * 100_000
    data = worker.order("sh", "-c", 'printf %s "$LARGE" >value', LARGE=value)
    for at in range(0, len(data), 30_000):
        worker.socket.sendall(data[at : at + 30_000])
    worker.answer()
    assert worker.answer()["code"] == 0
    assert (tmp_path / "value").read_text() == value


def test_messages_behind_the_order(worker: Worker):
    """What arrives together with the order is obeyed after it."""
    worker.socket.sendall(worker.order("sleep", "600") + message(do="kill"))
    assert "pid" in worker.answer()
    assert worker.answer() == KILLED | {"reason": "killed"}


def test_no_order(worker: Worker):
    """A guard whose worker dies before it says what to run ends by itself."""
    worker.hang_up()
    assert worker.guard.wait(20) == 0


def test_half_an_order(worker: Worker, mark: str):
    """A guard whose worker dies in the middle of its order runs nothing."""
    worker.socket.sendall(worker.order("sleep", "600")[:-5])
    worker.hang_up()
    assert worker.guard.wait(20) == 0
    assert marked(mark) == set()


def test_order_and_death(worker: Worker, mark: str):
    """A guard whose worker dies right after its order leaves nothing running."""
    worker.socket.sendall(worker.order("sh", "-c", "setsid sleep 600 & sleep 600"))
    worker.hang_up()
    assert worker.guard.wait(20) == 0
    assert marked(mark) == set()


def test_end_of_file(worker: Worker, mark: str):
    """A guard whose worker is gone kills the tool's tree and ends."""
    worker.start("sh", "-c", "(setsid sleep 600 &); sleep 600")
    assert eventually(lambda: len(marked(mark)) == 3)
    worker.hang_up()
    assert worker.guard.wait(20) == 0
    assert marked(mark) == set()


def test_end_of_file_with_unread_answers(worker: Worker, mark: str):
    """A worker that dies before it has read the guard's answers is gone as well."""
    worker.socket.sendall(worker.order("sleep", "600"))
    assert eventually(lambda: marked(mark))
    worker.hang_up()
    assert worker.guard.wait(20) == 0
    assert marked(mark) == set()


def test_end_of_file_while_the_tool_is_stopped(worker: Worker, mark: str):
    """A tool that is stopped ends like any other."""
    os.kill(worker.start("sleep", "600"), signal.SIGSTOP)
    worker.hang_up()
    assert worker.guard.wait(20) == 0
    assert marked(mark) == set()


@pytest.mark.parametrize("number", guard.TERMINAL_SIGNALS)
def test_signals(worker: Worker, number: signal.Signals):
    """The signals of a terminal or of an init system end neither the guard nor its tool."""
    worker.start("sleep", "600")
    worker.guard.send_signal(number)
    worker.say(do="renew", seconds=0.05)
    assert worker.answer()["reason"] == "lease_ended"


def test_session(worker: Worker):
    """Guard and tool have a session each, apart from the worker's."""
    tool = worker.start("sleep", "600")
    assert len({os.getsid(0), os.getsid(worker.guard.pid), os.getsid(tool)}) == 3
    assert os.getpgid(tool) == tool


def test_output(worker: Worker):
    """The guard lets go of the output that its tool has, which would not end with the tool otherwise."""
    worker.start("sleep", "600")
    assert {str(Path(f"/proc/{worker.guard.pid}/fd/{number}").readlink()) for number in (1, 2)} == {"/dev/null"}


def test_no_lease(worker: Worker):
    """Without a lease a tool needs no renewals."""
    worker.start("sh", "-c", "sleep 0.5; exit 4")
    assert worker.answer()["code"] == 4


def test_lease(worker: Worker):
    """A lease that is not renewed ends the tool."""
    worker.start("sleep", "600", lease=0.1)
    assert worker.answer() == KILLED | {"reason": "lease_ended"}


def test_late_renewal(worker: Worker):
    """A renewal that comes after the lease's end, when the guard could not look, does not bring it back."""
    worker.start("sleep", "600", lease=0.2)
    worker.guard.send_signal(signal.SIGSTOP)
    assert eventually(lambda: state_of(worker.guard.pid) == "T")
    assert not eventually(lambda: False, seconds=0.3)
    worker.say(do="renew", seconds=600)
    worker.guard.send_signal(signal.SIGCONT)
    assert worker.answer()["reason"] == "lease_ended"


def test_interrupt(worker: Worker):
    """A tool that an interrupt ends says so."""
    worker.start("sleep", "600")
    worker.say(do="interrupt")
    assert worker.answer() == {"code": None, "signal": signal.SIGINT, "reason": "interrupted"}


def test_interrupt_then_kill(worker: Worker, tmp_path: Path):
    """A tool that ignores an interrupt can still be killed."""
    worker.start("sh", "-c", "trap '' INT; : >ready; sleep 600")
    assert eventually((tmp_path / "ready").exists)
    worker.say(do="interrupt")
    worker.say(do="kill")
    assert worker.answer() == KILLED | {"reason": "killed"}


@pytest.mark.parametrize(
    ("change", "step"),
    [
        pytest.param({"argv": ["no-such-tool"]}, "program", id="no-such-program"),
        pytest.param({"argv": []}, "program", id="no-program"),
        pytest.param({"cwd": "/no/such/place"}, "cwd", id="no-such-directory"),
        pytest.param({"env": {"BAD": "a\0b"}}, "program", id="impossible-environment"),
        pytest.param({"argv": ["true", "x" * 3_000_000]}, "program", id="too-long"),
    ],
)
def test_failure(worker: Worker, change: dict[str, object], step: str):
    """A tool that cannot be started is told with the step that failed; the guard ends, and says nothing more."""
    order = json.loads(worker.order("true")) | change
    worker.say(**order)
    failure = worker.answer()["failed"]
    assert (failure["step"], bool(failure["problem"])) == (step, True)
    assert worker.guard.wait(20) == 0
    assert worker.socket.recv(1) == b""


def test_orphans_are_reaped(worker: Worker, mark: str):
    """Orphans that end while the tool runs do not stay behind as zombies."""
    tool = worker.start("sh", "-c", "for n in 1 2 3 4 5; do (true &); done; exec sleep 600")
    assert eventually(lambda: marked(mark) == {tool} and children_of(worker.guard.pid) == {tool})


def test_guard_dies(worker: Worker, mark: str):
    """The tool's first process dies with its guard."""
    worker.start("sleep", "600")
    worker.guard.kill()
    assert eventually(lambda: not marked(mark))


def test_answer_comes_last(worker: Worker, mark: str):
    """The last answer comes when no descendant is left."""
    worker.start("sh", "-c", "for n in 1 2 3 4 5 6 7 8; do (setsid sleep 600 &); done; exit 0")
    assert worker.answer()["reason"] == "exited"
    assert marked(mark) == set()
