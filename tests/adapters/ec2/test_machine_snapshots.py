"""AMIs of machines, and that no cleanup and no sweep takes a machine, or another build's AMI of it, for a leftover."""

import time

import pytest
from botocore.exceptions import ClientError

from kiln.adapters.ec2 import Ec2Cloud
from kiln.adapters.ec2_machines import Ec2Machines
from kiln.adapters.ec2_reading import Ec2Reader
from kiln.errors import ConflictError
from kiln.naming import ATTEMPT_TAG, BUILD_TAG, INSTALLATION_TAG, NAME_TAG, image_name, resource_suffix
from support.ec2_editing import EditingProxy
from support.ec2_machines import MachineThings
from support.ec2_things import BuildThings
from support.moto import NOTHING, REGION, Account, AccountState, ec2_client

DEADLINE_SECONDS = 20.0


@pytest.fixture
def machines(cloud: Ec2Cloud, before: AccountState) -> MachineThings:
    return MachineThings(cloud)


@pytest.fixture
def machine(cloud: Ec2Cloud, machines: MachineThings) -> str:
    """A stopped machine's instance."""
    instance_id = machines.launch()
    cloud.stop_instance(REGION, instance_id, force=False)
    return instance_id


@pytest.fixture
def with_machine(account: Account, machine: str) -> AccountState:
    """What existed when the machine was there, and no build yet."""
    return account.snapshot_of_account()


@pytest.fixture
def build(account: Account, machines: MachineThings) -> BuildThings:
    """A snapshot build of the machines' own installation."""
    return BuildThings(account.ec2, installation=machines.installation)


def name_of(build: BuildThings) -> str:
    return image_name("kiln", "machine", build.build_id, build.attempt)


def snapshot(cloud: Ec2Cloud, build: BuildThings, instance_id: str) -> str:
    """The AMI that the build has EC2 make of the instance."""
    return cloud.create_image(REGION, instance_id, name_of(build), build.tags)


def volumes_of(account: Account, instance_id: str) -> list[str]:
    attached = account.ec2.describe_volumes(Filters=[{"Name": "attachment.instance-id", "Values": [instance_id]}])
    return [volume["VolumeId"] for volume in attached["Volumes"]]


def clean_up(cloud: Ec2Cloud, build: BuildThings, *known_ids: str) -> None:
    """Passes until nothing is left."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while left := cloud.remove_leftovers(REGION, build.marks(*known_ids), ()):
        assert time.monotonic() < deadline, f"still there: {left}"


def test_an_image_of_a_machine_is_named_and_tagged(
    cloud: Ec2Cloud, machines: MachineThings, build: BuildThings, machine: str
) -> None:
    """The AMI is the account's own, with name and tags from its beginning, and the instance stays as it was."""
    image_id = snapshot(cloud, build, machine)

    ami = cloud.image(REGION, image_id)

    assert ami is not None
    assert (ami.name, ami.tags) == (name_of(build), build.tags)
    assert machines.seen(machine).state == "stopped"


def test_on_aws_its_snapshots_are_tagged_too(account: Account, proxy: EditingProxy, machine: str) -> None:
    """EC2 is asked for tags on AMI and snapshots, and for no reboot; moto cannot do the second."""
    ec2 = ec2_client(proxy.url)
    on_aws = Ec2Machines(ec2, Ec2Reader(ec2, REGION, lambda: account.account_id), simulated=False)

    proxy.fail("CreateImage", "UnauthorizedOperation", "You are not authorized to perform this operation.")

    with pytest.raises(ClientError, match="UnauthorizedOperation"):
        on_aws.create_image(machine, "kiln-on-aws", {"team": "vfx"})

    (call,) = proxy.calls_of("CreateImage")
    assert call.params["NoReboot"] == "true"
    for number, kind in enumerate(("image", "snapshot"), start=1):
        assert call.params[f"TagSpecification.{number}.ResourceType"] == kind
        assert call.params[f"TagSpecification.{number}.Tag.1.Key"] == "team"


@pytest.mark.parametrize("loses_reply", [False, True])
def test_a_name_is_given_once(
    loses_reply: bool, cloud: Ec2Cloud, build: BuildThings, proxy: EditingProxy, account: Account, machine: str
) -> None:
    """Asked again, or in boto3's own retry after a lost reply, EC2 refuses; the AMI is then found by its name."""
    proxy.hold_available()
    already = account.snapshot_of_account().images
    if loses_reply:
        proxy.drop_reply("CreateImage")
    else:
        snapshot(cloud, build, machine)

    with pytest.raises(ConflictError, match="already in use"):
        snapshot(cloud, build, machine)

    (ami,) = cloud.images_of_build(REGION, build.marks())
    assert (ami.name, ami.state) == (name_of(build), "pending")
    assert account.snapshot_of_account().images - already == {ami.image_id}


