"""Temporary security groups: one of a name, tagged from its first moment, open to whom they should be."""

from uuid import uuid4

import pytest
from mypy_boto3_ec2.type_defs import SecurityGroupTypeDef

from kiln.adapters.ec2 import CloudRefusedError, CloudUnavailableError, Ec2Cloud
from kiln.ports import SecurityGroupRequest
from support.ec2_editing import EditingProxy
from support.moto import REGION, Account

CIDR = "203.0.113.0/24"
TAGS = {"kiln:installation": "installation-1", "team": "agents"}


@pytest.fixture
def name() -> str:
    return f"kiln-{uuid4()}-1"


def group_of(account: Account, group_id: str) -> SecurityGroupTypeDef:
    return account.ec2.describe_security_groups(GroupIds=[group_id])["SecurityGroups"][0]


def groups_named(account: Account, name: str) -> list[str]:
    filters = [{"Name": "group-name", "Values": [name]}]
    groups = account.ec2.describe_security_groups(Filters=filters)["SecurityGroups"]  # type: ignore[arg-type]
    return [group["GroupId"] for group in groups]


def subnet_of_another_vpc(account: Account) -> tuple[str, str]:
    vpc_id = account.ec2.create_vpc(CidrBlock="10.7.0.0/16")["Vpc"]["VpcId"]
    subnet = account.ec2.create_subnet(VpcId=vpc_id, CidrBlock="10.7.1.0/24")["Subnet"]
    return vpc_id, subnet["SubnetId"]


def test_a_group_is_made_with_tags_and_ssh(cloud: Ec2Cloud, account: Account, name: str) -> None:
    """The group is in the default VPC, has the tags, and lets the given addresses to port 22 and nothing else."""
    group_id = cloud.make_security_group(REGION, SecurityGroupRequest(name, tags=TAGS, ssh_cidr=CIDR))

    group = group_of(account, group_id)
    vpc = account.ec2.describe_vpcs(VpcIds=[group["VpcId"]])["Vpcs"][0]
    (rule,) = group["IpPermissions"]
    assert (group["GroupName"], vpc["IsDefault"]) == (name, True)
    assert {tag["Key"]: tag["Value"] for tag in group["Tags"]} == TAGS
    assert (rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) == ("tcp", 22, 22)
    assert [each["CidrIp"] for each in rule["IpRanges"]] == [CIDR]


def test_tags_come_with_the_creation(cloud: Ec2Cloud, proxy: EditingProxy, name: str) -> None:
    """There is no moment in which the group has no tags."""
    cloud.make_security_group(REGION, SecurityGroupRequest(name, tags=TAGS))

    (creation,) = proxy.calls_of("CreateSecurityGroup")
    assert creation.params["TagSpecification.1.Tag.1.Key"] == "kiln:installation"
    assert proxy.calls_of("CreateTags") == ()


def test_a_group_without_ssh_is_closed(cloud: Ec2Cloud, account: Account, name: str) -> None:
    """Where nobody logs in, nobody gets in."""
    group_id = cloud.make_security_group(REGION, SecurityGroupRequest(name))

    assert group_of(account, group_id)["IpPermissions"] == []


def test_an_ipv6_range_is_let_in(cloud: Ec2Cloud, account: Account, name: str) -> None:
    """An IPv6 range is a rule of its own sort in EC2."""
    group_id = cloud.make_security_group(REGION, SecurityGroupRequest(name, ssh_cidr="2001:db8::/32"))

    (rule,) = group_of(account, group_id)["IpPermissions"]
    assert [each["CidrIpv6"] for each in rule["Ipv6Ranges"]] == ["2001:db8::/32"]


def test_a_group_is_made_once(cloud: Ec2Cloud, account: Account, name: str) -> None:
    """Asked for again, the same group is there, with the one rule."""
    request = SecurityGroupRequest(name, tags=TAGS, ssh_cidr=CIDR)
    ids = {cloud.make_security_group(REGION, request) for _ in range(3)}

    assert ids == set(groups_named(account, name))
    assert len(ids) == 1
    assert len(group_of(account, ids.pop())["IpPermissions"]) == 1


@pytest.mark.parametrize("action", ["CreateSecurityGroup", "AuthorizeSecurityGroupIngress"])
def test_a_lost_reply_makes_no_second_group(
    action: str, cloud: Ec2Cloud, account: Account, proxy: EditingProxy, name: str
) -> None:
    """A call whose answer got lost is repeated, and finds what it made."""
    proxy.drop_reply(action)

    group_id = cloud.make_security_group(REGION, SecurityGroupRequest(name, ssh_cidr=CIDR))

    assert groups_named(account, name) == [group_id]
    assert len(group_of(account, group_id)["IpPermissions"]) == 1


def test_a_half_made_group_is_opened(cloud: Ec2Cloud, account: Account, name: str) -> None:
    """A worker that died between creation and rule left a closed group; the next attempt opens it."""
    group_id = cloud.make_security_group(REGION, SecurityGroupRequest(name))

    assert cloud.make_security_group(REGION, SecurityGroupRequest(name, ssh_cidr=CIDR)) == group_id
    assert len(group_of(account, group_id)["IpPermissions"]) == 1


def test_a_group_belongs_to_the_subnets_vpc(cloud: Ec2Cloud, account: Account, name: str) -> None:
    """The group is made where the build's subnet is, even if another VPC has one of the name."""
    elsewhere = cloud.make_security_group(REGION, SecurityGroupRequest(name))
    vpc_id, subnet_id = subnet_of_another_vpc(account)
    request = SecurityGroupRequest(name, subnet_id=subnet_id)

    group_id = cloud.make_security_group(REGION, request)

    assert group_id != elsewhere
    assert group_of(account, group_id)["VpcId"] == vpc_id
    assert cloud.make_security_group(REGION, request) == group_id


def test_a_group_that_ec2_does_not_show_yet_is_to_be_asked_for_again(
    cloud: Ec2Cloud, proxy: EditingProxy, name: str
) -> None:
    """EC2 says that the name is taken, and doesn't list the group: a retry cures that."""
    proxy.hide_fresh(60)
    proxy.drop_reply("CreateSecurityGroup")

    with pytest.raises(CloudUnavailableError, match=name):
        cloud.make_security_group(REGION, SecurityGroupRequest(name))


def test_a_group_that_ec2_does_not_know_yet_is_to_be_asked_for_again(
    cloud: Ec2Cloud, proxy: EditingProxy, name: str
) -> None:
    """EC2 has made the group, and denies it to the next call: a retry cures that."""
    proxy.fail("AuthorizeSecurityGroupIngress", "InvalidGroup.NotFound", "The security group does not exist")

    with pytest.raises(CloudUnavailableError):
        cloud.make_security_group(REGION, SecurityGroupRequest(name, ssh_cidr=CIDR))


def test_a_wrong_range_is_a_refusal(cloud: Ec2Cloud, name: str) -> None:
    """A range that is none is the operator's mistake, not a fault that passes."""
    with pytest.raises(CloudRefusedError):
        cloud.make_security_group(REGION, SecurityGroupRequest(name, ssh_cidr="not-a-range"))


def test_a_region_without_default_vpc_wants_a_subnet(cloud: Ec2Cloud, proxy: EditingProxy, name: str) -> None:
    """Without a default VPC the refusal says what to set."""
    proxy.fail("CreateSecurityGroup", "VPCIdNotSpecified", "No default VPC for this user")

    with pytest.raises(CloudRefusedError, match="subnet"):
        cloud.make_security_group(REGION, SecurityGroupRequest(name))
