"""Pods, as a runner works on them: what Kiln's API tells it, and the shims and sandboxes on its host."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

from kiln.models import PodResult, PodSpec


@dataclass(frozen=True)
class HostReport:
    """What a runner says of itself when it registers. `limits` are those of `PodLimits` that its host can enforce."""

    name: str
    incarnation: str
    max_concurrent_pods: int
    allows_custom_commands: bool
    available_agents: Sequence[str]
    limits: Sequence[str]
    host_info: Mapping[str, str]


@dataclass(frozen=True)
class GitSource:
    """The repository that a worktree is of. `credential` is in clear: never log it."""

    repository_id: int
    url: str
    branch: str
    credential: str = field(repr=False, default="")


@dataclass(frozen=True)
class ImageSource:
    """The image that a container runs, by digest, and what opens its repository. `token` is in clear: never log it."""

    reference: str
    registry: str
    token: str = field(repr=False, default="")


@dataclass(frozen=True)
class PodOrder:
    """What a runner is to run. Values of `environment` and what stands in `mcp_config` are in clear: never log them."""

    pod_id: str
    key: str
    attempt: int
    spec: PodSpec
    prompts: Sequence[str]
    environment: Mapping[str, str] = field(repr=False)
    custom_args: Sequence[str] = field(repr=False, default=())
    mcp_config: Mapping[str, object] | None = field(repr=False, default=None)
    git: GitSource | None = None
    image: ImageSource | None = None
    deadline_at: datetime | None = None


@dataclass(frozen=True)
class Instructions:
    """What a runner hears in answer to its heartbeat: pods that are to end, and those whose sandbox is to go."""

    end: frozenset[str] = frozenset()
    remove: frozenset[str] = frozenset()


@dataclass(frozen=True)
class SpooledLine:
    """A line as its shim wrote it down, numbered from 1 within the pod."""

    number: int
    time: datetime
    stream: str
    text: str


class RunnerApi(Protocol):
    """Kiln's API, as runners use it. Any call may raise UnavailableError, and RefusedError for a token that is no more."""

    async def register(self, report: HostReport) -> str:
        """The runner's id; what an earlier incarnation says is refused from now on."""
        ...

    async def beat(self, pods: Sequence[str]) -> Instructions:
        """Says which pods are alive here: their leases and the runner's presence go on."""
        ...

    async def begin(self, key: str, shim: str) -> PodOrder:
        """Takes a pod up for a shim that is about to start. Raises OperationOverError if it has ended, or has another
        shim that nobody has given up."""
        ...

    async def started(self, key: str, shim: str) -> None:
        """The agent runs."""
        ...

    async def prompts(self, key: str, after: int) -> Sequence[tuple[int, str]]:
        """Prompts numbered above `after`; waits some seconds for one."""
        ...

    async def log(self, key: str, lines: Sequence[SpooledLine]) -> int:
        """Keeps lines; the number of the last one that is kept. Repeating it is harmless."""
        ...

    async def ended(self, key: str, shim: str, result: PodResult) -> None:
        """The agent is no more, and its log is whole."""
        ...


@dataclass(frozen=True)
class ShimOrder:
    """What a shim is to run. `environment` reaches it by its standard input."""

    shim: str
    argv: Sequence[str]
    cwd: Path
    environment: Mapping[str, str] = field(repr=False)
    user: str | None = None
    limit_seconds: float | None = None
    grace_seconds: float = 10.0
    lease_seconds: float = 300.0
    memory_mb: int | None = None
    processes: int | None = None


class Shim(Protocol):
    """A running shim, or what one left."""

    async def prompt(self, text: str) -> None:
        """Writes a prompt to the agent's terminal."""
        ...

    async def terminate(self) -> None:
        """Asks for the agent's end: SIGTERM, and after the grace SIGKILL for its whole tree."""
        ...

    async def renew(self, seconds: float) -> None:
        """Lets the agent live for so many seconds more without a worker."""
        ...

    async def wait(self) -> PodResult:
        """How it ended. A shim that died without a word is told of as such."""
        ...

    def lines(self, after: int) -> Sequence[SpooledLine]:
        """What the agent has printed since, at most some hundred lines."""
        ...


class Shims(Protocol):
    """The shims of this host."""

    async def start(self, key: str, order: ShimOrder) -> Shim:
        """Raises FileExistsError if the pod has had one here already."""
        ...

    def find(self, key: str) -> Shim | None:
        """The pod's shim, alive or ended; None if it never had one here."""
        ...

    def keys(self) -> frozenset[str]:
        """Pods that have a directory here."""
        ...
