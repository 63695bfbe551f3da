"""A machine gets a new instance: whatever comes in between, it ends with exactly one."""

import pytest
from temporalio.client import WorkflowExecutionStatus
from temporalio.exceptions import ActivityError

from kiln.errors import CapacityError
from kiln.naming import LAUNCH_TAG, NAME_TAG
from support.fake_machines import BASE_AMI
from support.machine_harness import PLACEMENT, USERS_TAGS, MachineHarness

# What a rebuilding does before the new instance is the machine's.
STEPS = ("claim-operation", "find-source", "launch-instance")


class TestSuccess:
    async def test_the_new_instance_takes_the_olds_place(self, machine_kiln: MachineHarness) -> None:
        """A machine that was recreated has the image's instance, where and as whom the old one ran; the old one ends."""
        kiln = machine_kiln
        template = kiln.assign(machine := kiln.machine())
        async with kiln.workers():
            row = await kiln.done(await kiln.begin(kiln.order_start(machine)))
        (launch,) = kiln.machines.launches
        assert (launch.image_id, launch.placement, row.tags) == (kiln.image_id(template), PLACEMENT, USERS_TAGS)
        assert (launch.tags[NAME_TAG], launch.tags[LAUNCH_TAG]) == (row.name, "1")
        assert (kiln.status_of(machine), row.operation_error, row.built_assignment) == ("ready", None, row.assignment)
        assert (kiln.machines.alive, kiln.retired()) == ({row.instance_id}, set())

    async def test_a_creation_waits_for_its_image(self, machine_kiln: MachineHarness) -> None:
        """A machine whose image is still being built is launched once the image is there."""
        kiln = machine_kiln
        template = kiln.template("pending")
        async with kiln.workers():
            creation = await kiln.begin(kiln.order_creation(template_id=template))
            await kiln.says(creation, "waiting for image")
            assert kiln.machines.launches == []
            kiln.finish(template, "available")
            row = await kiln.done(creation)
        assert kiln.machines.launches[0].image_id == kiln.image_id(template)
        assert (kiln.status_of(row.id), kiln.machines.alive) == ("ready", {row.instance_id})

    async def test_a_creation_from_a_base_image(self, machine_kiln: MachineHarness) -> None:
        """A machine without an image of its own begins with the AMI that EC2 has of its base image."""
        kiln = machine_kiln
        async with kiln.workers():
            await kiln.done(await kiln.begin(kiln.order_creation(base_image_id=1)))
        assert [launch.image_id for launch in kiln.machines.launches] == [BASE_AMI]

    async def test_what_is_assigned_meanwhile_is_awaited(self, machine_kiln: MachineHarness) -> None:
        """An image that is assigned during a rebuilding is for the next start, which rebuilds again."""
        kiln = machine_kiln
        machine = (rebuild := kiln.order_rebuild()).machine_id
        async with kiln.workers():
            kiln.machines.settles = False
            await kiln.waits_for_ec2(await kiln.begin(rebuild))
            template = kiln.assign(machine)
            kiln.machines.settles = True
            row = await kiln.done(rebuild)
            assert row.built_assignment < row.assignment
            await kiln.done(await kiln.begin(kiln.order_stop(machine)))
            again = await kiln.done(await kiln.begin(kiln.order_start(machine)))
        assert kiln.machines.launches[-1].image_id == kiln.image_id(template)
        assert (again.built_assignment, kiln.machines.alive) == (again.assignment, {again.instance_id})


