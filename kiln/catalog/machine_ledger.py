"""The catalog behind `kiln.ports.MachineLedger`: each method is one transaction."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy.orm import Session

from kiln.catalog import machine_operations, templates
from kiln.catalog.machines import operation_ref, placement_of
from kiln.catalog.session import Catalog
from kiln.catalog.tables import Machine
from kiln.catalog.templates import KnownTemplate
from kiln.models import OperationRef, SourceState, TemplateStatus
from kiln.ports import Holdings, Instance, LivingMachine, MachineOrder, MachineSource, OperationBrief, Retired


class CatalogMachineLedger:
    """`kiln.ports.MachineLedger` on a catalog."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self.installation = catalog.installation()

    def claim_operation(self, ref: OperationRef, run_id: str) -> bool:
        with self._catalog.transaction() as tx:
            return machine_operations.claim(tx, ref, run_id)

    def machine_order(self, ref: OperationRef) -> MachineOrder:
        with self._catalog.read() as session:
            return _order(machine_operations.open_row(session, ref), ref)

    def source(self, ref: OperationRef) -> MachineSource:
        with self._catalog.read() as session:
            return _source(session, machine_operations.open_row(session, ref))

    def note_account(self, ref: OperationRef, account: str) -> None:
        with self._catalog.transaction() as tx:
            machine_operations.note_account(tx, ref, account)

    def note_launch(self, ref: OperationRef, instance_id: str) -> str:
        with self._catalog.transaction() as tx:
            return machine_operations.note_launch(tx, ref, instance_id)

    def adopt_instance(self, ref: OperationRef, instance: Instance) -> None:
        with self._catalog.transaction() as tx:
            machine_operations.adopt(tx, ref, instance)

    def finish_operation(self, ref: OperationRef, state: str | None, error: str | None = None) -> None:
        with self._catalog.transaction() as tx:
            machine_operations.finish(tx, ref, state, error)

    def retire(self, retired: Sequence[Retired]) -> None:
        with self._catalog.transaction() as tx:
            machine_operations.retire(tx, retired)

    def retired(self, older_than: timedelta, machine_id: int | None = None) -> list[Retired]:
        with self._catalog.read() as session:
            return machine_operations.retired(session, older_than, machine_id)

    def forget_retired(self, region: str, instance_id: str) -> None:
        with self._catalog.transaction() as tx:
            machine_operations.forget_retired(tx, region, instance_id)

    def open_operations(self, older_than: timedelta) -> list[OperationBrief]:
        with self._catalog.read() as session:
            rows = machine_operations.open_rows(session, older_than)
            return [OperationBrief(operation_ref(row), row.operation_run) for row in rows]

    def release_operation(self, ref: OperationRef, run_id: str) -> bool:
        with self._catalog.transaction() as tx:
            return machine_operations.release(tx, ref, run_id)

    def living_machines(self) -> list[LivingMachine]:
        with self._catalog.read() as session:
            return machine_operations.living(session)

    def observed(self, machine: LivingMachine, state: str, asked_at: datetime) -> None:
        with self._catalog.transaction() as tx:
            machine_operations.observe(tx, machine, state, asked_at)

    def holdings(self, machine_id: int) -> Holdings | None:
        with self._catalog.read() as session:
            return machine_operations.holdings(session, machine_id)


def _order(row: Machine, ref: OperationRef) -> MachineOrder:
    return MachineOrder(
        ref=ref,
        name=row.name,
        region=row.region,
        account=row.account,
        instance_id=row.instance_id,
        next_instance_id=row.next_instance_id,
        instance_type=row.instance_type,
        disk_gib=row.disk_gib,
        tags=row.tags,
        placement=placement_of(row),
        forced=row.operation_forced,
    )


def _source(session: Session, row: Machine) -> MachineSource:
    if row.launching_template_id is not None:
        known = templates.find(session, row.organization_id, row.launching_template_id)
        return _template_source(known)
    if row.base_image_id is not None:
        return MachineSource(SourceState.READY, base_image_id=row.base_image_id)
    return MachineSource(SourceState.FAILED, "the machine has no image to be launched from")


def _template_source(known: KnownTemplate | None) -> MachineSource:
    if known is None:
        return MachineSource(SourceState.FAILED, "the machine's image is no more")
    named = f"image {known.template.name}"
    if known.status is TemplateStatus.AVAILABLE and known.image is not None:
        return MachineSource(SourceState.READY, image_id=known.image.reference)
    if known.status is TemplateStatus.FAILED:
        return MachineSource(SourceState.FAILED, f"{named} is not there: {_why(known)}")
    return MachineSource(SourceState.WAITING, f"waiting for {named}, which is {known.status}")


def _why(known: KnownTemplate) -> str:
    """Why a template failed, in the words in which it is recorded."""
    if known.image is not None:
        return known.image.gone_reason or f"its AMI is {known.image.status}"
    return known.build.error_message or f"its build is {known.build.status}"
