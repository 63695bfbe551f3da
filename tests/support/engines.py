"""A private Docker engine for tests: one builder slot, started as the stack starts it, and builds on it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cli.engine_cgroup import BUILDS
from cli.engine_slot import Slot
from cli.engines import plan_containers, search_path
from cli.parts import engine_answers
from kiln.settings import PROJECT_ROOT, Settings
from support.processes import eventually

BUSYBOX = Path("/bin/busybox")
MEMORY_BYTES = 128 * 1024**2
PROCESSES = 100


def require_private_engine(home: Path) -> None:
    """Skips the test, with the reason, where no private engine can be had."""
    reason = plan_containers(Settings(home=home, containers=True, registry="127.0.0.1:1")).off
    if not reason and not BUSYBOX.exists():
        reason = "busybox-static is not installed"
    if reason:
        pytest.skip(reason)


class EngineProcess:
    """`cli.engine_main` on a home, ready to build. Its limits are small."""

    def __init__(self, home: Path) -> None:
        self.slot = Slot(home, 1)
        self.log = home / "engine.log"
        limits = (f"--memory-bytes={MEMORY_BYTES}", "--cpus=2", f"--processes={PROCESSES}", "--keep-bytes=1000000000")
        command = [sys.executable, "-P", "-m", "cli.engine_main", f"--home={home}", "--slot=1", *limits]
        env = {"PATH": search_path(), "PYTHONPATH": str(PROJECT_ROOT), "WORKERS_SECRET": "not-for-builds"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        if not eventually(lambda: self.answers or self.process.poll() is not None, 30) or not self.answers:
            self.end(signal.SIGKILL)
            raise AssertionError(self.log.read_text(errors="replace"))

    @property
    def answers(self) -> bool:
        return engine_answers(self.slot.host)

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(15)

    def docker(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["docker", "--host", self.slot.host, *arguments], capture_output=True, text=True, check=False, timeout=60
        )

    def build(self, folder: Path, *lines: str, options: tuple[str, ...] = (), seconds: float = 60) -> str | None:
        """What a build of busybox and these lines printed; None if it was killed after so many seconds."""
        with self.started(folder, *lines, options=options) as build:
            try:
                printed, _ = build.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                return None
            return printed

    @contextmanager
    def started(self, folder: Path, *lines: str, options: tuple[str, ...] = ()) -> Iterator["subprocess.Popen[str]"]:
        """A build that runs, and is killed after the block. Its shell is busybox."""
        folder.mkdir(exist_ok=True)
        (folder / "busybox").write_bytes(BUSYBOX.read_bytes())
        (folder / "busybox").chmod(0o755)
        dockerfile = ["FROM scratch", "COPY busybox /bin/busybox", "COPY busybox /bin/sh", *lines]
        (folder / "Dockerfile").write_text("\n".join(dockerfile))
        command = ["docker", "--host", self.slot.host, "buildx", "build", "--progress=plain", *options, str(folder)]
        build = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        with build:
            try:
                yield build
            finally:
                build.kill()

    def builds_cgroup(self, file: str) -> int:
        """A number of the cgroup of processes that the builds run in (v1 or v2)."""
        for root in ("/sys/fs/cgroup/pids", "/sys/fs/cgroup"):
            path = Path(root, self.slot.cgroup, BUILDS, file)
            if path.exists():
                return int(path.read_text())
        raise AssertionError(f"{self.slot.cgroup} has no {file}")

    def traces(self) -> dict[str, list[str]]:
        """What this host has of the slot outside of its data: by kind, nothing where there is nothing."""
        name = self.slot.name
        commands = {
            "processes": "ps -eo pid,args",
            "links": "ip -oneline link",
            "rules": "for table in raw filter nat; do iptables -t $table -S; done",
            "mounts": "cat /proc/mounts",
        }
        found = {kind: _lines_with(name, command) for kind, command in commands.items()}
        found["cgroups"] = [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/{self.slot.cgroup}")]
        found["files"] = [str(path) for path in [self.slot.run_folder] if path.exists()]
        return {kind: lines for kind, lines in found.items() if lines}


def _lines_with(text: str, command: str) -> list[str]:
    return [line for line in subprocess.getoutput(command).splitlines() if text in line]


@contextmanager
def running_engine(home: Path) -> Iterator[EngineProcess]:
    """An engine for the block, and nothing of it after. Skips the test where none can be had."""
    home.mkdir(exist_ok=True)
    require_private_engine(home)
    engine = EngineProcess(home)
    try:
        yield engine
    finally:
        with suppress(ProcessLookupError):
            os.kill(engine.process.pid, signal.SIGTERM)
        engine.process.wait(15)
