"""Machines of organizations: how they come about, how they stand, and what may be ordered of them."""

from collections.abc import Collection

import pytest

from kiln.catalog import machines
from kiln.catalog.machine_ledger import CatalogMachineLedger
from kiln.catalog.machines import KnownMachine
from kiln.catalog.session import Catalog
from kiln.errors import InvalidRequestError, NotFoundError, RefusedError
from kiln.models import ClientCode, MachineOperation
from kiln.ports import Placement, Retired
from support.machine_rows import (
    add_machine,
    add_template,
    assign,
    bring,
    create_machine,
    delete,
    machine_of,
    machine_row,
    make_image,
    refused,
    rewrite_machine,
    start,
    stop,
)
from support.rows import ACCOUNT, REGION, add_organization

HUGE = 2**63
STATUSES = ["off", "creating", "turning_on", "ready", "turning_off", "installing"]
# By operation and EC2's state.
SHOWN = {
    ("create", None): "creating",
    ("rebuild", "stopped"): "installing",
    ("start", "stopped"): "turning_on",
    ("stop", "running"): "turning_off",
    (None, "running"): "ready",
    (None, "pending"): "turning_on",
    (None, "stopping"): "turning_off",
    (None, "shutting-down"): "turning_off",
    (None, "stopped"): "off",
    (None, "terminated"): "off",
    (None, None): "off",
}


def page(
    catalog: Catalog,
    organization: str,
    q: str = "",
    statuses: Collection[str] | None = None,
    number: int = 1,
    size: int = 20,
) -> tuple[list[int], int]:
    with catalog.read() as session:
        found, total = machines.page(session, organization, q, statuses, number, size)
    return [known.machine.id for known in found], total


def status(catalog: Catalog, organization: str, machine: int) -> str:
    return machine_of(catalog, organization, machine).status.value


def remove(catalog: Catalog, machine: int) -> None:
    with catalog.transaction() as tx:
        machines.remove(tx, machine)


def listing(catalog: Catalog) -> list[tuple[KnownMachine, str]]:
    with catalog.read() as session:
        return machines.listing(session)


class TestTakingIn:
    def test_the_instance_is_kept_as_it_runs(self, catalog: Catalog, organization: str) -> None:
        """Where an instance runs and which tags its users gave it is what a recreated one takes over."""
        placement = Placement("subnet-1", ("sg-1", "sg-2"), "a-key", "arn:profile")
        tags = {"team": "art", "Name": "desk", "kiln:machine-id": "3", "aws:autoscaling:groupName": "x"}
        row = machine_row(catalog, add_machine(catalog, organization, "running", placement=placement, tags=tags))
        assert machines.placement_of(row) == placement
        assert (row.tags, row.ec2_state, row.name) == ({"team": "art"}, "running", f"Machine #{row.id}")

    def test_an_instance_is_one_machine(self, catalog: Catalog, organization: str) -> None:
        """An instance that is a machine already, of whichever organization, is refused."""
        there = machine_row(catalog, add_machine(catalog, add_organization(catalog)))
        with refused(None, match=f"machine {there.id} already"):
            add_machine(catalog, organization, instance_id=there.instance_id)

    def test_an_instance_that_is_to_go_is_no_machine(
        self, machine_ledger: CatalogMachineLedger, catalog: Catalog, organization: str
    ) -> None:
        """What Kiln is about to terminate cannot be taken in."""
        machine_ledger.retire([Retired(1, "i-retired", REGION, ACCOUNT)])
        with refused(None, match="terminated"):
            add_machine(catalog, organization, instance_id="i-retired")


class TestStatus:
    def test_it_is_what_is_done_or_what_ec2_says(self, catalog: Catalog, organization: str) -> None:
        """A machine's status is what is being done to it, else EC2's; the list narrowed to that status holds it."""
        machine = add_machine(catalog, organization)
        for (operation, state), shown in SHOWN.items():
            rewrite_machine(catalog, machine, operation=operation, ec2_state=state)
            assert status(catalog, organization, machine) == shown, (operation, state)
            holding = [each for each in STATUSES if page(catalog, organization, "", [each]) == ([machine], 1)]
            assert holding == [shown]

    @pytest.mark.parametrize("end", ["available", "failed"])
    def test_one_whose_image_is_made_is_installing(self, catalog: Catalog, organization: str, end: str) -> None:
        """From the order until its build's end, however it ends, a machine is not to be touched."""
        machine = add_machine(catalog, organization)
        build = make_image(catalog, organization, machine).build.id
        assert page(catalog, organization, "", ["installing"]) == ([machine], 1)
        bring(catalog, build, end)
        assert status(catalog, organization, machine) == "off"


