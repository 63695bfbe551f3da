"""House-keeping for machines: what EC2 says is written down, and instances that nobody has go. Unknown means keep."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from sqlalchemy import update
from temporalio.client import Client
from temporalio.testing import ActivityEnvironment

from kiln.catalog.tables import RetiredInstance
from kiln.errors import UnavailableError
from kiln.models import OperationRef
from kiln.ports import Retired
from support.harness import copied_catalog
from support.machine_harness import LONG_AGO, MachineHarness
from support.machine_rows import rewrite_machine
from support.rows import ACCOUNT, REGION

GRACE = timedelta(minutes=10)
OTHER_ACCOUNT = "999999999999"


@pytest_asyncio.fixture
async def kiln(migrated_file: Path, tmp_path: Path) -> AsyncIterator[MachineHarness]:
    """A Kiln without Temporal, of which single passes ask nothing."""
    client = await Client.connect("127.0.0.1:1", lazy=True)
    harness = MachineHarness(client, copied_catalog(migrated_file, tmp_path), tmp_path, skips_time=False)
    yield harness
    harness.close()


def old() -> datetime:
    """A launch that the sweep's grace does not cover."""
    return datetime.now(UTC) - GRACE * 2


class TestObservation:
    def observe(self, kiln: MachineHarness) -> None:
        """One look at every machine."""
        kiln.machines.settles = False
        ActivityEnvironment().run(kiln.machine_house().observe)

    @pytest.mark.parametrize(
        ("state", "status"), [("running", "ready"), ("stopping", "turning_off"), ("terminated", "off")]
    )
    async def test_what_ec2_says_is_written(self, kiln: MachineHarness, state: str, status: str) -> None:
        """A machine that was started, stopped or terminated behind Kiln's back shows as it is."""
        machine = kiln.machine("pending")
        kiln.machines.change(kiln.instance_of(machine), state=state)
        self.observe(kiln)
        assert (kiln.machine_row(machine).ec2_state, kiln.status_of(machine)) == (state, status)

    async def test_what_ec2_no_longer_shows_is_terminated(self, kiln: MachineHarness) -> None:
        """A machine whose instance EC2 has forgotten has none; one beside it is as it was."""
        machine, other = kiln.machine("running"), kiln.machine("running")
        kiln.machines.forget(kiln.instance_of(machine))
        self.observe(kiln)
        assert [kiln.machine_row(each).ec2_state for each in (machine, other)] == ["terminated", "running"]

    async def test_another_account_proves_nothing(self, kiln: MachineHarness) -> None:
        """An instance of another account than the credentials' is not looked for."""
        kiln.machines.forget(kiln.instance_of(machine := kiln.machine("running")))
        kiln.cloud.account_id = OTHER_ACCOUNT
        self.observe(kiln)
        assert kiln.machine_row(machine).ec2_state == "running"

    async def test_another_ec2_proves_nothing(self, kiln: MachineHarness) -> None:
        """A machine of AWS is not looked for in a simulated EC2, whatever account that has."""
        simulated, real = kiln.machine("running"), kiln.machine("running")
        rewrite_machine(kiln.catalog, real, simulated=False)
        for machine in (simulated, real):
            kiln.machines.forget(kiln.instance_of(machine))
        self.observe(kiln)
        assert [kiln.machine_row(each).ec2_state for each in (simulated, real)] == ["terminated", "running"]

    async def test_an_outage_proves_nothing(self, kiln: MachineHarness) -> None:
        """While EC2 is away the last answer holds, and operators hear of it."""
        kiln.machines.forget(kiln.instance_of(machine := kiln.machine("running")))
        kiln.machines.fail("instances")
        with pytest.raises(UnavailableError):
            self.observe(kiln)
        assert kiln.machine_row(machine).ec2_state == "running"

    async def test_an_operation_has_the_last_word(self, kiln: MachineHarness) -> None:
        """A machine to which something is being done is left alone."""
        kiln.order_stop(machine := kiln.machine("running"))
        kiln.machines.forget(kiln.instance_of(machine))
        self.observe(kiln)
        assert kiln.machine_row(machine).ec2_state == "running"


class TestLostOperations:
    async def test_an_operation_that_runs_is_left_alone(self, machine_kiln: MachineHarness) -> None:
        """An operation whose workflow runs is nobody else's, and one that was never started is the dispatcher's."""
        kiln = machine_kiln
        async with kiln.control():
            running, waiting = await kiln.begin(kiln.order_rebuild()), kiln.order_rebuild()
            run_id = (await kiln.operation(running).describe()).run_id
            assert kiln.machine_ledger.claim_operation(running, run_id or "")
            assert await self.released(kiln, running, waiting) == 0
        assert kiln.machine_row(running.machine_id).operation_run == run_id

    async def test_a_forgotten_workflow_gives_its_operation_back(self, machine_kiln: MachineHarness) -> None:
        """An operation whose run Temporal no longer knows is the dispatcher's again."""
        kiln = machine_kiln
        rebuild = kiln.order_rebuild()
        kiln.machine_ledger.claim_operation(rebuild, "a run of long ago")
        assert await self.released(kiln, rebuild) == 1
        assert kiln.machine_row(rebuild.machine_id).operation_run is None

    async def test_a_fresh_operation_has_its_time(self, kiln: MachineHarness) -> None:
        """An operation gets a few seconds to reach Temporal before anybody asks where it is."""
        kiln.machine_ledger.claim_operation(kiln.order_rebuild(), "a run of just now")
        assert await self.released(kiln) == 0

    async def released(self, kiln: MachineHarness, *refs: OperationRef) -> int:
        """How many operations a look gives back; these are old."""
        for ref in refs:
            kiln.make_operation_older(ref)
        return (await ActivityEnvironment().run(kiln.machine_house().find_lost_operations)).released


