"""What operations on machines read and write, and what is seen in EC2."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from kiln.catalog.machine_ledger import CatalogMachineLedger
from kiln.catalog.session import Catalog
from kiln.errors import OperationFailedError, OperationOverError
from kiln.models import MachineOperation, OperationRef, SourceState
from kiln.ports import Holdings, OperationBrief, Placement, Retired
from support.machine_rows import (
    add_machine,
    add_template,
    assign,
    bring,
    create_machine,
    image_of,
    instance,
    machine_of,
    machine_row,
    rewrite_machine,
    start,
    stop,
    template_of,
)
from support.rows import ACCOUNT, REGION

NOW = timedelta(0)
LATER = timedelta(minutes=1)


def retired_ids(ledger: CatalogMachineLedger, machine: int | None = None) -> set[str]:
    return {each.instance_id for each in ledger.retired(NOW, machine)}


def own_instance(catalog: Catalog, machine: int) -> str:
    known = machine_row(catalog, machine).instance_id
    assert known is not None
    return known


@pytest.fixture
def rebuild(catalog: Catalog, organization: str) -> OperationRef:
    """A stopped machine that is being recreated from an image."""
    machine = add_machine(catalog, organization, placement=Placement("subnet-1", ("sg-1",)), tags={"team": "art"})
    assign(catalog, organization, add_template(catalog, organization), machine)
    return start(catalog, organization, machine)


class TestClaim:
    def test_the_first_run_has_it(self, machine_ledger: CatalogMachineLedger, rebuild: OperationRef) -> None:
        """An operation is the run's that asked first, however often it asks."""
        claims = [machine_ledger.claim_operation(rebuild, run) for run in ("run-1", "run-2", "run-1")]
        assert claims == [True, False, True]

    def test_a_lost_run_gives_it_back(self, machine_ledger: CatalogMachineLedger, rebuild: OperationRef) -> None:
        """What a run leaves behind is another's; only its own is given back."""
        machine_ledger.claim_operation(rebuild, "run-1")
        assert not machine_ledger.release_operation(rebuild, "run-2")
        assert machine_ledger.release_operation(rebuild, "run-1")
        assert machine_ledger.open_operations(NOW) == [OperationBrief(rebuild, None)]
        assert machine_ledger.claim_operation(rebuild, "run-2")

    def test_what_is_over_is_nobodys(self, machine_ledger: CatalogMachineLedger, rebuild: OperationRef) -> None:
        """A closed operation cannot be claimed or given back, nor one of another number."""
        later = rebuild.model_copy(update={"number": rebuild.number + 1})
        assert not machine_ledger.claim_operation(later, "run-1")
        machine_ledger.claim_operation(rebuild, "run-1")
        machine_ledger.finish_operation(rebuild, None)
        assert not machine_ledger.claim_operation(rebuild, "run-1")
        assert not machine_ledger.release_operation(rebuild, "run-1")

    def test_the_oldest_comes_first(
        self, machine_ledger: CatalogMachineLedger, catalog: Catalog, organization: str, rebuild: OperationRef
    ) -> None:
        """The dispatcher sees operations in their order, and gives a new one time to get going by itself."""
        other = stop(catalog, organization, add_machine(catalog, organization, "running"))
        rewrite_machine(catalog, other.machine_id, operation_at=datetime.now(UTC) - LATER)
        assert [brief.ref for brief in machine_ledger.open_operations(NOW)] == [other, rebuild]
        assert [brief.ref for brief in machine_ledger.open_operations(LATER)] == [other]