class TestReading:
    def test_pages_are_by_id(self, catalog: Catalog, organization: str) -> None:
        """Machines are listed in the order in which they came, the organization's own only."""
        there = [add_machine(catalog, organization) for _ in range(3)]
        add_machine(catalog, add_organization(catalog))
        assert page(catalog, organization, size=2) == (there[:2], 3)
        assert page(catalog, organization, number=2, size=2) == (there[2:], 3)

    def test_a_name_and_several_statuses_narrow_it(self, catalog: Catalog, organization: str) -> None:
        """A machine is shown if its name holds what is searched for, and its status is among those asked."""
        desk = add_machine(catalog, organization, name="Ada's DESK")
        add_machine(catalog, organization, "running", name="a desk")
        add_machine(catalog, organization, name="a board")
        assert page(catalog, organization, "desk", ["off", "installing"]) == ([desk], 1)
        assert page(catalog, organization, "desk", []) == ([], 0)

    def test_a_deleted_image_is_assigned_no_longer(self, catalog: Catalog, organization: str) -> None:
        """A machine shows the image that was assigned to it last for as long as there is one."""
        template = add_template(catalog, organization)
        machine = create_machine(catalog, organization, template_id=template).machine_id
        shown = machine_of(catalog, organization, machine).template
        assert shown is not None
        assert shown.id == template
        rewrite_machine(catalog, machine, operation=None, launching_template_id=None, built_assignment=1)
        delete(catalog, organization, template)
        assert machine_of(catalog, organization, machine).template is None

    def test_another_organizations_is_not_found(self, catalog: Catalog, organization: str) -> None:
        """Machines are their organization's own, and no id is too large to ask for."""
        machine = add_machine(catalog, add_organization(catalog))
        with catalog.read() as session:
            assert [machines.find(session, organization, number) for number in (machine, HUGE)] == [None] * 2

    def test_all_are_listed_for_the_operator(self, catalog: Catalog) -> None:
        """The operator sees every machine with its organization's slug."""
        there = [(add_machine(catalog, add_organization(catalog, slug)), slug) for slug in ("acme", "zenith")]
        assert [(known.machine.id, slug) for known, slug in listing(catalog)] == there


