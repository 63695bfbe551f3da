"""Instances of machines: what EC2 shows of them, launching, stopping, starting and ending them."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest

from kiln.adapters.ec2 import CloudRefusedError, CloudUnavailableError, Ec2Cloud
from kiln.errors import CapacityError, ConflictError, ImageNotFoundError, NotFoundError, RefusedError
from kiln.naming import INSTALLATION_TAG, LAUNCH_TAG, MACHINE_TAG, NAME_TAG, machine_tags
from kiln.ports import Placement
from support.ec2_editing import EditingProxy
from support.ec2_machines import DISK_GIB, INSTANCE_TYPE, MachineThings
from support.ec2_message import Reply, Request
from support.ec2_things import MOTO_IMAGE_ID, BuildThings
from support.ec2_xml import Document
from support.moto import REGION, Account, AccountState, ec2_client

UNKNOWN_ID = "i-0123456789abcdef0"
UNKNOWN_IMAGE_ID = "ami-00000000000000000"
UBUNTU = "099720109477"
AMI_GIB = 15
TAGS_LIMIT = 50
WRONG_STATE = "IncorrectInstanceState"

Change = Callable[[Ec2Cloud, str], object]


def start(cloud: Ec2Cloud, instance_id: str) -> None:
    cloud.start_instance(REGION, instance_id)


def stop(cloud: Ec2Cloud, instance_id: str) -> None:
    cloud.stop_instance(REGION, instance_id, force=False)


def image(cloud: Ec2Cloud, instance_id: str) -> None:
    cloud.create_image(REGION, instance_id, "kiln-of-a-machine", {})


CHANGES = {"StartInstances": start, "StopInstances": stop, "CreateImage": image}


@pytest.fixture
def machines(cloud: Ec2Cloud, before: AccountState) -> MachineThings:
    """Launches machines' instances through the proxy."""
    return MachineThings(cloud)


@pytest.fixture
def hasty(proxy: EditingProxy) -> Iterator[Ec2Cloud]:
    """A cloud that asks once."""
    cloud = Ec2Cloud(simulated=True, endpoint_url=proxy.url, attempts=1)
    yield cloud
    cloud.close()


def set_texts_of(proxy: EditingProxy, list_name: str, key: str, texts: dict[str, tuple[str, str]]) -> None:
    """Has reads show one text of some items differently: `texts` has its path and value by the item's id."""

    def change(_: Request, reply: Reply) -> Reply:
        document = Document(reply.body)
        for item in document.items(list_name):
            if item.text(key) in texts:
                item.set_text(*texts[item.text(key)])
        return reply.with_body(document.to_bytes())

    proxy.edit("DescribeInstances" if list_name == "instancesSet" else "DescribeImages", change)


def volumes_of(account: Account, instance_id: str) -> list[dict]:
    return account.ec2.describe_volumes(Filters=[{"Name": "attachment.instance-id", "Values": [instance_id]}])[
        "Volumes"
    ]


def as_dict(pairs: list[dict]) -> dict[str, str]:
    return {pair["Key"]: pair["Value"] for pair in pairs}


def test_an_instance_is_read_as_ec2_has_it(cloud: Ec2Cloud, machines: MachineThings, account: Account) -> None:
    """State, type, AMI, time, tags and placement come from DescribeInstances."""
    group_id = account.ec2.create_security_group(GroupName=machines.installation, Description="a test's")["GroupId"]
    account.ec2.create_key_pair(KeyName=machines.installation)
    subnet_id = account.ec2.describe_subnets()["Subnets"][-1]["SubnetId"]
    placement = Placement(subnet_id, (group_id,), machines.installation)
    order = machines.order(placement=placement)

    instance = machines.seen(cloud.launch(REGION, order))

    assert (instance.region, instance.state, instance.instance_type) == (REGION, "running", INSTANCE_TYPE)
    assert (instance.image_id, instance.tags, instance.placement) == (MOTO_IMAGE_ID, order.tags, placement)
    assert abs(datetime.now(UTC) - instance.launched_at) < timedelta(minutes=5)
    assert instance.state_reason == ""


def test_ids_that_ec2_does_not_know_are_absent(cloud: Ec2Cloud, machines: MachineThings) -> None:
    """An unknown id does not fail the answer; a terminated instance is in it, with EC2's reason."""
    instance_id = machines.launch()
    cloud.terminate_instance(REGION, instance_id)

    seen = cloud.instances(REGION, [instance_id, UNKNOWN_ID])

    assert {each: instance.state for each, instance in seen.items()} == {instance_id: "terminated"}
    assert "User initiated" in seen[instance_id].state_reason