@pytest.mark.parametrize("tagged", [True, False], ids=["tagged", "untagged"])
def test_a_cancelled_snapshot_leaves_the_machine_alone(
    tagged: bool,
    cloud: Ec2Cloud,
    build: BuildThings,
    proxy: EditingProxy,
    account: Account,
    machines: MachineThings,
    machine: str,
    with_machine: AccountState,
) -> None:
    """Its pending AMI, even while EC2 shows no tags, is waited for and goes with its snapshot; the instance and its
    volume stay, whether or not the log names them."""
    proxy.hold_available(mapped=False)
    image_id = snapshot(cloud, build, machine)
    if not tagged:
        account.ec2.delete_tags(Resources=[image_id], Tags=[{"Key": key} for key in build.tags])
    (volume_id,) = volumes_of(account, machine)
    known = (image_id, machine, volume_id)

    left = cloud.remove_leftovers(REGION, build.marks(*known), ())
    assert {(each.kind, each.state) for each in left} == {("image", "pending"), ("snapshot", "pending")}

    proxy.release()
    clean_up(cloud, build, *known)
    assert account.left_since(with_machine) == NOTHING
    assert machines.seen(machine).state == "stopped"
    assert with_machine - account.snapshot_of_account() == NOTHING


@pytest.mark.parametrize("claim", ["tags", "name", "log"])
def test_a_machine_is_no_builds_instance(
    claim: str,
    cloud: Ec2Cloud,
    build: BuildThings,
    account: Account,
    machines: MachineThings,
    machine: str,
    with_machine: AccountState,
) -> None:
    """A build's tags (someone launched more like it, or took a build's instance in), a name that ends like a build's,
    and a build's log that names it make no leftover of a machine, not even without its installation's tag."""
    by_hand = account.ec2.create_image(InstanceId=machine, Name=f"by-hand-{build.build_id[:8]}")["ImageId"]
    if claim == "tags":
        build.tag(machine, *volumes_of(account, machine))
    elif claim == "log":
        account.ec2.delete_tags(Resources=[machine], Tags=[{"Key": INSTALLATION_TAG}])
    else:
        suffix = resource_suffix(build.build_id, build.attempt)
        account.ec2.create_tags(Resources=[machine], Tags=[{"Key": NAME_TAG, "Value": f"studio-{suffix}"}])

    assert cloud.end_instances(REGION, build.marks(machine)) == []
    assert cloud.remove_leftovers(REGION, build.marks(machine), ()) == []
    assert machines.seen(machine).state == "stopped"
    assert account.left_since(with_machine).images == {by_hand}


def test_the_sweep_hears_of_no_build_of_a_machine(
    cloud: Ec2Cloud, build: BuildThings, account: Account, machines: MachineThings, machine: str
) -> None:
    """A machine's instance and volume are listed without a build, and so are kept, even with a build's tag on them."""
    account.ec2.create_tags(
        Resources=[machine, *volumes_of(account, machine)],
        Tags=[{"Key": BUILD_TAG, "Value": build.build_id}, {"Key": ATTEMPT_TAG, "Value": "1"}],
    )

    listed = cloud.tagged_resources(REGION, machines.installation)

    assert {(each.kind, each.build_id) for each in listed} == {("instance", ""), ("volume", "")}


def test_another_builds_image_of_the_machine_stays(
    cloud: Ec2Cloud, build: BuildThings, proxy: EditingProxy, account: Account, machine: str
) -> None:
    """A second build's AMI of the same machine, pending and without its snapshot's tags, is not the first build's."""
    snapshot(cloud, build, machine)
    held = account.snapshot_of_account()
    other = BuildThings(account.ec2, installation=build.installation)
    proxy.hold_available(mapped=False)
    other_id = snapshot(cloud, other, machine)
    others = account.left_since(held)

    clean_up(cloud, build, machine)

    assert others.images == {other_id}
    assert others - account.snapshot_of_account() == NOTHING
    assert [each.image_id for each in cloud.images_of_build(REGION, other.marks())] == [other_id]


def test_a_machine_stays_when_its_image_goes(
    cloud: Ec2Cloud, build: BuildThings, account: Account, machines: MachineThings, machine: str
) -> None:
    """Deleting the AMI that a machine was launched from takes the AMI and its snapshots only."""
    image_id = snapshot(cloud, build, machine)
    launched = cloud.launch(REGION, machines.order(8, image_id=image_id))
    volumes = account.snapshot_of_account().volumes

    assert cloud.delete_image(REGION, image_id, ()).done

    assert machines.seen(launched).state == "running"
    assert machines.seen(launched).tags[INSTALLATION_TAG] == machines.installation
    assert account.snapshot_of_account().volumes == volumes
