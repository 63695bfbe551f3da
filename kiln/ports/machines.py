"""The machines of organizations: EC2 instances as Kiln runs them, and the catalog's word on what is to be done to them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Protocol

from kiln.models import OperationRef, SourceState


@dataclass(frozen=True)
class Placement:
    """Where and as whom an instance runs: what a recreated one takes over. "" and () mean EC2's defaults."""

    subnet_id: str = ""
    security_group_ids: tuple[str, ...] = ()
    key_name: str = ""
    instance_profile_arn: str = ""


@dataclass(frozen=True)
class Instance:
    """An EC2 instance. `state` is EC2's own word (`pending`, `running`, `stopping`, `stopped`, `shutting-down`,
    `terminated`), `state_reason` its reason for the last change, "" for none. `client_token` is the one that it was
    launched with, "" for none."""

    instance_id: str
    region: str
    state: str
    instance_type: str
    image_id: str
    launched_at: datetime
    tags: Mapping[str, str] = field(default_factory=dict)
    placement: Placement = Placement()
    state_reason: str = ""
    client_token: str = ""


@dataclass(frozen=True)
class Launch:
    """An instance to launch. Its root disk has `disk_gib`, or what the AMI's has if that is more. `tags` go on the
    instance and its volumes. The same `client_token` again launches nothing more (EC2 `RunInstances`)."""

    image_id: str
    instance_type: str
    disk_gib: int
    client_token: str
    tags: Mapping[str, str]
    placement: Placement = Placement()


class MachineCloud(Protocol):
    """EC2's instances. Any call may raise CloudUnavailableError, which a retry cures, and CloudRefusedError."""

    simulated: bool

    def account(self, region: str) -> str:
        """The account's id that the credentials belong to."""
        ...

    def instances(self, region: str, instance_ids: Collection[str]) -> dict[str, Instance]:
        """Those of the given instances that EC2 shows, terminated ones too, by id. Complete, or it raises."""
        ...

    def instances_of_machine(self, region: str, installation: str, machine_id: int) -> list[Instance]:
        """The instances that this installation launched for a machine (they carry `kiln:machine-launch`), less
        terminated ones, oldest first. One that was taken in is not among them."""
        ...

    def launched_instances(self, region: str, installation: str) -> list[Instance]:
        """All that this installation launched for machines (they carry `kiln:machine-launch`), less terminated ones."""
        ...

    def disk_gib(self, region: str, instance_id: str) -> int:
        """The size of an instance's root volume in GiB; 0 if EC2 shows none."""
        ...

    def base_image(self, region: str, owner: str, name: str) -> str | None:
        """The newest available AMI of an owner whose name matches (`*` for any); None if there is none."""
        ...

    def launch(self, region: str, launch: Launch) -> str:
        """The new instance's id. Raises CapacityError if EC2 has no room, ImageNotFoundError if the AMI is no more,
        ConflictError if the client token came with another launch."""
        ...

    def start_instance(self, region: str, instance_id: str) -> None:
        """Starts a stopped instance; a running one is left alone. Raises CapacityError, NotFoundError."""
        ...

    def stop_instance(self, region: str, instance_id: str, *, force: bool) -> None:
        """Stops an instance; a stopped one is left alone. `force` does not wait for its operating system. Raises
        NotFoundError."""
        ...

    def terminate_instance(self, region: str, instance_id: str) -> bool:
        """Asks for an instance's end; True once EC2 shows it as terminated, or no more."""
        ...

    def create_image(self, region: str, instance_id: str, name: str, tags: Mapping[str, str]) -> str:
        """The id of the AMI that EC2 begins to make of an instance's disks, without a reboot (EC2 `CreateImage`).

        Raises NotFoundError if there is no such instance, ConflictError if an AMI has the name already.
        """
        ...

    def tag(self, region: str, resource_ids: Collection[str], tags: Mapping[str, str]) -> None:
        """Puts tags on resources (EC2 `CreateTags`)."""
        ...


@dataclass(frozen=True)
class MachineOrder:
    """What an open operation is to do. `account` is None until something was made in it; `tags` are the user's own."""

    ref: OperationRef
    name: str
    region: str
    account: str | None
    instance_id: str | None
    next_instance_id: str | None
    instance_type: str
    disk_gib: int
    tags: Mapping[str, str]
    placement: Placement
    forced: bool = False