def test_a_machines_instances_are_those_that_were_launched_for_it(
    cloud: Ec2Cloud, machines: MachineThings, account: Account
) -> None:
    """Another machine's, another installation's, one that was taken in, and a terminated one stay out."""
    mine, ended = machines.launch(7, 1), machines.launch(7, 2)
    cloud.terminate_instance(REGION, ended)
    taken_in = machines.launch(7, 3)
    account.ec2.delete_tags(Resources=[taken_in], Tags=[{"Key": LAUNCH_TAG}])
    other = machines.launch(8, 1)
    MachineThings(cloud).launch(7, 1)

    found = cloud.instances_of_machine(REGION, machines.installation, 7)
    launched = cloud.launched_instances(REGION, machines.installation)

    assert [each.instance_id for each in found] == [mine]
    assert {each.instance_id for each in launched} == {mine, other}
    assert cloud.launched_instances(REGION, f"{machines.installation[:-1]}*") == []


def test_the_oldest_instance_comes_first(cloud: Ec2Cloud, machines: MachineThings, proxy: EditingProxy) -> None:
    """A doubled launch shows two instances, of which the first is the one to keep, whatever their ids."""
    ids = sorted(machines.launch(7, number) for number in (1, 2))
    times = dict(zip(ids, ("2024-05-02T10:00:00.000Z", "2024-05-01T10:00:00.000Z"), strict=True))
    set_texts_of(proxy, "instancesSet", "instanceId", {each: ("launchTime", at) for each, at in times.items()})

    found = cloud.instances_of_machine(REGION, machines.installation, 7)

    assert [each.instance_id for each in found] == ids[::-1]


def test_the_disk_is_the_root_volume(cloud: Ec2Cloud, machines: MachineThings, account: Account) -> None:
    """A data volume does not count, and an instance without disks, or none at all, has 0 GiB."""
    instance_id = machines.launch()
    data_id = BuildThings(account.ec2).volume(tagged=False)
    account.ec2.attach_volume(VolumeId=data_id, InstanceId=instance_id, Device="/dev/sdh")
    assert cloud.disk_gib(REGION, instance_id) == DISK_GIB

    account.ec2.terminate_instances(InstanceIds=[instance_id])

    assert [cloud.disk_gib(REGION, each) for each in (instance_id, UNKNOWN_ID)] == [0, 0]


def test_the_newest_base_image_is_taken(cloud: Ec2Cloud, proxy: EditingProxy, account: Account) -> None:
    """Of an owner's AMIs whose name matches, the one with the latest creation date."""
    images = account.ec2.describe_images(Owners=[UBUNTU])["Images"]
    for newest in (each["ImageId"] for each in images[:2]):
        proxy.start_over()
        set_texts_of(proxy, "imagesSet", "imageId", {newest: ("creationDate", "2099-01-01T00:00:00.000Z")})

        assert cloud.base_image(REGION, UBUNTU, "ubuntu/images/*") == newest


def test_no_base_image_is_none(cloud: Ec2Cloud, things: BuildThings) -> None:
    """Neither a name that nobody has, nor an AMI without an EBS root (moto's own CreateImage makes such) is one."""
    things.image(things.instance(), name=f"base-{things.build_id}")

    assert cloud.base_image(REGION, UBUNTU, "no-such-*") is None
    assert cloud.base_image(REGION, "self", f"base-{things.build_id}") is None


def test_a_launch_tags_the_instance_and_its_volume(cloud: Ec2Cloud, machines: MachineThings, account: Account) -> None:
    """One instance with a gp3 root volume of the asked size, both with the launch's tags."""
    order = machines.order(tags={"team": "vfx"})

    instance_id = cloud.launch(REGION, order)

    (volume,) = volumes_of(account, instance_id)
    assert (volume["Size"], volume["VolumeType"]) == (DISK_GIB, "gp3")
    assert as_dict(volume["Tags"]) == machines.seen(instance_id).tags == order.tags


def test_a_disk_is_no_smaller_than_the_images(cloud: Ec2Cloud, machines: MachineThings) -> None:
    """EC2 would refuse a root volume that the AMI's does not fit in."""
    instance_id = cloud.launch(REGION, machines.order(disk_gib=AMI_GIB - 1))

    assert cloud.disk_gib(REGION, instance_id) == AMI_GIB


def test_all_disks_go_with_the_instance(
    cloud: Ec2Cloud, machines: MachineThings, proxy: EditingProxy, account: Account
) -> None:
    """An AMI of two volumes says that they outlive the instance; a machine's must not, or each rebuilding leaves one."""
    proxy.second_snapshot()
    made = BuildThings(ec2_client(proxy.url), installation=machines.installation)
    image_id = made.image(made.instance())
    kept = account.snapshot_of_account()

    instance_id = cloud.launch(REGION, machines.order(image_id=image_id))
    assert len(volumes_of(account, instance_id)) == 2
    cloud.terminate_instance(REGION, instance_id)

    assert account.left_since(kept) == AccountState()


