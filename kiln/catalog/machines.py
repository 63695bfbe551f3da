"""Queries about the machines of organizations: insert, take in, look up, page, remove. Orders stand in
`machine_orders.py`, what operations write in `machine_operations.py`."""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Row, Select, and_, delete, or_, select
from sqlalchemy.orm import Session

from kiln.catalog.machine_status import TERMINATED, friendly_status, standing
from kiln.catalog.names import contains, is_id, search_key
from kiln.catalog.numbered_pages import page_of_ids
from kiln.catalog.tables import Machine, Organization, RetiredInstance, Template
from kiln.errors import NotFoundError, RefusedError
from kiln.models import FriendlyStatus, MachineOperation, OperationRef
from kiln.naming import users_tags
from kiln.ports import Instance, Placement


@dataclass(frozen=True)
class NewMachine:
    """A machine to create, from a template or from a base image of the software catalogue. `name` None: `Machine #{id}`.

    Of an existing template, the caller holds the row (`templates.find` with `lock`), lest it is deleted meanwhile.
    """

    organization_id: str
    name: str | None
    region: str
    instance_type: str
    disk_gib: int
    simulated: bool
    template_id: int | None = None
    base_image_id: int | None = None


@dataclass(frozen=True)
class KnownMachine:
    """A machine's row, the template that was assigned to it last unless that is deleted, and its status."""

    machine: Machine
    template: Template | None
    status: FriendlyStatus


def insert(tx: Session, new: NewMachine) -> Machine:
    """Writes a machine whose creation is ordered: the row is the order that the dispatcher carries out."""
    now = datetime.now(UTC)
    return _insert(
        tx,
        Machine(
            **_first_columns(new.organization_id, new.region, new.instance_type, new.disk_gib, simulated=new.simulated),
            template_id=new.template_id,
            base_image_id=new.base_image_id,
            assignment=1,
            operation=MachineOperation.CREATE.value,
            operation_number=1,
            operation_at=now,
            launching_template_id=new.template_id,
            launching_assignment=1,
        ),
        new.name,
    )


def take_in(  # noqa: PLR0913  what EC2 does not say
    tx: Session,
    organization_id: str,
    instance: Instance,
    *,
    account: str,
    simulated: bool,
    disk_gib: int,
    name: str | None = None,
) -> Machine:
    """Writes an instance that is there already as a machine.

    Raises RefusedError if it is a machine already, or is about to be terminated.
    """
    _require_nobodys(tx, account, instance)
    return _insert(
        tx,
        Machine(
            **_first_columns(organization_id, instance.region, instance.instance_type, disk_gib, simulated=simulated),
            account=account,
            instance_id=instance.instance_id,
            ec2_state=instance.state,
            state_at=datetime.now(UTC),
            placement=placement_columns(instance.placement),
            tags=users_tags(instance.tags),
        ),
        name,
    )


def placement_columns(placement: Placement) -> dict[str, Any]:
    """A placement as the column keeps it."""
    return {**asdict(placement), "security_group_ids": list(placement.security_group_ids)}


def placement_of(row: Machine) -> Placement:
    """Where a machine's instances run."""
    kept = {**row.placement, "security_group_ids": tuple(row.placement.get("security_group_ids", ()))}
    return Placement(**kept)


def _first_columns(
    organization_id: str, region: str, instance_type: str, disk_gib: int, *, simulated: bool
) -> dict[str, Any]:
    now = datetime.now(UTC)
    return {
        "organization_id": organization_id,
        "name": "",
        "name_key": "",
        "region": region,
        "instance_type": instance_type,
        "disk_gib": disk_gib,
        "simulated": simulated,
        "created_at": now,
        "updated_at": now,
    }


def _insert(tx: Session, row: Machine, name: str | None) -> Machine:
    tx.add(row)
    tx.flush()
    row.name = f"Machine #{row.id}" if name is None else name
    row.name_key = search_key(row.name)
    tx.flush()
    return row


