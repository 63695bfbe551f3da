"""The sandboxes of a runner's host.

In a pod's directory, beside what is its shim's and its log's:

    sandbox/{home,work,tmp}      HOME, working directory and TMPDIR of the agent; `repository.git`: see sandbox_git.py
    kind, user, disk.img         the sandbox's type, the agent's user id (agent_users.py), its disk (sandbox_disk.py)

Where the runner is root, each pod's agent has a user id of its own, and what it may not see is closed to it; else its
user is the runner's.
"""

import os
import pwd
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from kiln.adapters.agent_commands import AgentCommand, agent_command
from kiln.adapters.agent_users import AgentUsers
from kiln.adapters.sandbox_disk import SandboxDisk, can_limit_disk
from kiln.adapters.sandbox_files import Places, make_own, make_passable, remove_tree, write_files
from kiln.adapters.sandbox_git import Tenant, Worktrees, forget, identity
from kiln.adapters.sandbox_mirror import secrets_of
from kiln.adapters.sandbox_steps import PodUser, end_all, whole
from kiln.errors import OperationFailedError
from kiln.models import AGENT_PATH, SandboxType
from kiln.ports.pods import PodOrder, ShimOrder
from kiln.ports.sandboxes import Sandboxes, Say
from kiln.redact import MIN_ANYWHERE

KIND = "kind"
AGENT = "agent"
SHELL = "/bin/sh"
# Of an MCP server's configuration, where tokens stand.
MCP_SECRETS = frozenset({"env", "headers", "http_headers"})


@dataclass(frozen=True)
class SandboxTerms:
    """What holds for every sandbox of a host. `root` holds `pods/KEY` and `repositories`; `uids` are the user ids that
    agents may have, where the runner is root; `engine` is the container engine's address, "" for the usual one; `path` is
    where agents and what they call are looked for."""

    root: Path
    uids: range
    memory_mb: int
    processes: int
    cpus: float
    grace_seconds: float
    lease_seconds: float
    engine: str
    path: str = AGENT_PATH


class HostSandboxes:
    """`kiln.ports.sandboxes.Sandboxes`; those of type `container` are `containers`' own, where there is an engine."""

    def __init__(self, terms: SandboxTerms, containers: Sandboxes | None) -> None:
        self._terms = terms
        self._containers = containers
        self._pods = terms.root / "pods"
        self._users = AgentUsers(self._pods, terms.uids)
        self._worktrees = Worktrees(terms.root / "repositories")

    async def prepare(self, order: PodOrder, say: Say) -> ShimOrder:
        """Raises OperationFailedError."""
        try:
            await end_all(self._tenant(order.key).user)
            await whole(self._clear, order)
            if order.spec.sandbox_type != SandboxType.CONTAINER:
                return await self._prepare(order)
        except OSError as error:
            problem = error.strerror or error
            raise OperationFailedError(f"the runner cannot make the sandbox: {problem}") from error
        if self._containers is None:
            raise OperationFailedError("this runner has no container engine")
        return await self._containers.prepare(order, say)

    async def stop(self, key: str) -> None:
        if containers := self._containers_of(key):
            await containers.stop(key)

    async def conclude(self, key: str, say: Say) -> None:
        if containers := self._containers_of(key):
            await containers.conclude(key, say)
            return
        try:
            await self._conclude(key, say)
        except OSError as error:
            await say(f"unpushed work cannot be looked for now: {error}")

    async def remove(self, key: str) -> None:
        """Raises OSError."""
        if containers := self._containers_of(key):
            await containers.remove(key)
            return
        places = Places(self._pods / key)
        if not places.pod.exists():
            return
        await self._conclude(key, _to_nobody)
        await whole(_remove, places)

    def limits(self) -> list[str]:
        """Those of `PodLimits` that sandboxes of this host can enforce, containers aside. Blocks for a moment."""
        self._pods.mkdir(parents=True, exist_ok=True)
        return ["disk_mb"] if can_limit_disk(self._terms.root) else []

    async def _prepare(self, order: PodOrder) -> ShimOrder:
        places = Places(self._pods / order.key)
        command = agent_command(order, str(places.home), str(places.work))
        await whole(self._make, order, places, command)
        if order.spec.sandbox_type == SandboxType.WORKTREE:
            if order.git is None:
                raise OperationFailedError("the pod has no repository")
            await self._worktrees.prepare(self._tenant(order.key), order.git)
        return self._shim_order(order, places, command)

    def _clear(self, order: PodOrder) -> None:
        """Removes what an interrupted call has left, and notes what comes now."""
        places = Places(self._pods / order.key)
        for directory in (self._terms.root, self._pods, places.pod):
            make_passable(directory)
        forget(places.pod)
        _remove_sandbox(places)
        (places.pod / KIND).write_text(order.spec.sandbox_type)

    def _make(self, order: PodOrder, places: Places, command: AgentCommand) -> None:
        uid = self._users.take(order.key)
        make_passable(places.sandbox)
        if order.spec.limits.disk_mb is not None:
            SandboxDisk(places.pod, places.sandbox).make(order.spec.limits.disk_mb)
        for directory in (places.home, places.work, places.tmp):
            make_own(directory, uid)
        write_files(places.home, {".gitconfig": identity(order.key), **command.files}, uid)

    def _shim_order(self, order: PodOrder, places: Places, command: AgentCommand) -> ShimOrder:
        terms, asked, uid = self._terms, order.spec.limits, self._users.of(order.key)
        left = None if order.deadline_at is None else (order.deadline_at - datetime.now(UTC)).total_seconds()
        return ShimOrder(
            # Whoever starts it names it.
            shim="",
            argv=command.argv,
            cwd=places.work,
            environment=agent_environment(order, command, _base(places, uid, terms.path)),
            user=None if uid is None else str(uid),
            limit_seconds=left,
            grace_seconds=terms.grace_seconds,
            lease_seconds=terms.lease_seconds,
            memory_mb=limited(asked.memory_mb, terms.memory_mb),
            processes=limited(asked.processes, terms.processes),
            prompted=command.prompted,
            secrets=secret_values(order),
        )

    async def _conclude(self, key: str, say: Say) -> None:
        """Nobody works in the sandbox any more: a disk of its own is in its file only, from here on. Raises OSError."""
        tenant = self._tenant(key)
        await end_all(tenant.user)
        disk = SandboxDisk(tenant.places.pod, tenant.places.sandbox)
        await whole(disk.mount)
        try:
            await self._worktrees.conclude(tenant, say)
        finally:
            await whole(disk.unmount)

    def _tenant(self, key: str) -> Tenant:
        user = PodUser(self._users.of(key), self._terms.memory_mb, self._terms.processes)
        return Tenant(key, Places(self._pods / key), user)

    def _containers_of(self, key: str) -> Sandboxes | None:
        """Who has the pod's sandbox, if it is a container."""
        with suppress(FileNotFoundError):
            if (self._pods / key / KIND).read_text() == SandboxType.CONTAINER:
                return self._containers
        return None