class TestAssignment:
    def test_a_later_one_wins(self, catalog: Catalog, organization: str) -> None:
        """Each assignment counts, of a running machine too; the last one says which image."""
        first, second = (add_template(catalog, organization) for _ in range(2))
        machine = add_machine(catalog, organization, "running")
        assign(catalog, organization, first, machine)
        assign(catalog, organization, second, machine, machine)
        row = machine_row(catalog, machine)
        assert (row.template_id, row.assignment, row.built_assignment) == (second, 2, 0)
        assert status(catalog, organization, machine) == "ready"

    @pytest.mark.parametrize("state", ["pending", "building", "failed", "gone"])
    def test_an_image_must_be_available(self, catalog: Catalog, organization: str, state: str) -> None:
        """What nothing can be launched from cannot be assigned, whatever the machines."""
        template = add_template(catalog, organization, state)
        with refused(ClientCode.IMAGE_UNAVAILABLE):
            assign(catalog, organization, template, HUGE)

    def test_an_image_must_be_there(self, catalog: Catalog, organization: str) -> None:
        """Another organization's image is none."""
        template = add_template(catalog, add_organization(catalog))
        with pytest.raises(NotFoundError):
            assign(catalog, organization, template, add_machine(catalog, organization))

    def test_one_machine_that_is_not_there_refuses_all(self, catalog: Catalog, organization: str) -> None:
        """All or none: a number that is no machine's refuses the whole call."""
        template, machine = add_template(catalog, organization), add_machine(catalog, organization)
        for number in (HUGE, -1, 0, 2**31 - 1):
            with refused(ClientCode.NO_MACHINES, match=str(number)):
                assign(catalog, organization, template, machine, number)
        assert machine_row(catalog, machine).assignment == 0

    def test_no_machine_is_refused(self, catalog: Catalog, organization: str) -> None:
        """An assignment is to some machine."""
        with refused(ClientCode.NO_MACHINES):
            assign(catalog, organization, add_template(catalog, organization))

    def test_another_organizations_machine_is_none(self, catalog: Catalog, organization: str) -> None:
        """Machines of others are refused like those that are not there."""
        template, theirs = add_template(catalog, organization), add_machine(catalog, add_organization(catalog))
        with refused(ClientCode.NO_MACHINES):
            assign(catalog, organization, template, theirs)

    def test_more_machines_than_one_statement_takes(
        self, catalog: Catalog, organization: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However many machines are named, and however often, each is assigned once."""
        monkeypatch.setattr("kiln.catalog.machine_orders.LOCKED_AT_ONCE", 2)
        template, there = add_template(catalog, organization), [add_machine(catalog, organization) for _ in range(5)]
        assign(catalog, organization, template, *there, *there)
        rows = [machine_row(catalog, machine) for machine in there]
        assert [(row.template_id, row.assignment) for row in rows] == [(template, 1)] * 5

    def test_a_machine_whose_image_is_made_takes_none(self, catalog: Catalog, organization: str) -> None:
        """While an image of it is being made, a machine is assigned nothing, not even one that is too large for it."""
        machine = add_machine(catalog, organization)
        make_image(catalog, organization, machine)
        template = add_template(catalog, organization, size_gb=101)
        with refused(ClientCode.NOT_ASSIGNABLE):
            assign(catalog, organization, template, add_machine(catalog, organization), machine)

    def test_a_machine_takes_images_of_its_region(self, catalog: Catalog, organization: str) -> None:
        """An AMI can be launched in its own region only."""
        template = add_template(catalog, organization, region="eu-west-1")
        with refused(ClientCode.NOT_ASSIGNABLE, match="eu-west-1"):
            assign(catalog, organization, template, add_machine(catalog, organization))

    def test_an_image_must_fit_the_disk(self, catalog: Catalog, organization: str) -> None:
        """An image as large as the disk fits; a larger one does not."""
        machine = add_machine(catalog, organization, disk_gib=100)
        assign(catalog, organization, add_template(catalog, organization, size_gb=100), machine)
        template = add_template(catalog, organization, size_gb=101)
        with refused(ClientCode.IMAGE_TOO_LARGE):
            assign(catalog, organization, template, machine)


class TestImages:
    @pytest.mark.parametrize(
        ("columns", "code"),
        [
            ({"ec2_state": "terminated"}, ClientCode.NO_IMAGE),
            ({"instance_id": None, "ec2_state": None}, ClientCode.NO_IMAGE),
            ({"operation": "create", "instance_id": None}, ClientCode.IMAGE_PENDING),
            ({"ec2_state": "running"}, ClientCode.NOT_STOPPED),
            ({"ec2_state": "stopping"}, ClientCode.NOT_STOPPED),
            ({"operation": "start"}, ClientCode.NOT_STOPPED),
            ({"operation": "rebuild"}, ClientCode.NOT_STOPPED),
        ],
    )
    def test_one_is_made_of_a_stopped_machine(
        self, catalog: Catalog, organization: str, columns: dict[str, str | None], code: ClientCode
    ) -> None:
        """What has no disk, or whose disk may change, cannot be made an image of; nothing is written then."""
        machine = add_machine(catalog, organization)
        rewrite_machine(catalog, machine, **columns)
        with refused(code):
            make_image(catalog, organization, machine)
        assert machine_row(catalog, machine).imaging_build_id is None

    def test_one_is_made_at_a_time(self, catalog: Catalog, organization: str) -> None:
        """A second image waits until the first one's build has ended."""
        machine = add_machine(catalog, organization)
        first = make_image(catalog, organization, machine)
        with refused(ClientCode.IMAGE_PENDING):
            make_image(catalog, organization, machine)
        bring(catalog, first.build.id, "failed")
        assert make_image(catalog, organization, machine).status == "pending"

    def test_another_organizations_machine_is_not_found(self, catalog: Catalog, organization: str) -> None:
        """Nobody makes images of others' machines."""
        with pytest.raises(NotFoundError):
            make_image(catalog, organization, add_machine(catalog, add_organization(catalog)))


class TestStart:
    def test_a_stopped_machine_is_started(self, catalog: Catalog, organization: str) -> None:
        """A machine that awaits no image is switched on as it is."""
        ref = start(catalog, organization, machine := add_machine(catalog, organization), REGION)
        assert (ref.machine_id, ref.number, ref.operation) == (machine, 1, MachineOperation.START)
        assert status(catalog, organization, machine) == "turning_on"

    def test_one_that_awaits_an_image_is_recreated(self, catalog: Catalog, organization: str) -> None:
        """The assignment at the start is the one that is carried out."""
        template, machine = add_template(catalog, organization), add_machine(catalog, organization, "terminated")
        assign(catalog, organization, template, machine)
        assert start(catalog, organization, machine).operation is MachineOperation.REBUILD
        row = machine_row(catalog, machine)
        assert (row.launching_template_id, row.launching_assignment) == (template, 1)

    def test_one_that_was_never_created_is_recreated(
        self, machine_ledger: CatalogMachineLedger, catalog: Catalog, organization: str
    ) -> None:
        """A creation from a base image that failed is made up for by the next start."""
        ref = create_machine(catalog, organization, base_image_id=2)
        machine_ledger.finish_operation(ref, None, "no room")
        again = start(catalog, organization, ref.machine_id)
        assert (again.number, again.operation) == (2, MachineOperation.REBUILD)
        assert machine_ledger.source(again).base_image_id == 2

    def test_its_image_must_be_available(self, catalog: Catalog, organization: str) -> None:
        """A machine is not terminated for an image that is not there."""
        template = add_template(catalog, organization, "failed")
        machine = create_machine(catalog, organization, template_id=template).machine_id
        rewrite_machine(catalog, machine, operation=None)
        with refused(ClientCode.IMAGE_UNAVAILABLE):
            start(catalog, organization, machine)

    def test_only_one_that_is_off(self, catalog: Catalog, organization: str) -> None:
        """A machine that is not off cannot be started."""
        for state in ("running", "pending", "stopping", "shutting-down"):
            machine = add_machine(catalog, organization, state)
            with refused(None):
                start(catalog, organization, machine)

    def test_one_operation_at_a_time(self, catalog: Catalog, organization: str) -> None:
        """While something is being done to a machine, nothing else is ordered."""
        started, imaged = add_machine(catalog, organization), add_machine(catalog, organization)
        start(catalog, organization, started)
        make_image(catalog, organization, imaged)
        for machine in (started, imaged):
            with refused(None):
                start(catalog, organization, machine)

    def test_what_has_no_instance_needs_an_image(self, catalog: Catalog, organization: str) -> None:
        """A machine that was terminated behind Kiln's back says what to do."""
        machine = add_machine(catalog, organization, "terminated")
        with refused(None, match="assign an image"):
            start(catalog, organization, machine)

    def test_it_stays_in_its_region(self, catalog: Catalog, organization: str) -> None:
        """A start names the machine's own region, if any."""
        machine = add_machine(catalog, organization)
        with pytest.raises(InvalidRequestError) as caught:
            start(catalog, organization, machine, "eu-west-1")
        assert caught.value.field == "region"


class TestStop:
    @pytest.mark.parametrize("force", [False, True])
    def test_a_running_machine_is_stopped(
        self, machine_ledger: CatalogMachineLedger, catalog: Catalog, organization: str, *, force: bool
    ) -> None:
        """A stop says whether the operating system is waited for."""
        ref = stop(catalog, organization, add_machine(catalog, organization, "running"), force=force)
        assert ref.operation is MachineOperation.STOP
        assert machine_ledger.machine_order(ref).forced is force

    def test_only_one_that_is_ready(self, catalog: Catalog, organization: str) -> None:
        """A machine that does not run cannot be stopped."""
        for state in ("stopped", "pending", "stopping", "terminated"):
            machine = add_machine(catalog, organization, state)
            with refused(None):
                stop(catalog, organization, machine)


class TestRemoval:
    def test_a_machine_without_an_instance_goes(self, catalog: Catalog, organization: str) -> None:
        """What has nothing in EC2 any more can be forgotten, and its instance's id may come again."""
        machine = add_machine(catalog, organization, "terminated")
        remove(catalog, machine)
        assert page(catalog, organization) == ([], 0)
        with pytest.raises(NotFoundError):
            remove(catalog, machine)

    def test_one_with_an_instance_stays(self, catalog: Catalog, organization: str) -> None:
        """An instance that is still there would be nobody's."""
        machine = add_machine(catalog, organization)
        with pytest.raises(RefusedError, match=str(machine_row(catalog, machine).instance_id)):
            remove(catalog, machine)

    def test_one_that_is_being_created_stays(self, catalog: Catalog, organization: str) -> None:
        """What a creation launches must have its machine."""
        machine = create_machine(catalog, organization, base_image_id=1).machine_id
        with pytest.raises(RefusedError, match="creating"):
            remove(catalog, machine)

    def test_one_that_was_just_taken_in_is_let_go(self, catalog: Catalog, organization: str) -> None:
        """A taking in can be undone until something was ordered of the machine."""
        untouched, started = add_machine(catalog, organization), add_machine(catalog, organization)
        start(catalog, organization, started)
        for machine in (untouched, started):
            with catalog.transaction() as tx:
                machines.let_go(tx, machine)
        assert page(catalog, organization) == ([started], 1)


def test_several_are_created_in_a_row(catalog: Catalog, organization: str) -> None:
    """Each new machine is an order to create it, and has a number for a name unless it was given one."""
    refs = [create_machine(catalog, organization, name=name) for name in (None, "desk 1")]
    assert [(ref.number, ref.operation) for ref in refs] == [(1, MachineOperation.CREATE)] * 2
    names = [machine_row(catalog, ref.machine_id).name for ref in refs]
    assert names == [f"Machine #{refs[0].machine_id}", "desk 1"]
