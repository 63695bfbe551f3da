"""Agent pods and the runners that they run on, as Kiln's floors hand them to each other."""

from collections.abc import Collection
from datetime import datetime
from enum import StrEnum

from kiln.models.builds import Frozen


class PodStatus(StrEnum):
    """A pod's life, in the words of `pods.md`. `orphaned` is no stored status: it is a running pod whose runner is away."""

    CREATING = "creating"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    TERMINATED = "terminated"
    ORPHANED = "orphaned"


OPEN_POD_STATUSES = frozenset({PodStatus.CREATING, PodStatus.RUNNING})
# Of a prompt's text in UTF-8.
MAX_PROMPT_BYTES = 256 * 1024


class RunnerStatus(StrEnum):
    """A runner's state, in the words of `pods.md`: `busy` is online with no place left."""

    ONLINE = "online"
    OFFLINE = "offline"
    BUSY = "busy"


class SandboxType(StrEnum):
    """Where an agent works: an empty directory, a git worktree, or a container."""

    TEMPDIR = "tempdir"
    WORKTREE = "worktree"
    CONTAINER = "container"


class AgentType(StrEnum):
    """The coding agents that a runner may offer."""

    CLAUDE_CODE = "claude-code"
    CODEX = "codex"
    GEMINI = "gemini"
    CURSOR = "cursor"
    AIDER = "aider"


class PodLimits(Frozen):
    """What a pod may use; None where it is not limited."""

    memory_mb: int | None = None
    processes: int | None = None
    disk_mb: int | None = None


# Where a runner looks for agents, and they for what they call, unless its operator says otherwise.
AGENT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Every engine enforces these; of others, a runner says `container.` and the name where its own does.
ENGINE_LIMITS = frozenset({"memory_mb", "processes"})
CONTAINER_LIMIT = "container."


def container_limits(reported: Collection[str]) -> frozenset[str]:
    """Those of `PodLimits` that a runner's engine can enforce, by what the runner reported."""
    own = {name.removeprefix(CONTAINER_LIMIT) for name in reported if name.startswith(CONTAINER_LIMIT)}
    return ENGINE_LIMITS | own


class PodSpec(Frozen):
    """What a pod was asked for. Values of environment variables, the MCP configuration and a custom command's arguments
    are kept encrypted beside the spec; `environment_names` only names the variables."""

    agent_type: AgentType = AgentType.CLAUDE_CODE
    repository_id: int | None = None
    branch: str | None = None
    ticket_slug: str | None = None
    channel_id: int | None = None
    sandbox_type: SandboxType = SandboxType.TEMPDIR
    image: str | None = None
    environment_names: tuple[str, ...] = ()
    custom_command: str | None = None
    auto_close: bool = False
    auto_close_delay_seconds: int | None = None
    timeout_minutes: int | None = None
    max_turns: int | None = None
    limits: PodLimits = PodLimits()


class PodRef(Frozen):
    """A pod, as workflow and activities name it: they read the rest from the catalog, the runner from Kiln's API."""

    pod_id: str
    key: str
    organization_id: str
    runner_id: str


class PodRun(PodRef):
    """A pod workflow's whole input. `prompts` are those that the run before this one had not passed on yet."""

    prompts: tuple[str, ...] = ()


class PodClaimRequest(Frozen):
    """Activity `claim-pod`: `run_id` is the workflow run that asks."""

    pod: PodRef
    run_id: str


class PodResult(Frozen):
    """Activity `run-pod`: how the agent ended. `error` None and `exit_code` 0: it is done."""

    exit_code: int | None = None
    error: str | None = None
    ended_at: datetime | None = None


class PodEnd(Frozen):
    """Activity `record-pod-end`. `told` is False where the runner never said how the agent ended."""

    pod: PodRef
    result: PodResult
    told: bool = True


class PodPhase(StrEnum):
    """Where a pod's workflow is. Whether its runner has a place for it, and its agent runs, the pod's status says."""

    CLAIMING = "claiming"
    AT_RUNNER = "at_runner"
    CLOSING = "closing"
    ENDED = "ended"


class PodProgress(Frozen):
    """Query `status` of a pod's workflow. `status` is how the pod ended; `prompts` are signals not passed on yet."""

    key: str
    phase: PodPhase
    detail: str
    since: datetime | None = None
    prompts: int = 0
    status: PodStatus | None = None


class PodPromptRequest(Frozen):
    """Activity `prompt-pod`."""

    pod: PodRef
    text: str


class LostPods(Frozen):
    """Activity `look-after-pods`: what a round found to do."""

    lapsed: int = 0
    released: int = 0
    settled: int = 0