def _require_nobodys(tx: Session, account: str, instance: Instance) -> None:
    here = (Machine.account == account, Machine.region == instance.region)
    theirs = or_(Machine.instance_id == instance.instance_id, Machine.next_instance_id == instance.instance_id)
    known = tx.scalar(select(Machine.id).where(*here, theirs).limit(1))
    if known is not None:
        raise RefusedError(f"{instance.instance_id} is machine {known} already")
    if tx.get(RetiredInstance, (instance.region, instance.instance_id)) is not None:
        raise RefusedError(f"{instance.instance_id} is about to be terminated")


def find(session: Session, organization_id: str, machine_id: int) -> KnownMachine | None:
    """An organization's machine."""
    if not is_id(machine_id):
        return None
    own = (Machine.id == machine_id, Machine.organization_id == organization_id)
    row = session.execute(_rows().where(*own)).first()
    return None if row is None else _known(row)


def page(  # noqa: PLR0913, PLR0917  the contract's query
    session: Session, organization_id: str, q: str, statuses: Collection[str] | None, page: int, per_page: int
) -> tuple[list[KnownMachine], int]:
    """The `page`th page (from 1 on), by id, of the machines whose name contains `q` whatever its case and whose status
    is one of `statuses`, where any are given; and how many there are in all."""
    wanted = [Machine.organization_id == organization_id]
    if q:
        wanted.append(contains(session, Machine.name_key, q))
    if statuses is not None:
        wanted.append(friendly_status().in_(statuses))
    ids = select(Machine.id).where(*wanted)
    shown, total = page_of_ids(session, ids, page, per_page)
    rows = session.execute(_rows().where(Machine.id.in_(shown)).order_by(Machine.id))
    return [_known(row) for row in rows], total


def listing(session: Session) -> list[tuple[KnownMachine, str]]:
    """Every machine with its organization's slug, by id."""
    query = _rows().add_columns(Organization.slug).join(Organization, Organization.id == Machine.organization_id)
    rows = session.execute(query.order_by(Machine.id))
    return [(KnownMachine(row[0], row[1], FriendlyStatus(row[2])), row[3]) for row in rows]


def remove(tx: Session, machine_id: int) -> None:
    """Forgets a machine that has nothing in EC2.

    Raises NotFoundError; RefusedError while it has an instance, or something is being done to it.
    """
    row = tx.get(Machine, machine_id, with_for_update=True, populate_existing=True) if is_id(machine_id) else None
    if row is None:
        raise NotFoundError(f"there is no machine {machine_id}")
    if row.instance_id is not None and row.ec2_state != TERMINATED:
        raise RefusedError(f"machine {row.id} has an instance: terminate {row.instance_id} first")
    status = standing(tx, row.id).status
    if status is not FriendlyStatus.OFF:
        raise RefusedError(f"machine {row.id} is {status}")
    tx.delete(row)
    tx.flush()


def let_go(tx: Session, machine_id: int) -> None:
    """Forgets a machine that was taken in just now, as if it had not been; its instance stays as it is."""
    untouched = (Machine.assignment == 0, Machine.operation_number == 0, Machine.imaging_build_id.is_(None))
    tx.execute(delete(Machine).where(Machine.id == machine_id, *untouched))


def operation_ref(row: Machine) -> OperationRef:
    """The operation that is open on a machine."""
    if row.operation is None:
        raise ValueError(f"no operation is open on machine {row.id}")
    return OperationRef(
        machine_id=row.id,
        organization_id=row.organization_id,
        number=row.operation_number,
        operation=MachineOperation(row.operation),
    )


def _rows() -> Select[Machine, Template, str]:
    living = and_(Template.id == Machine.template_id, Template.deleted_at.is_(None))
    return select(Machine, Template, friendly_status()).outerjoin(Template, living)


def _known(row: Row[Machine, Template, str]) -> KnownMachine:
    return KnownMachine(row[0], row[1], FriendlyStatus(row[2]))