class TestFailure:
    async def test_an_image_that_failed_is_the_reason(self, machine_kiln: MachineHarness) -> None:
        """A creation whose image cannot be built is closed with the build's own reason, and nothing was launched."""
        kiln = machine_kiln
        template = kiln.template("pending")
        async with kiln.workers():
            creation = await kiln.begin(kiln.order_creation(template_id=template))
            await kiln.says(creation, "waiting for image")
            kiln.finish(template, "failed")
            reason = await kiln.reason(creation)
        row = kiln.machine_row(creation.machine_id)
        assert "is not there: no room on the disk" in reason
        assert (row.operation_error, kiln.status_of(row.id), kiln.machines.alive) == (reason, "off", set())

    async def test_no_room_is_believed_the_third_time(self, machine_kiln: MachineHarness) -> None:
        """Where EC2 has no room, the machine keeps what it has, says why, and still awaits its image."""
        kiln = machine_kiln
        kiln.machines.fail("launch", CapacityError("no t3.medium in us-east-1 now"), times=9)
        rebuild = kiln.order_rebuild()
        async with kiln.workers():
            reason = await kiln.reason(await kiln.begin(rebuild))
        row = kiln.machine_row(rebuild.machine_id)
        assert (kiln.machines.calls["launch"], reason) == (3, "no t3.medium in us-east-1 now")
        assert (row.operation_error, row.built_assignment < row.assignment) == (reason, True)
        assert (kiln.status_of(row.id), kiln.machines.alive) == ("off", {row.instance_id})

    async def test_an_instance_that_dies_is_not_taken(self, machine_kiln: MachineHarness) -> None:
        """A new instance that never runs goes, with EC2's reason; the old one stays the machine's."""
        kiln = machine_kiln
        kiln.machines.dies = "Client.VolumeLimitExceeded: Volume limit exceeded"
        old = kiln.instance_of((rebuild := kiln.order_rebuild()).machine_id)
        async with kiln.workers():
            reason = await kiln.reason(await kiln.begin(rebuild))
        assert reason.endswith("is terminated: Client.VolumeLimitExceeded: Volume limit exceeded")
        assert (kiln.instance_of(rebuild.machine_id), kiln.machines.alive, kiln.retired()) == (old, {old}, set())

    async def test_nothing_is_launched_in_another_account(self, machine_kiln: MachineHarness) -> None:
        """Credentials of another account than the machine's leave everything as it is."""
        kiln = machine_kiln
        rebuild = kiln.order_rebuild()
        kiln.cloud.account_id = "999999999999"
        async with kiln.workers():
            reason = await kiln.reason(await kiln.begin(rebuild))
        assert reason == "the machine is in account 123456789012, and these credentials are of 999999999999"
        assert (kiln.machines.launches, kiln.machines.alive) == ([], {kiln.instance_of(rebuild.machine_id)})

    async def test_an_old_instance_that_ec2_keeps_undoes_nothing(self, machine_kiln: MachineHarness) -> None:
        """A protected old instance is still to go, and shows as a failure; the machine has its new one."""
        kiln = machine_kiln
        old = kiln.instance_of((rebuild := kiln.order_rebuild()).machine_id)
        kiln.machines.protect(old)
        async with kiln.workers():
            error = await kiln.error(await kiln.begin(rebuild))
        row = kiln.machine_row(rebuild.machine_id)
        assert isinstance(error, ActivityError)
        assert "may not be terminated" in str(error.cause)
        assert (kiln.status_of(row.id), row.operation_error, row.instance_id != old) == ("ready", None, True)
        assert (kiln.machines.alive, kiln.retired()) == ({row.instance_id, old}, {old})


class TestLostReplies:
    async def test_what_was_launched_is_found(self, machine_kiln: MachineHarness) -> None:
        """A launch whose reply was lost is known by its tag: there is no second one."""
        kiln = machine_kiln
        kiln.machines.lose_reply("launch")
        async with kiln.workers():
            row = await kiln.done(await kiln.begin(kiln.order_rebuild()))
        assert (kiln.machines.calls["launch"], kiln.machines.alive) == (1, {row.instance_id})

    @pytest.mark.parametrize(("forgets", "launches"), [(False, 1), (True, 2)], ids=["token", "no token"])
    async def test_a_hidden_one_leaves_one(self, machine_kiln: MachineHarness, forgets: bool, launches: int) -> None:
        """What EC2 hides is launched once more; its client token, or at last the tags, see to it that one is left."""
        kiln = machine_kiln
        kiln.machines.hides, kiln.machines.forgets_tokens = 2, forgets
        kiln.machines.lose_reply("launch")
        async with kiln.workers():
            row = await kiln.done(await kiln.begin(kiln.order_rebuild()))
        assert (kiln.machines.calls["launch"], len(kiln.machines.launches)) == (2, launches)
        assert (kiln.machines.alive, kiln.retired()) == ({row.instance_id}, set())

    async def test_an_ec2_that_is_away_is_waited_for(self, machine_kiln: MachineHarness) -> None:
        """An outage delays each step, and fails none."""
        kiln = machine_kiln
        for call in ("launch", "instances", "instances_of_machine", "terminate_instance"):
            kiln.machines.fail(call, times=2)
        async with kiln.workers():
            row = await kiln.done(await kiln.begin(kiln.order_rebuild()))
        assert (kiln.status_of(row.id), kiln.machines.alive) == ("ready", {row.instance_id})


