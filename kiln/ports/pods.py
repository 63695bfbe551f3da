"""Pods, as a runner works on them: what Kiln's API tells it, and the shims and sandboxes on its host."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

from kiln.models import PodRef, PodResult, PodSpec, PodStatus


@dataclass(frozen=True)
class HostReport:
    """What a runner says of itself when it registers; `runner_name`, if its operator named the runner that it must be.
    `limits` are those of `PodLimits` that its host can enforce, and, with `container.` before them, its engine."""

    name: str
    incarnation: str
    max_concurrent_pods: int
    allows_custom_commands: bool
    available_agents: Sequence[str]
    limits: Sequence[str]
    host_info: Mapping[str, str]
    runner_name: str | None = None


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
class RunnerProcess:
    """The process of a runner that speaks: once another one has registered, what it says is refused."""

    runner_id: str
    incarnation: str


@dataclass(frozen=True)
class PodSecrets:
    """What of a pod is kept sealed, and only until its end. In clear here: never log it."""

    environment: Mapping[str, str] = field(repr=False, default_factory=dict)
    custom_args: Sequence[str] = field(repr=False, default=())
    mcp_config: Mapping[str, object] | None = field(repr=False, default=None)


@dataclass(frozen=True)
class PodBrief:
    """A pod and the workflow run that claimed it: what the dispatcher and the house-keeping decide by."""

    ref: PodRef
    run_id: str | None


@dataclass(frozen=True)
class Instructions:
    """What a runner hears in answer to its heartbeat, of the pods that it listed: `end` are not, or no longer, its to
    run (of one whose agent has ended by itself, nothing is left to do), `remove` those whose sandbox is to go too."""

    end: frozenset[str] = frozenset()
    remove: frozenset[str] = frozenset()


@dataclass(frozen=True)
class News:
    """What a runner waits for between its beats: pods that are not its to run any more, and prompts that came for the
    others, each with its number."""

    end: frozenset[str] = frozenset()
    prompts: Mapping[str, Sequence[tuple[int, str]]] = field(default_factory=dict)


@dataclass(frozen=True)
class KnownToKiln:
    """What a runner learns when it registers: who it is, and by which terms its pods are kept."""

    runner_id: str
    name: str
    organization: str
    lease_seconds: float
    beat_seconds: float


@dataclass(frozen=True)
class SpooledLine:
    """A line as its shim wrote it down, numbered from 1 within the pod."""

    number: int
    time: datetime
    stream: str
    text: str


class Remotes(Protocol):
    """Git repositories, as far as this host can ask them."""

    async def lacks_branch(self, source: GitSource) -> bool:
        """Whether the repository says that it has no such branch; False if it cannot be asked, within some seconds."""
        ...


class RunnerApi(Protocol):
    """Kiln's API, as runners use it. Any call may raise UnavailableError; RefusedError for a token that is no more, and
    once another process has registered as this runner."""

    async def register(self, report: HostReport) -> KnownToKiln:
        """Who this runner is; what an earlier incarnation says is refused from now on."""
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

    async def news(self, after: Mapping[str, int]) -> News:
        """Waits, some 20 s at most, until there is news of these pods: an order to end, or prompts numbered above
        `after`; those up to it are noted as taken."""
        ...

    async def log(self, key: str, lines: Sequence[SpooledLine]) -> int:
        """Keeps lines, which follow each other without a gap; the number up to which all are kept, or need not be any
        more since the log has ended. Repeating it is harmless."""
        ...

    async def ended(self, key: str, shim: str, result: PodResult) -> None:
        """The agent is no more, and its log is whole."""
        ...


@dataclass(frozen=True)
class ShimOrder:
    """What a shim is to run. `environment` reaches it by its standard input; `secrets` are masked in what is printed.
    `prompted` is the number of the last prompt that the command line gives the agent already."""

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
    prompted: int = 0
    secrets: Sequence[str] = field(repr=False, default=())


class Shim(Protocol):
    """A running shim, or what one left."""

    async def prompt(self, text: str, number: int | None = None) -> None:
        """Writes a prompt to the agent's terminal; one with a number that came before is not written again. Raises
        OperationOverError if the agent has ended, or reads nothing."""
        ...

    async def prompted(self) -> int:
        """The number of the last prompt that it has. Raises OperationOverError if it is no more."""
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

    def is_alive(self) -> bool:
        """Whether the shim, or who clears up after it, still runs."""
        ...

    def lines(self, after: int) -> Sequence[SpooledLine]:
        """What the agent has printed since, at most some hundred lines."""
        ...

    async def arrived(self, after: int, seconds: float) -> bool:
        """Waits so long for a line numbered above `after`, or for the end; whether there is such a line."""
        ...

    async def acknowledge(self, number: int) -> None:
        """Lets go of the lines up to this one."""
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


class PodLedger(Protocol):
    """The catalog's word on pods: each call is one transaction, and repeating it is harmless.

    What a runner says, a `RunnerProcess` says: RefusedError unless it is the one that registered last, with a token that
    is still good; NotFoundError for a pod of another runner. Any call may raise UnavailableError.
    """

    def claim_pod(self, ref: PodRef, run_id: str) -> PodSpec | None:
        """Makes an open pod this run's own, and says what was asked for; None if it has ended, or is another run's."""
        ...

    def release_pod(self, ref: PodRef, run_id: str) -> bool:
        """Gives an open pod whose run is no more back to the dispatcher; False if it has ended, or is another run's."""
        ...

    def finish_pod(self, ref: PodRef, result: PodResult) -> PodStatus:
        """The workflow's last word: closes a pod that is still open, `completed` or `failed`. Returns how it ended."""
        ...

    def terminate_pod(self, ref: PodRef) -> None:
        """Writes `terminated` for a pod that is still open: for a workflow that somebody cancelled. Raises NotFoundError."""
        ...

    def add_prompt(self, ref: PodRef, text: str) -> int:
        """Keeps a prompt for the pod's agent; its number. Raises NotFoundError, RefusedError for an ended pod,
        UnavailableError while its runner is away."""
        ...

    def open_pods(self, older_than: timedelta, *, unclaimed: bool = False) -> list[PodBrief]:
        """Open pods that have had `older_than` to get going, oldest first; with `unclaimed`, those that no run has."""
        ...

    def unsettled_pods(self, older_than: timedelta) -> list[PodBrief]:
        """Pods that ended at least `older_than` ago and whose workflow has not said its last word: it may not have heard
        of the end. Oldest end first."""
        ...

    def lapse_pods(self) -> list[PodRef]:
        """Closes pods that nobody vouches for any more, `failed`: those whose lease is over, and those that wait for a
        runner whose token was disabled. Their workflows are still to be told."""
        ...

    def register(self, runner_id: str, report: HostReport) -> None:
        """Makes the report's incarnation the runner's process. Raises RefusedError if its token was disabled."""
        ...

    def beat(self, process: RunnerProcess, keys: Sequence[str]) -> Instructions:
        """The runner is there, and so are these pods: their leases go on."""
        ...

    def locate(self, process: RunnerProcess, key: str) -> PodRef:
        """A pod of the runner's, open or ended: to keep its log."""
        ...

    def begin(self, process: RunnerProcess, key: str, shim: str) -> PodOrder:
        """Takes a `creating` pod up for a shim: the first one that asks has it for ever, and only it may ask again.

        The order names its image without a token, and has the prompts numbered from 1 on. Raises OperationOverError if
        the pod has ended, runs already, or has another shim; OperationFailedError if what it needs is no more.
        """
        ...

    def started(self, process: RunnerProcess, key: str, shim: str) -> None:
        """The agent runs. Raises OperationOverError if the pod has ended, or has another shim: then it must not."""
        ...

    def news(self, process: RunnerProcess, after: Mapping[str, int]) -> News:
        """What there is to say of these pods now: `end` are those that are not, or no longer, the runner's to run;
        prompts are those numbered above `after`, and those up to it are noted as taken."""
        ...

    def ended(self, process: RunnerProcess, key: str, shim: str, result: PodResult) -> PodStatus:
        """The agent is no more: closes a pod that is still open. Returns how it ended. Raises OperationOverError if it
        has another shim."""
        ...
