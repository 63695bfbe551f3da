"""The catalog, as the activities use it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Protocol, TypeVar

from kiln.models import (
    AgentInstall,
    BuildEnd,
    BuildRef,
    BuildSpec,
    BuildStatus,
    BuiltImage,
    Claim,
    ContainerBuildSpec,
    ImageRef,
    MachineBuildSpec,
    SnapshotSpec,
    TransferSpec,
)
from kiln.ports.cloud import Ami
from kiln.ports.facts import ContextFacts, ImageFacts

S = TypeVar("S", MachineBuildSpec, ContainerBuildSpec, TransferSpec, SnapshotSpec)


@dataclass(frozen=True)
class Order:
    """An attempt that has begun: what it is to build, and by when. `secrets` are in clear: never log or heartbeat them."""

    build_id: str
    attempt: int
    spec: BuildSpec
    secrets: Mapping[str, str] = field(repr=False)
    known_ids: frozenset[str] = frozenset()
    deadline_at: datetime | None = None
    predecessor_lost: bool = False
    organization_id: str = ""
    platform: str = "linux/amd64"
    context_sha256: str | None = None

    @property
    def machine(self) -> MachineBuildSpec:
        """The spec of a machine image build; any other kind is a fault of the caller's."""
        return _spec_of(self, MachineBuildSpec)

    @property
    def container(self) -> ContainerBuildSpec:
        """The spec of a Dockerfile build; any other kind is a fault of the caller's."""
        return _spec_of(self, ContainerBuildSpec)

    @property
    def agent(self) -> AgentInstall:
        """What a container build from the agents' template installs; any other kind is a fault of the caller's."""
        if self.container.agent is None:
            raise TypeError(f"build {self.build_id} installs no agent")
        return self.container.agent

    @property
    def transfer(self) -> TransferSpec:
        """The spec of a transfer; any other kind is a fault of the caller's."""
        return _spec_of(self, TransferSpec)

    @property
    def snapshot(self) -> SnapshotSpec:
        """The spec of an image of a machine; any other kind is a fault of the caller's."""
        return _spec_of(self, SnapshotSpec)

    @property
    def region(self) -> str:
        """Where the AMI is made, for the kinds that make one."""
        return self.snapshot.region if isinstance(self.spec, SnapshotSpec) else self.machine.region


def _spec_of(order: Order, kind: type[S]) -> S:
    if not isinstance(order.spec, kind):
        raise TypeError(f"build {order.build_id} is no {kind.__name__}")
    return order.spec


@dataclass(frozen=True)
class Held:
    """Another attempt holds the build for so much longer."""

    remaining: timedelta


@dataclass(frozen=True)
class Footprint:
    """What the cleanup of a build must know. `remaining_lease` is how long a lost attempt's tool may still live;
    `published` is the AMI to spare; `account` is None if no attempt ever reached the cloud."""

    build_id: str
    attempt: int
    region: str
    account: str | None
    known_ids: frozenset[str]
    published: str | None
    remaining_lease: timedelta
    orderly: bool


@dataclass(frozen=True)
class ContainerFootprint:
    """What the cleanup of a container build must know. With a `publication`, the build is as good as succeeded: what is
    missing of it is to be done, not undone."""

    build_id: str
    attempt: int
    remaining_lease: timedelta
    orderly: bool
    publication: "Publication | None" = None


@dataclass(frozen=True)
class Publication:
    """An image whose publication has been committed: where it goes, under which tag."""

    repository: str
    tag: str
    digest: str


@dataclass(frozen=True)
class ContextOrder:
    """What a build waits for, and until when. `seconds_left` of `patience_seconds` may be negative."""

    key: str
    dockerfile: str
    started: bool
    wanted: bool
    seconds_left: float
    patience_seconds: int


@dataclass(frozen=True)
class Errand:
    """Something that the registry is still to do because the catalog says so (kiln/catalog/tables.py)."""

    id: str
    repository: str
    tag: str
    digest: str
    source_repository: str | None = None


@dataclass(frozen=True)
class DoomedImage:
    """An image that is being deleted, and what the catalog remembers behind it."""

    reference: str
    region: str
    account: str
    snapshot_ids: tuple[str, ...]


@dataclass(frozen=True)
class LivingImage:
    """An image that the catalog believes to be there."""

    image_id: str
    reference: str
    region: str
    account: str
    simulated: bool


@dataclass(frozen=True)
class BuildBrief:
    """A build in short: what the dispatcher and the house-keeping decide by."""

    ref: BuildRef
    status: BuildStatus
    run_id: str | None
    cancel_requested: bool
    created_at: datetime
    completed_at: datetime | None


