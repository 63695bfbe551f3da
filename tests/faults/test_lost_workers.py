"""Workers that die, freeze or stop in mid-build: the build ends with one AMI, and nothing is left over."""

import signal

import pytest

from support.account_checks import nothing_left, one_image_and_nothing_else
from support.moto import AccountState
from support.processes import eventually
from support.rig import Rig

pytestmark = [pytest.mark.fault, pytest.mark.long]


def test_another_worker_takes_up_a_killed_workers_build(rig: Rig, before: AccountState) -> None:
    """A builder killed while its instance runs: its Packer dies with it, and another builder makes the one AMI."""
    with rig.proxy.blocked("StopInstances") as gate:
        build_id = rig.submit()
        gate.wait_for_request(20)
        tools = rig.packers(build_id)
        rig.stack.kill(rig.builder_of(build_id), signal.SIGKILL)
        assert eventually(lambda: not tools & rig.packers(), 5), "the killed worker's Packer lives on"
    build = rig.wait(build_id, "succeeded")
    assert build["attempt"] == 2
    one_image_and_nothing_else(rig, before, build["image"]["ami_id"])
    assert "attempt 1 was lost" in rig.log(build_id)


def test_a_frozen_worker_comes_back_to_a_build_that_is_anothers(rig: Rig, before: AccountState) -> None:
    """A builder stopped past the heartbeat time-out and continued: its tool is dead by then, one AMI is made."""
    with rig.proxy.blocked("StopInstances") as gate:
        build_id = rig.submit()
        gate.wait_for_request(20)
        frozen, tools = rig.builder_of(build_id), rig.packers(build_id)
        rig.freeze(frozen)
        try:
            assert eventually(lambda: not tools & rig.packers(), 10), "a tool outlived its lease"
            gate.release()
            build = rig.wait(build_id, "succeeded")
        finally:
            rig.stack.kill(frozen, signal.SIGCONT)
    one_image_and_nothing_else(rig, before, build["image"]["ami_id"])
    assert rig.wait(rig.submit(), "succeeded")["error"] is None, "the continued worker serves again"


def test_an_ami_that_was_pending_at_the_kill_is_adopted(rig: Rig, before: AccountState) -> None:
    """Building it again would double it: the successor waits for the untagged AMI and makes it its own."""
    rig.proxy.hold_available()
    made = len(rig.proxy.calls_of("CreateImage"))
    build_id = rig.submit(tags={"team": "platform"})
    assert eventually(lambda: len(rig.proxy.calls_of("CreateImage")) > made, 20)
    assert eventually(lambda: "AMI: ami-" in rig.log(build_id), 10)
    rig.stack.kill(rig.builder_of(build_id), signal.SIGKILL)
    assert eventually(lambda: "takes the build up" in rig.log(build_id), 20)
    rig.proxy.release()
    build = rig.wait(build_id, "succeeded")
    assert len(rig.proxy.calls_of("CreateImage")) == made + 1
    one_image_and_nothing_else(rig, before, build["image"]["ami_id"])
    image = rig.account.ec2.describe_images(ImageIds=[build["image"]["ami_id"]])["Images"][0]
    tags = {tag["Key"]: tag["Value"] for tag in image["Tags"]}
    assert tags["kiln:build-id"] == build_id
    assert tags["team"] == "platform"


def test_an_ami_that_was_pending_at_the_freeze_is_adopted(rig: Rig, before: AccountState) -> None:
    """The builder stopped while its AMI is pending, and continued when that is another attempt's: one AMI."""
    rig.proxy.hold_available()
    made = len(rig.proxy.calls_of("CreateImage"))
    build_id = rig.submit()
    assert eventually(lambda: "AMI: ami-" in rig.log(build_id), 20)
    frozen = rig.builder_of(build_id)
    rig.freeze(frozen)
    try:
        assert eventually(lambda: "takes the build up" in rig.log(build_id), 30)
        rig.proxy.release()
        build = rig.wait(build_id, "succeeded")
    finally:
        rig.stack.kill(frozen, signal.SIGCONT)
    assert len(rig.proxy.calls_of("CreateImage")) == made + 1
    one_image_and_nothing_else(rig, before, build["image"]["ami_id"])


def test_an_orderly_stop_hands_the_build_over(rig: Rig, before: AccountState) -> None:
    """SIGTERM is no cancel: Packer is interrupted and cleans up, and another worker builds."""
    with rig.proxy.blocked("StopInstances") as gate:
        build_id = rig.submit()
        gate.wait_for_request(20)
        builder = rig.builder_of(build_id)
        rig.stack.kill(builder, signal.SIGTERM)
        gate.release()
        rig.stack.wait_for_exit(builder)
    build = rig.wait(build_id, "succeeded")
    one_image_and_nothing_else(rig, before, build["image"]["ami_id"])


def test_a_killed_control_worker_loses_nothing(rig: Rig, before: AccountState) -> None:
    """The workflow lives in Temporal: killed in mid-build, the worker that runs workflows is simply started again."""
    with rig.proxy.blocked("StopInstances") as gate:
        build_id = rig.submit()
        gate.wait_for_request(20)
        rig.stack.kill("worker", signal.SIGKILL)
        rig.stack.wait_for_exit("worker")
    rig.stack.start_parts("worker")
    build = rig.wait(build_id, "succeeded")
    assert build["attempt"] == 1
    one_image_and_nothing_else(rig, before, build["image"]["ami_id"])


def test_a_build_is_queued_again_while_no_builder_is_left(rig: Rig, before: AccountState) -> None:
    """With its builder killed and no other one there, a build says that it waits, and goes on when one comes."""
    with rig.proxy.blocked("StopInstances") as gate:
        build_id = rig.submit()
        gate.wait_for_request(20)
        for builder in ("worker-2", "worker-3"):
            rig.stack.kill(builder, signal.SIGKILL)
            rig.stack.wait_for_exit(builder)
        build = rig.wait(build_id, "queued", seconds=20)
        assert eventually(lambda: _waiting_for(rig, build_id).endswith("none is connected"), 30)
    rig.stack.start_parts("worker-2", "worker-3")
    build = rig.wait(build_id, "succeeded")
    one_image_and_nothing_else(rig, before, build["image"]["ami_id"])


def test_everything_killed_at_once_goes_on_after_a_restart(rig: Rig, before: AccountState) -> None:
    """API, workers and Temporal killed in mid-build: after their start the build ends as if nothing had been."""
    with rig.proxy.blocked("StopInstances") as gate:
        build_id = rig.submit()
        gate.wait_for_request(20)
        for name in rig.names:
            rig.stack.kill(name, signal.SIGKILL)
        for name in rig.names:
            rig.stack.wait_for_exit(name)
    rig.stack.start_parts("temporal")
    rig.stack.start_parts("api", "worker", "worker-2", "worker-3")
    build = rig.wait(build_id, "succeeded", seconds=90)
    one_image_and_nothing_else(rig, before, build["image"]["ami_id"])


def test_two_lost_builders_in_a_row_leave_nothing(rig: Rig, before: AccountState) -> None:
    """A cancel that meets a build whose builder was just killed waits the lease out and cleans the account."""
    with rig.proxy.blocked("StopInstances") as gate:
        build_id = rig.submit()
        gate.wait_for_request(20)
        rig.stack.kill(rig.builder_of(build_id), signal.SIGKILL)
        rig.cancel(build_id)
    assert rig.wait(build_id)["status"] == "cancelled"
    nothing_left(rig, before)


def _waiting_for(rig: Rig, build_id: str) -> str:
    return str((rig.build(build_id)["progress"] or {}).get("waiting_for") or "")
