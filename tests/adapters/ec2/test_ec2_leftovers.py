"""What a build leaves: instances, AMIs, snapshots, volumes, key pairs and security groups, and nobody else's."""

import time

import pytest

from kiln.adapters.ec2 import CloudUnavailableError, Ec2Cloud
from kiln.ports import Resource
from support.ec2_editing import EditingProxy
from support.ec2_message import Reply, Request
from support.ec2_things import BuildThings
from support.ec2_xml import Document
from support.moto import NOTHING, REGION, Account, AccountState, ec2_client

DEADLINE_SECONDS = 20.0


@pytest.fixture
def made(proxy: EditingProxy, before: AccountState) -> BuildThings:
    """Makes things through the proxy, which then knows of them."""
    return BuildThings(ec2_client(proxy.url))


def named(resources: list[Resource]) -> set[str]:
    return {str(resource) for resource in resources}


def remove_all(cloud: Ec2Cloud, things: BuildThings, *known_ids: str, spare: tuple[str, ...] = ()) -> None:
    """Passes until nothing is left."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while left := cloud.remove_leftovers(REGION, things.marks(*known_ids), spare):
        assert time.monotonic() < deadline, f"still there: {left}"


def filtered(request: Request) -> bool:
    return any(name.startswith("Filter.") for name in request.params)


def without_images(reply: Reply) -> Reply:
    document = Document(reply.body)
    document.remove_items("imagesSet", lambda _item: True)
    return reply.with_body(document.to_bytes())


def end_instances(cloud: Ec2Cloud, things: BuildThings, *known_ids: str) -> None:
    """Asks until EC2 says that they are terminated."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while left := cloud.end_instances(REGION, things.marks(*known_ids)):
        assert time.monotonic() < deadline, f"still there: {left}"


def test_everything_of_a_build_goes(
    cloud: Ec2Cloud, things: BuildThings, account: Account, before: AccountState
) -> None:
    """After the passes the account is as it was found."""
    things.all()

    remove_all(cloud, things)

    assert account.left_since(before) == NOTHING


def test_nothing_left_is_nothing_reported(cloud: Ec2Cloud, things: BuildThings) -> None:
    """A pass over a build that left nothing, or whose instance EC2 still shows as terminated, is empty."""
    things.all()
    remove_all(cloud, things)

    assert cloud.remove_leftovers(REGION, things.marks(), ()) == []


def test_untagged_things_go_by_name_and_log(
    cloud: Ec2Cloud, things: BuildThings, account: Account, before: AccountState
) -> None:
    """A killed Packer leaves an untagged AMI, whose instance the log names, a key pair and a group of known names."""
    instance_id = things.instance(tagged=False)
    things.image(instance_id, tagged=False)
    things.key_pair(tagged=False)
    things.security_group(tagged=False)

    remove_all(cloud, things, instance_id)

    assert account.left_since(before) == NOTHING


def test_tagged_things_go_whatever_their_names(
    cloud: Ec2Cloud, things: BuildThings, account: Account, before: AccountState
) -> None:
    """An operator's template may give its own names."""
    things.image(things.instance(), name=f"golden-of-{things.build_id[:8]}")
    things.key_pair(name=f"key-of-{things.build_id[:8]}")
    things.security_group(name=f"group-of-{things.build_id[:8]}")

    remove_all(cloud, things)

    assert account.left_since(before) == NOTHING


def test_others_things_stay(cloud: Ec2Cloud, things: BuildThings, account: Account, before: AccountState) -> None:
    """What another build or another installation made is untouched, even where the log names it."""
    sister = BuildThings(things.ec2)
    stranger = BuildThings(things.ec2, installation="installation-2", build_id=things.build_id, attempt=2)
    known = {sister.all(), stranger.all(also_untagged=False)}
    others = account.left_since(before)
    things.instance()

    remove_all(cloud, things, *known, *others.images, *others.snapshots, *others.volumes, *others.security_groups)

    assert account.left_since(before) == others


