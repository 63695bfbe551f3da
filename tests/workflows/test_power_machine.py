"""A machine is started or stopped, and its row says what EC2 says."""

from datetime import timedelta

import pytest

from kiln.errors import CapacityError, OperationOverError
from kiln.models import OperationRef
from support.machine_harness import MachineHarness


async def test_a_machine_starts(machine_kiln: MachineHarness) -> None:
    """A stopped machine's own instance runs, and the operation is over."""
    kiln = machine_kiln
    start = kiln.order_start(kiln.machine())
    async with kiln.workers():
        row = await kiln.done(await kiln.begin(start))
    assert (kiln.status_of(row.id), row.operation, row.operation_error) == ("ready", None, None)
    assert (kiln.machines.alive, kiln.machines.launches) == ({row.instance_id}, [])


@pytest.mark.parametrize("force", [False, True])
async def test_a_machine_stops(machine_kiln: MachineHarness, force: bool) -> None:
    """A running machine's instance is stopped, as gracefully as was asked for."""
    kiln = machine_kiln
    stop = kiln.order_stop(kiln.machine("running"), force=force)
    async with kiln.workers():
        row = await kiln.done(await kiln.begin(stop))
    assert (kiln.status_of(row.id), row.operation_error, kiln.machines.forced) == ("off", None, [force])
    assert kiln.machines.state(row.instance_id or "") == "stopped"


