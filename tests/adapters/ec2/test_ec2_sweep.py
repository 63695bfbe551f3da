"""The sweep: what carries an installation's tag, and the removal of single things."""

import time
from uuid import uuid4

import pytest

from kiln.adapters.ec2 import Ec2Cloud
from kiln.naming import INSTALLATION_TAG
from kiln.ports import Resource
from support.ec2_editing import EditingProxy
from support.ec2_things import BuildThings
from support.moto import NOTHING, REGION, Account, AccountState

DEADLINE_SECONDS = 20.0
KINDS = ["instance", "image", "snapshot", "volume", "key-pair", "security-group"]


@pytest.fixture
def own(account: Account, before: AccountState) -> BuildThings:
    """Things of an installation that no other test knows."""
    return BuildThings(account.ec2, installation=f"installation-{uuid4()}")


def tagged(cloud: Ec2Cloud, things: BuildThings) -> list[Resource]:
    return cloud.tagged_resources(REGION, things.installation)


def test_every_kind_that_carries_the_tag_is_listed(cloud: Ec2Cloud, own: BuildThings) -> None:
    """Instances, AMIs, snapshots, volumes, key pairs and groups are listed with their build."""
    own.all()

    found = tagged(cloud, own)

    assert {resource.kind for resource in found} == set(KINDS)
    assert {resource.build_id for resource in found} == {own.build_id}
    assert {resource.region for resource in found} == {REGION}


def test_what_has_no_build_is_listed_without_one(cloud: Ec2Cloud, own: BuildThings) -> None:
    """The installation's tag alone is enough; the build is then empty."""
    volume_id = own.volume(tagged=False)
    own.ec2.create_tags(Resources=[volume_id], Tags=[{"Key": INSTALLATION_TAG, "Value": own.installation}])

    assert tagged(cloud, own) == [Resource("volume", volume_id, REGION, build_id="", state="available")]


def test_others_things_are_not_listed(cloud: Ec2Cloud, own: BuildThings) -> None:
    """Another installation's things, and untagged ones with a build's name, are not this installation's."""
    BuildThings(own.ec2, installation=f"{own.installation}-2").all()
    own.image(own.instance(tagged=False), tagged=False)

    assert tagged(cloud, own) == []


def test_an_installation_is_no_pattern(cloud: Ec2Cloud, own: BuildThings) -> None:
    """EC2 reads `*` in a filter as a wildcard; Kiln means the tag as it stands."""
    own.volume()

    assert cloud.tagged_resources(REGION, f"{own.installation[:-1]}*") == []


def test_terminated_instances_are_not_listed(cloud: Ec2Cloud, own: BuildThings) -> None:
    """EC2 shows an instance for an hour after its end."""
    own.ec2.terminate_instances(InstanceIds=[own.instance()])

    assert tagged(cloud, own) == []


def test_each_listed_thing_can_be_removed(
    cloud: Ec2Cloud, own: BuildThings, account: Account, before: AccountState
) -> None:
    """Removing what is listed, one by one, takes the tagged things away, an AMI with its snapshots."""
    own.image(own.instance(group_id=own.security_group()))
    own.volume()
    own.snapshot()
    own.key_pair()

    waiting = tagged(cloud, own)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while waiting := [resource for resource in waiting if not cloud.remove(resource)]:
        assert time.monotonic() < deadline, f"still there: {waiting}"

    assert account.left_since(before) == NOTHING


@pytest.mark.parametrize("kind", KINDS)
def test_removing_what_is_gone_succeeds(kind: str, cloud: Ec2Cloud) -> None:
    """A thing that EC2 doesn't have is gone."""
    prefix = {"instance": "i", "image": "ami", "snapshot": "snap", "volume": "vol", "key-pair": "key"}.get(kind, "sg")
    resource = Resource(kind, f"{prefix}-0123456789abcdef0", REGION, build_id="", name="kiln-gone")

    assert cloud.remove(resource)


def test_what_has_to_wait_is_not_removed(cloud: Ec2Cloud, own: BuildThings, proxy: EditingProxy) -> None:
    """A group in use, and a volume on an instance, are not gone."""
    proxy.fail("DeleteSecurityGroup", "DependencyViolation", "resource has a dependent object")
    own.instance()
    own.security_group()
    waiting = [resource for resource in tagged(cloud, own) if resource.kind in ("volume", "security-group")]

    assert [cloud.remove(resource) for resource in waiting] == [False, False]


def test_a_snapshot_that_an_image_needs_is_not_removed(
    cloud: Ec2Cloud, own: BuildThings, account: Account, before: AccountState
) -> None:
    """A tagged snapshot of an AMI that nobody wants removed stays."""
    image_id = own.image(own.instance())
    (snapshot,) = [resource for resource in tagged(cloud, own) if resource.kind == "snapshot"]

    assert not cloud.remove(snapshot)
    assert account.left_since(before).snapshots == frozenset(own.snapshots_of(image_id))