class TestOrder:
    def test_it_says_what_to_do(
        self, machine_ledger: CatalogMachineLedger, catalog: Catalog, rebuild: OperationRef
    ) -> None:
        """An order holds the machine's whole recipe."""
        order, row = machine_ledger.machine_order(rebuild), machine_row(catalog, rebuild.machine_id)
        assert (order.ref, order.name, order.region, order.account) == (rebuild, row.name, REGION, ACCOUNT)
        assert (order.instance_id, order.next_instance_id) == (row.instance_id, None)
        assert (order.placement, order.tags) == (Placement("subnet-1", ("sg-1",)), {"team": "art"})

    @pytest.mark.parametrize(
        ("status", "state"),
        [
            ("pending", SourceState.WAITING),
            ("building", SourceState.WAITING),
            ("failed", SourceState.FAILED),
            ("gone", SourceState.FAILED),
        ],
    )
    def test_an_image_is_waited_for(
        self, machine_ledger: CatalogMachineLedger, catalog: Catalog, organization: str, status: str, state: SourceState
    ) -> None:
        """A machine is launched once its image is there, and not at all if that failed."""
        template = add_template(catalog, organization, status)
        source = machine_ledger.source(create_machine(catalog, organization, template_id=template))
        assert (source.state, source.image_id) == (state, None)
        assert f"Template #{template}" in source.message

    def test_an_image_that_came_is_its_source(
        self, machine_ledger: CatalogMachineLedger, catalog: Catalog, organization: str
    ) -> None:
        """The AMI that the image's build made is what the machine is launched from."""
        template = add_template(catalog, organization, "pending")
        ref = create_machine(catalog, organization, template_id=template)
        build = template_of(catalog, organization, template).build.id
        bring(catalog, build, "available")
        assert machine_ledger.source(ref).image_id == image_of(catalog, build).reference

    def test_a_later_assignment_changes_no_source(
        self, machine_ledger: CatalogMachineLedger, catalog: Catalog, organization: str
    ) -> None:
        """What an operation launches from is settled when it begins, also where that is a base image."""
        ref = create_machine(catalog, organization, base_image_id=2)
        assign(catalog, organization, add_template(catalog, organization), ref.machine_id)
        assert (machine_ledger.source(ref).base_image_id, machine_ledger.source(ref).image_id) == (2, None)


class TestAdoption:
    def test_it_is_all_in_one(
        self, machine_ledger: CatalogMachineLedger, catalog: Catalog, organization: str, rebuild: OperationRef
    ) -> None:
        """The new instance is the machine's, the old one is to go, and nothing is awaited any more."""
        machine, old = rebuild.machine_id, own_instance(catalog, rebuild.machine_id)
        new = instance(placement=Placement("subnet-2", ("sg-1", "sg-2")), tags={"team": "art", "Name": "desk"})
        machine_ledger.note_launch(rebuild, new.instance_id)
        machine_ledger.adopt_instance(rebuild, new)
        assert machine_ledger.retired(NOW) != []
        assert retired_ids(machine_ledger, machine) == {old}
        assert machine_ledger.holdings(machine) == Holdings(REGION, ACCOUNT, frozenset({new.instance_id}), False)
        row = machine_row(catalog, machine)
        assert (row.assignment, row.built_assignment, row.tags) == (1, 1, {"team": "art"})
        assert row.placement["subnet_id"] == "subnet-2"
        assert machine_of(catalog, organization, machine).status == "ready"

    def test_a_repeated_one_does_nothing(
        self, machine_ledger: CatalogMachineLedger, catalog: Catalog, organization: str, rebuild: OperationRef
    ) -> None:
        """An adoption whose answer was lost is repeated, even where the next operation has begun."""
        new = instance()
        machine_ledger.adopt_instance(rebuild, new)
        again = stop(catalog, organization, rebuild.machine_id)
        machine_ledger.adopt_instance(rebuild, new)
        assert machine_ledger.machine_order(again).instance_id == new.instance_id
        with pytest.raises(OperationOverError):
            machine_ledger.adopt_instance(rebuild, instance())

    def test_what_was_assigned_meanwhile_is_awaited(
        self, machine_ledger: CatalogMachineLedger, catalog: Catalog, organization: str, rebuild: OperationRef
    ) -> None:
        """An assignment during a rebuild is carried out at the next start."""
        template = add_template(catalog, organization)
        assign(catalog, organization, template, rebuild.machine_id)
        machine_ledger.adopt_instance(rebuild, instance("stopped"))
        again = start(catalog, organization, rebuild.machine_id)
        assert again.operation is MachineOperation.REBUILD
        assert machine_row(catalog, rebuild.machine_id).launching_template_id == template

    def test_what_is_to_go_is_not_adopted(self, machine_ledger: CatalogMachineLedger, rebuild: OperationRef) -> None:
        """An instance that is about to be terminated can neither be launched nor adopted."""
        doomed = instance()
        machine_ledger.retire([Retired(4711, doomed.instance_id, REGION, ACCOUNT)])
        with pytest.raises(OperationFailedError):
            machine_ledger.note_launch(rebuild, doomed.instance_id)
        with pytest.raises(OperationFailedError):
            machine_ledger.adopt_instance(rebuild, doomed)

    def test_the_first_launch_that_is_noted_counts(
        self, machine_ledger: CatalogMachineLedger, rebuild: OperationRef
    ) -> None:
        """Of two launches of one operation the first that is noted is its own, however often another is noted."""
        first, second = instance(), instance()
        noted = [machine_ledger.note_launch(rebuild, each.instance_id) for each in (first, second, first, second)]
        assert (set(noted), retired_ids(machine_ledger)) == ({first.instance_id}, {second.instance_id})
        machine_ledger.adopt_instance(rebuild, first)

    def test_an_adopted_base_image_is_history(
        self, machine_ledger: CatalogMachineLedger, catalog: Catalog, organization: str
    ) -> None:
        """A machine that came from an image is no longer one of a base image."""
        ref = create_machine(catalog, organization, base_image_id=2)
        machine_ledger.note_account(ref, ACCOUNT)
        machine_ledger.adopt_instance(ref, instance("stopped"))
        assert machine_row(catalog, ref.machine_id).base_image_id == 2
        assign(catalog, organization, add_template(catalog, organization), ref.machine_id)
        machine_ledger.adopt_instance(start(catalog, organization, ref.machine_id), instance())
        assert machine_row(catalog, ref.machine_id).base_image_id is None


