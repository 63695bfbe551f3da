"""The Docker engines of this worker: which build gets which, and what is dropped from them afterwards."""

import asyncio
import fcntl
import hashlib
import logging
import os
import zlib
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path

from kiln.ports import Engine

FORGET_TIMEOUT = timedelta(seconds=30)
LOCK_PAUSE = timedelta(milliseconds=100)
MAX_AFFINITIES = 4096
# An engine elsewhere is reached over TLS or SSH with these; no other variable of the worker's is for the client.
KEPT_VARIABLES = ("PATH", "HOME", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH", "SSH_AUTH_SOCK")

log = logging.getLogger("kiln.engines")


class Engines:
    """Lends `slots` engines, one a build: each of `hosts` (DOCKER_HOST) is one, or several if there are fewer of them.

    For one event loop. Implements `EnginePool`. Where each slot has an engine, files in `locks` keep the other workers
    of this host from building in the same one.
    """

    def __init__(self, hosts: Sequence[str], slots: int, *, locks: Path | None = None, program: str = "docker") -> None:
        self._locks = locks if len(hosts) >= slots else None
        self._count = count = max(slots, len(hosts)) if hosts else 0
        # Free engines, the longest unused one first.
        self._free = [Engine(f"engine-{number + 1}", hosts[number % len(hosts)]) for number in range(count)]
        self._waiting: deque[asyncio.Future[Engine]] = deque()
        self._last: OrderedDict[str, str] = OrderedDict()
        self._program = program

    @asynccontextmanager
    async def lease(self, affinity: str) -> AsyncIterator[Engine]:
        """An engine for one build, the one that built `affinity` last if it is free; who waits first is served first."""
        engine, lock = await self._take_alone(affinity)
        self._remember(affinity, engine)
        try:
            yield engine
        finally:
            if lock is not None:
                os.close(lock)
            self._give_back(engine)

    async def _take_alone(self, affinity: str) -> tuple[Engine, int | None]:
        """An engine that no other process builds in, and the open file that says so until it is closed."""
        while True:
            engine = await self._take(affinity)
            if self._locks is None:
                return engine, None
            lock = _try_lock(self._locks, engine.host)
            if lock is not None:
                return engine, lock
            # Another worker of this host has it; at the end of the free ones it lets the others be tried.
            self._give_back(engine)
            affinity = ""
            await asyncio.sleep(LOCK_PAUSE.total_seconds())

    async def forget(self, engine: Engine, references: Collection[str]) -> None:
        """Drops image names from an engine; its layer cache stays. What cannot be dropped is logged."""
        if not references:
            return
        command = [self._program, "--host", engine.host, "image", "rm", "--force", *references]
        problem = await _problem_of(command)
        if problem:
            log.warning("%s keeps names of images: %s", engine.name, problem)

    async def _take(self, affinity: str) -> Engine:
        if self._free and not self._waiting:
            found = self._preferred(affinity)
            self._free.remove(found)
            return found
        place: asyncio.Future[Engine] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._give_back(place.result())
            raise

    def _preferred(self, affinity: str) -> Engine:
        """The free engine that built it last; one that its name always leads to, also after a restart; or any."""
        home = zlib.crc32(affinity.encode()) % self._count
        for name in (self._last.get(affinity), f"engine-{home + 1}" if affinity else None):
            found = next((engine for engine in self._free if engine.name == name), None)
            if found is not None:
                return found
        return self._free[0]

    def _give_back(self, engine: Engine) -> None:
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(engine)
                return
        self._free.append(engine)

    def _remember(self, affinity: str, engine: Engine) -> None:
        self._last[affinity] = engine.name
        self._last.move_to_end(affinity)
        if len(self._last) > MAX_AFFINITIES:
            self._last.popitem(last=False)


def _try_lock(folder: Path, host: str) -> int | None:
    """The lock on an engine, which goes with its process; None while another process holds it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    name = hashlib.sha256(host.encode()).hexdigest()[:16]
    lock = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


async def _problem_of(command: Sequence[str]) -> str:
    """Runs a command to its end; what it said last if it failed, else nothing."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            env=_environment(os.environ),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    try:
        _, said = await asyncio.wait_for(process.communicate(), FORGET_TIMEOUT.total_seconds())
    except TimeoutError:
        return f"{command[0]} did not end within {FORGET_TIMEOUT.seconds} s"
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    lines = said.decode(errors="replace").strip().splitlines()
    return (lines or ["it said nothing"])[-1] if process.returncode else ""


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: environ[name] for name in KEPT_VARIABLES if name in environ}
