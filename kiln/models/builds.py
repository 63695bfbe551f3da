"""Builds, as Kiln's floors hand them to each other."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Frozen(BaseModel):
    """A value object: immutable, and strict about unknown names only where a contract says so."""

    model_config = ConfigDict(frozen=True)


class BuildKind(StrEnum):
    """What a build makes, in the words of `kiln.md`."""

    MACHINE = "machine"
    CONTAINER = "container"
    TRANSFER = "transfer"
    SNAPSHOT = "snapshot"
    REGISTRATION = "registration"


class Api(StrEnum):
    """The contract through which a build came."""

    MACHINE_IMAGES = "machine-images"
    CONTAINER_IMAGES = "container-images"
    CLOUD_BUILDS = "cloud-builds"
    ORGANIZATION_IMAGES = "organization-images"


class BuildStatus(StrEnum):
    """A build's life as the catalog keeps it. `cancelling` is an open status with a cancel request; see `shown_status`."""

    AWAITING_CONTEXT = "awaiting_context"
    QUEUED = "queued"
    BUILDING = "building"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    CANCELLING = "cancelling"

    @property
    def is_open(self) -> bool:
        return self in OPEN_STATUSES


OPEN_STATUSES = frozenset(
    {BuildStatus.AWAITING_CONTEXT, BuildStatus.QUEUED, BuildStatus.BUILDING, BuildStatus.CANCELLING}
)


class ErrorCode(StrEnum):
    """Why a build failed, in the words of `kiln.md`."""

    TOOL_FAILED = "tool_failed"
    TIMED_OUT = "timed_out"
    CONTEXT_MISSING = "context_missing"
    CONTEXT_INVALID = "context_invalid"
    SOURCE_UNAVAILABLE = "source_unavailable"
    CAPACITY = "capacity"
    VERIFICATION_FAILED = "verification_failed"
    WORKFLOW_TERMINATED = "workflow_terminated"
    INTERNAL = "internal"


class Failure(Frozen):
    """A build's error as it is recorded and shown."""

    code: ErrorCode
    message: str


class Provider(StrEnum):
    """The coding agents that Kiln's own template installs."""

    CLAUDE_CODE = "claude-code"
    CODEX = "codex"
    GEMINI = "gemini"
    CURSOR = "cursor"


class MachineBuildSpec(Frozen):
    """What an AMI build was asked for. `variables` holds no secret value: those are kept encrypted beside the spec."""

    kind: Literal[BuildKind.MACHINE] = BuildKind.MACHINE
    provider: str
    region: str
    instance_type: str
    template: str
    variables: dict[str, str] = Field(default_factory=dict)
    secret_names: tuple[str, ...] = ()
    tags: dict[str, str] = Field(default_factory=dict)


class OwnerType(StrEnum):
    """Whose namespace a container image stands in (`container-images.md`)."""

    PERSONAL = "personal"
    TEAM = "team"
    PLATFORM = "platform"


class Visibility(StrEnum):
    """Who may pull a container image: its organization's keys, or any key."""

    PRIVATE = "PRIVATE"
    PUBLIC = "PUBLIC"


class Target(Frozen):
    """Where a container image goes. `owner` is the first segment of its path: the organization's slug, `team-{id}` or
    `platform`; `name` the rest. `visibility` None: an existing tag keeps its own, a new one is PRIVATE."""

    owner_type: OwnerType
    owner: str
    name: str
    tag: str
    visibility: Visibility | None = None

    @property
    def repository(self) -> str:
        return f"{self.owner}/{self.name}"

    @property
    def display(self) -> str:
        """`{owner}/{name}:{tag}`."""
        return f"{self.repository}:{self.tag}"


class SourceNotes(Frozen):
    """What a cloud-builds client says of where its context came from; Kiln keeps it, and reads nothing into it."""

    source_commit: str | None = None
    source_dirty: bool | None = None
    source_ref: str | None = None
    source_repo: str | None = None
    source_subpath: str | None = None
    working_tree_hash: str | None = None


class AgentInstall(Frozen):
    """An agent that Kiln's own template installs on a base image, which is a whole reference
    (`docker.io/library/debian:bookworm-slim`). `extra_packages` are joined with spaces; without `npm_registry` it is
    npm's default."""

    provider: Provider
    version: str = "latest"
    base_image: str
    extra_packages: str = ""
    npm_registry: str = ""


class ContainerBuildSpec(Frozen):
    """What a container build was asked for: a Dockerfile's, or an `agent`. Build arguments whose name says that they are
    secret are kept encrypted beside the spec, and only named here."""

    kind: Literal[BuildKind.CONTAINER] = BuildKind.CONTAINER
    target: Target
    dockerfile: str = "Dockerfile"
    build_args: dict[str, str] = Field(default_factory=dict)
    secret_names: tuple[str, ...] = ()
    source: SourceNotes = SourceNotes()
    agent: AgentInstall | None = None


