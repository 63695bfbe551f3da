"""Deleting an AMI: it, then every snapshot behind it, however often and however late EC2 answers."""

from collections.abc import Iterator

import pytest

from kiln.adapters.ec2 import CloudRefusedError, Ec2Cloud
from kiln.ports import ImageDeletion
from support.ec2_editing import EditingProxy
from support.ec2_things import MOTO_IMAGE_ID, BuildThings
from support.moto import REGION, Account, AccountState, ec2_client

DONE = ImageDeletion()
FORBIDDEN = "You are not authorized to perform this operation."


@pytest.fixture
def made(proxy: EditingProxy, before: AccountState) -> BuildThings:
    """Makes things through the proxy, which then knows of them."""
    return BuildThings(ec2_client(proxy.url))


def left(account: Account, before: AccountState) -> tuple[int, int]:
    """How many AMIs and snapshots there are more than before."""
    now = account.left_since(before)
    return len(now.images), len(now.snapshots)


def test_an_image_goes_with_its_snapshot(
    cloud: Ec2Cloud, things: BuildThings, account: Account, before: AccountState
) -> None:
    """Nothing of the AMI is left, although the catalog remembered no snapshot."""
    image_id = things.image(things.instance())

    assert cloud.delete_image(REGION, image_id, ()) == DONE
    assert left(account, before) == (0, 0)


def test_an_image_goes_with_both_snapshots(
    cloud: Ec2Cloud, made: BuildThings, proxy: EditingProxy, account: Account, before: AccountState
) -> None:
    """An AMI of two volumes leaves neither snapshot."""
    proxy.second_snapshot()
    image_id = made.image(made.instance())
    assert left(account, before) == (1, 2)

    assert cloud.delete_image(REGION, image_id, ()) == DONE
    assert left(account, before) == (0, 0)


def test_the_image_goes_before_its_snapshots(cloud: Ec2Cloud, things: BuildThings, proxy: EditingProxy) -> None:
    """EC2 deletes no snapshot of a registered AMI, so the AMI is deregistered first."""
    cloud.delete_image(REGION, things.image(things.instance()), ())

    writes = [call.action for call in proxy.calls if call.action in ("DeregisterImage", "DeleteSnapshot")]
    assert writes == ["DeregisterImage", "DeleteSnapshot"]


def test_a_deletion_may_be_repeated(cloud: Ec2Cloud, things: BuildThings) -> None:
    """When everything is gone, a second deletion says so."""
    image_id = things.image(things.instance())
    snapshot_ids = things.snapshots_of(image_id)
    cloud.delete_image(REGION, image_id, snapshot_ids)

    assert cloud.delete_image(REGION, image_id, snapshot_ids) == DONE


def test_an_image_that_never_was_is_deleted(cloud: Ec2Cloud) -> None:
    """An AMI that EC2 has never had is gone."""
    assert cloud.delete_image(REGION, "ami-00000000000000000", ["snap-00000000000000000"]) == DONE


@pytest.mark.parametrize("action", ["DeregisterImage", "DeleteSnapshot"])
def test_a_lost_reply_is_no_obstacle(
    action: str, cloud: Ec2Cloud, things: BuildThings, proxy: EditingProxy, account: Account, before: AccountState
) -> None:
    """A call whose answer got lost is repeated, and then finds its work done."""
    image_id = things.image(things.instance())
    proxy.drop_reply(action)

    assert cloud.delete_image(REGION, image_id, ()) == DONE
    assert left(account, before) == (0, 0)


def test_remembered_snapshots_go_after_the_image(
    cloud: Ec2Cloud, things: BuildThings, account: Account, before: AccountState
) -> None:
    """Once the AMI is gone, EC2 doesn't say what was behind it; the catalog does."""
    image_id = things.image(things.instance())
    (described,) = things.snapshots_of(image_id)
    remembered = things.snapshot(tagged=False)
    things.ec2.deregister_image(ImageId=image_id)
    things.ec2.delete_snapshot(SnapshotId=described)

    assert cloud.delete_image(REGION, image_id, [remembered]) == DONE
    assert left(account, before) == (0, 0)


def test_forgotten_snapshots_are_known_by_their_description(
    cloud: Ec2Cloud, things: BuildThings, account: Account, before: AccountState
) -> None:
    """EC2 writes on a snapshot which AMI it is for: one of this AMI goes, and one of a copy of it stays."""
    image_id = things.image(things.instance())
    things.ec2.deregister_image(ImageId=image_id)
    copied = things.snapshot(
        tagged=False, description=f"Copied for DestinationAmi ami-0123456789abcdef0 from SourceAmi {image_id} for it"
    )

    assert cloud.delete_image(REGION, image_id, ()) == DONE
    assert account.left_since(before).snapshots == {copied}


def test_a_pending_image_is_waited_out(
    cloud: Ec2Cloud, made: BuildThings, proxy: EditingProxy, account: Account, before: AccountState
) -> None:
    """A pending AMI remains, untouched; once it is available it goes."""
    proxy.hold_available(mapped=False)
    image_id = made.image(made.instance(), tagged=False)

    assert cloud.delete_image(REGION, image_id, ()).remaining == (image_id,)
    assert left(account, before) == (1, 1)

    proxy.release()
    assert cloud.delete_image(REGION, image_id, ()) == DONE
    assert left(account, before) == (0, 0)


