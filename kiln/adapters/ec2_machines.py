"""Instances as machines: found by their tags, launched, started, stopped, ended, and made into AMIs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Final, cast

from botocore.exceptions import ClientError

from kiln.adapters.ec2_errors import (
    GONE_CODES,
    IMAGE_GONE_CODES,
    WRONG_STATE_CODES,
    CloudRefusedError,
    CloudUnavailableError,
    code_of,
    told,
)
from kiln.adapters.ec2_reading import Ec2Reader, FoundImage, FoundInstance
from kiln.errors import ImageNotFoundError, NotFoundError, RefusedError
from kiln.naming import INSTALLATION_TAG, LAUNCH_TAG, MACHINE_TAG, NAME_TAG, launch_token
from kiln.ports import Instance, Launch, Placement

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client
    from mypy_boto3_ec2.literals import InstanceTypeType, ResourceTypeType
    from mypy_boto3_ec2.type_defs import (
        BlockDeviceMappingTypeDef,
        EbsBlockDeviceTypeDef,
        RunInstancesRequestTypeDef,
        TagSpecificationTypeDef,
    )

_ROOT_VOLUME_TYPE: Final = "gp3"
_TAGS_LIMIT: Final = 50  # of one resource (EC2, "Tag restrictions")
_AWS_TAG_PREFIX: Final = "aws:"
_KILN_TAG_PREFIX: Final = "kiln:"
_OVER_STATES: Final = frozenset({"shutting-down", "terminated"})
# EC2 may refuse in these what it will do a little later.
_PASSING_STATES: Final = frozenset({"pending", "stopping"})
# What of an AMI's disk a launch may say again; EC2 takes the rest, encryption above all, from the snapshot.
_REPEATED_KEYS: Final = ("SnapshotId", "VolumeSize", "VolumeType")
# What only some volume types let themselves be told.
_TUNABLES: Final = {"io1": ("Iops",), "io2": ("Iops",), "gp3": ("Iops", "Throughput")}


class Ec2Machines:
    """The instances of one region. Raises botocore's errors, and Kiln's as said.

    `simulated`: moto does not tag an AMI's snapshots, and lets terminated instances rise again.
    """

    def __init__(self, ec2: EC2Client, reader: Ec2Reader, *, simulated: bool) -> None:
        self._ec2 = ec2
        self._reader = reader
        self._simulated = simulated

    def launched(self, installation: str) -> list[Instance]:
        """What an installation launched for machines, less terminated ones, oldest first."""
        return _launched(self._reader.instances(f"tag:{INSTALLATION_TAG}", [installation]), installation)

    def launched_for(self, installation: str, machine_id: int) -> list[Instance]:
        """What an installation launched for one machine, less terminated ones, oldest first."""
        found = self._reader.instances(f"tag:{MACHINE_TAG}", [str(machine_id)])
        return [each for each in _launched(found, installation) if each.tags[MACHINE_TAG] == str(machine_id)]

    def disk_gib(self, instance_id: str) -> int:
        """The size of an instance's root volume; 0 if EC2 shows none."""
        found = self._reader.instances("instance-id", [instance_id])
        root_ids = [each.root_volume_id for each in found if each.root_volume_id]
        return sum(volume.size_gib for volume in self._reader.volumes("volume-id", root_ids))

    def base_image(self, owner: str, name: str) -> str | None:
        """The newest of an owner's AMIs of this name."""
        offered = self._reader.offered_images(owner, name)
        newest = max(offered, key=lambda image: (image.ami.created_at, image.id), default=None)
        return newest.id if newest else None

    def launch(self, launch: Launch) -> str:
        """The new instance's id. Raises ImageNotFoundError, CloudRefusedError if its place is no more."""
        request = _request(launch, self._image(launch.image_id))
        try:
            answer = self._ec2.run_instances(**request)
        except ClientError as error:
            code = code_of(error)
            if code in GONE_CODES - IMAGE_GONE_CODES:  # a security group or a key: it will not come back
                raise CloudRefusedError(told(error, self._reader.region), code=code) from None
            raise
        return answer["Instances"][0]["InstanceId"]

    def start(self, instance_id: str) -> None:
        """Raises NotFoundError, RefusedError if it is terminated, CloudUnavailableError while it is stopping."""
        instance = self._living(instance_id)
        self._ask(instance, partial(self._ec2.start_instances, InstanceIds=[instance_id]))

    def stop(self, instance_id: str, *, force: bool) -> None:
        """Raises NotFoundError, RefusedError if it is terminated, CloudUnavailableError while EC2 will not yet."""
        instance = self._living(instance_id)
        self._ask(instance, partial(self._ec2.stop_instances, InstanceIds=[instance_id], Force=force))

    def terminate(self, instance_id: str) -> bool:
        """Whether the instance is terminated, or unknown; if not, it is asked to end."""
        shown = self._reader.instances("instance-id", [instance_id])
        if any(each.is_gone for each in shown):
            return True
        try:
            self._ec2.terminate_instances(InstanceIds=[instance_id])
        except ClientError as error:
            if code_of(error) not in GONE_CODES:
                raise
            return not shown  # a fresh instance is not everywhere in EC2 at once: the next look tells
        return False

    def create_image(self, instance_id: str, name: str, tags: Mapping[str, str]) -> str:
        """The id of the AMI that EC2 begins to make. Raises NotFoundError, RefusedError if it is terminated."""
        instance = self._living(instance_id)
        tagged = _tagged(tags, "image") if self._simulated else _tagged(tags, "image", "snapshot")
        made: list[str] = []

        def create() -> None:
            answer = self._ec2.create_image(InstanceId=instance_id, Name=name, NoReboot=True, TagSpecifications=tagged)
            made.append(answer["ImageId"])

        self._ask(instance, create)
        return made[0]

    def _image(self, image_id: str) -> FoundImage:
        images = [each for each in self._reader.anyones_images("image-id", [image_id]) if not each.is_gone]
        if not images:
            raise ImageNotFoundError(f"EC2 in {self._reader.region} has no AMI {image_id}")
        return images[0]

    def _living(self, instance_id: str) -> Instance:
        found = self._reader.instances("instance-id", [instance_id])
        if not found:
            raise NotFoundError(f"EC2 in {self._reader.region} shows no instance {instance_id}")
        instance = found[0].instance
        if instance.state in _OVER_STATES:
            raise RefusedError(f"instance {instance_id} in {self._reader.region} is {instance.state}")
        return instance

    def _ask(self, instance: Instance, call: Callable[[], object]) -> None:
        """Raises CloudUnavailableError if EC2 refuses for a state that will pass."""
        try:
            call()
        except ClientError as error:
            if code_of(error) in WRONG_STATE_CODES and self._is_passing(instance):
                raise CloudUnavailableError(told(error, instance.region)) from None
            raise

    def _is_passing(self, instance: Instance) -> bool:
        """Whether the instance was on its way to another state, or is by now. Raises what stands against any state."""
        return instance.state in _PASSING_STATES or self._living(instance.instance_id).state in _PASSING_STATES


