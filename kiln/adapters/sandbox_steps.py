"""Short programs that make, look through and clear away sandboxes: by the runner's user, or by a pod's."""

import asyncio
import fcntl
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from kiln.adapters import run_as

T = TypeVar("T")

OUTPUT_BYTES = 256 * 1024
READ_BYTES = 64 * 1024
# What is left to read once the program is dead; where it had no user of its own, a stray may hold the pipe.
OUTPUT_SECONDS = 2.0
LOCK_PAUSE_SECONDS = 0.1
TIMED_OUT = 124


@dataclass(frozen=True)
class PodUser:
    """Whom a pod's agent ran as, and what its user may have. `uid` None: the runner's own user, without limits."""

    uid: int | None
    memory_mb: int
    processes: int

    @property
    def prefix(self) -> list[str]:
        """What precedes a program's arguments, so that it runs as this user."""
        if self.uid is None:
            return []
        limits = [str(self.uid), str(self.memory_mb), str(self.processes)]
        return [sys.executable, "-I", "-S", run_as.__file__, *limits]


@dataclass(frozen=True)
class Step:
    """A program, its whole environment, and where its output goes: `stdout` is a descriptor, None means to `Done`."""

    argv: Sequence[str] = field(repr=False)
    environment: Mapping[str, str] = field(repr=False)
    cwd: Path
    seconds: float
    user: PodUser | None = None
    stdin: bytes = b""
    stdout: int | None = None
    most_bytes: int = OUTPUT_BYTES


@dataclass(frozen=True)
class Done:
    """How a program ended, and the beginning of what it printed (of its standard error alone, if Step had a `stdout`)."""

    code: int
    output: str

    @property
    def lines(self) -> list[str]:
        return self.output.splitlines()


async def run(step: Step) -> Done:
    """Returns at the program's end, or once its time is over; what else it has started is dead then, too."""
    user = step.user or PodUser(None, 0, 0)
    # Pipes of asyncio's own would have it wait for all who hold them, not for the program.
    output, into_output = os.pipe()
    with tempfile.TemporaryFile() as stdin:
        stdin.write(step.stdin)
        stdin.seek(0)
        try:
            process = await asyncio.create_subprocess_exec(
                *user.prefix,
                *step.argv,
                env=dict(step.environment),
                cwd=step.cwd,
                stdin=stdin,
                stdout=into_output if step.stdout is None else step.stdout,
                stderr=into_output,
                start_new_session=True,
            )
        except BaseException:
            os.close(output)
            raise
        finally:
            os.close(into_output)
    kept = bytearray()
    reading = asyncio.create_task(_keep(output, kept, step.most_bytes))
    try:
        async with asyncio.timeout(step.seconds):
            code = await process.wait()
    except TimeoutError:
        code = TIMED_OUT
    finally:
        await asyncio.shield(_end(process, user))
        await asyncio.wait([reading], timeout=OUTPUT_SECONDS)
        reading.cancel()
    return Done(code, kept.decode(errors="replace"))


async def whole(work: Callable[..., T], *arguments: object) -> T:
    """Runs what blocks in a thread, to its end even if this is cancelled meanwhile: so that nothing is made behind the
    caller's back."""
    task = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


async def end_all(user: PodUser) -> None:
    """Kills each process of a pod's own user."""
    if user.uid is not None and await asyncio.to_thread(_has_processes, user.uid):
        killer = await asyncio.create_subprocess_exec(*user.prefix, env={}, cwd="/")
        await killer.wait()


def _has_processes(uid: int) -> bool:
    """Twice the same look: what forks and dies all the time may be missed once."""
    return any(_is_of(entry.name, uid) for _ in range(2) for entry in os.scandir("/proc") if entry.name.isdigit())


def _is_of(pid: str, uid: int) -> bool:
    """By its status: the owner of its files in /proc is what the process chose (PR_SET_DUMPABLE)."""
    with suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
        return str(uid) in status.partition("\nUid:")[2].partition("\n")[0].split()
    return False


async def _end(process: asyncio.subprocess.Process, user: PodUser) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await end_all(user)
    await process.wait()


@asynccontextmanager
async def file_lock(path: Path) -> AsyncIterator[None]:
    """Of all processes of this host, one is within at a time."""
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(LOCK_PAUSE_SECONDS)
        yield


async def _keep(descriptor: int, kept: bytearray, most_bytes: int) -> None:
    """Keeps the beginning of what a program prints; the rest is read and forgotten, so that it can go on."""
    stream = asyncio.StreamReader()
    pipe = os.fdopen(descriptor, "rb", 0)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), pipe)
    try:
        while data := await stream.read(READ_BYTES):
            kept += data[: most_bytes - len(kept)]
    finally:
        transport.close()