class Ledger(Protocol):
    """The catalog as workflows' activities use it: each call is one transaction, and repeating it is harmless.

    Any call may raise UnavailableError; the others are named where they may come.
    """

    installation: str

    def claim(self, build_id: str, run_id: str) -> Claim:
        """Makes the build this run's own, unless another run has it or it is closed."""
        ...

    def begin(self, build_id: str, holder: str, lease: timedelta) -> Order | Held:
        """Begins the next attempt. Raises BuildCancelledError, BuildOverError."""
        ...

    def renew(self, build_id: str, attempt: int, lease: timedelta) -> None:
        """Holds the build for another `lease`. Raises AttemptLostError, BuildCancelledError, BuildOverError."""
        ...

    def release(self, build_id: str, attempt: int) -> None:
        """Gives the build up: the attempt's tool is gone."""
        ...

    def prepare(self, build_id: str, attempt: int, account: str) -> None:
        """Notes the account before anything is made in it. Raises AttemptLostError."""
        ...

    def tool_started(self, build_id: str, attempt: int, limit: timedelta) -> datetime:
        """Writes `building`; returns the deadline of the whole build. Raises AttemptLostError."""
        ...

    def note_ids(self, build_id: str, ids: Collection[str]) -> None:
        """Remembers resources that the tool named."""
        ...

    def publish(self, image: BuiltImage, build_id: str, ami: Ami, *, simulated: bool) -> BuildEnd:
        """Writes `succeeded` and the image's row together.

        Raises BuildCancelledError, BuildOverError, AttemptLostError: then nothing is published.
        """
        ...

    def begin_publication(self, image: BuiltImage, build_id: str, facts: ImageFacts, host: str) -> Publication:
        """Commits the image and its tag, before the registry is told: from now on a cancel changes nothing.

        Raises BuildCancelledError, BuildOverError, AttemptLostError: then nothing is published.
        """
        ...

    def finish_publication(self, build_id: str) -> BuildEnd:
        """Writes `succeeded`: the registry has it all."""
        ...

    def tagged(self, repository: str, tag: str) -> str | None:
        """The digest that a tag is to point at."""
        ...

    def needed(self, repository: str, digest: str) -> list[str]:
        """The tags of a repository that point at the digest, or will once their publication is done."""
        ...

    def in_use(self, digest: str) -> bool:
        """Whether an open pod runs from an image of this digest."""
        ...

    def may_pull(self, organization_id: str, repositories: Collection[str]) -> set[str]:
        """Those of the repositories of Kiln's registry that the organization may read."""
        ...

    def withheld(self, organization_id: str, digests: Collection[str]) -> set[str]:
        """Those of the digests that builds gave to images, none of which the organization may read.

        What was copied from a public registry is not among them: anybody may have it from there.
        """
        ...

    def context(self, build_id: str) -> ContextOrder | None:
        """What the build waits for; None if there is no such build, or it waits for none."""
        ...

    def start_context(self, build_id: str, facts: ContextFacts) -> bool:
        """Writes that the context has come and the build is queued; False if the build wants none any more."""
        ...

    def over(self, build_ids: Collection[str]) -> set[str]:
        """Those of the builds that are closed, or that nobody knows."""
        ...

    def errands(self, older_than: timedelta) -> list[Errand]:
        """What the registry was told a while ago and has not done, oldest first."""
        ...

    def errand_done(self, errand_id: str) -> None:
        """Forgets an errand."""
        ...

    def fence_container(self, build_id: str) -> ContainerFootprint:
        """`fence` for a build of a container image."""
        ...

    def note_cancel(self, build_id: str) -> None:
        """Notes a cancellation that came through Temporal rather than through the API."""
        ...

    def fence(self, build_id: str) -> Footprint:
        """Takes the build away from whichever attempt holds it, and says what the cleanup must know."""
        ...

    def finish(self, build_id: str, end: BuildEnd) -> BuildEnd:
        """Closes the build, and forgets its secrets. A closed one stays as it is; returns how it really ended."""
        ...

    def build_of(self, build_id: str) -> BuildBrief | None:
        """A build's state in short; None if the catalog has no such build."""
        ...

    def open_builds(self, older_than: timedelta) -> list[BuildBrief]:
        """Builds that are not closed, for the comparison with Temporal."""
        ...

    def requeue_lapsed(self) -> int:
        """Writes `queued` for builds whose attempt's lease is over."""
        ...

    def doomed(self, image_id: str) -> DoomedImage | None:
        """The image of this catalog id if it is being deleted."""
        ...

    def finish_deletion(self, image_id: str, kept: Collection[str]) -> None:
        """Records that an image is gone."""
        ...

    def stuck_deletions(self, older_than: timedelta) -> list[ImageRef]:
        """Deletions that began a while ago and are not recorded as done."""
        ...

    def living_images(self) -> list[LivingImage]:
        """Images that the catalog believes to be there."""
        ...

    def mark_gone(self, image_ids: Collection[str], reason: str) -> None:
        """Records images whose absence EC2 proved."""
        ...

    def tidy(self) -> None:
        """Drops what is past its day (idempotency keys)."""
        ...