class TestEnd:
    def test_what_was_launched_in_vain_is_to_go(
        self, machine_ledger: CatalogMachineLedger, catalog: Catalog, organization: str, rebuild: OperationRef
    ) -> None:
        """A failed rebuild leaves the machine as it was: off, with its instance, awaiting its image."""
        machine, old = rebuild.machine_id, own_instance(catalog, rebuild.machine_id)
        machine_ledger.note_launch(rebuild, "i-in-vain")
        machine_ledger.finish_operation(rebuild, None, "no room")
        assert retired_ids(machine_ledger, machine) == {"i-in-vain"}
        row = machine_row(catalog, machine)
        assert (row.instance_id, row.ec2_state, row.operation_error) == (old, "stopped", "no room")
        assert start(catalog, organization, machine).operation is MachineOperation.REBUILD

    def test_a_new_operation_knows_nothing_of_the_last(
        self, machine_ledger: CatalogMachineLedger, catalog: Catalog, organization: str
    ) -> None:
        """An error is shown until something else is ordered; a forced stop forces nothing after it."""
        machine = add_machine(catalog, organization, "running")
        machine_ledger.finish_operation(stop(catalog, organization, machine, force=True), "stopped", "no answer")
        order = machine_ledger.machine_order(start(catalog, organization, machine))
        assert (order.forced, machine_row(catalog, machine).operation_error) == (False, None)

    def test_it_writes_what_ec2_says(
        self, machine_ledger: CatalogMachineLedger, catalog: Catalog, organization: str
    ) -> None:
        """The end of an operation says how the instance is now; a second end says nothing more."""
        ref = start(catalog, organization, add_machine(catalog, organization))
        machine_ledger.finish_operation(ref, "running")
        machine_ledger.finish_operation(ref, "stopped", "too late")
        assert machine_of(catalog, organization, ref.machine_id).status == "ready"
        assert machine_row(catalog, ref.machine_id).operation_error is None

    @pytest.mark.parametrize(
        "call",
        [
            lambda ledger, ref: ledger.machine_order(ref),
            lambda ledger, ref: ledger.source(ref),
            lambda ledger, ref: ledger.note_account(ref, "1"),
            lambda ledger, ref: ledger.note_launch(ref, "i-late"),
            lambda ledger, ref: ledger.adopt_instance(ref, instance()),
        ],
        ids=["order", "source", "account", "launch", "adopt"],
    )
    def test_then_nothing_is_written_for_it(
        self,
        machine_ledger: CatalogMachineLedger,
        catalog: Catalog,
        organization: str,
        rebuild: OperationRef,
        call: Callable[[CatalogMachineLedger, OperationRef], object],
    ) -> None:
        """A straggler learns that its operation is over, though another of its kind has begun."""
        machine_ledger.finish_operation(rebuild, None, "cancelled")
        start(catalog, organization, rebuild.machine_id)
        with pytest.raises(OperationOverError):
            call(machine_ledger, rebuild)


