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
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from kiln.errors import UnavailableError
from kiln.naming import STAGING_OWNER
from kiln.ports import Engine, Traces

FORGET_TIMEOUT = timedelta(seconds=30)
LOCK_PAUSE = timedelta(milliseconds=100)
MAX_AFFINITIES = 4096
IN_USE = "in use:"
# Room for an owner, and for what a build leaves: references have 1024 characters at most.
MARK_BYTES = 8192
IMAGE_LABEL = "kiln-build"
# An engine elsewhere is reached over TLS or SSH with these; no other variable of the worker's is for the client.
KEPT_VARIABLES = ("PATH", "HOME", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH", "SSH_AUTH_SOCK")

log = logging.getLogger("kiln.engines")


class Engines:
    """Lends `slots` engines, one a build: each of `hosts` (DOCKER_HOST) is one, or several if there are fewer of them.

    For one event loop. Implements `EnginePool`. Where each slot has an engine, files in `locks` keep the other workers
    of this host from building in the same one, and say what the next build is to know of it.
    """

    def __init__(self, hosts: Sequence[str], slots: int, *, locks: Path | None = None, program: str = "docker") -> None:
        self._locks = locks if len(hosts) >= slots else None
        self._count = count = max(slots, len(hosts)) if hosts else 0
        # Free engines, the longest unused one first.
        self._free = [Engine(f"engine-{number + 1}", hosts[number % len(hosts)]) for number in range(count)]
        self._waiting: deque[asyncio.Future[Engine]] = deque()
        self._last: OrderedDict[str, str] = OrderedDict()
        self._leases: dict[str, _Lease] = {}
        self._program = program

    @asynccontextmanager
    async def lease(self, affinity: str) -> AsyncIterator[Engine]:
        """An engine for one build, the one that built `affinity` last if it is free; who waits first is served first."""
        engine, lock = await self._take_alone(affinity)
        self._remember(affinity, engine)
        try:
            if lock is None:
                yield engine
            else:
                async with self._entered(engine, _Lease(lock, affinity.partition("/")[0])):
                    yield engine
        finally:
            if lock is not None:
                os.close(lock)
            self._give_back(engine)

    def keep_private(self, engine: Engine) -> None:
        """Notes that the engine has what the lease's owner may read, and others may not."""
        lease = self._leases.get(engine.name)
        if lease is not None:
            _write_mark(lease.lock, replace(_read_mark(lease.lock), private_to=lease.owner))

    def expect(self, engine: Engine, traces: Traces) -> None:
        """Notes what a build is going to make in the engine, for whoever has it after this process's death."""
        lease = self._leases.get(engine.name)
        if lease is not None:
            _write_mark(lease.lock, replace(_read_mark(lease.lock), traces=traces))

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
        _, problem = await _run([self._program, "--host", engine.host, "image", "rm", "--force", *references])
        if problem:
            log.warning("%s keeps names of images: %s", engine.name, problem)

    async def clear(self, engine: Engine, traces: Traces) -> None:
        """Removes a build's container, and its images. What cannot be removed is logged, and tried again at the engine's
        next lease."""
        named, made = f"--filter=name=^/?{traces.container}$", f"--filter=label={IMAGE_LABEL}={traces.container}"
        try:
            containers = await self._ids(engine, "container", "ls", "--all", "--no-trunc", "--quiet", named)
            if containers:
                await self._docker(engine, "container", "rm", "--force", "--volumes", *containers)
            images = await self._ids(engine, "image", "ls", "--no-trunc", "--quiet", made)
            await self._docker(engine, "image", "rm", "--force", *traces.images, *images)
        except UnavailableError as error:
            log.warning("%s", error)
            return
        lease = self._leases.get(engine.name)
        if lease is not None:
            _write_mark(lease.lock, replace(_read_mark(lease.lock), traces=None))

    async def _ids(self, engine: Engine, *listing: str) -> list[str]:
        return list(dict.fromkeys((await self._docker(engine, *listing)).split()))

    async def _docker(self, engine: Engine, *arguments: str) -> str:
        """What the command printed. Raises UnavailableError if it failed."""
        printed, problem = await _run([self._program, "--host", engine.host, *arguments])
        if problem:
            raise UnavailableError(f"{engine.name} keeps what a build has left: {problem}")
        return printed

    @asynccontextmanager
    async def _entered(self, engine: Engine, lease: "_Lease") -> AsyncIterator[None]:
        """Cleans up what earlier builds left there that died, or that this one's owner may not read."""
        mark = _read_mark(lease.lock)
        if mark.traces is not None:
            await self.clear(engine, mark.traces)
        if mark.in_use:
            await self._forget_staged(engine)
        if mark.private_to not in ("", lease.owner):
            await self._forget_layers(engine)
            mark = _Mark()
        _write_mark(lease.lock, _Mark(in_use=True, private_to=mark.private_to))
        self._leases[engine.name] = lease
        try:
            yield
        finally:
            del self._leases[engine.name]
            _write_mark(lease.lock, replace(_read_mark(lease.lock), in_use=False))

    async def _forget_staged(self, engine: Engine) -> None:
        """Drops the names of all builds' images, of which none is running."""
        listing = ["image", "ls", f"--filter=reference=*/{STAGING_OWNER}/*", "--format={{.Repository}}:{{.Tag}}"]
        names, problem = await _run([self._program, "--host", engine.host, *listing])
        if problem:
            log.warning("%s may keep names of images: %s", engine.name, problem)
        await self.forget(engine, names.split())

    async def _forget_layers(self, engine: Engine) -> None:
        """Empties the engine of manifests and layers; cache mounts stay. Raises UnavailableError.

        BuildKit takes a manifest that it has by its digest, without asking the registry that the name before it says.
        """
        pruning = ["builder", "prune", "--all", "--force", "--filter=type=regular"]
        _, problem = await _run([self._program, "--host", engine.host, *pruning])
        if problem:
            raise UnavailableError(f"{engine.name}: another owner's layers are not removed: {problem}")

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


@dataclass(frozen=True)
class _Lease:
    """An engine that this process alone uses: its lock's file, and for whom (an owner of repositories)."""

    lock: int
    owner: str


@dataclass(frozen=True)
class _Mark:
    """What the next build in an engine is to know of it: whether one died there and what it may have left, and to which
    owner its layers are private."""

    in_use: bool = False
    private_to: str = ""
    traces: Traces | None = None


def _read_mark(lock: int) -> _Mark:
    """Words of a line, none of which can hold a space: `in use:`, an owner after it, a container, images."""
    text = os.pread(lock, MARK_BYTES, 0).decode()
    owner, *names = text.removeprefix(IN_USE).split(" ")
    return _Mark(text.startswith(IN_USE), owner, Traces(names[0], tuple(names[1:])) if names else None)


def _write_mark(lock: int, mark: _Mark) -> None:
    traces = (mark.traces.container, *mark.traces.images) if mark.traces else ()
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{IN_USE if mark.in_use else ''}{' '.join((mark.private_to, *traces))}".encode(), 0)


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


async def _run(command: Sequence[str]) -> tuple[str, str]:
    """Runs a command to its end: what it printed, and what it said last if it failed, else nothing."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            env=_environment(os.environ),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        return "", f"{command[0]}: {error.strerror}"
    try:
        printed, said = await asyncio.wait_for(process.communicate(), FORGET_TIMEOUT.total_seconds())
    except TimeoutError:
        return "", f"{command[0]} did not end within {FORGET_TIMEOUT.seconds} s"
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    lines = said.decode(errors="replace").strip().splitlines()
    problem = (lines or ["it said nothing"])[-1] if process.returncode else ""
    return printed.decode(errors="replace"), problem


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: environ[name] for name in KEPT_VARIABLES if name in environ}
