"""Sandboxes of a test's own, in a directory that agents with users of their own get to, and real git repositories."""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kiln.adapters.pod_shim_spool import TERMINAL
from kiln.adapters.sandboxes import HostSandboxes, SandboxTerms
from kiln.adapters.shims import HostShim, HostShims
from kiln.models import PodLimits, PodSpec, SandboxType
from kiln.ports.pods import GitSource, PodOrder
from support.processes import MARK

AS_ROOT = os.geteuid() == 0
UIDS = range(390_000, 390_100)
GIT = {"PATH": "/usr/bin:/bin", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
IDENTITY = ("-c", "user.name=Test", "-c", "user.email=test@kiln.invalid")


@dataclass
class Sandboxed:
    """A host's sandboxes and shims, and what they said."""

    root: Path
    mark: str
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shims = HostShims(self.root / "pods")
        self.start_anew()

    def start_anew(self) -> None:
        """What another process of the runner would have."""
        self.sandboxes = HostSandboxes(terms(self.root), None)

    async def say(self, text: str) -> None:
        self.said.append(text)

    def order(self, key: str, script: str, **more: Any) -> PodOrder:
        return pod_order(key, script, {MARK: self.mark, "GIT_PAGER": "cat", **more.pop("environment", {})}, **more)

    async def start(self, order: PodOrder) -> HostShim:
        shim_order = await self.sandboxes.prepare(order, self.say)
        return await self.shims.start(order.key, shim_order)

    async def run(self, order: PodOrder) -> list[str]:
        """What the agent prints until its end."""
        shim = await self.start(order)
        await shim.wait()
        return [line.text for line in shim.lines(0) if line.stream == TERMINAL]

    def sandbox(self, key: str) -> Path:
        return self.root / "pods" / key / "sandbox"

    async def close(self) -> None:
        """Ends and removes all that there is."""
        for key in self.shims.keys():  # noqa: SIM118  no dictionary
            if shim := self.shims.find(key):
                await shim.terminate()
                await shim.wait()
            await self.sandboxes.remove(key)


def terms(root: Path) -> SandboxTerms:
    return SandboxTerms(
        root=root,
        uids=UIDS,
        memory_mb=512,
        processes=100,
        cpus=1.0,
        grace_seconds=0.3,
        lease_seconds=60.0,
        engine="",
    )


def pod_order(key: str, script: str, environment: dict[str, str], **more: Any) -> PodOrder:
    """An order for a shell script; `source` makes it one for a worktree."""
    source: GitSource | None = more.pop("source", None)
    kind = SandboxType.TEMPDIR if source is None else SandboxType.WORKTREE
    spec = PodSpec(custom_command="sh", sandbox_type=kind, limits=more.pop("limits", PodLimits()))
    return PodOrder(
        **{"pod_id": key, "attempt": 1, "prompts": [], "git": source, "spec": spec} | more,
        key=key,
        environment=environment,
        custom_args=["-c", script],
    )


def git(where: Path, *arguments: str) -> str:
    """Runs git as the test itself; what it prints."""
    done = subprocess.run(
        ["git", "-C", str(where), *IDENTITY, *arguments], env=GIT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


class Origin:
    """A repository as a server has it, in a directory, with one commit on `main` and another one on `feature/a`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        git(path, "init", "--quiet", "--bare", "--initial-branch=main")
        self.clone = path.with_suffix(".clone")
        self.clone.mkdir()
        git(self.clone, "init", "--quiet", "--initial-branch=main")
        self.commit("main", "README", "hello\n")
        git(self.clone, "checkout", "--quiet", "-b", "feature/a")
        self.commit("feature/a", "feature", "a\n")

    def commit(self, branch: str, name: str, text: str) -> None:
        (self.clone / name).write_text(text)
        git(self.clone, "add", "--all")
        git(self.clone, "commit", "--quiet", "-m", f"add {name}")
        git(self.clone, "push", "--quiet", str(self.path), f"HEAD:refs/heads/{branch}")

    def source(self, branch: str = "main", **more: Any) -> GitSource:
        return GitSource(**{"repository_id": 7, "url": str(self.path), "branch": branch} | more)

    def branches(self) -> Sequence[str]:
        return git(self.path, "for-each-ref", "--format=%(refname:short)", "refs/heads").splitlines()
