"""The embedded stack for tests: in this process by `running_stack`, or as the command `kiln up` by `KilnUp`."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from cli.local_stack import LocalStack
from cli.parts import ALL_ROLES
from kiln.settings import PROJECT_ROOT, Settings
from support.ports import free_ports
from support.processes import MARK, eventually, marked

START_SECONDS = 60.0
STOP_SECONDS = 30.0
LOG_TAIL_CHARACTERS = 4000
PORTS = ("KILN_API_PORT", "KILN_TEMPORAL_PORT", "KILN_TEMPORAL_UI_PORT", "KILN_EC2_PORT")
REGISTRY_PORT = "KILN_REGISTRY_PORT"
RUNNER_DIR = "KILN_RUNNER_DIR"
# Whatever takes a test's time in production waits less here.
QUICK = {"KILN_HOUSE_SECONDS": "1", "KILN_HEARTBEAT_TIMEOUT_SECONDS": "3", "KILN_CANCEL_GRACE_SECONDS": "10"}
FOREIGN = ("KILN_", "TEMPORAL_", "AWS_")


@contextmanager
def running_stack(
    home: Path,
    *,
    workers: Sequence[Sequence[str]] = (ALL_ROLES,),
    auto_restart: bool = False,
    extra_env: Mapping[str, Mapping[str, str]] | None = None,
    containers: bool = False,
    **env: str,
) -> Iterator[LocalStack]:
    """A stack on free ports; `env` are settings by their names (`KILN_REGIONS="us-east-1,eu-west-1"`).

    With `containers`, it has engines and a registry where they can be had. What its parts printed is printed if the block fails.
    """
    values = {**QUICK, **_places(containers=containers), "KILN_HOME": str(home), **env}
    settings = Settings(**{name.removeprefix("KILN_").lower(): value for name, value in values.items()})  # type: ignore[arg-type]
    stack = LocalStack(settings, workers=workers, auto_restart=auto_restart, extra_env=extra_env, embedded=True)
    try:
        with stack:
            yield stack
    except BaseException:
        print_logs(home)
        raise


def _places(*, containers: bool) -> dict[str, str]:
    """Free ports, and whether containers are built."""
    names = (*PORTS, REGISTRY_PORT)
    ports = dict(zip(names, map(str, free_ports(len(names))), strict=True))
    return {**ports, "KILN_CONTAINERS": "true" if containers else "false"}


def print_logs(home: Path) -> None:
    """The end of every part's log, for the report of a failed test."""
    for log in sorted((home / "logs").glob("*.log")):
        print(f"--- {log.name}\n{log.read_text(errors='replace')[-LOG_TAIL_CHARACTERS:]}")  # noqa: T201  the report


def kiln_environment(home: Path, **env: str) -> dict[str, str]:
    """The environment of a `kiln` command: this process's, less all settings, with a home and `env`.

    Containers are off unless `env` says otherwise.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    ours = {"PYTHONPATH": str(PROJECT_ROOT), "KILN_HOME": str(home), "COLUMNS": "200"}
    return {**clean, **ours, "KILN_CONTAINERS": "false", **env}


def run_kiln(home: Path, *arguments: str, given: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `kiln` to its end; `given` is its standard input."""
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments],
        env=kiln_environment(home, **env),
        input=given,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


class KilnUp:
    """A `kiln up` on free ports, as a context manager that ends it. `lines` is what it has printed so far.

    With `containers`, it has engines and a registry where they can be had.
    """

    def __init__(self, home: Path, *, containers: bool = False, **env: str) -> None:
        self.home = home
        self.mark = uuid.uuid4().hex
        # Its parent is closed to others than this user: a test whose agents are other users names a place of its own.
        self.runner_dir = env.get(RUNNER_DIR, str(home / "runner"))
        places = _places(containers=containers) | {RUNNER_DIR: self.runner_dir}
        self.ports = {name: int(port) for name, port in places.items() if name.endswith("_PORT")}
        self._env = kiln_environment(home, **{**QUICK, **places, MARK: self.mark, **env})
        self.lines: list[str] = []

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['KILN_API_PORT']}"

    @property
    def api_key(self) -> str:
        return (self.home / "api-key").read_text().strip()

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "up"],
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        try:
            self.line("^Ready", START_SECONDS)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(signal.SIGTERM)
        if error is not None:
            print("\n".join(self.lines))  # noqa: T201  the report
            print_logs(self.home)

    def end(self, number: signal.Signals) -> tuple[int, float]:
        """Sends a signal and waits: the exit code, and the seconds that it took. Kills it after half a minute."""
        begun = time.monotonic()
        self._process.send_signal(number)
        try:
            self._process.wait(STOP_SECONDS)
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join()
        return self._process.returncode, time.monotonic() - begun

    def line(self, pattern: str, seconds: float = 30) -> str:
        """The first line that matches, which may be still to come. Fails after so many seconds."""
        found: list[str] = []

        def look() -> bool:
            found[:] = [line for line in self.lines if re.search(pattern, line)]
            return bool(found) or self._process.poll() is not None

        eventually(look, seconds)
        assert found, f"no line matches {pattern}:\n" + "\n".join(self.lines)
        return found[0]

    def processes(self) -> set[int]:
        """What it started and still runs, itself included. The runner inherits nothing, but has its own folder."""
        return marked(self.mark) | marked(self.runner_dir, RUNNER_DIR)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip("\n"))
        self._process.stdout.close()
