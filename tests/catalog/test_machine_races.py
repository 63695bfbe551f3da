"""Two at the same moment on templates and machines: whatever comes first, nothing is lost and nothing slips past."""

from collections.abc import Callable
from functools import partial

import pytest

from kiln.catalog import attempts, images, machine_operations, machine_orders, machines, templates
from kiln.catalog.machine_ledger import CatalogMachineLedger
from kiln.catalog.machines import NewMachine
from kiln.catalog.session import Catalog
from kiln.catalog.tables import Machine
from kiln.errors import BuildCancelledError, BuildOverError, NotFoundError, RefusedError
from kiln.models import ClientCode, MachineOperation, OperationRef
from kiln.ports import Retired
from support.machine_rows import (
    add_machine,
    add_template,
    assign,
    create_machine,
    delete,
    image_of,
    instance,
    machine_row,
    make_image,
    snapshot_of,
    start,
    template_of,
)
from support.parallel import Pending, in_parallel
from support.rows import ACCOUNT, LEASE, REGION, ami, build_row, built

AT_ONCE = 5
ROUNDS = 5


def failures(outcomes: list[object]) -> list[Exception]:
    return [outcome for outcome in outcomes if isinstance(outcome, Exception)]


def is_deleted(catalog: Catalog, organization: str, template: int) -> bool:
    with catalog.read() as session:
        return templates.find(session, organization, template) is None


def create_from(catalog: Catalog, organization: str, template: int) -> None:
    """What `POST /machines` writes for an `image_id`."""
    with catalog.transaction() as tx:
        known = templates.find(tx, organization, template, lock=True)
        if known is None:
            raise NotFoundError("no such image")
        new = NewMachine(organization, None, REGION, "t3.medium", 100, simulated=True, template_id=template)
        machines.insert(tx, new)


def test_a_template_is_assigned_or_deleted(catalog: Catalog, organization: str) -> None:
    """No machine ever awaits a template that is deleted, whichever comes first."""
    machine = add_machine(catalog, organization)
    for _ in range(ROUNDS):
        template = add_template(catalog, organization)
        calls: list[Callable[[], object]] = [
            partial(assign, catalog, organization, template, machine),
            partial(delete, catalog, organization, template),
        ]
        assigned, deleted = in_parallel(calls)
        if assigned is None:
            assert isinstance(deleted, RefusedError)
            assert machine_row(catalog, machine).template_id == template
        else:
            assert isinstance(assigned, NotFoundError)
            assert machine_row(catalog, machine).template_id != template
        assert is_deleted(catalog, organization, template) is (assigned is not None)


def test_a_deletion_waits_for_the_assignment(catalog: Catalog, organization: str) -> None:
    """A deletion that comes while an assignment commits is refused."""
    template, machine = add_template(catalog, organization), add_machine(catalog, organization)
    with catalog.transaction() as tx:
        machine_orders.assign(tx, organization, template, [machine])
        deletion = Pending(partial(delete, catalog, organization, template))
        assert deletion.is_waiting()
    with pytest.raises(RefusedError):
        deletion.result()


def test_an_assignment_waits_for_the_deletion(catalog: Catalog, organization: str) -> None:
    """An assignment that comes while a deletion commits finds no image."""
    template, machine = add_template(catalog, organization), add_machine(catalog, organization)
    with catalog.transaction() as tx:
        templates.delete(tx, organization, template)
        assignment = Pending(partial(assign, catalog, organization, template, machine))
        assert assignment.is_waiting()
    with pytest.raises(NotFoundError):
        assignment.result()


def test_a_machine_is_created_from_a_template_or_it_is_deleted(catalog: Catalog, organization: str) -> None:
    """A machine that is being written keeps its template, and a template that is being deleted takes none."""
    kept, deleted = (add_template(catalog, organization) for _ in range(2))
    with catalog.transaction() as tx:
        templates.find(tx, organization, kept, lock=True)
        machines.insert(tx, NewMachine(organization, None, REGION, "t3.medium", 100, simulated=True, template_id=kept))
        deletion = Pending(partial(delete, catalog, organization, kept))
        assert deletion.is_waiting()
    with pytest.raises(RefusedError):
        deletion.result()
    with catalog.transaction() as tx:
        templates.delete(tx, organization, deleted)
        creation = Pending(partial(create_from, catalog, organization, deleted))
        assert creation.is_waiting()
    with pytest.raises(NotFoundError):
        creation.result()


