"""How a machine stands: in SQL, so that a list can be narrowed to what it shows."""

from dataclasses import dataclass

from sqlalchemy import ColumnElement, case, select
from sqlalchemy.orm import Session

from kiln.catalog.builds import OPEN
from kiln.catalog.tables import Build, Machine
from kiln.models import FriendlyStatus, MachineOperation

TERMINATED = "terminated"
IN_OPERATION = {
    MachineOperation.CREATE: FriendlyStatus.CREATING,
    MachineOperation.REBUILD: FriendlyStatus.INSTALLING,
    MachineOperation.START: FriendlyStatus.TURNING_ON,
    MachineOperation.STOP: FriendlyStatus.TURNING_OFF,
}
IN_EC2 = {
    "running": FriendlyStatus.READY,
    "pending": FriendlyStatus.TURNING_ON,
    "stopping": FriendlyStatus.TURNING_OFF,
    "shutting-down": FriendlyStatus.TURNING_OFF,
}


@dataclass(frozen=True)
class Standing:
    """A machine's status; `imaging` while an image of it is being made."""

    status: FriendlyStatus
    imaging: bool


def friendly_status() -> ColumnElement[str]:
    """A machine's status in the words of `organization-images.md`: what is being done to it, else what EC2 says."""
    return case(
        *((Machine.operation == operation.value, status.value) for operation, status in IN_OPERATION.items()),
        (is_imaging(), FriendlyStatus.INSTALLING.value),
        *((Machine.ec2_state == state, status.value) for state, status in IN_EC2.items()),
        else_=FriendlyStatus.OFF.value,
    )


def is_imaging() -> ColumnElement[bool]:
    """Whether an image of the machine is being made."""
    # Not a join, nor a look at each one's build: of a long list, open builds are the fewest to read.
    return Machine.imaging_build_id.in_(select(Build.id).where(Build.status.in_(OPEN)))


def standing(session: Session, machine_id: int) -> Standing:
    """How a machine that is there stands."""
    query = select(friendly_status(), is_imaging()).select_from(Machine).where(Machine.id == machine_id)
    status, imaging = session.execute(query).one()
    return Standing(FriendlyStatus(status), imaging=bool(imaging))
