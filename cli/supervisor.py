"""Runs the parts of a stack as child processes: starts them, notices their deaths, and ends them."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from kiln.errors import KilnError

TETHER = Path(__file__).with_name("tether.py")
POLL_SECONDS = 0.05
WATCH_SECONDS = 0.1
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 10.0
# A part that ran this long had started well: its next death is a new one.
SOUND_SECONDS = 30.0
LOG_LIMIT_BYTES = 5_000_000
TAIL_BYTES = 4096
PRIVATE_UMASK = 0o077

Say = Callable[[str], None]


class PartFailedError(KilnError):
    """A part did not start; the message says how it ended, its last line and where its log is."""


class InterruptedStartError(KilnError):
    """The stack was told to stop while it was starting."""


@dataclass(frozen=True)
class Part:
    """One process of the stack. `ready` is asked, with the process's pid, until it says yes.

    `death_signal` comes to the part when the stack itself dies; `patience` is how long it may take to stop.
    """

    name: str
    title: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)
    log_file: Path
    ready: Callable[[int], bool]
    patience: timedelta
    death_signal: signal.Signals


@dataclass
class _Run:
    """A part's process, and when to start it again if it dies."""

    part: Part
    process: subprocess.Popen[bytes]
    started_at: float
    pause: float = FIRST_PAUSE_SECONDS
    restart_at: float | None = None
    told_ready: bool = True
    watched: bool = False


