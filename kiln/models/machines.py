"""Images (templates) and machines of organizations, as Kiln's floors hand them to each other."""

from enum import IntEnum, StrEnum

from kiln.models.builds import Frozen


class ClientCode(IntEnum):
    """Why a request about an organization's images was refused (`organization-images.md`); other refusals have their
    HTTP status."""

    NO_IMAGE = 4208
    NOT_STOPPED = 4209
    IMAGE_UNAVAILABLE = 4210
    NO_MACHINES = 4211
    IMAGE_PENDING = 4212
    IMAGE_BUILDING = 4213
    NOT_ASSIGNABLE = 4214
    IMAGE_TOO_LARGE = 4510
    PERMISSION_REQUIRED = 4710


class Software(Frozen):
    """A program on an organization's image; `size` in GB."""

    id: int
    name: str
    size: float


class TemplateStatus(StrEnum):
    """An organization's image (template), in the words of `organization-images.md`."""

    PENDING = "pending"
    BUILDING = "building"
    AVAILABLE = "available"
    FAILED = "failed"


class TemplateSource(StrEnum):
    """What an organization's image was made of: a machine (`seat`), or a list of software."""

    SEAT = "seat"
    PRE_INSTALLATION = "pre_installation"


class FriendlyStatus(StrEnum):
    """A machine's state, in the words of `organization-images.md`."""

    OFF = "off"
    CREATING = "creating"
    TURNING_ON = "turning_on"
    READY = "ready"
    TURNING_OFF = "turning_off"
    INSTALLING = "installing"


class MachineOperation(StrEnum):
    """What is being done to a machine: at most one thing at a time."""

    CREATE = "create"
    REBUILD = "rebuild"
    START = "start"
    STOP = "stop"

    @property
    def launches(self) -> bool:
        """Whether it ends with an instance of its own making."""
        return self in (MachineOperation.CREATE, MachineOperation.REBUILD)


class OperationRef(Frozen):
    """A machine workflow's whole input: the `number`th operation on this machine. Activities read the rest from the
    catalog."""

    machine_id: int
    organization_id: str
    number: int
    operation: MachineOperation


class OperationClaimRequest(Frozen):
    """Activity `claim-operation`: which run asks for which operation."""

    operation: OperationRef
    run_id: str


class SourceState(StrEnum):
    """Whether the image that a machine is to be launched from is there."""

    WAITING = "waiting"
    READY = "ready"
    FAILED = "failed"


class SourceAnswer(Frozen):
    """Activity `find-source`: whether a machine's image is there; `message` says what is waited for, or why it failed."""

    state: SourceState
    message: str = ""


class LaunchedInstance(Frozen):
    """Activity `launch-instance`: the instance that the operation launched, now or in an earlier try."""

    operation: OperationRef
    instance_id: str


class OperationFailure(Frozen):
    """Activity `abandon-operation`: why an operation ends without what it was to do, in a sentence for users."""

    operation: OperationRef
    message: str


class LostOperations(Frozen):
    """What a look at the open operations did: how many were given back to the dispatcher."""

    released: int = 0
