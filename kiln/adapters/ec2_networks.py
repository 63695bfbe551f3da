"""Temporary security groups: made once by name, however often they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from botocore.exceptions import ClientError

from kiln.adapters.ec2_errors import GONE_CODES, CloudRefusedError, CloudUnavailableError, code_of
from kiln.ports import SecurityGroupRequest

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client
    from mypy_boto3_ec2.type_defs import (
        CreateSecurityGroupRequestTypeDef,
        FilterTypeDef,
        IpPermissionTypeDef,
        TagSpecificationTypeDef,
        TagTypeDef,
        WaiterConfigTypeDef,
    )

_NO_DEFAULT_VPC: Final = "VPCIdNotSpecified"
_SSH_PORT: Final = 22
_DESCRIPTION: Final = "Temporary security group of a Kiln build"
# EC2's reads lag behind its writes, and Packer gives up at once on a group that it cannot see.
_VISIBLE: Final[WaiterConfigTypeDef] = {"Delay": 1, "MaxAttempts": 30}


class SecurityGroups:
    """Makes security groups in one region. Raises botocore's errors, and Kiln's as said."""

    def __init__(self, ec2: EC2Client, region: str) -> None:
        self._ec2 = ec2
        self._region = region

    def make(self, request: SecurityGroupRequest) -> str:
        """The id of the group of this name in the subnet's VPC, or in the default one; made if it is not there.

        Raises CloudRefusedError if there is no default VPC, CloudUnavailableError while EC2 does not show a group
        yet that it has just made.
        """
        # Without a VPC, EC2 itself takes the default one.
        vpc_id = self._vpc_of(request.subnet_id) if request.subnet_id else None
        group_id = self._created(request, vpc_id) or self._found(request.name, vpc_id)
        if request.ssh_cidr:
            self._allow_ssh(group_id, request.ssh_cidr)
        return group_id

    def _vpc_of(self, subnet_id: str) -> str:
        return self._ec2.describe_subnets(SubnetIds=[subnet_id])["Subnets"][0]["VpcId"]

    def _created(self, request: SecurityGroupRequest, vpc_id: str | None) -> str | None:
        """The new group's id; None if the VPC has one of this name."""
        tags: list[TagTypeDef] = [{"Key": key, "Value": value} for key, value in request.tags.items()]
        tagged: list[TagSpecificationTypeDef] = [{"ResourceType": "security-group", "Tags": tags}] if tags else []
        wanted: CreateSecurityGroupRequestTypeDef = {
            "GroupName": request.name,
            "Description": _DESCRIPTION,
            "TagSpecifications": tagged,
        }
        try:
            answer = self._ec2.create_security_group(**wanted, **({"VpcId": vpc_id} if vpc_id else {}))
        except ClientError as error:
            if code_of(error) == _NO_DEFAULT_VPC:
                message = f"{self._region} has no default VPC: name a subnet for builds (KILN_SUBNET_ID)"
                raise CloudRefusedError(message, code=_NO_DEFAULT_VPC) from None
            if code_of(error) != "InvalidGroup.Duplicate":
                raise
            return None
        self._ec2.get_waiter("security_group_exists").wait(GroupIds=[answer["GroupId"]], WaiterConfig=_VISIBLE)
        return answer["GroupId"]

    def _found(self, name: str, vpc_id: str | None) -> str:
        # The name ends in build and attempt: no other VPC has one of this name.
        filters: list[FilterTypeDef] = [{"Name": "group-name", "Values": [name]}]
        if vpc_id is not None:
            filters.append({"Name": "vpc-id", "Values": [vpc_id]})
        groups = self._ec2.describe_security_groups(Filters=filters)["SecurityGroups"]
        if not groups:
            raise CloudUnavailableError(f"EC2 in {self._region} does not show security group {name} yet")
        return groups[0]["GroupId"]

    def _allow_ssh(self, group_id: str, cidr: str) -> None:
        try:
            self._ec2.authorize_security_group_ingress(GroupId=group_id, IpPermissions=[_ssh_from(cidr)])
        except ClientError as error:
            if code_of(error) in GONE_CODES:
                message = f"EC2 in {self._region} does not show security group {group_id} yet"
                raise CloudUnavailableError(message) from None
            if code_of(error) != "InvalidPermission.Duplicate":
                raise


def _ssh_from(cidr: str) -> IpPermissionTypeDef:
    permission: IpPermissionTypeDef = {"IpProtocol": "tcp", "FromPort": _SSH_PORT, "ToPort": _SSH_PORT}
    if ":" in cidr:
        return {**permission, "Ipv6Ranges": [{"CidrIpv6": cidr}]}
    return {**permission, "IpRanges": [{"CidrIp": cidr}]}