def test_a_pending_image_is_still_there_until_it_is_available(
    cloud: Ec2Cloud, made: BuildThings, proxy: EditingProxy, account: Account, before: AccountState
) -> None:
    """A pending AMI without a tag is reported with its snapshot, and neither is touched; later both go."""
    proxy.hold_available(mapped=False)
    image_id = made.image(made.instance(), tagged=False)
    (snapshot_id,) = account.left_since(before).snapshots
    end_instances(cloud, made)

    left = cloud.remove_leftovers(REGION, made.marks(), ())
    assert named(left) == {f"image {image_id}", f"snapshot {snapshot_id}"}
    assert {resource.state for resource in left} == {"pending"}
    assert {resource.build_id for resource in left} == {made.build_id}
    assert proxy.calls_of("DeregisterImage") + proxy.calls_of("DeleteSnapshot") == ()

    proxy.release()
    assert cloud.remove_leftovers(REGION, made.marks(), ()) == []
    assert account.left_since(before) == NOTHING


def test_a_snapshot_of_someone_elses_stays_behind(
    cloud: Ec2Cloud, things: BuildThings, account: Account, before: AccountState
) -> None:
    """A snapshot that carries another installation's tag stays, even if it is behind an AMI of the build."""
    image_id = things.image(things.instance())
    snapshot_ids = things.snapshots_of(image_id)
    BuildThings(things.ec2, installation="installation-2").tag(*snapshot_ids)

    remove_all(cloud, things)

    assert account.left_since(before) == AccountState(snapshots=frozenset(snapshot_ids))


def test_a_failed_image_goes_at_once(
    cloud: Ec2Cloud, things: BuildThings, proxy: EditingProxy, account: Account, before: AccountState
) -> None:
    """An AMI that EC2 gave up on is deregistered."""
    things.image(things.instance())
    proxy.set_text("DescribeImages", "imagesSet", {"imageState": "failed"})

    remove_all(cloud, things)

    assert account.left_since(before) == NOTHING


def test_both_snapshots_of_an_image_go(
    cloud: Ec2Cloud, made: BuildThings, proxy: EditingProxy, account: Account, before: AccountState
) -> None:
    """An untagged AMI of two volumes leaves neither snapshot."""
    proxy.second_snapshot()
    made.image(made.instance(), tagged=False)

    remove_all(cloud, made)

    assert account.left_since(before) == NOTHING


def test_snapshots_of_an_image_that_is_gone_go(
    cloud: Ec2Cloud, things: BuildThings, account: Account, before: AccountState
) -> None:
    """A pass that died between the AMI and its untagged snapshot leaves one that its description betrays."""
    image_id = things.image(things.instance(), tagged=False)
    things.ec2.deregister_image(ImageId=image_id)

    remove_all(cloud, things)

    assert account.left_since(before) == NOTHING


def test_a_spared_image_stays_with_its_snapshots(
    cloud: Ec2Cloud, made: BuildThings, proxy: EditingProxy, account: Account, before: AccountState
) -> None:
    """The published AMI keeps both its snapshots, while everything else of the build goes."""
    proxy.second_snapshot()
    spared = made.image(made.instance())
    kept = frozenset(made.snapshots_of(spared))
    BuildThings(made.ec2, build_id=made.build_id, attempt=2).all()

    remove_all(cloud, made, spare=(spared,))

    assert account.left_since(before) == AccountState(images=frozenset({spared}), snapshots=kept)


def test_a_spared_image_that_ec2_does_not_show_keeps_its_snapshots(
    cloud: Ec2Cloud, things: BuildThings, account: Account, proxy: EditingProxy
) -> None:
    """While EC2 forgets the spared AMI, only snapshots that are another AMI's for certain are deleted."""
    spared = things.image(things.instance())
    (its_own,) = things.snapshots_of(spared)
    data = things.snapshot(description="made for the spared AMI by the tool")
    proxy.hide("DescribeImages", "imagesSet", "imageId", spared)

    cloud.remove_leftovers(REGION, things.marks(), (spared,))

    assert {its_own, data} <= account.snapshot_of_account().snapshots
    assert proxy.calls_of("DeleteSnapshot") == ()