class TestRetired:
    def test_what_a_machine_has_or_may_get_is_left_out(
        self, machine_ledger: CatalogMachineLedger, catalog: Catalog, organization: str, rebuild: OperationRef
    ) -> None:
        """Nothing is terminated that a machine has, is about to have, or may have launched without saying so yet."""
        machine, old = rebuild.machine_id, own_instance(catalog, rebuild.machine_id)
        imported = own_instance(catalog, add_machine(catalog, organization))
        found = [Retired(machine, each, REGION, ACCOUNT) for each in (old, "i-launched", "i-other", imported)]
        machine_ledger.retire(found)
        assert retired_ids(machine_ledger) == set()
        machine_ledger.note_launch(rebuild, "i-launched")
        machine_ledger.retire(found)
        machine_ledger.retire(found)
        assert retired_ids(machine_ledger) == {"i-other"}

    def test_what_a_machine_has_is_not_ended(
        self, machine_ledger: CatalogMachineLedger, catalog: Catalog, organization: str
    ) -> None:
        """An instance that was retired at the moment at which it was taken in is the machine's."""
        machine_ledger.retire([Retired(4711, each, REGION, ACCOUNT) for each in ("i-taken", "i-left")])
        rewrite_machine(catalog, add_machine(catalog, organization), instance_id="i-taken")
        assert retired_ids(machine_ledger) == {"i-left"}

    def test_it_is_forgotten_once_it_is_gone(self, machine_ledger: CatalogMachineLedger) -> None:
        """An instance is retired until it is terminated; of no machine any more, too."""
        machine_ledger.retire([Retired(4711, each, REGION, ACCOUNT) for each in ("i-1", "i-2")])
        machine_ledger.forget_retired(REGION, "i-1")
        machine_ledger.forget_retired(REGION, "i-1")
        assert retired_ids(machine_ledger) == {"i-2"}
        assert (machine_ledger.retired(LATER), machine_ledger.retired(NOW, 1)) == ([], [])


class TestObservation:
    @pytest.mark.usefixtures("rebuild")
    def test_living_machines_are_looked_after(
        self, machine_ledger: CatalogMachineLedger, catalog: Catalog, organization: str
    ) -> None:
        """EC2 is asked about machines with an instance with which nothing is being done."""
        gone = add_machine(catalog, organization, "terminated")
        rewrite_machine(catalog, gone, state_at=datetime.now(UTC) - timedelta(hours=2))
        create_machine(catalog, organization, base_image_id=1)
        machine = add_machine(catalog, organization, "running")
        (living,) = machine_ledger.living_machines()
        assert (living.machine_id, living.instance_id) == (machine, own_instance(catalog, machine))
        assert (living.region, living.account, living.simulated, living.state) == (REGION, ACCOUNT, True, "running")

    def test_what_ec2_says_is_written(
        self, machine_ledger: CatalogMachineLedger, catalog: Catalog, organization: str
    ) -> None:
        """A machine that somebody stopped in EC2 is off; news change its time, and what is known does not."""
        machine = add_machine(catalog, organization, "running")
        (living,) = machine_ledger.living_machines()
        machine_ledger.observed(living, "stopped", datetime.now(UTC))
        row = machine_row(catalog, machine)
        assert row.ec2_state == "stopped"
        machine_ledger.observed(living, "stopped", asked := datetime.now(UTC))
        assert machine_row(catalog, machine).updated_at == row.updated_at > row.created_at
        assert machine_row(catalog, machine).state_at == asked

    def test_old_news_are_none(self, machine_ledger: CatalogMachineLedger, catalog: Catalog, organization: str) -> None:
        """An answer that was asked for before the last thing that is known says nothing."""
        asked = datetime.now(UTC)
        machine = add_machine(catalog, organization, "running")
        (living,) = machine_ledger.living_machines()
        machine_ledger.observed(living, "stopped", asked)
        assert machine_row(catalog, machine).ec2_state == "running"

    @pytest.mark.parametrize("meanwhile", ["an operation", "another instance"])
    def test_a_machine_that_changed_meanwhile_is_left_alone(
        self, machine_ledger: CatalogMachineLedger, catalog: Catalog, organization: str, meanwhile: str
    ) -> None:
        """What was seen of an instance is nothing to the machine that has another one, or is being seen to."""
        machine = add_machine(catalog, organization)
        (living,) = machine_ledger.living_machines()
        if meanwhile == "an operation":
            start(catalog, organization, machine)
        else:
            rewrite_machine(catalog, machine, instance_id="i-another")
        machine_ledger.observed(living, "terminated", datetime.now(UTC) + LATER)
        assert machine_row(catalog, machine).ec2_state == "stopped"


def test_holdings_tell_of_an_open_operation(
    machine_ledger: CatalogMachineLedger, catalog: Catalog, rebuild: OperationRef
) -> None:
    """While an operation is open, a machine may be about to have more than is noted; no machine holds nothing."""
    old = own_instance(catalog, rebuild.machine_id)
    machine_ledger.note_launch(rebuild, "i-next")
    assert machine_ledger.holdings(rebuild.machine_id) == Holdings(REGION, ACCOUNT, frozenset({old, "i-next"}), True)
    assert machine_ledger.holdings(4711) is None