class TransferSpec(Frozen):
    """A copy of a public image, all its platforms. `reference` is whole: `docker.io/library/busybox:1.36`."""

    kind: Literal[BuildKind.TRANSFER] = BuildKind.TRANSFER
    target: Target
    reference: str


class RegistrationSpec(Frozen):
    """A finished image that was made known to Kiln; `reference` is whole and names a digest."""

    kind: Literal[BuildKind.REGISTRATION] = BuildKind.REGISTRATION
    target: Target
    reference: str
    source: SourceNotes = SourceNotes()


class SnapshotSpec(Frozen):
    """An AMI of a stopped machine's disks (EC2 `CreateImage`). `machine_id` is the catalog's, `instance_id` EC2's."""

    kind: Literal[BuildKind.SNAPSHOT] = BuildKind.SNAPSHOT
    machine_id: int
    instance_id: str
    region: str


ImageSpec = ContainerBuildSpec | TransferSpec | RegistrationSpec
BuildSpec = Annotated[
    MachineBuildSpec | ContainerBuildSpec | TransferSpec | RegistrationSpec | SnapshotSpec, Field(discriminator="kind")
]


class BuildRef(Frozen):
    """A build workflow's whole input: activities read the rest from the catalog.

    `installs_agent`: a container image that Packer makes from the agents' template.
    """

    build_id: str
    organization_id: str
    kind: BuildKind
    platform: str = "linux/amd64"
    awaits_context: bool = False
    installs_agent: bool = False


class ImageRef(Frozen):
    """A deletion workflow's whole input. `image_id` is the catalog's id of the image, not the AMI's."""

    image_id: str
    organization_id: str


class Claim(Frozen):
    """The answer to a run that asks whether the build is its own."""

    mine: bool
    cancelled: bool = False
    heartbeat_timeout_seconds: float = 15.0
    max_attempts: int = 10


class BuiltImage(Frozen):
    """What a builder made, as the cloud or the registry named it: an AMI's id, or a manifest's digest.

    For a container image, `region` is empty and `account` the registry's host.
    """

    image_id: str
    region: str
    account: str
    attempt: int
    adopted: bool = False


class ImageView(Frozen):
    """An image as `kiln.md` shows it inside a build. A container image's reference names its digest."""

    kind: Literal["ami", "container"] = "ami"
    reference: str
    digest: str | None = None
    region: str | None = None
    platform: str | None = None
    size_bytes: int | None = None
    simulated: bool = False


class BuildEnd(Frozen):
    """How a build ended: what the workflow returns and `record` writes."""

    status: BuildStatus
    error: Failure | None = None
    image: ImageView | None = None


class Progress(Frozen):
    """What a live build is doing now."""

    phase: str
    detail: str
    attempt: int = 0
    since: datetime | None = None
    last_line: str | None = None
    waiting_for: str | None = None


class BuildStatusView(Frozen):
    """The answer of a build workflow's `status` query: the build, less what only the catalog knows."""

    id: str
    kind: BuildKind
    status: BuildStatus
    attempt: int
    image: ImageView | None
    error: Failure | None
    progress: Progress | None


class ContextState(StrEnum):
    """What a build's workflow hears when it asks for its context."""

    AWAITED = "awaited"
    READY = "ready"
    EXPIRED = "expired"


class ContextAnswer(Frozen):
    """Activity `accept-context`: whether the context is there; `seconds_left` until it is no longer waited for.

    `message` says of an expired one what was waited for.
    """

    state: ContextState
    seconds_left: float = 0.0
    message: str = ""


class ContextRequest(Frozen):
    """Activity `accept-context`: `announced` when somebody signalled that the context has come."""

    build: BuildRef
    announced: bool = False


class BuilderReport(Frozen):
    """Signal `builder_report`: what a builder tells its workflow, for the Temporal UI and the `status` query."""

    phase: Literal["building"]
    attempt: int
    detail: str


class ClaimRequest(Frozen):
    """Activity `claim-build`: which run asks for which build."""

    build: BuildRef
    run_id: str


class PublishRequest(Frozen):
    """Activity `publish-image`: what a builder made of which build."""

    build: BuildRef
    image: BuiltImage


class EndRequest(Frozen):
    """Activity `record-end`: how a build ended."""

    build: BuildRef
    end: BuildEnd


class CleanupReport(Frozen):
    """What a cleanup saw go."""

    removed: tuple[str, ...] = ()


class LostBuild(Frozen):
    """An open build without a running workflow; `cancelled` if its cancellation had been asked for."""

    build: BuildRef
    cancelled: bool = False


class HouseReport(Frozen):
    """Builds whose workflow is no more, to be cleaned up after."""

    lost: tuple[LostBuild, ...] = ()


class HouseTerms(Frozen):
    """Workflow `keep-house`: how long it rests between rounds, and every how many rounds it sweeps."""

    pause_seconds: float = 10.0
    rounds_a_sweep: int = 30
    round: int = 0