async def test_a_slow_one_is_left_to_the_house_keeping(
    machine_kiln: MachineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operating system that takes its time over its end does not keep the operation open."""
    kiln = machine_kiln
    monkeypatch.setattr("activities.machines.POWER_PATIENCE", timedelta(milliseconds=100))
    kiln.machines.settles = False
    stop = kiln.order_stop(kiln.machine("running"))
    async with kiln.workers():
        row = await kiln.done(await kiln.begin(stop))
        assert (kiln.status_of(row.id), row.operation, row.operation_error) == ("turning_off", None, None)
        kiln.machines.settles = True
        await kiln.keep_house()
    assert kiln.status_of(row.id) == "off"


@pytest.mark.parametrize("state", ["terminated", "gone"])
async def test_an_instance_that_is_no_more_is_told(machine_kiln: MachineHarness, state: str) -> None:
    """A machine whose instance somebody terminated is off, and says so."""
    kiln = machine_kiln
    start = kiln.order_start(machine := kiln.machine())
    if state == "gone":
        kiln.machines.forget(kiln.instance_of(machine))
    else:
        kiln.machines.change(kiln.instance_of(machine), state=state)
    async with kiln.workers():
        row = await kiln.done(await kiln.begin(start))
    assert (row.ec2_state, row.operation_error) == ("terminated", "its instance was terminated in EC2")
    assert kiln.status_of(machine) == "off"


async def test_another_account_says_nothing(machine_kiln: MachineHarness) -> None:
    """With credentials of another account the machine's instance is not to be seen, and not taken for terminated."""
    kiln = machine_kiln
    start = kiln.order_start(machine := kiln.machine())
    kiln.machines.forget(kiln.instance_of(machine))
    kiln.cloud.account_id = "999999999999"
    async with kiln.workers():
        reason = await kiln.reason(await kiln.begin(start))
    assert reason == "the machine is in account 123456789012, and these credentials are of 999999999999"
    assert (kiln.machine_row(machine).ec2_state, kiln.machine_row(machine).operation_error) == ("stopped", reason)


async def test_no_room_is_believed_the_third_time(machine_kiln: MachineHarness) -> None:
    """Where EC2 has no room for a start, the machine stays off and says why."""
    kiln = machine_kiln
    kiln.machines.fail("start_instance", CapacityError("no t3.medium in us-east-1 now"), times=9)
    start = kiln.order_start(kiln.machine())
    async with kiln.workers():
        reason = await kiln.reason(await kiln.begin(start))
    row = kiln.machine_row(start.machine_id)
    assert (kiln.machines.calls["start_instance"], reason) == (3, "no t3.medium in us-east-1 now")
    assert (row.operation_error, kiln.status_of(row.id)) == (reason, "off")


async def test_an_ec2_that_is_away_is_waited_for(machine_kiln: MachineHarness) -> None:
    """An outage, and a reply that was lost, delay a start and do not fail it."""
    kiln = machine_kiln
    kiln.machines.fail("start_instance", times=2)
    kiln.machines.lose_reply("start_instance")
    start = kiln.order_start(kiln.machine())
    async with kiln.workers():
        row = await kiln.done(await kiln.begin(start))
    assert (kiln.status_of(row.id), row.operation_error) == ("ready", None)


async def test_a_cancel_ends_the_waiting(machine_kiln: MachineHarness) -> None:
    """A start that is cancelled is over at once; what EC2 makes of it shows later."""
    kiln = machine_kiln
    kiln.machines.settles = False
    async with kiln.workers():
        start = await kiln.begin(kiln.order_start(kiln.machine()))
        await kiln.asked("instances", times=2)
        await kiln.cancel(start)
        row = await kiln.was_cancelled(start)
        assert (row.operation, row.operation_error) == (None, "it was cancelled")
        kiln.machines.settles = True
        await kiln.keep_house()
    assert kiln.status_of(row.id) == "ready"


async def test_a_cancel_with_the_claim_asks_nothing_of_ec2(machine_kiln: MachineHarness) -> None:
    """A start that is cancelled while it is claimed does nothing."""
    kiln = machine_kiln
    kiln.gate.hold("claim-operation")
    async with kiln.workers():
        start = await kiln.begin(kiln.order_start(kiln.machine()))
        await kiln.gate.is_reached()
        await kiln.cancel(start)
        kiln.gate.open()
        row = await kiln.was_cancelled(start)
    assert (row.operation_error, kiln.status_of(row.id)) == ("it was cancelled", "off")
    assert kiln.machines.calls["start_instance"] == 0


async def test_an_end_whose_answer_was_lost_is_an_end(machine_kiln: MachineHarness) -> None:
    """A worker that goes between the commit and its answer leaves a workflow that ends well."""
    kiln = machine_kiln
    kiln.gate.hold("power-machine")
    async with kiln.control():
        async with kiln.machinist("worker-1"):
            start = await kiln.begin(kiln.order_start(kiln.machine()))
            await kiln.gate.is_reached()
        kiln.gate.open()
        async with kiln.machinist("worker-2"):
            row = await kiln.done(start)
    assert (kiln.status_of(row.id), row.operation_error, kiln.machines.calls["start_instance"]) == ("ready", None, 1)


async def test_a_worker_that_stops_cancels_nothing(machine_kiln: MachineHarness) -> None:
    """A worker's orderly end while EC2 is waited for leaves the rest to another worker."""
    kiln = machine_kiln
    kiln.machines.settles = False
    async with kiln.control():
        async with kiln.machinist("worker-1"):
            start = await kiln.begin(kiln.order_start(kiln.machine()))
            await kiln.asked("instances", times=2)
        kiln.machines.settles = True
        async with kiln.machinist("worker-2"):
            row = await kiln.done(start)
    assert (kiln.status_of(row.id), row.operation_error) == ("ready", None)


async def test_a_lost_workflow_is_followed_by_another(machine_kiln: MachineHarness) -> None:
    """A terminated workflow's operation is given back, and a new run carries it out."""
    kiln = machine_kiln
    kiln.machines.settles = False
    async with kiln.workers():
        start = await kiln.begin(kiln.order_start(kiln.machine()))
        await kiln.asked("instances", times=2)
        await kiln.operation(start).terminate()
        kiln.make_operation_older(start)
        await kiln.keep_house()
        await kiln.dispatch()
        kiln.machines.settles = True
        await kiln.until(lambda: is_over(kiln, start))
    assert kiln.status_of(start.machine_id) == "ready"


async def is_over(kiln: MachineHarness, ref: OperationRef) -> bool:
    try:
        kiln.machine_ledger.machine_order(ref)
    except OperationOverError:
        return True
    return False