class TestSweep:
    def swept(self, kiln: MachineHarness) -> set[str]:
        """What a sweep finds that nobody has."""
        ActivityEnvironment().run(kiln.machine_house(GRACE).sweep)
        return kiln.retired()

    async def test_what_an_operation_left_goes(self, kiln: MachineHarness) -> None:
        """An instance that was launched for a machine which has another one is to go."""
        left = kiln.launched(kiln.machine(), launched_at=old())
        assert self.swept(kiln) == {left}

    async def test_it_ends_in_the_next_rounds(self, machine_kiln: MachineHarness) -> None:
        """House-keeping finds what was left and sees it terminated; what was taken in stays."""
        kiln = machine_kiln
        left = kiln.launched(machine := kiln.machine(), launched_at=old())
        async with kiln.control():
            await kiln.keep_house(rounds=1)
            age(kiln, left)
            await kiln.until(lambda: self.is_gone(kiln, left))
        assert (kiln.machines.alive, kiln.retired()) == ({kiln.instance_of(machine)}, set())

    async def test_a_machines_own_instance_stays(self, kiln: MachineHarness) -> None:
        """The instance that a machine has was launched for it, too."""
        own = kiln.launched(machine := kiln.machine(), launched_at=old())
        rewrite_machine(kiln.catalog, machine, instance_id=own)
        assert self.swept(kiln) == set()

    async def test_what_was_taken_in_stays(self, kiln: MachineHarness) -> None:
        """An instance that Kiln did not launch is nobody's to end, though its machine has another one."""
        machine = kiln.machine(launched_at=old())
        rewrite_machine(kiln.catalog, machine, instance_id="i-another")
        assert self.swept(kiln) == set()

    async def test_what_is_fresh_stays(self, kiln: MachineHarness) -> None:
        """An instance of which the catalog may not know yet has its time."""
        kiln.launched(kiln.machine())
        assert self.swept(kiln) == set()

    async def test_an_open_operations_instances_stay(self, kiln: MachineHarness) -> None:
        """What an operation launched, once or twice, it sorts out itself."""
        rebuild = kiln.order_rebuild()
        first, second = (kiln.launched(rebuild.machine_id, launched_at=old()) for _ in range(2))
        kiln.machine_ledger.note_launch(rebuild, first)
        assert self.swept(kiln) == set()
        kiln.machine_ledger.adopt_instance(rebuild, kiln.machines.instances(REGION, [first])[first])
        assert second in self.swept(kiln)

    async def test_what_nobody_knows_stays(self, kiln: MachineHarness) -> None:
        """A machine that the catalog does not have, or has in another account, keeps what carries its tag."""
        kiln.launched(4711, launched_at=old())
        kiln.launched(machine := kiln.machine(), launched_at=old())
        rewrite_machine(kiln.catalog, machine, account=OTHER_ACCOUNT)
        assert self.swept(kiln) == set()

    async def is_gone(self, kiln: MachineHarness, instance_id: str) -> bool:
        return kiln.machines.state(instance_id) == "terminated" and not kiln.retired()


class TestRetired:
    def ended(self, kiln: MachineHarness, passes: int = 3) -> set[str]:
        """What is still to go after some passes."""
        for _ in range(passes):
            ActivityEnvironment().run(kiln.machine_house().end_retired)
        return kiln.retired()

    async def test_one_that_is_refused_holds_up_no_other(self, kiln: MachineHarness) -> None:
        """An instance that EC2 keeps, or that is in another account, is tried again; those after it end."""
        machine = kiln.machine()
        protected, elsewhere, last = (retired(kiln, machine, account) for account in (ACCOUNT, OTHER_ACCOUNT, ACCOUNT))
        kiln.machines.protect(protected)
        assert self.ended(kiln) == {protected, elsewhere}
        assert kiln.machines.alive == {kiln.instance_of(machine), protected, elsewhere}
        assert kiln.machines.state(last) == "terminated"

    async def test_a_fresh_one_is_its_operations(self, kiln: MachineHarness) -> None:
        """The operation that retired an instance has the time to end it."""
        fresh = retired(kiln, kiln.machine(), ago=timedelta(0))
        assert (self.ended(kiln), kiln.machines.calls["terminate_instance"]) == ({fresh}, 0)

    async def test_one_that_ec2_hides_is_not_forgotten(self, kiln: MachineHarness) -> None:
        """An instance that EC2 does not show is believed to be gone only after a while."""
        hidden = retired(kiln, kiln.machine())
        kiln.machines.forget(hidden)
        assert self.ended(kiln) == {hidden}
        age(kiln, hidden, timedelta(minutes=5))
        assert self.ended(kiln) == set()


def retired(kiln: MachineHarness, machine: int, account: str = ACCOUNT, ago: timedelta = LONG_AGO) -> str:
    """An instance that a machine no longer has."""
    instance_id = kiln.launched(machine)
    kiln.machine_ledger.retire([Retired(machine, instance_id, REGION, account)])
    age(kiln, instance_id, ago)
    return instance_id


def age(kiln: MachineHarness, instance_id: str, ago: timedelta = LONG_AGO) -> None:
    """Moves the time at which an instance was retired into the past."""
    with kiln.catalog.transaction() as tx:
        row = update(RetiredInstance).where(RetiredInstance.instance_id == instance_id)
        tx.execute(row.values(retired_at=datetime.now(UTC) - ago))
