"""A limit for what a sandbox holds: a file system of its own, in a sparse file that is mounted in the sandbox's place."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from kiln.adapters.sandbox_files import PASSABLE

IMAGE = "disk.img"
MEGABYTE = 1024 * 1024
PROBE = ".disk-"
PROBE_MB = 8
STEP_SECONDS = 120.0
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


class SandboxDisk:
    """The disk of the sandbox at `mount`, kept in the pod's directory. Each method raises OSError."""

    def __init__(self, pod: Path, mount: Path) -> None:
        self._image = pod / IMAGE
        self._mount = mount

    def make(self, size_mb: int) -> None:
        """Mounts an empty disk; the directory is there."""
        with self._image.open("wb") as file:
            file.truncate(size_mb * MEGABYTE)
        self._image.chmod(0o600)
        _run("mkfs.ext4", "-q", "-F", "-m", "0", str(self._image))
        self.mount()
        (self._mount / "lost+found").rmdir()
        self._mount.chmod(PASSABLE)

    def mount(self) -> None:
        """Mounts the disk again, if there is one."""
        if self._image.exists() and not os.path.ismount(self._mount):
            _run("mount", "-o", "loop,nosuid,nodev", "--", str(self._image), str(self._mount))

    def unmount(self) -> None:
        """Unmounts it, whoever may still use it; the host frees the loop device once nobody does."""
        while os.path.ismount(self._mount):
            try:
                _run("umount", "--", str(self._mount))
            except OSError:
                _run("umount", "--lazy", "--", str(self._mount))

    def remove(self) -> None:
        """Forgets all that is on it."""
        self.unmount()
        self._image.unlink(missing_ok=True)


def can_limit_disk(root: Path) -> bool:
    """Whether this process can make and mount such disks, as tried with one below `root`, where no other process tries it
    at the same time. Blocks for a moment."""
    if os.geteuid():
        return False
    # Of processes that were killed over it.
    for left in root.glob(f"{PROBE}*"):
        _remove_probe(left)
    pod = Path(tempfile.mkdtemp(prefix=PROBE, dir=root))
    try:
        (pod / "mount").mkdir()
        SandboxDisk(pod, pod / "mount").make(PROBE_MB)
    except OSError:
        return False
    finally:
        _remove_probe(pod)
    return True


def _remove_probe(pod: Path) -> None:
    SandboxDisk(pod, pod / "mount").remove()
    shutil.rmtree(pod)


def _run(*argv: str) -> None:
    try:
        done = subprocess.run(
            argv, capture_output=True, env={"PATH": PATH, "LC_ALL": "C"}, timeout=STEP_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{argv[0]} took more than {STEP_SECONDS:g} seconds") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise OSError(f"{argv[0]}: {said[-1] if said else done.returncode}")
