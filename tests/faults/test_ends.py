"""Time limit, cancel, failure: whatever ends a build, its processes end and the account is left as it was found."""

from collections.abc import Iterator

import pytest

from support.account_checks import nothing_left, one_image_and_nothing_else
from support.moto import NOTHING, AccountState
from support.processes import eventually
from support.rig import BUILDERS, Rig, running_rig

pytestmark = [pytest.mark.fault, pytest.mark.long]


def test_a_build_cancelled_while_its_instance_runs_leaves_nothing(rig: Rig, before: AccountState) -> None:
    """The API's cancel ends Packer and all its descendants, and reads `cancelled` only once EC2 is clean."""
    with rig.proxy.blocked("StopInstances") as gate:
        build_id = rig.submit()
        gate.wait_for_request(20)
        rig.cancel(build_id)
        rig.wait(build_id, "cancelling")
        gate.release()
    assert rig.wait(build_id)["status"] == "cancelled"
    nothing_left(rig, before)


def test_a_build_cancelled_while_its_ami_is_pending_leaves_nothing(rig: Rig, before: AccountState) -> None:
    """Packer has tagged nothing yet: the AMI is found by its name, waited for, and deleted with its snapshots."""
    rig.proxy.hold_available()
    rig.proxy.second_snapshot()
    build_id = rig.submit()
    assert eventually(lambda: "AMI: ami-" in rig.log(build_id), 20)
    rig.cancel(build_id)
    rig.wait(build_id, "cancelling")
    assert eventually(lambda: not rig.packers(build_id), 20)
    rig.proxy.release()
    assert rig.wait(build_id)["status"] == "cancelled"
    nothing_left(rig, before)