def test_a_lost_reply_launches_nothing_twice(
    cloud: Ec2Cloud, machines: MachineThings, proxy: EditingProxy, account: Account, before: AccountState
) -> None:
    """The client token makes EC2 repeat its answer, to boto3's retry and to a later call of the same launch."""
    proxy.drop_reply("RunInstances")

    first = machines.launch()
    second = machines.launch()

    assert first == second
    assert account.left_since(before).instances == {first}


def test_a_token_with_another_launch_is_refused(cloud: Ec2Cloud, machines: MachineThings) -> None:
    """EC2's own word for it reaches the caller: there is an instance already, which may not be shown yet."""
    machines.launch()

    with pytest.raises(ConflictError, match="IdempotentParameterMismatch"):
        cloud.launch(REGION, machines.order(disk_gib=DISK_GIB + 1))


def test_a_launch_needs_its_image(cloud: Ec2Cloud, machines: MachineThings, proxy: EditingProxy) -> None:
    """An AMI that EC2 does not show is said to be no more, and nothing is launched."""
    with pytest.raises(ImageNotFoundError, match=UNKNOWN_IMAGE_ID):
        cloud.launch(REGION, machines.order(image_id=UNKNOWN_IMAGE_ID))

    assert proxy.calls_of("RunInstances") == ()


@pytest.mark.parametrize(
    ("code", "status"),
    [("InsufficientInstanceCapacity", 500), ("VcpuLimitExceeded", 400), ("InsufficientFreeAddressesInSubnet", 400)],
)
@pytest.mark.parametrize("action", ["RunInstances", "StartInstances"])
def test_no_room_is_a_capacity_error(
    action: str, code: str, status: int, hasty: Ec2Cloud, machines: MachineThings, proxy: EditingProxy
) -> None:
    """EC2 says it with a server error or with a client error; both are worth another try later, in AWS's words."""
    instance_id = machines.launch()
    proxy.fail(action, code, "There is no room.", status)

    with pytest.raises(CapacityError, match=f"{action} in {REGION}: {code}: There is no room."):
        if action == "StartInstances":
            start(hasty, instance_id)
        else:
            hasty.launch(REGION, machines.order(number=2))


def test_a_place_that_is_gone_is_refused(cloud: Ec2Cloud, machines: MachineThings) -> None:
    """A security group that somebody deleted will not come back: no retry helps."""
    placement = Placement(security_group_ids=("sg-0123456789abcdef0",))

    with pytest.raises(CloudRefusedError, match=r"InvalidGroup\.NotFound"):
        cloud.launch(REGION, machines.order(placement=placement))


def test_tags_are_cut_to_what_ec2_takes(cloud: Ec2Cloud, machines: MachineThings) -> None:
    """Kiln's tags and the name are kept, as many of the user's as fit, and none of AWS's own."""
    users = {f"team-{number:02}": "v" for number in range(TAGS_LIMIT)}

    tags = machines.seen(machines.launch(tags={**users, "aws:cloudformation:stack-name": "v"})).tags

    assert {INSTALLATION_TAG, MACHINE_TAG, LAUNCH_TAG, NAME_TAG} <= tags.keys()
    assert tags.keys() - users.keys() == {INSTALLATION_TAG, MACHINE_TAG, LAUNCH_TAG, NAME_TAG}
    assert len(tags) == TAGS_LIMIT


def test_stopping_and_starting_may_be_repeated(cloud: Ec2Cloud, machines: MachineThings) -> None:
    """An instance that is in the wanted state already stays in it."""
    instance_id = machines.launch()
    states = []

    for change in (stop, stop, start, start):
        change(cloud, instance_id)
        states.append(machines.seen(instance_id).state)

    assert states == ["stopped", "stopped", "running", "running"]


def test_force_is_passed_on(cloud: Ec2Cloud, machines: MachineThings, proxy: EditingProxy) -> None:
    """EC2 does not wait for the operating system if it is asked not to."""
    instance_id = machines.launch()

    for force in (False, True):
        cloud.stop_instance(REGION, instance_id, force=force)

    assert [call.params["Force"] for call in proxy.calls_of("StopInstances")] == ["false", "true"]