class TestAWorkerThatStops:
    @pytest.mark.parametrize("step", ["claim-operation", "launch-instance", "adopt-instance", "end-retired"])
    async def test_a_step_that_was_done_is_not_doubled(self, machine_kiln: MachineHarness, step: str) -> None:
        """A worker that goes between a step's commit and its answer leaves a workflow that ends well."""
        kiln = machine_kiln
        kiln.gate.hold(step)
        async with kiln.control():
            async with kiln.machinist("worker-1"):
                rebuild = await kiln.begin(kiln.order_rebuild())
                await kiln.gate.is_reached()
            kiln.gate.open()
            async with kiln.machinist("worker-2"):
                row = await kiln.done(rebuild)
        assert (kiln.status_of(row.id), row.operation_error) == ("ready", None)
        assert (len(kiln.machines.launches), kiln.machines.alive) == (1, {row.instance_id})

    async def test_waiting_is_taken_up(self, machine_kiln: MachineHarness) -> None:
        """A worker's orderly end while EC2 is waited for is no cancel: another worker waits on."""
        kiln = machine_kiln
        kiln.machines.settles = False
        async with kiln.control():
            async with kiln.machinist("worker-1"):
                await kiln.waits_for_ec2(rebuild := await kiln.begin(kiln.order_rebuild()))
            kiln.machines.settles = True
            async with kiln.machinist("worker-2"):
                row = await kiln.done(rebuild)
        assert (kiln.status_of(row.id), row.operation_error) == ("ready", None)
        assert (len(kiln.machines.launches), kiln.machines.alive) == (1, {row.instance_id})


