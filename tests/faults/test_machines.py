"""Machines that are recreated while things go wrong: each ends with exactly one instance, and nothing is lost."""

import asyncio
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from temporalio.client import WorkflowExecutionStatus

from support.organization_rig import OrganizationRig, running_organization_rig
from support.processes import eventually

pytestmark = [pytest.mark.fault, pytest.mark.long]

# EC2's lag and the sweep's patience, short enough to be waited out.
TERMS: dict[str, Any] = {"sweep_seconds": 2.0, "sweep_grace_seconds": 2.0, "settle_seconds": 1.0}
# What a rebuilding asks EC2 for, in its order.
STEPS = ("RunInstances", "TerminateInstances")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OrganizationRig]:
    with running_organization_rig(tmp_path_factory.mktemp("rig") / "home", **TERMS) as shared:
        yield shared


@pytest.fixture
def house(shared: OrganizationRig) -> Iterator[OrganizationRig]:
    shared.rig.heal()
    yield shared
    shared.rig.heal()


@pytest.fixture(scope="module")
def template(shared: OrganizationRig) -> int:
    """An image that machines can be made from."""
    seat, *_ = shared.launch(name="seat")
    shared.call("POST", f"/machines/{seat}/stop")
    shared.until(seat, "off")
    return shared.image_of(seat)


@pytest.fixture
def awaiting(house: OrganizationRig, template: int) -> int:
    """A machine that is off and awaits the image."""
    number, *_ = house.launch(name="desk")
    house.call("POST", f"/machines/{number}/stop")
    house.until(number, "off")
    house.call("POST", f"/images/{template}/assign", {"machine_ids": [number]})
    return number


def one_instance(house: OrganizationRig, number: int, template: int) -> None:
    """The machine is ready, on an instance of the image's AMI, which is the only one that it has."""
    house.until(number, "ready", seconds=90)
    instance = house.instance_of(number)
    assert instance["ImageId"] == house.rig.build(house.build_of(template))["image"]["ami_id"]
    assert eventually(lambda: house.instances_for(number) == {instance["InstanceId"]}, 60), house.instances_for(number)


def restart_worker(house: OrganizationRig) -> None:
    house.rig.stack.kill("worker", signal.SIGKILL)
    house.rig.stack.wait_for_exit("worker")
    house.rig.stack.start_parts("worker")


@pytest.mark.parametrize("action", STEPS)
def test_a_worker_killed_before_a_step_leaves_one_instance(
    house: OrganizationRig, awaiting: int, template: int, action: str
) -> None:
    """Killed with its request to EC2 on the way, which is carried out after all."""
    with house.rig.proxy.blocked(action) as gate:
        house.call("POST", f"/machines/{awaiting}/start")
        gate.wait_for_request(30)
        house.rig.stack.kill("worker", signal.SIGKILL)
        house.rig.stack.wait_for_exit("worker")
        gate.release()
    house.rig.stack.start_parts("worker")
    one_instance(house, awaiting, template)


@pytest.mark.parametrize("action", STEPS)
def test_a_worker_killed_after_a_step_leaves_one_instance(
    house: OrganizationRig, awaiting: int, template: int, action: str
) -> None:
    """Killed when EC2 has done what it was asked, and before it has said so."""
    with house.rig.proxy.reply_blocked(action) as gate:
        house.call("POST", f"/machines/{awaiting}/start")
        gate.wait_for_request(30)
        restart_worker(house)
    one_instance(house, awaiting, template)


def test_a_worker_killed_while_the_new_instance_is_not_shown(
    house: OrganizationRig, awaiting: int, template: int
) -> None:
    """EC2 hides what it has just launched, and the worker that launched it dies: still one instance."""
    house.rig.proxy.hide_fresh(3)
    with house.rig.proxy.reply_blocked("RunInstances") as gate:
        house.call("POST", f"/machines/{awaiting}/start")
        gate.wait_for_request(30)
        restart_worker(house)
    one_instance(house, awaiting, template)


def test_a_lost_reply_and_throttling_leave_one_instance(house: OrganizationRig, awaiting: int, template: int) -> None:
    """RunInstances done and unheard of, everything else throttled twice."""
    house.rig.proxy.drop_reply("RunInstances")
    for action in ("TerminateInstances", "DescribeInstances"):
        house.rig.proxy.throttle(action, times=2)
    house.call("POST", f"/machines/{awaiting}/start")
    one_instance(house, awaiting, template)


def test_everything_killed_at_once_goes_on(house: OrganizationRig, awaiting: int, template: int) -> None:
    """API, workers and Temporal die together in mid-launch: the machine is recreated when they are back."""
    stack = house.rig.stack
    with house.rig.proxy.blocked("RunInstances") as gate:
        house.call("POST", f"/machines/{awaiting}/start")
        gate.wait_for_request(30)
        for name in house.rig.names:
            stack.kill(name, signal.SIGKILL)
        for name in house.rig.names:
            stack.wait_for_exit(name)
    stack.start_parts(*house.rig.names)
    one_instance(house, awaiting, template)