@pytest.mark.parametrize("action", CHANGES)
def test_nothing_is_done_to_a_terminated_instance(action: str, cloud: Ec2Cloud, machines: MachineThings) -> None:
    """AWS refuses; moto would let it rise again."""
    instance_id = machines.launch()
    cloud.terminate_instance(REGION, instance_id)

    with pytest.raises(RefusedError, match=f"{instance_id} in {REGION} is terminated"):
        CHANGES[action](cloud, instance_id)

    assert machines.seen(instance_id).state == "terminated"


@pytest.mark.parametrize("action", CHANGES)
def test_an_unknown_instance_is_not_found(action: str, cloud: Ec2Cloud) -> None:
    """There is nothing to start, to stop or to make an AMI of."""
    with pytest.raises(NotFoundError, match=UNKNOWN_ID):
        CHANGES[action](cloud, UNKNOWN_ID)


@pytest.mark.parametrize(("state", "error"), [("stopping", CloudUnavailableError), ("stopped", RefusedError)])
def test_a_state_that_passes_is_worth_waiting_for(
    state: str, error: type[Exception], cloud: Ec2Cloud, machines: MachineThings, proxy: EditingProxy
) -> None:
    """EC2 does not start an instance that is still stopping; a refusal that time does not cure keeps EC2's words."""
    instance_id = machines.launch()
    set_texts_of(proxy, "instancesSet", "instanceId", {instance_id: ("instanceState/name", state)})
    proxy.fail("StartInstances", WRONG_STATE, "The instance is not in a state from which it can be started.")

    with pytest.raises(error, match=f"{WRONG_STATE}: The instance is not in a state"):
        start(cloud, instance_id)


def test_ending_an_instance_takes_two_looks(cloud: Ec2Cloud, machines: MachineThings, proxy: EditingProxy) -> None:
    """The first asks, a later one sees the end, and asks no more."""
    instance_id = machines.launch()

    assert [cloud.terminate_instance(REGION, instance_id) for _ in range(3)] == [False, True, True]
    assert len(proxy.calls_of("TerminateInstances")) == 1


def test_an_unknown_instance_is_at_its_end(cloud: Ec2Cloud) -> None:
    """EC2 forgets an instance about an hour after its end."""
    assert cloud.terminate_instance(REGION, UNKNOWN_ID)


def test_a_fresh_instance_that_ec2_hides_is_ended(
    cloud: Ec2Cloud, machines: MachineThings, proxy: EditingProxy, account: Account, before: AccountState
) -> None:
    """EC2 may not show yet what it has launched, and end it nevertheless."""
    proxy.hide_fresh(60)
    instance_id = machines.launch()
    assert cloud.instances(REGION, [instance_id]) == {}

    assert not cloud.terminate_instance(REGION, instance_id)

    assert account.left_since(before) == AccountState()


def test_an_instance_that_ec2_shows_and_denies_is_still_there(
    cloud: Ec2Cloud, machines: MachineThings, proxy: EditingProxy
) -> None:
    """EC2's parts do not know a fresh instance all at once: the next look decides."""
    instance_id = machines.launch()
    proxy.fail("TerminateInstances", "InvalidInstanceID.NotFound", "The instance ID does not exist")

    assert not cloud.terminate_instance(REGION, instance_id)


def test_a_protected_instance_is_not_ended(cloud: Ec2Cloud, machines: MachineThings, proxy: EditingProxy) -> None:
    """Somebody turned termination protection on: EC2's word against it reaches the caller."""
    instance_id = machines.launch()
    proxy.fail("TerminateInstances", "OperationNotPermitted", "Modify its 'disableApiTermination' attribute.")

    with pytest.raises(CloudRefusedError, match="OperationNotPermitted"):
        cloud.terminate_instance(REGION, instance_id)


@pytest.mark.parametrize("action", ["DescribeInstances", "RunInstances", "TerminateInstances"])
def test_an_outage_says_nothing_of_a_machine(
    action: str, hasty: Ec2Cloud, machines: MachineThings, proxy: EditingProxy
) -> None:
    """A call that EC2 throttles fails, and tells neither that an instance is there nor that it is not."""
    instance_id = machines.launch()
    proxy.throttle(action)

    with pytest.raises(CloudUnavailableError):
        if action == "RunInstances":
            hasty.launch(REGION, machines.order(number=2))
        else:
            hasty.terminate_instance(REGION, instance_id)


def test_tagging_takes_an_instance_in(cloud: Ec2Cloud, account: Account, machines: MachineThings) -> None:
    """An instance that Kiln did not launch becomes a machine's by its tags, and is not among the launched ones."""
    instance_id = BuildThings(account.ec2).instance(tagged=False)

    cloud.tag(REGION, [instance_id], machine_tags(machines.installation, 9))

    assert machines.seen(instance_id).tags == machine_tags(machines.installation, 9)
    assert cloud.instances_of_machine(REGION, machines.installation, 9) == []