def test_a_snapshot_in_use_remains(cloud: Ec2Cloud, things: BuildThings, proxy: EditingProxy) -> None:
    """Right after the deregistration EC2 may still count the AMI; the next pass finishes."""
    image_id = things.image(things.instance())
    snapshot_ids = tuple(things.snapshots_of(image_id))
    proxy.fail("DeleteSnapshot", "InvalidSnapshot.InUse", "The snapshot is currently in use.")

    assert cloud.delete_image(REGION, image_id, ()) == ImageDeletion(remaining=snapshot_ids)
    assert cloud.delete_image(REGION, image_id, snapshot_ids) == DONE


def test_an_image_that_ec2_still_shows_does_not_hold_its_snapshots(
    cloud: Ec2Cloud, things: BuildThings, proxy: EditingProxy, account: Account, before: AccountState
) -> None:
    """A listing that lags behind the deregistration, and still has the AMI, keeps no snapshot."""
    image_id = things.image(things.instance())
    proxy.fail("DeregisterImage", "InvalidAMIID.Unavailable", "The image id is no longer available")

    deletion = cloud.delete_image(REGION, image_id, ())

    # moto still has the AMI, and so refuses to delete what Kiln rightly tried to delete.
    assert (deletion.kept, len(deletion.remaining)) == ((), 1)
    assert [call.action for call in proxy.calls_of("DeleteSnapshot")] == ["DeleteSnapshot"]
    assert left(account, before) == (1, 1)


def test_a_shared_snapshot_is_kept(
    cloud: Ec2Cloud, things: BuildThings, proxy: EditingProxy, account: Account, before: AccountState
) -> None:
    """A snapshot that someone else's AMI is made of as well stays, and is reported."""
    instance_id = things.instance()
    image_id = things.image(instance_id)
    other_id = things.image(instance_id, tagged=False, name=f"someone-elses-{image_id}")
    (shared,) = things.snapshots_of(image_id)
    proxy.share_snapshot(shared, other_id)

    assert cloud.delete_image(REGION, image_id, ()) == ImageDeletion(kept=(shared,))
    assert account.left_since(before).images == {other_id}
    assert shared in account.left_since(before).snapshots


@pytest.fixture
def aws(proxy: EditingProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ec2Cloud]:
    """The cloud as it talks to AWS, led to the proxy by boto3's own setting."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    cloud = Ec2Cloud(simulated=False, endpoint_url=None)
    yield cloud
    cloud.close()


def test_on_aws_anyones_image_keeps_a_shared_snapshot(aws: Ec2Cloud, things: BuildThings, proxy: EditingProxy) -> None:
    """On AWS the users of a snapshot are looked for by EC2's filter, among all AMIs that the account can see."""
    instance_id = things.instance()
    image_id = things.image(instance_id)
    other_id = things.image(instance_id, tagged=False, name=f"anyones-{image_id}")
    (shared,) = things.snapshots_of(image_id)
    proxy.share_snapshot(shared, other_id)

    assert aws.delete_image(REGION, image_id, ()) == ImageDeletion(kept=(shared,))
    by_snapshot = proxy.requests_with_filter("block-device-mapping.snapshot-id")
    assert [request.action for request in by_snapshot] == ["DescribeImages"]
    assert not any(name.startswith("Owner") for request in by_snapshot for name in request.params)


def test_on_aws_an_unshared_snapshot_goes(
    aws: Ec2Cloud, things: BuildThings, account: Account, before: AccountState
) -> None:
    """On AWS an AMI of its own goes with its snapshot."""
    assert aws.delete_image(REGION, things.image(things.instance()), ()) == DONE
    assert left(account, before) == (0, 0)


@pytest.mark.parametrize("action", ["DeregisterImage", "DeleteSnapshot"])
def test_a_forbidden_deletion_is_an_error(
    action: str, cloud: Ec2Cloud, things: BuildThings, proxy: EditingProxy
) -> None:
    """Waiting gives no permission, so a refusal is raised rather than reported as remaining."""
    image_id = things.image(things.instance())
    proxy.fail(action, "UnauthorizedOperation", FORBIDDEN, 403)

    with pytest.raises(CloudRefusedError, match=f"{action} in {REGION}: UnauthorizedOperation"):
        cloud.delete_image(REGION, image_id, ())


def test_an_image_that_cannot_be_deregistered_keeps_its_snapshots(
    cloud: Ec2Cloud, things: BuildThings, proxy: EditingProxy
) -> None:
    """As long as the AMI is there, no snapshot behind it is touched."""
    image_id = things.image(things.instance())
    proxy.fail("DeregisterImage", "UnauthorizedOperation", FORBIDDEN, 403)

    with pytest.raises(CloudRefusedError):
        cloud.delete_image(REGION, image_id, things.snapshots_of(image_id))

    assert proxy.calls_of("DeleteSnapshot") == ()


def test_amazons_snapshots_are_not_listed_with_the_accounts(cloud: Ec2Cloud, proxy: EditingProxy) -> None:
    """Snapshots are asked for by their owner in two ways: moto knows the one, and AWS prefers the other."""
    cloud.delete_image(REGION, MOTO_IMAGE_ID.replace("ami-1", "ami-2"), ())

    (call,) = proxy.calls_of("DescribeSnapshots")
    assert call.params["Owner.1"] == "self"
    assert call.params["Filter.1.Value.1"] == "123456789012"