def test_a_spared_image_that_one_listing_forgets_keeps_its_snapshots(
    cloud: Ec2Cloud, things: BuildThings, account: Account, proxy: EditingProxy
) -> None:
    """EC2 has shown the spared AMI once in the pass, so a snapshot of it stays even if a later listing lacks it."""
    spared = things.image(things.instance())
    data = things.snapshot(description="made for the spared AMI by the tool")
    proxy.share_snapshot(data, spared)
    proxy.edit("DescribeImages", lambda request, reply: reply if filtered(request) else without_images(reply))

    cloud.remove_leftovers(REGION, things.marks(), (spared,))

    assert data in account.snapshot_of_account().snapshots


def test_a_snapshot_that_another_image_needs_stays(
    cloud: Ec2Cloud, things: BuildThings, proxy: EditingProxy, account: Account
) -> None:
    """A snapshot that someone's AMI is made of as well is neither deleted nor waited for."""
    machine = BuildThings(things.ec2, installation="installation-2")
    other_id = machine.image(machine.instance())
    image_id = things.image(things.instance())
    (shared,) = things.snapshots_of(image_id)
    proxy.share_snapshot(shared, other_id)
    end_instances(cloud, things)

    assert cloud.remove_leftovers(REGION, things.marks(), ()) == []
    assert shared in account.snapshot_of_account().snapshots


def test_an_instance_that_shuts_down_is_still_there(cloud: Ec2Cloud, things: BuildThings, proxy: EditingProxy) -> None:
    """An instance counts until it is terminated."""
    instance_id = things.instance()
    proxy.set_text("TerminateInstances", "instancesSet", {"currentState/name": "shutting-down"})

    (left,) = cloud.remove_leftovers(REGION, things.marks(), ())

    assert (str(left), left.state) == (f"instance {instance_id}", "shutting-down")


def test_an_instances_volume_is_not_named_beside_it(cloud: Ec2Cloud, things: BuildThings, proxy: EditingProxy) -> None:
    """A volume that hangs on an instance which is still there goes with it, and needs no word of its own."""
    instance_id = things.instance()
    proxy.fail("TerminateInstances", "OperationNotPermitted", "The instance may not be terminated.")

    assert named(cloud.remove_leftovers(REGION, things.marks(), ())) == {f"instance {instance_id}"}


def test_ending_instances_leaves_the_rest(
    cloud: Ec2Cloud, things: BuildThings, account: Account, before: AccountState
) -> None:
    """Ending a predecessor's instances, tagged or known, touches no AMI."""
    tagged, known = things.instance(), things.instance(tagged=False)
    image_id = things.image(tagged)

    end_instances(cloud, things, known)

    left = account.left_since(before)
    assert (left.instances, left.images) == (frozenset(), frozenset({image_id}))


def test_ending_instances_twice_asks_ec2_once(cloud: Ec2Cloud, things: BuildThings, proxy: EditingProxy) -> None:
    """A terminated instance, which EC2 shows for an hour, is not terminated again."""
    things.instance()
    end_instances(cloud, things)

    assert cloud.end_instances(REGION, things.marks()) == []
    assert len(proxy.calls_of("TerminateInstances")) == 1


def test_an_instance_that_ec2_does_not_know_yet_is_still_there(
    cloud: Ec2Cloud, things: BuildThings, proxy: EditingProxy
) -> None:
    """EC2 may show a fresh instance and deny it in the next call: the next pass decides."""
    instance_id = things.instance()
    proxy.fail("TerminateInstances", "InvalidInstanceID.NotFound", "The instance ID does not exist")

    assert named(cloud.end_instances(REGION, things.marks())) == {f"instance {instance_id}"}