def test_the_pending_ami_of_a_build_cannot_be_deleted_and_is_listed_as_pending(rig: Rig, before: AccountState) -> None:
    """DELETE of an AMI that is still being built is a 409, and changes nothing."""
    rig.proxy.hold_available()
    build_id = rig.submit()
    assert eventually(lambda: "AMI: ami-" in rig.log(build_id), 20)
    (image_id,) = rig.account.left_since(before).images
    listed = {image["image_id"]: image["status"] for image in rig.http.get("/api/v1/images").json()["images"]}
    assert listed[image_id] == "pending"
    refused = rig.http.delete(f"/api/v1/images/{image_id}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "image_building")
    rig.proxy.release()
    one_image_and_nothing_else(rig, before, rig.wait(build_id, "succeeded")["image"]["ami_id"])


def test_a_build_cancelled_while_queued_never_starts_packer(rig: Rig, before: AccountState) -> None:
    """With no builder there, the build waits; cancelled, it is over before any comes."""
    for builder in BUILDERS:
        rig.stack.stop_part(builder)
    calls = len(rig.proxy.calls)
    build_id = rig.submit()
    rig.cancel(build_id)
    build = rig.wait(build_id)
    rig.stack.start_parts(*BUILDERS)
    assert (build["status"], build["attempt"], build["started_at"]) == ("cancelled", 0, None)
    assert "CreateKeyPair" not in {call.action for call in rig.proxy.calls[calls:]}
    assert "Packer" not in rig.log(build_id)
    nothing_left(rig, before)


def test_a_cancel_waits_for_an_ec2_that_is_down(rig: Rig, before: AccountState) -> None:
    """While EC2 does not answer nobody can know what is left: the build is `cancelling`, and then clean."""
    with rig.proxy.blocked("StopInstances") as gate:
        build_id = rig.submit()
        gate.wait_for_request(20)
        with rig.proxy.outage():
            rig.cancel(build_id)
            assert eventually(lambda: not rig.packers(build_id), 30)
            assert rig.build(build_id)["status"] == "cancelling"
    assert rig.wait(build_id, seconds=120)["status"] == "cancelled"
    nothing_left(rig, before)


def test_a_tool_that_ignores_its_interrupt_is_killed(rig: Rig, before: AccountState) -> None:
    """A Packer that hangs in its own clean-up is killed after the grace; Kiln does the clean-up in its stead."""
    with rig.proxy.blocked("StopInstances") as gate, rig.proxy.blocked("TerminateInstances") as second:
        build_id = rig.submit()
        gate.wait_for_request(20)
        rig.cancel(build_id)
        gate.release()
        second.wait_for_request(20)
        assert eventually(lambda: not rig.packers(build_id), 30)
        second.release()
    assert rig.wait(build_id)["status"] == "cancelled"
    nothing_left(rig, before)


def test_a_failed_build_says_packers_own_last_error_and_leaves_nothing(rig: Rig, before: AccountState) -> None:
    """Not "exit status 1": the error is EC2's, as Packer printed it last."""
    rig.proxy.fail("CreateImage", "InvalidParameterValue", "the moon is not full", times=10)
    build = rig.wait(rig.submit())
    assert build["status"] == "failed"
    assert build["error"]["code"] == "tool_failed"
    assert "the moon is not full" in build["error"]["message"]
    assert "\n" not in build["error"]["message"]
    nothing_left(rig, before)


def test_no_capacity_is_tried_again(rig: Rig, before: AccountState) -> None:
    """EC2 had no room for the first attempt: the second finds some, and no line says that an attempt was lost."""
    rig.proxy.fail("RunInstances", "VcpuLimitExceeded", "You have requested more vCPU capacity than you have")
    build_id = rig.submit()
    build = rig.wait(build_id)
    assert (build["status"], build["attempt"]) == ("succeeded", 2)
    assert "was lost" not in rig.log(build_id)
    one_image_and_nothing_else(rig, before, build["image"]["ami_id"])


def test_no_capacity_at_all_fails_as_such(rig: Rig, before: AccountState) -> None:
    """Three attempts found no room: the code says that it was nobody's fault."""
    rig.proxy.fail("RunInstances", "VcpuLimitExceeded", "You have requested more vCPU capacity than you have", times=9)
    build = rig.wait(rig.submit())
    assert (build["status"], build["error"]["code"], build["attempt"]) == ("failed", "capacity", 3)
    assert "VcpuLimitExceeded" in build["error"]["message"]
    nothing_left(rig, before)


@pytest.fixture(scope="module")
def impatient_rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running_rig(tmp_path_factory.mktemp("rig") / "home", packer_timeout_seconds=3) as rig:
        yield rig


def test_the_time_limit_ends_the_build_and_everything_of_it(impatient_rig: Rig) -> None:
    """The limit reads exactly as the contract says, also on machine-images, and nothing is left."""
    rig = impatient_rig
    before = rig.account.snapshot_of_account()
    with rig.proxy.blocked("StopInstances") as gate:
        build_id = rig.submit()
        gate.wait_for_request(20)
        assert eventually(lambda: "timed out" in rig.log(build_id), 20)
        gate.release()
    assert rig.wait(build_id)["status"] == "timed_out"
    shown = rig.http.get(f"/api/v1/images/builds/{build_id}").json()
    assert (shown["status"], shown["error"]) == ("failed", "Packer build timed out after 3 seconds")
    nothing_left(rig, before)


def test_a_deletion_that_ec2_delays_goes_on_in_the_background(rig: Rig, before: AccountState) -> None:
    """After 20 s the answer is a 202 without a body; the image is listed no more, and all of it goes later."""
    rig.proxy.second_snapshot()
    image_id = rig.wait(rig.submit(), "succeeded")["image"]["ami_id"]
    one_image_and_nothing_else(rig, before, image_id, snapshots=2)
    with rig.proxy.outage():
        answer = rig.http.delete(f"/api/v1/images/{image_id}")
        assert (answer.status_code, answer.content) == (202, b"")
        assert image_id not in rig.http.get("/api/v1/images").text
    assert rig.account.snapshot_of_account().images >= {image_id}
    assert eventually(lambda: rig.account.left_since(before) == NOTHING, 60)
