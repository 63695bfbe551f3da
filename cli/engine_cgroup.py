"""The cgroup of a slot's engine: `engine` for its daemons, `builds` for what its builds run (cgroups(7)).

The daemons stand apart from the builds, so that a build that eats all of its memory or processes harms itself only.
Works on cgroup v1, on v2 and on a mixture, one controller at a time. Standard library only.
"""

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cli.engine_slot import SlotLimits

ENGINE, BUILDS = "engine", "builds"
CONTROLLERS = ("memory", "cpu", "pids")
# A daemon that leaks is ended before it starves the host; in quiet it takes a tenth of that.
ENGINE_MEMORY_BYTES = 1024**3
ENGINE_PROCESSES = 4096
CPU_PERIOD_MICROSECONDS = 100_000
REMOVAL_SECONDS = 2.0
POLL_SECONDS = 0.02


class CgroupError(OSError):
    """The limits cannot be set here; the text is one line that says why."""


@dataclass(frozen=True)
class Mount:
    """A mounted cgroup hierarchy. `controllers` is what v1 mounted it with, or what v2 offers."""

    path: Path
    unified: bool
    controllers: frozenset[str]


@dataclass(frozen=True)
class SlotCgroup:
    """A slot's cgroup, made."""

    name: str
    mounts: tuple[Mount, ...]

    @property
    def builds(self) -> str:
        """What dockerd gets as `--cgroup-parent`: BuildKit's RUN processes and all other containers are below it."""
        return f"/{self.name}/{BUILDS}"

    def take_in(self, pid: int) -> None:
        """Moves a process, and what it will start, to the daemons' cgroup."""
        for mount in self.mounts:
            (mount.path / self.name / ENGINE / "cgroup.procs").write_text(str(pid))


@contextmanager
def slot_cgroup(name: str, limits: SlotLimits) -> Iterator[SlotCgroup]:
    """Makes the cgroup with its limits, and removes it. Raises CgroupError."""
    mounts = _limiting_mounts()
    try:
        for mount in mounts:
            _make(mount, name)
            _limit(mount, mount.path / name, limits)
        yield SlotCgroup(name, mounts)
    finally:
        remove_cgroup(name)


def remove_cgroup(name: str) -> None:
    """Removes a cgroup and all below it from every hierarchy; one whose processes do not end stays."""
    deadline = time.monotonic() + REMOVAL_SECONDS
    for mount in _mounts():
        top = mount.path / name
        while top.exists() and not _removed(top) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)


def _removed(top: Path) -> bool:
    folders = [top, *(path for path in top.rglob("*") if path.is_dir())]
    with suppress(OSError):
        for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):
            folder.rmdir()
        return True
    return False


def _limiting_mounts() -> tuple[Mount, ...]:
    """The hierarchies that have the controllers; v1 comes first, because a controller is in one hierarchy only."""
    found = []
    missing = set(CONTROLLERS)
    for mount in sorted(_mounts(), key=lambda mount: mount.unified):
        here = mount.controllers & missing
        if here:
            found.append(Mount(mount.path, mount.unified, frozenset(here)))
            missing -= here
    if missing:
        raise CgroupError(errno.ENOENT, f"there is no cgroup controller {min(missing)}")
    return tuple(found)


def _mounts() -> list[Mount]:
    """The hierarchies of this process's mount namespace (proc(5), mountinfo)."""
    mounts = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        path = Path(before.split()[4])
        if kind == "cgroup":
            mounts.append(Mount(path, unified=False, controllers=frozenset(options.split(","))))
        elif kind == "cgroup2":
            offered = (path / "cgroup.controllers").read_text().split()
            mounts.append(Mount(path, unified=True, controllers=frozenset(offered)))
    return mounts


def _make(mount: Mount, name: str) -> None:
    try:
        top = mount.path / name
        if mount.unified:
            _enable(mount.path, mount.controllers)
        top.mkdir(exist_ok=True)
        if mount.unified:
            _enable(top, mount.controllers)
        for child in (ENGINE, BUILDS):
            (top / child).mkdir(exist_ok=True)
    except OSError as error:
        raise CgroupError(error.errno, f"no cgroup can be made below {mount.path}: {error.strerror}") from None


def _enable(folder: Path, controllers: frozenset[str]) -> None:
    """Hands controllers on to a v2 cgroup's children; refused (EBUSY) where it has processes of its own."""
    control = folder / "cgroup.subtree_control"
    wanted = controllers - set(control.read_text().split())
    if wanted:
        control.write_text(" ".join(f"+{name}" for name in sorted(wanted)))


def _limit(mount: Mount, top: Path, limits: SlotLimits) -> None:
    try:
        if "memory" in mount.controllers:
            _limit_memory(mount, top / BUILDS, limits.memory_bytes)
            _limit_memory(mount, top / ENGINE, ENGINE_MEMORY_BYTES)
        if "pids" in mount.controllers:
            (top / BUILDS / "pids.max").write_text(str(limits.processes))
            (top / ENGINE / "pids.max").write_text(str(ENGINE_PROCESSES))
        if "cpu" in mount.controllers:
            _limit_cpu(mount, top, limits.cpus)
    except OSError as error:
        raise CgroupError(error.errno, f"the limits of {top} cannot be set: {error.strerror}") from None


def _limit_memory(mount: Mount, folder: Path, limit_bytes: int) -> None:
    """Without swap beyond it, where the kernel counts swap."""
    if mount.unified:
        (folder / "memory.max").write_text(str(limit_bytes))
        _write_if_there(folder / "memory.swap.max", "0")
    else:
        (folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
        _write_if_there(folder / "memory.memsw.limit_in_bytes", str(limit_bytes))


def _limit_cpu(mount: Mount, folder: Path, cpus: float) -> None:
    quota = max(1000, round(cpus * CPU_PERIOD_MICROSECONDS))
    if mount.unified:
        (folder / "cpu.max").write_text(f"{quota} {CPU_PERIOD_MICROSECONDS}")
    else:
        (folder / "cpu.cfs_period_us").write_text(str(CPU_PERIOD_MICROSECONDS))
        (folder / "cpu.cfs_quota_us").write_text(str(quota))


def _write_if_there(file: Path, value: str) -> None:
    if file.exists():
        file.write_text(value)