def _launched(found: Iterable[FoundInstance], installation: str) -> list[Instance]:
    # EC2 takes * and ? in a filter's value for wildcards.
    own = [each for each in found if each.tags.get(INSTALLATION_TAG) == installation and not each.is_gone]
    launched = [each.instance for each in own if _was_launched(each.instance, installation)]
    return sorted(launched, key=lambda instance: (instance.launched_at, instance.instance_id))


def _was_launched(instance: Instance, installation: str) -> bool:
    """Whether it was Kiln that launched it for a machine: a copy that somebody makes in EC2's console, or restores from
    a backup, has the tags too, and not the client token."""
    machine_id, number = instance.tags.get(MACHINE_TAG), instance.tags.get(LAUNCH_TAG)
    if machine_id is None or number is None:
        return False
    return instance.client_token == launch_token(installation, machine_id, number)


def _request(launch: Launch, image: FoundImage) -> RunInstancesRequestTypeDef:
    """The same for the same launch: EC2 refuses a repeated ClientToken with other parameters."""
    request: RunInstancesRequestTypeDef = {
        "ImageId": launch.image_id,
        "InstanceType": cast("InstanceTypeType", launch.instance_type),
        "MinCount": 1,
        "MaxCount": 1,
        "ClientToken": launch.client_token,
        "BlockDeviceMappings": _disks(image, launch.disk_gib),
        "TagSpecifications": _tagged(launch.tags, "instance", "volume"),
    }
    _place(request, launch.placement)
    return request


def _place(request: RunInstancesRequestTypeDef, placement: Placement) -> None:
    if placement.subnet_id:
        request["SubnetId"] = placement.subnet_id
    if placement.security_group_ids:
        request["SecurityGroupIds"] = placement.security_group_ids
    if placement.key_name:
        request["KeyName"] = placement.key_name
    if placement.instance_profile_arn:
        request["IamInstanceProfile"] = {"Arn": placement.instance_profile_arn}


def _disks(image: FoundImage, disk_gib: int) -> list[BlockDeviceMappingTypeDef]:
    """The AMI's disks, the root one large enough; all go with the instance, or each rebuilding would leave some."""
    root = image.root_device if image.root_device in image.disks else next(iter(image.disks), image.root_device)
    root_gib = image.disks[root].get("VolumeSize", 0) if root in image.disks else 0
    root_disk: EbsBlockDeviceTypeDef = {"VolumeSize": max(disk_gib, root_gib), "VolumeType": _ROOT_VOLUME_TYPE}
    disks = {root: root_disk, **{device: _repeated(disk) for device, disk in image.disks.items() if device != root}}
    return [{"DeviceName": device, "Ebs": {**disk, "DeleteOnTermination": True}} for device, disk in disks.items()]


def _repeated(disk: EbsBlockDeviceTypeDef) -> EbsBlockDeviceTypeDef:
    keys = (*_REPEATED_KEYS, *_TUNABLES.get(disk.get("VolumeType", ""), ()))
    return cast("EbsBlockDeviceTypeDef", {key: value for key, value in disk.items() if key in keys})


def _tagged(tags: Mapping[str, str], *kinds: ResourceTypeType) -> list[TagSpecificationTypeDef]:
    """Tags as EC2 takes them: none of AWS's own, and 50 at most. Kiln's and the name come first."""
    kept = sorted((key for key in tags if not key.startswith(_AWS_TAG_PREFIX)), key=_tag_order)[:_TAGS_LIMIT]
    return [{"ResourceType": kind, "Tags": [{"Key": key, "Value": tags[key]} for key in kept]} for kind in kinds]


def _tag_order(key: str) -> tuple[bool, bool, str]:
    return (not key.startswith(_KILN_TAG_PREFIX), key != NAME_TAG, key)
