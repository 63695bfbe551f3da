"""What the API has done to machines: an image made of one, one assigned to some, one started or stopped.

Each order is written under the lock of the machine's row, and of a template's row before it (see `templates.py`).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice

from sqlalchemy import select
from sqlalchemy.orm import Session

from kiln.catalog import templates
from kiln.catalog.builds import OPEN
from kiln.catalog.machine_status import TERMINATED, standing
from kiln.catalog.machines import operation_ref
from kiln.catalog.names import is_id
from kiln.catalog.tables import Build, Machine, Template
from kiln.catalog.templates import KnownTemplate, NewTemplate
from kiln.errors import InvalidRequestError, NotFoundError, RefusedError
from kiln.models import ClientCode, FriendlyStatus, MachineOperation, OperationRef

# Fewer than the variables that SQLite takes in one statement.
LOCKED_AT_ONCE = 500
# A caller's own number is repeated to them, but not at any length.
DIGITS_SHOWN = 100
NOT_OFF = {
    FriendlyStatus.CREATING: "is still being created",
    FriendlyStatus.INSTALLING: "is being installed, or an image of it is being made",
    FriendlyStatus.TURNING_ON: "is turning on",
    FriendlyStatus.READY: "is running",
    FriendlyStatus.TURNING_OFF: "is turning off",
}


def order_image(
    tx: Session, organization_id: str, machine_id: int, new_template: Callable[[Machine], NewTemplate]
) -> KnownTemplate:
    """Writes a template of a stopped machine's disks, and that the machine waits for it; `new_template` says which.

    Raises NotFoundError; RefusedError if there is nothing to make it of, one is being made, or the machine is not off.
    """
    row = _locked(tx, organization_id, machine_id)
    _require_imageable(tx, row)
    known = templates.insert(tx, new_template(row))
    row.imaging_build_id = known.build.id
    row.updated_at = datetime.now(UTC)
    tx.flush()
    return known


def _require_imageable(tx: Session, row: Machine) -> None:
    stands = standing(tx, row.id)
    creating = row.operation == MachineOperation.CREATE.value
    if not creating and (row.instance_id is None or row.ec2_state == TERMINATED):
        raise RefusedError(f"{row.name} has no instance to make an image of", ClientCode.NO_IMAGE)
    if creating or stands.imaging:
        raise RefusedError(f"{row.name} {_not_off(stands.status)}", ClientCode.IMAGE_PENDING)
    if stands.status is not FriendlyStatus.OFF:
        raise RefusedError(f"{row.name} {_not_off(stands.status)}: stop it first", ClientCode.NOT_STOPPED)


def assign(tx: Session, organization_id: str, template_id: int, machine_ids: Collection[int]) -> None:
    """Has machines recreated from a template at their next start: all of them, or none. A later assignment wins.

    Raises NotFoundError for the template; RefusedError, each for the first machine that stands against it.
    """
    known = templates.find(tx, organization_id, template_id, lock=True)
    if known is None:
        raise NotFoundError("no image of this organization has this id")
    templates.require_available(known)
    rows = _locked_all(tx, organization_id, machine_ids)
    _require_assignable(tx, rows, known.template)
    for row in rows:
        row.template_id = known.template.id
        row.assignment += 1
        row.updated_at = datetime.now(UTC)
    tx.flush()


def _locked_all(tx: Session, organization_id: str, machine_ids: Collection[int]) -> list[Machine]:
    """The machines by id. Raises RefusedError if there are none, or one is not the organization's."""
    wanted = sorted(set(machine_ids))
    rows: list[Machine] = []
    for some in _in_batches([number for number in wanted if is_id(number)]):
        query = select(Machine).where(Machine.organization_id == organization_id, Machine.id.in_(some))
        locking = query.order_by(Machine.id).with_for_update(key_share=True)
        rows += tx.scalars(locking.execution_options(populate_existing=True))
    missing = sorted(set(wanted) - {row.id for row in rows})
    if missing or not rows:
        named = f": {str(missing[0])[:DIGITS_SHOWN]}" if missing else ""
        raise RefusedError(f"machine_ids: no machine of this organization{named}", ClientCode.NO_MACHINES)
    return rows


def _in_batches(numbers: Sequence[int]) -> Iterator[list[int]]:
    remaining = iter(numbers)
    while some := list(islice(remaining, LOCKED_AT_ONCE)):
        yield some


