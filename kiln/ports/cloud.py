"""EC2, as Kiln uses it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol


@dataclass(frozen=True)
class Ami:
    """An AMI as EC2 has it. `state` is EC2's own word (`pending`, `available`, `failed`, `deregistered`, …)."""

    image_id: str
    name: str
    state: str
    created_at: datetime
    tags: Mapping[str, str]
    snapshot_ids: tuple[str, ...]
    size_gib: int
    architecture: str
    state_reason: str | None = None


@dataclass(frozen=True)
class Marks:
    """How to recognise what a build made: its tag, the end of its names, and the ids that its log named."""

    installation: str
    build_id: str
    known_ids: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Resource:
    """One thing in EC2 that carries this installation's tag. `kind` is `instance`, `image`, `snapshot`, `volume`,
    `key-pair` or `security-group`; `state` is EC2's own word where it has one."""

    kind: str
    resource_id: str
    region: str
    build_id: str
    name: str = ""
    state: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.resource_id}"


@dataclass(frozen=True)
class ImageDeletion:
    """What one pass of deleting an AMI left: `remaining` is not gone yet, `kept` is in use by another AMI."""

    remaining: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    @property
    def done(self) -> bool:
        return not self.remaining


@dataclass(frozen=True)
class SecurityGroupRequest:
    """A temporary security group: its name, tags, the subnet whose VPC it goes to ("" = the default VPC) and who may
    reach port 22 ("" = nobody)."""

    name: str
    tags: Mapping[str, str] = field(default_factory=dict)
    subnet_id: str = ""
    ssh_cidr: str = ""


class Cloud(Protocol):
    """EC2, as Kiln uses it. Any call may raise `CloudUnavailableError` (kiln.adapters.ec2), which a retry cures."""

    simulated: bool

    def account(self, region: str) -> str:
        """The account's id that the credentials belong to (STS `GetCallerIdentity`)."""
        ...

    def make_security_group(self, region: str, request: SecurityGroupRequest) -> str:
        """The id of the security group of this name; made if it is not there yet."""
        ...

    def image(self, region: str, image_id: str) -> Ami | None:
        """The account's own AMI of this id, in any state; None if EC2 says that there is none."""
        ...

    def images_of_build(self, region: str, marks: Marks) -> list[Ami]:
        """Every AMI of a build (by tag, by name, by known id), newest first, in any state."""
        ...

    def own_images(self, region: str, image_ids: Collection[str]) -> dict[str, Ami]:
        """Those of the given AMIs that EC2 has. Complete, or it raises: an absence in the answer is a proof."""
        ...

    def tag(self, region: str, resource_ids: Collection[str], tags: Mapping[str, str]) -> None:
        """Puts tags on resources (EC2 `CreateTags`)."""
        ...

    def end_instances(self, region: str, marks: Marks) -> list[Resource]:
        """Terminates a build's instances; returns those that are not terminated yet."""
        ...

    def remove_leftovers(self, region: str, marks: Marks, spare: Collection[str]) -> list[Resource]:
        """One pass over everything a build made, less the AMIs in `spare` and their snapshots. Returns what is still
        there (an instance that shuts down, an AMI that is still pending, …): call again until nothing is."""
        ...

    def delete_image(self, region: str, image_id: str, snapshot_ids: Collection[str]) -> ImageDeletion:
        """One pass of deregistering an AMI and then deleting every snapshot behind it. Repeating it is harmless."""
        ...

    def tagged_resources(self, region: str, installation: str) -> list[Resource]:
        """Everything that carries this installation's tag, less terminated instances."""
        ...

    def remove(self, resource: Resource) -> bool:
        """One attempt to remove a resource; True if it is gone."""
        ...