async def test_a_terminated_workflow_is_started_again(house: OrganizationRig, awaiting: int, template: int) -> None:
    """Terminated in Temporal's UI while it launches: the operation is taken up by another run."""
    with house.rig.proxy.blocked("RunInstances") as gate:
        await asyncio.to_thread(house.call, "POST", f"/machines/{awaiting}/start")
        await asyncio.to_thread(gate.wait_for_request, 30)
        client = await house.rig.temporal()
        handle = client.get_workflow_handle(f"machine-{awaiting}-{house.row(awaiting).operation_number}")
        await handle.terminate()
    await asyncio.to_thread(one_instance, house, awaiting, template)
    async with asyncio.timeout(30):
        while (await handle.describe()).status is not WorkflowExecutionStatus.COMPLETED:
            await asyncio.sleep(0.2)


async def test_a_cancelled_workflow_keeps_the_old_instance(
    house: OrganizationRig, awaiting: int, template: int
) -> None:
    """Cancelled in Temporal's UI before the new instance runs: the old one stays, and the image is still awaited."""
    old = house.row(awaiting).instance_id
    with house.rig.proxy.blocked("RunInstances") as gate:
        await asyncio.to_thread(house.call, "POST", f"/machines/{awaiting}/start")
        await asyncio.to_thread(gate.wait_for_request, 30)
        client = await house.rig.temporal()
        await client.get_workflow_handle(f"machine-{awaiting}-{house.row(awaiting).operation_number}").cancel()
        await asyncio.to_thread(house.until, awaiting, "off")
    assert await asyncio.to_thread(eventually, lambda: house.instances_for(awaiting) == {old}, 60)
    await asyncio.to_thread(house.call, "POST", f"/machines/{awaiting}/start")
    await asyncio.to_thread(one_instance, house, awaiting, template)


def test_ec2_without_room_leaves_the_machine_as_it_was(house: OrganizationRig, awaiting: int, template: int) -> None:
    """No capacity, three times: the machine is off again with its old instance, says why, and starts another time."""
    old = house.row(awaiting).instance_id
    house.rig.proxy.no_capacity(times=20)
    house.call("POST", f"/machines/{awaiting}/start")
    house.until(awaiting, "off")
    assert "InsufficientInstanceCapacity" in str(house.row(awaiting).operation_error)
    assert house.instances_for(awaiting) == {old}
    house.rig.proxy.clear()
    house.call("POST", f"/machines/{awaiting}/start")
    one_instance(house, awaiting, template)


def test_two_assignments_at_once_lose_nothing(house: OrganizationRig, template: int) -> None:
    """Two images assigned to the same machines by two clients at the same moment: all machines have the same one."""
    numbers = house.launch(quantity=3)
    for number in numbers:
        house.call("POST", f"/machines/{number}/stop")
    for number in numbers:
        house.until(number, "off")
    other = house.image_of(numbers[0])
    together = threading.Barrier(2)

    def assign(image_id: int, machine_ids: list[int]) -> None:
        together.wait()
        house.call("POST", f"/images/{image_id}/assign", {"machine_ids": machine_ids})

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(assign, (template, other), (numbers, numbers[::-1])))
    (winner,) = {house.machine(number)["assigned_image_id"] for number in numbers}
    for number in numbers:
        house.call("POST", f"/machines/{number}/start")
    for number in numbers:
        one_instance(house, number, winner)


def test_a_deletion_outlives_a_restart(house: OrganizationRig) -> None:
    """Workers and Temporal die while an image is being deleted: AMI and snapshots go all the same."""
    number, *_ = house.launch()
    house.call("POST", f"/machines/{number}/stop")
    house.until(number, "off")
    before = house.rig.account.snapshot_of_account()
    image_id = house.image_of(number)
    with house.rig.proxy.blocked("DeregisterImage") as gate:
        house.call("DELETE", f"/images/{image_id}")
        assert image_id not in [each["attributes"]["id"] for each in house.call("GET", "/images")["images"]]
        gate.wait_for_request(30)
        for name in ("worker", "temporal"):
            house.rig.stack.kill(name, signal.SIGKILL)
            house.rig.stack.wait_for_exit(name)
    house.rig.stack.start_parts("temporal", "worker")
    assert eventually(lambda: not (house.left(before).images or house.left(before).snapshots), 60)


def test_a_snapshot_build_that_is_cancelled_leaves_the_machine_alone(house: OrganizationRig) -> None:
    """Cancelled while EC2 makes the AMI: AMI and snapshot go, the machine's instance and disk stay."""
    number, *_ = house.launch()
    house.call("POST", f"/machines/{number}/stop")
    house.until(number, "off")
    before = house.rig.account.snapshot_of_account()
    house.rig.proxy.hold_available()
    made = house.call("POST", "/images", {"machine_id": number})["attributes"]["id"]
    build_id = house.build_of(made)
    house.rig.wait(build_id, "building")
    assert house.machine(number)["friendly_status"] == "installing"
    assert house.call("DELETE", f"/images/{made}", expected=400)["client_code"] == 4213
    house.rig.cancel(build_id)
    house.rig.proxy.release()
    assert house.rig.wait(build_id)["status"] == "cancelled"
    assert house.machine(number)["friendly_status"] == "off"
    assert house.call("GET", f"/images/{made}")["attributes"]["status"] == "failed"
    after = house.rig.account.snapshot_of_account()
    assert (after - before, before - after) == (type(after)(), type(after)())