def _require_assignable(tx: Session, rows: Sequence[Machine], template: Template) -> None:
    imaging = _imaging(tx, rows)
    for row in rows:
        if row.imaging_build_id in imaging:
            raise RefusedError(f"an image of {row.name} is being made", ClientCode.NOT_ASSIGNABLE)
        if row.region != template.region:
            message = f"{row.name} is in {row.region}, and the image in {template.region}"
            raise RefusedError(message, ClientCode.NOT_ASSIGNABLE)
    for row in rows:
        if template.size_gb > row.disk_gib:
            message = f"the image has {template.size_gb} GB, and the disk of {row.name} {row.disk_gib}"
            raise RefusedError(message, ClientCode.IMAGE_TOO_LARGE)


def _imaging(tx: Session, rows: Sequence[Machine]) -> set[str]:
    """The builds that are making images of the machines."""
    last = [row.imaging_build_id for row in rows if row.imaging_build_id is not None]
    found: set[str] = set()
    for start in range(0, len(last), LOCKED_AT_ONCE):
        some = last[start : start + LOCKED_AT_ONCE]
        found.update(tx.scalars(select(Build.id).where(Build.id.in_(some), Build.status.in_(OPEN))))
    return found


def order_start(tx: Session, organization_id: str, machine_id: int, region: str | None = None) -> OperationRef:
    """Has a machine started; one that awaits an image is recreated from it.

    Raises NotFoundError, InvalidRequestError for a `region` that is not its own; RefusedError if it is not off, has
    nothing to start, or the image that it awaits is not available.
    """
    row = _locked(tx, organization_id, machine_id)
    if region is not None and region != row.region:
        raise InvalidRequestError("region", f"{row.name} is in {row.region}")
    stands = standing(tx, row.id)
    if stands.status is not FriendlyStatus.OFF:
        raise RefusedError(f"{row.name} {_not_off(stands.status)}")
    if row.assignment > row.built_assignment:
        return _open_rebuild(tx, row)
    if row.instance_id is None or row.ec2_state == TERMINATED:
        raise RefusedError(f"{row.name} has no instance any more: assign an image to it first")
    return _open(tx, row, MachineOperation.START)


def order_stop(tx: Session, organization_id: str, machine_id: int, *, force: bool = False) -> OperationRef:
    """Has a running machine stopped; `force` does not wait for its operating system.

    Raises NotFoundError; RefusedError if it is not ready.
    """
    row = _locked(tx, organization_id, machine_id)
    status = standing(tx, row.id).status
    if status is FriendlyStatus.OFF:
        raise RefusedError(f"{row.name} is off already")
    if status is not FriendlyStatus.READY:
        raise RefusedError(f"{row.name} {_not_off(status)}")
    return _open(tx, row, MachineOperation.STOP, force=force)


def _open_rebuild(tx: Session, row: Machine) -> OperationRef:
    # No lock on the template: as long as this machine awaits it, nobody deletes it.
    if row.template_id is not None:
        known = templates.find(tx, row.organization_id, row.template_id)
        if known is None:
            raise RefusedError(f"the image of {row.name} is no more", ClientCode.IMAGE_UNAVAILABLE)
        templates.require_available(known)
    row.launching_template_id = row.template_id
    row.launching_assignment = row.assignment
    return _open(tx, row, MachineOperation.REBUILD)


def _open(tx: Session, row: Machine, operation: MachineOperation, *, force: bool = False) -> OperationRef:
    now = datetime.now(UTC)
    row.operation = operation.value
    row.operation_number += 1
    row.operation_at = row.updated_at = now
    row.operation_run = row.operation_error = row.next_instance_id = None
    row.operation_forced = force
    tx.flush()
    return operation_ref(row)


def _locked(tx: Session, organization_id: str, machine_id: int) -> Machine:
    """The organization's machine, kept from all others' writes until the transaction's end. Raises NotFoundError."""
    query = select(Machine).where(Machine.id == machine_id, Machine.organization_id == organization_id)
    locking = query.with_for_update(key_share=True).execution_options(populate_existing=True)
    row = tx.scalars(locking).first() if is_id(machine_id) else None
    if row is None:
        raise NotFoundError("no machine of this organization has this id")
    return row


def _not_off(status: FriendlyStatus) -> str:
    return NOT_OFF.get(status, "is off")