def test_assignments_to_the_same_machines_all_count(catalog: Catalog, organization: str) -> None:
    """However many images are assigned at once, in whatever order the machines are named, each assignment counts."""
    chosen = [add_template(catalog, organization) for _ in range(AT_ONCE)]
    there = [add_machine(catalog, organization) for _ in range(3)]
    orders = [there if number % 2 else there[::-1] for number in range(AT_ONCE)]
    calls = [partial(assign, catalog, organization, chosen[n], *orders[n]) for n in range(AT_ONCE)]
    assert failures(in_parallel(calls)) == []
    rows = [machine_row(catalog, machine) for machine in there]
    assert [row.assignment for row in rows] == [AT_ONCE] * 3
    assert len({row.template_id for row in rows}) == 1


def test_a_start_and_an_assignment_both_count(catalog: Catalog, organization: str) -> None:
    """A start takes the image that was assigned by then; another that comes at that moment is awaited or taken whole."""
    for _ in range(ROUNDS):
        first, second = (add_template(catalog, organization) for _ in range(2))
        machine = add_machine(catalog, organization)
        assign(catalog, organization, first, machine)
        calls: list[Callable[[], object]] = [
            partial(start, catalog, organization, machine),
            partial(assign, catalog, organization, second, machine),
        ]
        assert failures(in_parallel(calls)) == []
        row = machine_row(catalog, machine)
        assert (row.template_id, row.assignment) == (second, 2)
        assert (row.launching_template_id, row.launching_assignment) in {(first, 1), (second, 2)}


def test_a_start_does_not_wait_for_its_template(catalog: Catalog, organization: str) -> None:
    """A start goes on while an assignment of its own template waits for the machine: neither waits for the other."""
    template, machine = add_template(catalog, organization), add_machine(catalog, organization)
    assign(catalog, organization, template, machine)
    with catalog.transaction() as tx:
        tx.get_one(Machine, machine, with_for_update=True)
        assignment = Pending(partial(assign, catalog, organization, template, machine))
        assert assignment.is_waiting()
        machine_orders.order_start(tx, organization, machine)
    assignment.result()
    row = machine_row(catalog, machine)
    assert (row.assignment, row.launching_assignment) == (2, 1)


def test_an_image_is_made_or_the_machine_starts(catalog: Catalog, organization: str) -> None:
    """Of an image, a start and another image that are ordered at once, one is carried out."""
    for _ in range(ROUNDS):
        machine = add_machine(catalog, organization)
        calls: list[Callable[[], object]] = [
            partial(make_image, catalog, organization, machine),
            partial(start, catalog, organization, machine),
            partial(make_image, catalog, organization, machine),
        ]
        refusals = failures(in_parallel(calls))
        assert [type(refusal) for refusal in refusals] == [RefusedError] * 2
        row = machine_row(catalog, machine)
        assert (row.operation is None) is (row.imaging_build_id is not None)


def test_an_assignment_waits_for_the_image(catalog: Catalog, organization: str) -> None:
    """An assignment that comes while an image of the machine is ordered is refused."""
    template, machine = add_template(catalog, organization), add_machine(catalog, organization)
    with catalog.transaction() as tx:
        machine_orders.order_image(tx, organization, machine, snapshot_of)
        assignment = Pending(partial(assign, catalog, organization, template, machine))
        assert assignment.is_waiting()
    with pytest.raises(RefusedError) as caught:
        assignment.result()
    assert caught.value.code is ClientCode.NOT_ASSIGNABLE


def test_one_of_many_starts_is_carried_out(
    machine_ledger: CatalogMachineLedger, catalog: Catalog, organization: str
) -> None:
    """However many start a machine at once, it is started once, and one run does it."""
    machine = add_machine(catalog, organization)
    outcomes = in_parallel([partial(start, catalog, organization, machine)] * AT_ONCE)
    (ref,) = [outcome for outcome in outcomes if isinstance(outcome, OperationRef)]
    assert [type(refusal) for refusal in failures(outcomes)] == [RefusedError] * (AT_ONCE - 1)
    claims = in_parallel([partial(machine_ledger.claim_operation, ref, f"run-{n}") for n in range(AT_ONCE)])
    assert sorted(claims) == [False] * (AT_ONCE - 1) + [True]


