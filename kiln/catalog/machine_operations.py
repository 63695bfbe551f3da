"""What operations on machines write, and what EC2 is seen to say of them. What is written for an operation is written under
the lock of the machine's row, and only while that operation is the one that is open."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

from sqlalchemy import ColumnElement, case, delete, or_, select, update
from sqlalchemy.orm import Session

from kiln.catalog.machine_status import TERMINATED
from kiln.catalog.machines import placement_columns
from kiln.catalog.tables import Machine, RetiredInstance
from kiln.errors import OperationFailedError, OperationOverError
from kiln.models import MachineOperation, OperationRef
from kiln.naming import users_tags
from kiln.ports import Holdings, Instance, LivingMachine, Retired

# What EC2 did not show is taken for terminated: for so long, it is looked for again.
DOUBT = timedelta(hours=1)


def claim(tx: Session, ref: OperationRef, run_id: str) -> bool:
    """Makes an open operation this run's own; False if it is over, or another run's. Repeating it is harmless."""
    unclaimed = or_(Machine.operation_run.is_(None), Machine.operation_run == run_id)
    claimed = tx.execute(
        update(Machine).where(*_is_open(ref), unclaimed).values(operation_run=run_id).returning(Machine.id)
    )
    return claimed.first() is not None


def release(tx: Session, ref: OperationRef, run_id: str) -> bool:
    """Gives an open operation of this run back to the dispatcher; False if it is over, or another run's."""
    released = tx.execute(
        update(Machine)
        .where(*_is_open(ref), Machine.operation_run == run_id)
        .values(operation_run=None)
        .returning(Machine.id)
    )
    return released.first() is not None


def open_row(session: Session, ref: OperationRef, *, lock: bool = False) -> Machine:
    """The machine on which the operation is open, kept from all others' writes with `lock`. Raises OperationOverError."""
    row = _machine(session, ref.machine_id, lock=lock)
    if row is None or not _has_open(row, ref):
        raise OperationOverError(f"operation {ref.number} of machine {ref.machine_id} is over")
    return row


def note_account(tx: Session, ref: OperationRef, account: str) -> None:
    """Notes the account before anything is launched in it. Raises OperationOverError."""
    open_row(tx, ref, lock=True).account = account
    tx.flush()


def note_launch(tx: Session, ref: OperationRef, instance_id: str) -> str:
    """Remembers what the operation launched first, and returns it: what comes after it is retired.

    Raises OperationOverError; OperationFailedError for an instance that is to be terminated.
    """
    row = open_row(tx, ref, lock=True)
    if row.next_instance_id is None:
        _require_kept(tx, row, instance_id)
        row.next_instance_id = instance_id
        row.updated_at = datetime.now(UTC)
    elif instance_id not in (row.next_instance_id, row.instance_id):
        _retire(tx, row, instance_id)
    tx.flush()
    return row.next_instance_id


def adopt(tx: Session, ref: OperationRef, instance: Instance) -> None:
    """Makes the launched instance the machine's own, retires the one before it, and ends the operation.

    Done already, it does nothing. Raises OperationOverError; OperationFailedError for an instance that is to be
    terminated.
    """
    row = _machine(tx, ref.machine_id, lock=True)
    if row is not None and _was_adopted(row, ref, instance):
        return
    row = open_row(tx, ref, lock=True)
    _require_kept(tx, row, instance.instance_id)
    if row.next_instance_id != instance.instance_id:
        _retire_next(tx, row)
    if row.instance_id is not None and row.instance_id != instance.instance_id:
        _retire(tx, row, row.instance_id)
    row.instance_id = instance.instance_id
    row.placement = placement_columns(instance.placement)
    row.tags = users_tags(instance.tags)
    row.built_assignment = row.launching_assignment or row.built_assignment
    if row.launching_template_id is not None:
        row.base_image_id = None
    _close(row, instance.state, None)
    tx.flush()


def finish(tx: Session, ref: OperationRef, state: str | None, error: str | None) -> None:
    """Ends an open operation: what it launched and did not adopt is retired. Over already, it does nothing."""
    row = _machine(tx, ref.machine_id, lock=True)
    if row is None or not _has_open(row, ref):
        return
    _retire_next(tx, row)
    _close(row, state, error)
    tx.flush()


def retire(tx: Session, retired: Sequence[Retired]) -> None:
    """Notes instances that are to be terminated, less those that a machine has or may be about to have."""
    machines = _locked(tx, {each.machine_id for each in retired})
    for each in retired:
        row = machines.get(each.machine_id)
        if not (row is not None and may_take(row, each.instance_id)) and not _is_taken(tx, each):
            _note_retired(tx, each)
    tx.flush()


def retired(session: Session, older_than: timedelta, machine_id: int | None) -> list[Retired]:
    """Instances that are to be terminated, oldest first; of one machine only, where one is named."""
    old = RetiredInstance.retired_at <= datetime.now(UTC) - older_than
    query = select(RetiredInstance).where(old, ~_is_had())
    if machine_id is not None:
        query = query.where(RetiredInstance.machine_id == machine_id)
    rows = session.scalars(query.order_by(RetiredInstance.retired_at, RetiredInstance.instance_id))
    return [Retired(row.machine_id, row.instance_id, row.region, row.account, row.retired_at) for row in rows]


def forget_retired(tx: Session, region: str, instance_id: str) -> None:
    """Notes that a retired instance is gone. Repeating it is harmless."""
    gone = (RetiredInstance.region == region, RetiredInstance.instance_id == instance_id)
    tx.execute(delete(RetiredInstance).where(*gone))


