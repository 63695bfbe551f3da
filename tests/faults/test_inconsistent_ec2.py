"""EC2 as it is on a bad day: late, forgetful, throttled. One AMI comes of it, or nothing at all."""

import signal
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from support.account_checks import nothing_left, one_image_and_nothing_else
from support.moto import NOTHING, AccountState
from support.processes import eventually
from support.rig import Rig, running_rig

pytestmark = [pytest.mark.fault, pytest.mark.long]

CHANGES = ("CreateSecurityGroup", "RunInstances", "CreateImage", "TerminateInstances", "DeleteSecurityGroup")
HIDDEN_SECONDS = 2.0
LONG_SECONDS = 30.0


def faults_from_now(rig: Rig) -> Callable[[], Counter[tuple[str, str]]]:
    """Tells what met whom since: how many calls of EC2, by action and fault."""
    seen = len(rig.proxy.calls)
    return lambda: Counter((call.action, call.fault) for call in rig.proxy.calls[seen:] if call.fault is not None)


def test_a_slow_ami_with_two_snapshots_is_published_and_deleted_whole(rig: Rig, before: AccountState) -> None:
    """Every snapshot behind an AMI goes with it, the second one too."""
    rig.proxy.late_available(2)
    rig.proxy.second_snapshot()
    image_id = rig.wait(rig.submit(), "succeeded")["image"]["ami_id"]
    one_image_and_nothing_else(rig, before, image_id, snapshots=2)
    assert rig.http.delete(f"/api/v1/images/{image_id}").status_code == 204
    assert rig.account.left_since(before) == NOTHING
    assert rig.http.delete(f"/api/v1/images/{image_id}").status_code == 404


def test_throttling_is_waited_out(rig: Rig, before: AccountState) -> None:
    """Every call that changes something throttled twice: the build and its cleanup get through."""
    faults = faults_from_now(rig)
    for action in CHANGES:
        rig.proxy.throttle(action, times=2)
    one_image_and_nothing_else(rig, before, rig.wait(rig.submit(), "succeeded")["image"]["ami_id"])
    assert faults() == {(action, "throttle"): 2 for action in CHANGES}


def test_a_lost_reply_to_run_instances_leaves_one_instance_less(rig: Rig, before: AccountState) -> None:
    """The instance ran and nobody heard of it: whatever Packer does then, no instance is left."""
    faults = faults_from_now(rig)
    rig.proxy.drop_reply("RunInstances")
    build = rig.wait(rig.submit())
    assert faults()["RunInstances", "drop_reply"] == 1
    if build["status"] == "succeeded":
        one_image_and_nothing_else(rig, before, build["image"]["ami_id"])
    else:
        nothing_left(rig, before)


def test_a_lost_reply_to_create_image_leaves_no_nameless_ami(rig: Rig, before: AccountState) -> None:
    """EC2 made an AMI that Packer never heard of and did not tag: it is found by its name, and goes."""
    faults = faults_from_now(rig)
    rig.proxy.drop_reply("CreateImage")
    build = rig.wait(rig.submit())
    assert faults()["CreateImage", "drop_reply"] == 1
    assert build["status"] == "failed"
    nothing_left(rig, before)


@pytest.fixture(scope="module")
def settling_rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A deployment that knows how long its EC2 may hide what was just made."""
    with running_rig(tmp_path_factory.mktemp("rig") / "home", settle_seconds=HIDDEN_SECONDS + 1) as rig:
        yield rig


def test_what_ec2_hid_from_the_cleanup_is_found_all_the_same(settling_rig: Rig) -> None:
    """A builder killed right after RunInstances, with the instance not to be seen yet: it is terminated in the end."""
    rig = settling_rig
    before = rig.account.snapshot_of_account()
    faults = faults_from_now(rig)
    with rig.proxy.blocked("RunInstances") as door, rig.proxy.reply_blocked("RunInstances") as gate:
        build_id = rig.submit()
        door.wait_for_request(20)
        rig.proxy.hide_fresh(LONG_SECONDS)
        door.release()
        gate.wait_for_request(20)
        rig.stack.kill(rig.builder_of(build_id), signal.SIGKILL)
        rig.cancel(build_id)
    # The third look would be one too many for a cleanup that goes by what EC2 shows at once.
    assert eventually(lambda: faults()["DescribeInstances", "hide_fresh"] >= 3, LONG_SECONDS)
    rig.proxy.show_fresh()
    assert rig.wait(build_id)["status"] == "cancelled"
    assert eventually(lambda: rig.account.left_since(before) == NOTHING, 1), rig.account.left_since(before)
    rig.heal()


def test_a_build_succeeds_though_ec2_hides_what_is_fresh(settling_rig: Rig) -> None:
    """Reads that lag behind writes delay a build, and do not fail or double it."""
    rig = settling_rig
    before = rig.account.snapshot_of_account()
    faults = faults_from_now(rig)
    rig.proxy.hide_fresh(HIDDEN_SECONDS)
    build = rig.wait(rig.submit(), "succeeded")
    assert faults()["DescribeInstances", "hide_fresh"] > 0
    assert faults()["DescribeImages", "hide_fresh"] > 0
    one_image_and_nothing_else(rig, before, build["image"]["ami_id"])