def test_an_attempt_waits_for_the_deletion(catalog: Catalog, organization: str) -> None:
    """A build that would begin while its template is deleted does not."""
    template = add_template(catalog, organization, "pending")
    build = template_of(catalog, organization, template).build.id

    def begin() -> None:
        with catalog.transaction() as tx:
            attempts.begin(tx, build, "worker", LEASE)

    with catalog.transaction() as tx:
        templates.delete(tx, organization, template)
        attempt = Pending(begin)
        assert attempt.is_waiting()
    with pytest.raises((BuildCancelledError, BuildOverError)):
        attempt.result()


def test_a_deletion_waits_for_the_attempt(catalog: Catalog, organization: str) -> None:
    """A template whose build begins at this moment is building, and stays."""
    template = add_template(catalog, organization, "pending")
    build = template_of(catalog, organization, template).build.id
    with catalog.transaction() as tx:
        attempts.begin(tx, build, "worker", LEASE)
        attempts.tool_started(tx, build, 1, LEASE)
        deletion = Pending(partial(delete, catalog, organization, template))
        assert deletion.is_waiting()
    with pytest.raises(RefusedError) as caught:
        deletion.result()
    assert caught.value.code is ClientCode.IMAGE_BUILDING
    assert build_row(catalog, build).cancel_requested_at is None


def test_a_deletion_waits_for_the_publication(catalog: Catalog, organization: str) -> None:
    """A template whose AMI is published at this moment is deleted with it."""
    template = add_template(catalog, organization, "building")
    build, made = template_of(catalog, organization, template).build.id, ami()
    with catalog.transaction() as tx:
        images.insert_ami(tx, attempts.publish(tx, build, 1), made, built(made.image_id, 1), simulated=True)
        deletion = Pending(partial(delete, catalog, organization, template))
        assert deletion.is_waiting()
    deleted = deletion.result()
    assert deleted.image is not None
    assert image_of(catalog, build).status == images.DELETING


def test_an_assignment_waits_for_the_adoption(catalog: Catalog, organization: str) -> None:
    """What is assigned while a rebuild ends is awaited after it."""
    first, second = (add_template(catalog, organization) for _ in range(2))
    machine = add_machine(catalog, organization)
    assign(catalog, organization, first, machine)
    rebuild = start(catalog, organization, machine)
    with catalog.transaction() as tx:
        machine_operations.adopt(tx, rebuild, instance("stopped"))
        assignment = Pending(partial(assign, catalog, organization, second, machine))
        assert assignment.is_waiting()
    assignment.result()
    assert start(catalog, organization, machine).operation is MachineOperation.REBUILD


def test_an_instance_is_noted_or_retired(
    machine_ledger: CatalogMachineLedger, catalog: Catalog, organization: str
) -> None:
    """No instance is both a machine's next one and to be terminated, whichever is written first: a second launch is
    to go, and changes nothing else."""
    for _ in range(ROUNDS):
        ref = create_machine(catalog, organization, base_image_id=1)
        machine_ledger.note_launch(ref, "i-before")
        found = instance().instance_id
        calls: list[Callable[[], object]] = [
            partial(machine_ledger.note_launch, ref, found),
            partial(machine_ledger.retire, [Retired(ref.machine_id, found, REGION, ACCOUNT)]),
        ]
        assert in_parallel(calls) == ["i-before", None]
        doomed = {each.instance_id for each in machine_ledger.retired(LEASE * 0, ref.machine_id)}
        assert doomed == {found}
        assert machine_ledger.note_launch(ref, found) == "i-before"


def test_one_of_two_launches_is_noted(
    machine_ledger: CatalogMachineLedger, catalog: Catalog, organization: str
) -> None:
    """Of two launches that are noted at the same moment one is the machine's next one, and the other is to go."""
    for _ in range(ROUNDS):
        ref = create_machine(catalog, organization, base_image_id=1)
        first, second = (instance().instance_id for _ in range(2))
        outcomes = in_parallel([partial(machine_ledger.note_launch, ref, each) for each in (first, second)])
        noted = machine_ledger.machine_order(ref).next_instance_id
        assert outcomes == [noted, noted]
        doomed = {each.instance_id for each in machine_ledger.retired(LEASE * 0, ref.machine_id)}
        assert doomed == {first, second} - {noted}