@pytest.mark.parametrize(
    ("shown", "found"), [(frozenset({"VolumeId"}), ["volume"]), (frozenset(), [])], ids=["volume shown", "all hidden"]
)
def test_a_fresh_instance_that_ec2_hides_is_found_later(
    cloud: Ec2Cloud,
    made: BuildThings,
    proxy: EditingProxy,
    account: Account,
    before: AccountState,
    shown: frozenset[str],
    found: list[str],
) -> None:
    """An instance that EC2 doesn't show yet is betrayed by its tagged volume, unless that is hidden too; once EC2 shows
    it, a pass ends it."""
    proxy.hide_fresh(0.5, but=shown)
    made.instance()
    assert [left.kind for left in cloud.remove_leftovers(REGION, made.marks(), ())] == found
    assert account.left_since(before).instances

    deadline = time.monotonic() + DEADLINE_SECONDS
    while account.left_since(before) != NOTHING:
        cloud.remove_leftovers(REGION, made.marks(), ())
        assert time.monotonic() < deadline


def test_a_security_group_in_use_is_still_there(cloud: Ec2Cloud, things: BuildThings, proxy: EditingProxy) -> None:
    """A group that a network interface needs is reported with EC2's word, and goes in a later pass."""
    group_id = things.security_group()
    proxy.fail("DeleteSecurityGroup", "DependencyViolation", "resource has a dependent object")

    (left,) = cloud.remove_leftovers(REGION, things.marks(), ())

    assert (str(left), left.state) == (f"security-group {group_id}", "DependencyViolation")
    assert cloud.remove_leftovers(REGION, things.marks(), ()) == []


def test_a_volume_of_someones_instance_is_still_there(cloud: Ec2Cloud, things: BuildThings) -> None:
    """A tagged volume that hangs on an instance of somebody else's cannot go, and is reported."""
    volume_id, instance_id = things.volume(), things.instance(tagged=False)
    things.ec2.attach_volume(VolumeId=volume_id, InstanceId=instance_id, Device="/dev/sdh")

    (left,) = cloud.remove_leftovers(REGION, things.marks(), ())

    assert (str(left), left.state) == (f"volume {volume_id}", "in-use")


def test_a_forbidden_removal_does_not_hinder_the_others(
    cloud: Ec2Cloud, things: BuildThings, proxy: EditingProxy, account: Account, before: AccountState
) -> None:
    """One thing that EC2 refuses to remove is reported with EC2's code; the rest of the pass goes on."""
    things.all()
    proxy.fail("TerminateInstances", "OperationNotPermitted", "The instance may not be terminated.")

    left = cloud.remove_leftovers(REGION, things.marks(), ())

    assert [resource.state for resource in left if resource.kind == "instance"] == ["OperationNotPermitted"]
    assert account.left_since(before).images == frozenset()


@pytest.mark.parametrize("action", ["DescribeVolumes", "DeleteVolume"])
def test_an_outage_in_the_middle_fails_the_pass(action: str, things: BuildThings, proxy: EditingProxy) -> None:
    """A pass in which EC2 throttles a reading or a deletion says nothing of what is left."""
    things.all()
    proxy.throttle(action)
    cloud = Ec2Cloud(simulated=True, endpoint_url=proxy.url, attempts=1)

    with pytest.raises(CloudUnavailableError):
        cloud.remove_leftovers(REGION, things.marks(), ())

    cloud.close()


@pytest.mark.parametrize(
    "action", ["TerminateInstances", "DeregisterImage", "DeleteSnapshot", "DeleteVolume", "DeleteSecurityGroup"]
)
def test_lost_replies_leave_nothing(
    action: str, cloud: Ec2Cloud, things: BuildThings, proxy: EditingProxy, account: Account, before: AccountState
) -> None:
    """A removal whose answer got lost is repeated, and then finds its work done."""
    things.all()
    proxy.drop_reply(action)

    remove_all(cloud, things)

    assert account.left_since(before) == NOTHING