def open_rows(session: Session, older_than: timedelta) -> list[Machine]:
    """Machines with an operation that has had `older_than` to get going, the oldest operation first."""
    begun_before = datetime.now(UTC) - older_than
    query = select(Machine).where(Machine.operation.is_not(None), Machine.operation_at <= begun_before)
    return list(session.scalars(query.order_by(Machine.operation_at, Machine.id)))


def living(session: Session) -> list[LivingMachine]:
    """Machines whose instance the catalog believes to be there, or has not believed to be terminated for long; less
    those with an open operation."""
    doubted_since = datetime.now(UTC) - DOUBT
    lives = or_(Machine.ec2_state.is_distinct_from(TERMINATED), Machine.state_at > doubted_since)
    idle = (Machine.instance_id.is_not(None), Machine.operation.is_(None))
    query = select(Machine).where(*idle, lives).order_by(Machine.id)
    return [
        LivingMachine(row.id, row.instance_id or "", row.region, row.account or "", row.simulated, row.ec2_state or "")
        for row in session.scalars(query)
    ]


def observe(tx: Session, machine: LivingMachine, state: str, asked_at: datetime) -> None:
    """Writes what EC2 said at `asked_at`, unless the machine has another instance or an operation by now, or was written
    later than that."""
    same = (Machine.id == machine.machine_id, Machine.instance_id == machine.instance_id, Machine.operation.is_(None))
    news = Machine.ec2_state.is_distinct_from(state)
    tx.execute(
        update(Machine)
        .where(*same, or_(Machine.state_at.is_(None), Machine.state_at < asked_at))
        .values(
            ec2_state=state,
            state_at=asked_at,
            updated_at=case((news, datetime.now(UTC)), else_=Machine.updated_at),
        )
    )


def holdings(session: Session, machine_id: int) -> Holdings | None:
    """What a machine has in EC2, or is about to have; None if there is no such machine."""
    row = _machine(session, machine_id)
    if row is None:
        return None
    instance_ids = frozenset(each for each in (row.instance_id, row.next_instance_id) if each is not None)
    return Holdings(row.region, row.account, instance_ids, operation_open=row.operation is not None)


def may_take(row: Machine, instance_id: str) -> bool:
    """Whether an instance of a machine is the one that it has, or may be the one that it is about to have."""
    return instance_id in (row.instance_id, row.next_instance_id) or _may_have_launched(row)


def _may_have_launched(row: Machine) -> bool:
    """Whether an instance may be there that the open operation launched and has not noted yet."""
    launches = row.operation is not None and MachineOperation(row.operation).launches
    return launches and row.next_instance_id is None


def _is_taken(tx: Session, each: Retired) -> bool:
    has = (
        Machine.account == each.account,
        Machine.region == each.region,
        Machine.instance_id == each.instance_id,
    )
    return tx.scalar(select(Machine.id).where(*has)) is not None


def _is_had() -> ColumnElement[bool]:
    """Whether a retired instance is a machine's: `kiln machines import` may have taken it in at the same moment."""
    has = (
        Machine.account == RetiredInstance.account,
        Machine.region == RetiredInstance.region,
        Machine.instance_id == RetiredInstance.instance_id,
    )
    return select(Machine.id).where(*has).exists()


def _is_open(ref: OperationRef) -> tuple[ColumnElement[bool], ...]:
    return (
        Machine.id == ref.machine_id,
        Machine.operation_number == ref.number,
        Machine.operation == ref.operation.value,
    )


def _has_open(row: Machine, ref: OperationRef) -> bool:
    return row.operation == ref.operation.value and row.operation_number == ref.number


def _was_adopted(row: Machine, ref: OperationRef, instance: Instance) -> bool:
    return not _has_open(row, ref) and row.instance_id == instance.instance_id


def _close(row: Machine, state: str | None, error: str | None) -> None:
    now = datetime.now(UTC)
    if state is not None and row.instance_id is not None:
        row.ec2_state, row.state_at = state, now
    row.operation = row.operation_run = None
    row.next_instance_id = row.launching_template_id = row.launching_assignment = None
    row.operation_forced = False
    row.operation_error = error
    row.updated_at = now


def _retire_next(tx: Session, row: Machine) -> None:
    if row.next_instance_id is not None and row.next_instance_id != row.instance_id:
        _retire(tx, row, row.next_instance_id)


def _retire(tx: Session, row: Machine, instance_id: str) -> None:
    _note_retired(tx, Retired(row.id, instance_id, row.region, row.account or ""))


def _note_retired(tx: Session, each: Retired) -> None:
    """A machine's instances are noted under its lock: nobody else writes the same one meanwhile."""
    if tx.get(RetiredInstance, (each.region, each.instance_id)) is not None:
        return
    now = datetime.now(UTC)
    tx.add(
        RetiredInstance(
            region=each.region,
            instance_id=each.instance_id,
            account=each.account,
            machine_id=each.machine_id,
            retired_at=now,
        )
    )
    tx.flush()


def _require_kept(tx: Session, row: Machine, instance_id: str) -> None:
    if tx.get(RetiredInstance, (row.region, instance_id)) is not None:
        raise OperationFailedError(f"{instance_id} is about to be terminated")


def _locked(tx: Session, machine_ids: Iterable[int]) -> dict[int, Machine]:
    found = {number: _machine(tx, number, lock=True) for number in sorted(machine_ids)}
    return {number: row for number, row in found.items() if row is not None}


def _machine(session: Session, machine_id: int, *, lock: bool = False) -> Machine | None:
    query = select(Machine).where(Machine.id == machine_id)
    if lock:
        query = query.with_for_update(key_share=True).execution_options(populate_existing=True)
    return session.scalars(query).first()