def agent_environment(order: PodOrder, command: AgentCommand, base: Mapping[str, str]) -> dict[str, str]:
    """All that an agent has: `base` (PATH, HOME, USER, LOGNAME, SHELL, TMPDIR), what holds for every agent, the
    command's additions, and the pod's own variables, which win. Nothing of the worker's."""
    own = {"LANG": "C.UTF-8", "TERM": "xterm-256color", "KILN_POD": order.key}
    return {**base, **own, **command.environment, **order.environment}


def limited(asked: int | None, most: int) -> int:
    """A pod's limit: what it asked for, but no more than the runner gives."""
    return most if asked is None else min(asked, most)


def secret_values(order: PodOrder) -> list[str]:
    """What is masked in all that the agent prints. Very short values are not: they occur in innocent words."""
    values = [*order.environment.values(), *_mcp_secrets(order.mcp_config or {})]
    return [value for value in [*values, *(secrets_of(order.git) if order.git else [])] if len(value) >= MIN_ANYWHERE]


def _mcp_secrets(config: Mapping[str, object]) -> Iterator[str]:
    """The values of the variables and headers in an MCP configuration."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            if name in MCP_SECRETS:
                yield from (item for item in value.values() if isinstance(item, str))
            yield from _mcp_secrets(value)


def _base(places: Places, uid: int | None, path: str) -> dict[str, str]:
    name = AGENT
    if uid is None:
        with suppress(KeyError):
            name = pwd.getpwuid(os.geteuid()).pw_name
    return {
        "PATH": path,
        "HOME": str(places.home),
        "USER": name,
        "LOGNAME": name,
        "SHELL": SHELL,
        "TMPDIR": str(places.tmp),
    }


def _remove(places: Places) -> None:
    _remove_sandbox(places)
    remove_tree(places.pod)


def _remove_sandbox(places: Places) -> None:
    SandboxDisk(places.pod, places.sandbox).remove()
    remove_tree(places.sandbox)


async def _to_nobody(_: str) -> None:
    """For a pod whose log has ended."""
