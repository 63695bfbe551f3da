"""Instances that carry a machine's tags, and that Kiln did not launch: no operation and no sweep may end them."""

import pytest

from kiln.adapters.ec2 import Ec2Cloud
from support.ec2_machines import INSTANCE_TYPE, MachineThings
from support.ec2_things import MOTO_IMAGE_ID
from support.moto import REGION, Account


@pytest.mark.parametrize("token", [{}, {"ClientToken": "a-token-of-the-console"}], ids=["none", "another"])
@pytest.mark.usefixtures("before")
def test_a_copy_is_not_launched_by_kiln(cloud: Ec2Cloud, account: Account, token: dict[str, str]) -> None:
    """A copy that was made in EC2's console, or restored from a backup, has the tags and not the client token."""
    things = MachineThings(cloud)
    own = things.launch()
    copy_of(account, things, own, **token)

    found = cloud.launched_instances(REGION, things.installation)
    of_machine = cloud.instances_of_machine(REGION, things.installation, 7)

    assert [[each.instance_id for each in instances] for instances in (found, of_machine)] == [[own], [own]]


def copy_of(account: Account, things: MachineThings, instance_id: str, **token: str) -> None:
    """What "Launch more like this" does."""
    tags = [{"Key": key, "Value": value} for key, value in things.seen(instance_id).tags.items()]
    account.ec2.run_instances(
        ImageId=MOTO_IMAGE_ID,
        InstanceType=INSTANCE_TYPE,
        MinCount=1,
        MaxCount=1,
        TagSpecifications=[{"ResourceType": "instance", "Tags": tags}],  # type: ignore[typeddict-item]
        **token,
    )
