"""The directories of a sandbox: made for one user, and removed whatever an agent has made of them."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

OWN = 0o700
PASSABLE = 0o711
SECRET_FILE = 0o600
FEW_DIRECTORIES = 40


@dataclass(frozen=True)
class Places:
    """Where in a pod's directory its sandbox has what."""

    pod: Path

    @property
    def sandbox(self) -> Path:
        return self.pod / "sandbox"

    @property
    def home(self) -> Path:
        return self.sandbox / "home"

    @property
    def work(self) -> Path:
        return self.sandbox / "work"

    @property
    def tmp(self) -> Path:
        return self.sandbox / "tmp"

    @property
    def repository(self) -> Path:
        return self.sandbox / "repository.git"


def make_passable(path: Path) -> None:
    """A directory of the runner's, and what is missing above it; where that is root, agents with users of their own get
    through to their sandboxes."""
    if not path.parent.exists():
        make_passable(path.parent)
    path.mkdir(mode=OWN, exist_ok=True)
    mode = path.stat().st_mode & 0o777
    if not os.geteuid() and mode | PASSABLE != mode:
        path.chmod(mode | PASSABLE)


def make_own(path: Path, uid: int | None) -> None:
    """A new directory of the agent's user."""
    path.mkdir(mode=OWN)
    give(path, uid)


def give(path: Path, uid: int | None) -> None:
    if uid is not None:
        os.chown(path, uid, uid, follow_symlinks=False)


def write_files(home: Path, files: Mapping[str, str], uid: int | None) -> None:
    """Writes files of the agent's user below a HOME in which no agent has been."""
    for name, text in files.items():
        path = home / name
        for parent in reversed(path.relative_to(home).parents[:-1]):
            if not (home / parent).exists():
                make_own(home / parent, uid)
        path.touch(SECRET_FILE)
        path.write_text(text, encoding="utf-8", errors="replace")
        give(path, uid)


def remove_tree(path: Path) -> None:
    """Removes a directory, however deep it is and whatever its modes are, and nothing that its symbolic links lead to.
    Raises OSError if something resists. Python's own way starts no process, but holds a descriptor for each level, of which
    the runner has some hundreds, and gives up at modes that forbid it: what is not small is left to the system's tools."""
    if _is_small(path):
        with suppress(OSError):
            shutil.rmtree(path)
            return
    if os.geteuid() and path.is_dir() and not path.is_symlink():
        _run("chmod", "-R", "--", "u+rwx", str(path), check=False)
    _run("rm", "-rf", "--one-file-system", "--", str(path), check=True)


def _is_small(path: Path) -> bool:
    return len(list(islice(os.walk(path), FEW_DIRECTORIES + 1))) <= FEW_DIRECTORIES


def _run(*argv: str, check: bool) -> None:
    done = subprocess.run(argv, capture_output=True, env={"PATH": os.defpath, "LC_ALL": "C"}, check=False)
    if check and done.returncode:
        problem = done.stderr.decode(errors="replace").strip().splitlines()
        raise OSError(problem[0] if problem else f"{argv[0]} ended with {done.returncode}")