class TestCancel:
    @pytest.mark.parametrize("step", STEPS)
    async def test_before_the_adoption_the_old_one_stays(self, machine_kiln: MachineHarness, step: str) -> None:
        """A rebuilding that is cancelled in Temporal during a step ends there, and what it launched goes."""
        kiln = machine_kiln
        old = kiln.instance_of((rebuild := kiln.order_rebuild()).machine_id)
        async with kiln.workers():
            kiln.gate.hold(step)
            await kiln.begin(rebuild)
            await kiln.gate.is_reached()
            await kiln.cancel(rebuild)
            kiln.gate.open()
            row = await kiln.was_cancelled(rebuild)
        assert (row.operation, row.operation_error, row.instance_id) == (None, "it was cancelled", old)
        assert (kiln.machines.alive, kiln.retired()) == ({old}, set())
        assert len(kiln.machines.launches) == (step == "launch-instance")

    async def test_while_ec2_is_waited_for_the_new_one_goes(self, machine_kiln: MachineHarness) -> None:
        """A rebuilding that is cancelled while its instance is pending leaves the old one alone."""
        kiln = machine_kiln
        old = kiln.instance_of((rebuild := kiln.order_rebuild()).machine_id)
        async with kiln.workers():
            kiln.machines.settles = False
            await kiln.waits_for_ec2(await kiln.begin(rebuild))
            await kiln.cancel(rebuild)
            await kiln.asked("terminate_instance")
            kiln.machines.settles = True
            row = await kiln.was_cancelled(rebuild)
        assert (row.operation_error, row.built_assignment < row.assignment) == ("it was cancelled", True)
        assert (kiln.status_of(row.id), kiln.machines.alive) == ("off", {old})

    async def test_a_new_one_that_ec2_hides_goes_too(self, machine_kiln: MachineHarness) -> None:
        """What was launched is noted: to be ended, it need not be found by its tags."""
        kiln = machine_kiln
        kiln.machines.hides = 1000
        old = kiln.instance_of((rebuild := kiln.order_rebuild()).machine_id)
        async with kiln.workers():
            await kiln.waits_for_ec2(await kiln.begin(rebuild))
            await kiln.cancel(rebuild)
            await kiln.asked("terminate_instance")
            kiln.machines.show()
            await kiln.was_cancelled(rebuild)
        assert (kiln.machines.alive, kiln.retired()) == ({old}, set())

    async def test_a_creation_that_waits_leaves_nothing(self, machine_kiln: MachineHarness) -> None:
        """A creation that is cancelled while its image is built launches nothing."""
        kiln = machine_kiln
        async with kiln.workers():
            creation = await kiln.begin(kiln.order_creation(template_id=kiln.template("pending")))
            await kiln.says(creation, "waiting for image")
            await kiln.cancel(creation)
            row = await kiln.was_cancelled(creation)
        assert (row.operation_error, kiln.status_of(row.id)) == ("it was cancelled", "off")
        assert (kiln.machines.launches, kiln.machines.alive) == ([], set())

    @pytest.mark.parametrize("step", ["adopt-instance", "end-retired"])
    async def test_after_the_adoption_nothing_changes(self, machine_kiln: MachineHarness, step: str) -> None:
        """Once the new instance is the machine's, a cancel stops nothing: the old one ends."""
        kiln = machine_kiln
        rebuild = kiln.order_rebuild()
        async with kiln.workers():
            kiln.gate.hold(step)
            await kiln.begin(rebuild)
            await kiln.gate.is_reached()
            await kiln.cancel(rebuild)
            kiln.gate.open()
            row = await kiln.done(rebuild)
        assert (kiln.status_of(row.id), row.operation_error) == ("ready", None)
        assert kiln.machines.alive == {row.instance_id}


class TestALostWorkflow:
    async def test_another_one_goes_on_with_its_instance(self, machine_kiln: MachineHarness) -> None:
        """A terminated workflow's operation is given back, started again, and adopts what was launched."""
        kiln = machine_kiln
        async with kiln.workers():
            kiln.machines.settles = False
            await kiln.waits_for_ec2(rebuild := await kiln.begin(kiln.order_rebuild()))
            await kiln.operation(rebuild).terminate()
            kiln.make_operation_older(rebuild)
            await kiln.keep_house()
            assert kiln.machine_row(rebuild.machine_id).operation_run is None
            await kiln.dispatch()
            kiln.machines.settles = True
            row = await kiln.done(rebuild)
        assert (kiln.status_of(row.id), len(kiln.machines.launches)) == ("ready", 1)
        assert (kiln.machines.alive, kiln.retired()) == ({row.instance_id}, set())

    async def test_a_second_run_does_nothing(self, machine_kiln: MachineHarness) -> None:
        """An operation is one run's: another one ends at once."""
        kiln = machine_kiln
        kiln.machine_ledger.claim_operation(rebuild := kiln.order_rebuild(), "another run")
        async with kiln.workers():
            await kiln.done(await kiln.begin(rebuild))
            assert (await kiln.operation(rebuild).describe()).status is WorkflowExecutionStatus.COMPLETED
        assert (kiln.machines.launches, kiln.machine_row(rebuild.machine_id).operation) == ([], "rebuild")

    async def test_an_operation_that_was_left_behind_is_started(self, machine_kiln: MachineHarness) -> None:
        """A row whose workflow the API could not start is carried out all the same; a fresh one is left to the API."""
        kiln = machine_kiln
        fresh, rebuild = kiln.order_rebuild(), kiln.order_rebuild()
        kiln.make_operation_older(rebuild)
        await kiln.dispatch()
        async with kiln.workers():
            await kiln.done(rebuild)
        assert kiln.machine_row(fresh.machine_id).operation_run is None
