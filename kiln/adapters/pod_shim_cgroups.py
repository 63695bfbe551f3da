"""A control group for each pod: how much memory and how many processes its whole tree may have.

Made below the group that the runner is in, so that the runner's own limits hold for its pods too. Version 1 and 2 of
cgroups(7). In version 2 a group that has processes cannot share its controllers out: there the runner stands in a leaf
of the subtree that was delegated to it, and pods become its neighbours.
"""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

CONTROLLERS = ("memory", "pids")
MEGABYTE = 1024 * 1024
REMOVAL_SECONDS = 2.0
PAUSE_SECONDS = 0.01


class Cgroups:
    """One pod's control groups, by controller. A controller that is missing cannot be had here."""

    def __init__(self, paths: dict[str, Path]) -> None:
        self._paths = paths

    def __contains__(self, controller: str) -> bool:
        return controller in self._paths

    @property
    def paths(self) -> dict[str, str]:
        """Where they are, for whoever must clear up after a shim that died."""
        return {controller: str(path) for controller, path in self._paths.items()}

    def limit(self, memory_mb: int | None, processes: int | None) -> None:
        if memory_mb is not None and "memory" in self:
            _limit_memory(self._paths["memory"], memory_mb * MEGABYTE)
        if processes is not None and "pids" in self:
            (self._paths["pids"] / "pids.max").write_text(str(processes))

    def enter(self) -> None:
        """Puts the calling process in; its children will be born there."""
        for path in set(self._paths.values()):
            (path / "cgroup.procs").write_text("0")

    def forbid_forks(self) -> None:
        """From now on nothing in the tree can multiply, so that killing it comes to an end."""
        if "pids" in self:
            with suppress(OSError):
                (self._paths["pids"] / "pids.max").write_text("0")

    def oom_kills(self) -> int:
        """How many processes the kernel has killed because the group's memory was used up."""
        for name in ("memory.oom_control", "memory.events"):
            with suppress(KeyError, OSError):
                lines = (self._paths["memory"] / name).read_text().splitlines()
                return int(dict(line.split(maxsplit=1) for line in lines)["oom_kill"])
        return 0

    def remove(self) -> None:
        """Kills what is still in them, and removes them."""
        self.forbid_forks()
        end = time.monotonic() + REMOVAL_SECONDS
        for path in set(self._paths.values()):
            while not _removed(path) and time.monotonic() < end:
                _kill_members(path)
                time.sleep(PAUSE_SECONDS)


def make(name: str) -> Cgroups:
    """Makes the groups that can be had here, none if the caller may not."""
    paths: dict[str, Path] = {}
    for controller in CONTROLLERS:
        for parent in _parents(controller):
            with suppress(OSError):
                path = parent / name
                path.mkdir(exist_ok=path in paths.values())
                paths[controller] = path
                break
    return Cgroups(paths)


def _limit_memory(group: Path, size_bytes: int) -> None:
    """Swap counts as memory, where the kernel can count it."""
    if (group / "memory.limit_in_bytes").exists():
        files = {"memory.limit_in_bytes": size_bytes, "memory.memsw.limit_in_bytes": size_bytes}
    else:
        files = {"memory.max": size_bytes, "memory.swap.max": 0}
    for name, value in files.items():
        if (group / name).exists():
            (group / name).write_text(str(value))


def _removed(group: Path) -> bool:
    try:
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _kill_members(group: Path) -> None:
    with suppress(OSError):
        for pid in (group / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(int(pid), signal.SIGKILL)


def _parents(controller: str) -> Iterator[Path]:
    """Groups below which this controller can be had, the best first."""
    for kind, options, root, point in _mounts():
        if kind == "cgroup" and controller in options:
            yield _own_group(controller, root, point)
        elif kind == "cgroup2":
            own = _own_group("", root, point)
            if _shares_out(own, controller, try_to=True):
                yield own
            if own != point and _shares_out(own.parent, controller, try_to=False):
                yield own.parent


def _shares_out(group: Path, controller: str, *, try_to: bool) -> bool:
    """Whether a group of version 2 gives this controller to its children."""
    control = group / "cgroup.subtree_control"
    with suppress(OSError):
        if try_to and controller not in control.read_text().split():
            control.write_text(f"+{controller}")
        return controller in control.read_text().split()
    return False


def _own_group(controller: str, root: str, point: Path) -> Path:
    """The directory of the group that this process is in; the mount itself if that lies outside of it."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controller in controllers.split(",") and Path(group).is_relative_to(root) and ".." not in group:
            return point / Path(group).relative_to(root)
    return point


def _mounts() -> Iterator[tuple[str, Sequence[str], str, Path]]:
    """Each mounted hierarchy: its type, its options, which part of it is mounted, and where (proc(5), mountinfo)."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, system = line.partition(" - ")
        kind, _, options = system.split(" ", 2)
        if kind in {"cgroup", "cgroup2"}:
            root, point = mount.split(" ")[3:5]
            yield kind, options.split(","), root, Path(point)