@dataclass(frozen=True)
class MachineSource:
    """What a machine is to be launched from: an AMI, or a base image of the software catalogue, once it is `ready`."""

    state: SourceState
    message: str = ""
    image_id: str | None = None
    base_image_id: int | None = None


@dataclass(frozen=True)
class OperationBrief:
    """An open operation in short: what the dispatcher and the house-keeping decide by."""

    ref: OperationRef
    run_id: str | None


@dataclass(frozen=True)
class LivingMachine:
    """A machine whose instance is there, or may be; `state` is EC2's last word on it, "" for none."""

    machine_id: int
    instance_id: str
    region: str
    account: str
    simulated: bool
    state: str


@dataclass(frozen=True)
class Retired:
    """An instance that is to be terminated; `retired_at` is the catalog's to fill in."""

    machine_id: int
    instance_id: str
    region: str
    account: str
    retired_at: datetime | None = None


@dataclass(frozen=True)
class Holdings:
    """What a machine has in EC2, or is about to have. While an operation is open, it may have launched an instance that
    is not among `instance_ids` yet. `account` is None if nothing was ever made for it."""

    region: str
    account: str | None
    instance_ids: frozenset[str]
    operation_open: bool


class MachineLedger(Protocol):
    """The catalog's word on machines: each call is one transaction, and repeating it is harmless.

    What a call writes for an operation, it writes only while that operation is the machine's open one; else it raises
    OperationOverError. Any call may raise UnavailableError.
    """

    installation: str

    def claim_operation(self, ref: OperationRef, run_id: str) -> bool:
        """Makes the open operation this run's own; False if it is over, or another run's."""
        ...

    def machine_order(self, ref: OperationRef) -> MachineOrder:
        """What the operation is to do. Raises OperationOverError."""
        ...

    def source(self, ref: OperationRef) -> MachineSource:
        """What the operation launches from, by the assignment with which it began. Raises OperationOverError."""
        ...

    def note_account(self, ref: OperationRef, account: str) -> None:
        """Notes the account before anything is launched in it. Raises OperationOverError."""
        ...

    def note_launch(self, ref: OperationRef, instance_id: str) -> str:
        """Remembers what the operation launched first, and returns it; what comes after it is retired.

        Raises OperationOverError, OperationFailedError.
        """
        ...

    def adopt_instance(self, ref: OperationRef, instance: Instance) -> None:
        """Makes the launched instance the machine's own, retires the one before it, and ends the operation, all in one.

        Done already, it does nothing. Raises OperationOverError.
        """
        ...

    def finish_operation(self, ref: OperationRef, state: str | None, error: str | None = None) -> None:
        """Ends the operation: `state` is EC2's word for the machine's instance now (None: as it was), `error` why it
        failed. What it launched and did not adopt is retired. Over already, it does nothing."""
        ...

    def retire(self, retired: Sequence[Retired]) -> None:
        """Notes instances that are to be terminated; one that a machine has, or is about to have, is left out."""
        ...

    def retired(self, older_than: timedelta, machine_id: int | None = None) -> list[Retired]:
        """Instances that are to be terminated, oldest first; of one machine only, where one is named."""
        ...

    def forget_retired(self, region: str, instance_id: str) -> None:
        """Notes that a retired instance is gone."""
        ...

    def open_operations(self, older_than: timedelta) -> list[OperationBrief]:
        """Operations that have had `older_than` to get going, oldest first."""
        ...

    def release_operation(self, ref: OperationRef, run_id: str) -> bool:
        """Gives an operation whose run is no more back to the dispatcher; False if it is over or another run's."""
        ...

    def living_machines(self) -> list[LivingMachine]:
        """Machines with an instance that is not known to be terminated, or not for long; less those with an open
        operation."""
        ...

    def observed(self, machine: LivingMachine, state: str, asked_at: datetime) -> None:
        """Writes what EC2 said at `asked_at`, unless the machine has another instance or an operation by now, or was
        written later than that."""
        ...

    def holdings(self, machine_id: int) -> Holdings | None:
        """What a machine has in EC2; None if there is no such machine."""
        ...
