"""How parts are started, watched and ended, on small processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from cli.supervisor import TETHER, InterruptedStartError, Part, PartFailedError, Supervisor
from support.processes import eventually, state_of

LIMIT = timedelta(seconds=20)
SLEEP = "import time; print('up', flush=True); time.sleep(600)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def supervisor(said: list[str]) -> Iterator[Supervisor]:
    supervisor = Supervisor(said.append, auto_restart=True)
    yield supervisor
    supervisor.hurry()
    supervisor.close()


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Part]:
    """A part that runs a piece of Python, and is ready once it has printed something."""

    def part(code: str, name: str = "part", patience: float = 5) -> Part:
        log_file = tmp_path / f"{name}.log"
        return Part(
            name=name,
            title=name,
            argv=(sys.executable, "-c", code),
            env=dict(os.environ),
            log_file=log_file,
            ready=lambda _pid: "up" in log_file.read_text(),
            patience=timedelta(seconds=patience),
            death_signal=signal.SIGKILL,
        )

    return part


def test_a_part_that_dies_is_started_again(supervisor: Supervisor, make: Callable[..., Part], said: list[str]) -> None:
    """What happened to it, when it starts again and that it is back are said."""
    supervisor.start([make(SLEEP)], LIMIT)
    first = supervisor.pids()["part"]
    supervisor.send("part", signal.SIGKILL)
    assert eventually(lambda: supervisor.pids().get("part", first) != first)
    assert eventually(lambda: len(said) == 2)
    assert said[0].startswith("part was killed by SIGKILL; its log is ")
    assert said[0].endswith("; starting it again in 0.5 s")
    assert said[1] == "part is back"


def test_pauses_grow_while_a_part_keeps_dying(
    supervisor: Supervisor, make: Callable[..., Part], said: list[str], tmp_path: Path
) -> None:
    """Half a second, one second: a part that cannot live does not keep the host busy."""
    flag = tmp_path / "flag"
    code = (
        f"import os, sys, time; print('up', flush=True)\nif os.path.exists({str(flag)!r}): sys.exit('no more')\n{SLEEP}"
    )
    supervisor.start([make(code)], LIMIT)
    flag.touch()
    supervisor.send("part", signal.SIGKILL)
    assert eventually(lambda: any("again in 1 s" in line for line in said))
    assert any("part ended with exit code 1 (no more)" in line for line in said)


def test_a_part_that_does_not_start_is_reported_with_its_last_line(
    supervisor: Supervisor, make: Callable[..., Part]
) -> None:
    """The exit code, its own words, and where its log is."""
    with pytest.raises(PartFailedError, match=r"part ended with exit code 1 \(no luck\); its log is /.*part\.log"):
        supervisor.start([make("raise SystemExit('no luck')")], LIMIT)


def test_a_start_can_be_interrupted(supervisor: Supervisor, make: Callable[..., Part]) -> None:
    """As Ctrl-C does while a part gets ready."""
    supervisor.interrupt()
    with pytest.raises(InterruptedStartError):
        supervisor.start([make("import time; time.sleep(600)")], LIMIT)


def test_a_part_that_ignores_its_end_is_killed_when_patience_is_over(
    supervisor: Supervisor, make: Callable[..., Part]
) -> None:
    """SIGTERM first; SIGKILL after the part's patience."""
    supervisor.start([make(DEAF, patience=0.5)], LIMIT)
    begun = time.monotonic()
    supervisor.stop(["part"])
    assert 0.5 <= time.monotonic() - begun < 3
    assert supervisor.wait("part", LIMIT) == -signal.SIGKILL


def test_a_stopped_part_ends_all_the_same(supervisor: Supervisor, make: Callable[..., Part]) -> None:
    """A process under SIGSTOP hears SIGTERM because it is continued."""
    supervisor.start([make(SLEEP)], LIMIT)
    supervisor.send("part", signal.SIGSTOP)
    supervisor.stop(["part"])
    assert supervisor.wait("part", LIMIT) == -signal.SIGTERM


def test_a_stopped_part_is_not_started_again(
    supervisor: Supervisor, make: Callable[..., Part], said: list[str]
) -> None:
    """Who was told to end stays ended, until it is started again by hand."""
    part = make(SLEEP)
    supervisor.start([part], LIMIT)
    supervisor.stop(["part"])
    assert not eventually(lambda: said or supervisor.pids(), seconds=1)
    supervisor.start([part], LIMIT)
    assert supervisor.pids().keys() == {"part"}


def test_a_tethered_process_dies_with_its_parent(tmp_path: Path) -> None:
    """The kernel does it: the parent has no time to say anything when it is killed."""
    pid_file = tmp_path / "pid"
    child = f"import os, pathlib, time; pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid())); time.sleep(600)"
    code = (
        "import os, subprocess, sys, time\n"
        f"tether = [sys.executable, '-I', '-S', {str(TETHER)!r}, str(os.getpid()), '9']\n"
        f"subprocess.Popen([*tether, sys.executable, '-c', {child!r}])\n"
        "time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert eventually(lambda: pid_file.exists() and pid_file.read_text())
    finally:
        parent.kill()
        parent.wait()
    assert eventually(lambda: state_of(int(pid_file.read_text())) in ("", "Z"))


def test_hurry_ends_the_patience_of_a_stop_that_waits(supervisor: Supervisor, make: Callable[..., Part]) -> None:
    """As a second Ctrl-C does."""
    supervisor.start([make(DEAF, patience=600)], LIMIT)
    hurry = threading.Timer(0.3, supervisor.hurry)
    hurry.start()
    supervisor.stop(["part"])
    hurry.join()
    assert supervisor.wait("part", LIMIT) == -signal.SIGKILL