class Supervisor:
    """Parts by name. With `auto_restart`, one that dies is started again with a growing pause, and `say` told so."""

    def __init__(self, say: Say, *, auto_restart: bool) -> None:
        self._say = say
        self._runs: dict[str, _Run] = {}
        self._lock = threading.RLock()
        # The kernel ends a part with the thread that started it, so one thread starts them all and stays.
        self._starter = ThreadPoolExecutor(1, "kiln-starter")
        self._ended = threading.Event()
        # Plain values: signal handlers set them, and an Event's lock may be held by what they interrupt.
        self._hurried = False
        self._interrupted = False
        self._watcher = threading.Thread(target=self._watch, name="kiln-watcher", daemon=True)
        if auto_restart:
            self._watcher.start()

    def start(self, parts: Iterable[Part], limit: timedelta) -> None:
        """Starts parts side by side and returns when all are ready.

        Raises PartFailedError if one ends, is not ready within `limit` or runs already, InterruptedStartError after
        `interrupt`.
        """
        runs = [self._launch(part) for part in parts]
        deadline = time.monotonic() + limit.total_seconds()
        for run in runs:
            self._await_ready(run, deadline)
            run.watched = True

    def interrupt(self) -> None:
        """Makes a `start` that waits give up."""
        self._interrupted = True

    def hurry(self) -> None:
        """Ends the patience of every `stop`, also of one that waits."""
        self._hurried = True

    @property
    def hurried(self) -> bool:
        """Whether all patience is over."""
        return self._hurried

    def pids(self) -> dict[str, int]:
        """The parts that run, by name."""
        with self._lock:
            return {name: run.process.pid for name, run in self._runs.items() if run.process.poll() is None}

    def send(self, name: str, number: signal.Signals) -> None:
        """A signal to the part's process. Raises PartFailedError if it does not run."""
        pid = self.pids().get(name)
        if pid is None:
            raise PartFailedError(f"{name} does not run")
        os.kill(pid, number)

    def wait(self, name: str, limit: timedelta) -> int:
        """The exit code of a part, which may be ending. Raises PartFailedError if it does not end within `limit`."""
        with self._lock:
            process = self._runs[name].process
        try:
            return process.wait(limit.total_seconds())
        except subprocess.TimeoutExpired:
            raise PartFailedError(f"{name} still runs after {limit.total_seconds():g} s") from None

    def stop(self, names: Iterable[str]) -> None:
        """Ends parts side by side: SIGTERM, then SIGKILL to those whose patience is over."""
        with self._lock:
            runs = [self._runs[name] for name in names if name in self._runs]
            for run in runs:
                run.watched = False
        for run in runs:
            # A part that was stopped (SIGSTOP) hears of its end only if it goes on.
            for number in (signal.SIGTERM, signal.SIGCONT):
                _send(run.process, number)
        begun = time.monotonic()
        for run in runs:
            self._end(run.process, begun + run.part.patience.total_seconds())

    def close(self) -> None:
        """Kills whatever still runs, and ends the threads."""
        self._ended.set()
        if self._watcher.is_alive():
            self._watcher.join()
        with self._lock:
            processes = [run.process for run in self._runs.values()]
        for process in processes:
            _send(process, signal.SIGKILL)
            process.wait()
        self._starter.shutdown()

    def _launch(self, part: Part) -> _Run:
        if part.name in self.pids():
            raise PartFailedError(f"{part.name} runs already")
        process = self._starter.submit(_spawn, part).result()
        with self._lock:
            run = self._runs[part.name] = _Run(part, process, time.monotonic())
        return run

    def _await_ready(self, run: _Run, deadline: float) -> None:
        while not run.part.ready(run.process.pid):
            if self._interrupted:
                raise InterruptedStartError("interrupted")
            if run.process.poll() is not None:
                raise PartFailedError(_obituary(run))
            if time.monotonic() > deadline:
                raise PartFailedError(f"{run.part.title} does not get ready; its log is {run.part.log_file}")
            time.sleep(POLL_SECONDS)

    def _end(self, process: subprocess.Popen[bytes], deadline: float) -> None:
        while process.poll() is None:
            if time.monotonic() > deadline or self._hurried:
                _send(process, signal.SIGKILL)
                process.wait()
                return
            time.sleep(POLL_SECONDS)

    def _watch(self) -> None:
        while not self._ended.wait(WATCH_SECONDS):
            with self._lock:
                runs = list(self._runs.values())
            for run in runs:
                if run.watched:
                    self._look_after(run)

    def _look_after(self, run: _Run) -> None:
        now = time.monotonic()
        if run.restart_at is not None:
            if now >= run.restart_at:
                self._restart(run)
        elif run.process.poll() is not None:
            if now - run.started_at > SOUND_SECONDS:
                run.pause = FIRST_PAUSE_SECONDS
            run.restart_at = now + run.pause
            self._say(f"{_obituary(run)}; starting it again in {run.pause:g} s")
            run.pause = min(run.pause * 2, LONGEST_PAUSE_SECONDS)
        elif not run.told_ready and run.part.ready(run.process.pid):
            run.told_ready = True
            self._say(f"{run.part.title} is back")

    def _restart(self, run: _Run) -> None:
        with self._lock:
            if not run.watched or self._runs[run.part.name] is not run:
                return
            try:
                run.process = self._starter.submit(_spawn, run.part).result()
            except OSError as error:  # no memory, no process, no disk: that may pass
                run.restart_at = time.monotonic() + LONGEST_PAUSE_SECONDS
                self._say(f"{run.part.title} cannot be started ({error.strerror}); trying again")
                return
            run.started_at, run.restart_at, run.told_ready = time.monotonic(), None, False


def _spawn(part: Part) -> subprocess.Popen[bytes]:
    """The part in a session of its own, so that the terminal's Ctrl-C comes to the stack alone."""
    command = [sys.executable, "-I", "-S", str(TETHER), str(os.getpid()), str(part.death_signal.value), *part.argv]
    _rotate(part.log_file)
    with part.log_file.open("ab") as log:
        return subprocess.Popen(
            command,
            env=dict(part.env),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            umask=PRIVATE_UMASK,
        )


def _rotate(log_file: Path) -> None:
    if log_file.exists() and log_file.stat().st_size > LOG_LIMIT_BYTES:
        log_file.replace(log_file.with_suffix(".log.1"))


def _send(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(number)


def _obituary(run: _Run) -> str:
    """How a part ended, its last line, and where to read more."""
    code = run.process.returncode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    last = _last_line(run.part.log_file) if code > 0 else ""
    return f"{run.part.title} {how}{f' ({last})' if last else ''}; its log is {run.part.log_file}"


def _last_line(log_file: Path) -> str:
    with suppress(OSError), log_file.open("rb") as log:
        log.seek(max(0, log_file.stat().st_size - TAIL_BYTES))
        lines = log.read().decode(errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
    return ""
