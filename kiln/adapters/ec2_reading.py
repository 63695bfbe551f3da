"""What EC2 shows: complete listings, page by page, and what Kiln reads out of each thing."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, TypeVar

from kiln.naming import BUILD_TAG, MACHINE_TAG
from kiln.ports import Ami, Instance, Placement, Resource

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client
    from mypy_boto3_ec2.type_defs import (
        BlockDeviceMappingTypeDef,
        EbsBlockDeviceTypeDef,
        FilterTypeDef,
        ImageTypeDef,
        InstanceTypeDef,
        KeyPairInfoTypeDef,
        SecurityGroupTypeDef,
        SnapshotTypeDef,
        TagTypeDef,
        VolumeTypeDef,
    )

INSTANCE: Final = "instance"
IMAGE: Final = "image"
SNAPSHOT: Final = "snapshot"
VOLUME: Final = "volume"
KEY_PAIR: Final = "key-pair"
SECURITY_GROUP: Final = "security-group"

# EC2's own words for what is listed for a while after its end.
GONE_STATES: Final = {
    INSTANCE: frozenset({"terminated"}),
    IMAGE: frozenset({"deregistered"}),
    VOLUME: frozenset({"deleting", "deleted"}),
}
# What a machine consists of: with its tag, such a thing is no build's, whatever other tags and names it has.
MACHINE_KINDS: Final = frozenset({INSTANCE, VOLUME})
FILTER_VALUES_LIMIT: Final = 200  # of one request (EC2, "Filtering your resources")
_PAGE_SIZE: Final = 500

# What EC2 itself writes on the snapshots that it makes for an AMI (CreateImage, CopyImage).
_CREATED: Final = re.compile(r"Created by CreateImage\((i-[0-9a-f]+)\)(?: for (ami-[0-9a-f]+))?")
_COPIED: Final = re.compile(r"Copied for DestinationAmi (ami-[0-9a-f]+) ")


@dataclass(frozen=True)
class Found:
    """One thing that EC2 showed, with its tags."""

    resource: Resource
    tags: Mapping[str, str]

    @property
    def id(self) -> str:
        return self.resource.resource_id

    @property
    def state(self) -> str:
        return self.resource.state

    @property
    def is_gone(self) -> bool:
        return self.state in GONE_STATES.get(self.resource.kind, ())

    @property
    def is_machines(self) -> bool:
        """Whether it is a machine's instance or volume."""
        return _is_machines(self.resource.kind, self.tags)


@dataclass(frozen=True)
class FoundInstance(Found):
    """`root_volume_id` is "" for an instance without disks: a terminated one."""

    instance: Instance
    root_volume_id: str


@dataclass(frozen=True)
class FoundImage(Found):
    """`source_instance_id` is the instance that it was made of, "" if it was not made by CreateImage. `disks` are its
    EBS disks as EC2 describes them, by device name."""

    ami: Ami
    source_instance_id: str
    root_device: str
    disks: Mapping[str, EbsBlockDeviceTypeDef]


@dataclass(frozen=True)
class FoundSnapshot(Found):
    """The instance and the AMI that EC2 made it from and for, "" if EC2 did not make it for an AMI."""

    made_from: str
    made_for: str


@dataclass(frozen=True)
class FoundVolume(Found):
    """`attached_to` are ids of instances."""

    attached_to: frozenset[str]
    size_gib: int


AnyFound = TypeVar("AnyFound", bound=Found)


class Ec2Reader:
    """Lists what an account has in a region, by one filter at a time. Raises botocore's errors.

    Every listing is complete or raises. Ids are looked for by filter: one that EC2 doesn't know is then absent from
    the answer, where it would fail a whole call that names it outright. `account` tells whose the credentials are.
    """

    def __init__(self, ec2: EC2Client, region: str, account: Callable[[], str]) -> None:
        self._ec2 = ec2
        self._account = account
        self.region = region

    def instances(self, name: str, values: Iterable[str]) -> list[FoundInstance]:
        """Instances, terminated ones too, which EC2 shows for about an hour (`DescribeInstances`)."""
        pages = self._pages("describe_instances", _chunked(name, values))
        reservations = [reservation for page in pages for reservation in page["Reservations"]]
        return [self._instance(instance) for each in reservations for instance in each.get("Instances", [])]

    def images(self, name: str, values: Iterable[str]) -> list[FoundImage]:
        """The account's own AMIs, disabled ones too (`DescribeImages`)."""
        return self._images(_chunked(name, values), Owners=["self"])

    def own_images(self) -> list[FoundImage]:
        """All of the account's own AMIs, disabled ones too."""
        return self._images([[]], Owners=["self"])

    def anyones_images(self, name: str, values: Iterable[str]) -> list[FoundImage]:
        """AMIs that the account can see, whoever owns them."""
        return self._images(_chunked(name, values))

    def offered_images(self, owner: str, name: str) -> list[FoundImage]:
        """An owner's available AMIs for today's instance types, by name, in which `*` stands for anything."""
        wanted = {"name": name, "state": "available", "root-device-type": "ebs", "virtualization-type": "hvm"}
        filters: list[FilterTypeDef] = [{"Name": key, "Values": [value]} for key, value in wanted.items()]
        return self._images([filters], Owners=[owner])

    def snapshots(self, name: str, values: Iterable[str]) -> list[FoundSnapshot]:
        """The account's own snapshots (`DescribeSnapshots`)."""
        # moto ignores OwnerIds, and would search all tags for each of Amazon's snapshots that no filter rules out.
        own: FilterTypeDef = {"Name": "owner-id", "Values": [self._account_id]}
        chunks = ([own, *filters] for filters in _chunked(name, values))
        pages = self._pages("describe_snapshots", chunks, OwnerIds=["self"])
        return [self._snapshot(snapshot) for page in pages for snapshot in page["Snapshots"]]

    def unlisted_snapshot(self, snapshot_id: str) -> FoundSnapshot:
        """A snapshot of which EC2 tells no more than its id."""
        return FoundSnapshot(self._resource(SNAPSHOT, snapshot_id, {}), {}, made_from="", made_for="")

    def volumes(self, name: str, values: Iterable[str]) -> list[FoundVolume]:
        """Volumes (`DescribeVolumes`)."""
        pages = self._pages("describe_volumes", _chunked(name, values))
        return [self._volume(volume) for page in pages for volume in page["Volumes"]]

    def key_pairs(self, name: str, values: Iterable[str]) -> list[Found]:
        """Key pairs (`DescribeKeyPairs`, which has no pages)."""
        answers = [self._ec2.describe_key_pairs(Filters=filters) for filters in _chunked(name, values)]
        return [self._key_pair(key_pair) for answer in answers for key_pair in answer["KeyPairs"]]

    def security_groups(self, name: str, values: Iterable[str]) -> list[Found]:
        """Security groups (`DescribeSecurityGroups`)."""
        pages = self._pages("describe_security_groups", _chunked(name, values))
        return [self._security_group(group) for page in pages for group in page["SecurityGroups"]]

    @cached_property
    def _account_id(self) -> str:
        return self._account()

    def _images(self, chunks: Iterable[Sequence[FilterTypeDef]], **request: Any) -> list[FoundImage]:
        pages = self._pages("describe_images", chunks, IncludeDisabled=True, **request)
        return [self._image(image) for page in pages for image in page["Images"]]

    def _pages(self, action: Any, chunks: Iterable[Sequence[FilterTypeDef]], **request: Any) -> Iterator[Any]:
        paginator = self._ec2.get_paginator(action)
        for filters in chunks:
            yield from paginator.paginate(Filters=filters, PaginationConfig={"PageSize": _PAGE_SIZE}, **request)

    def _instance(self, instance: InstanceTypeDef) -> FoundInstance:
        tags = _tags(instance)
        resource = self._resource(
            INSTANCE, instance["InstanceId"], tags, state=instance["State"]["Name"], name=tags.get("Name", "")
        )
        root_volume_id = _root_volume_id(instance)
        return FoundInstance(resource, tags, instance_of(instance, self.region), root_volume_id=root_volume_id)

    def _image(self, image: ImageTypeDef) -> FoundImage:
        ami = ami_of(image)
        resource = self._resource(IMAGE, ami.image_id, ami.tags, state=ami.state, name=ami.name)
        return FoundImage(
            resource,
            ami.tags,
            ami=ami,
            source_instance_id=image.get("SourceInstanceId", ""),
            root_device=image.get("RootDeviceName", ""),
            disks={each.get("DeviceName", ""): each["Ebs"] for each in _ebs_mappings(image)},
        )

    def _snapshot(self, snapshot: SnapshotTypeDef) -> FoundSnapshot:
        tags = _tags(snapshot)
        resource = self._resource(SNAPSHOT, snapshot["SnapshotId"], tags, state=snapshot.get("State", ""))
        made_from, made_for = _origin(snapshot.get("Description", ""))
        return FoundSnapshot(resource, tags, made_from=made_from, made_for=made_for)

    def _volume(self, volume: VolumeTypeDef) -> FoundVolume:
        tags = _tags(volume)
        resource = self._resource(VOLUME, volume["VolumeId"], tags, state=volume.get("State", ""))
        attached_to = frozenset(each["InstanceId"] for each in volume.get("Attachments", []))
        return FoundVolume(resource, tags, attached_to=attached_to, size_gib=volume.get("Size", 0))

    def _key_pair(self, key_pair: KeyPairInfoTypeDef) -> Found:
        tags = _tags(key_pair)
        return Found(self._resource(KEY_PAIR, key_pair["KeyPairId"], tags, name=key_pair["KeyName"]), tags)

    def _security_group(self, group: SecurityGroupTypeDef) -> Found:
        tags = _tags(group)
        return Found(self._resource(SECURITY_GROUP, group["GroupId"], tags, name=group["GroupName"]), tags)

    def _resource(
        self, kind: str, resource_id: str, tags: Mapping[str, str], state: str = "", name: str = ""
    ) -> Resource:
        build_id = "" if _is_machines(kind, tags) else tags.get(BUILD_TAG, "")
        return Resource(kind, resource_id, self.region, build_id=build_id, name=name, state=state)


def ami_of(image: ImageTypeDef) -> Ami:
    """An AMI as `DescribeImages` shows it; a pending one may lack its snapshots. `size_gib` is the sum of its disks."""
    disks = [mapping["Ebs"] for mapping in _ebs_mappings(image)]
    created_at = image.get("CreationDate")
    return Ami(
        image_id=image["ImageId"],
        name=image.get("Name", ""),
        state=image.get("State", ""),
        created_at=datetime.fromisoformat(created_at) if created_at else datetime.min.replace(tzinfo=UTC),
        tags=_tags(image),
        snapshot_ids=tuple(disk["SnapshotId"] for disk in disks if disk.get("SnapshotId")),
        size_gib=sum(disk.get("VolumeSize", 0) for disk in disks),
        architecture=image.get("Architecture", ""),
        state_reason=image.get("StateReason", {}).get("Message"),
    )


def instance_of(instance: InstanceTypeDef, region: str) -> Instance:
    """An instance as `DescribeInstances` shows it. EC2's launch time is that of the last start; a terminated instance
    may lack its placement."""
    return Instance(
        instance_id=instance["InstanceId"],
        region=region,
        state=instance["State"]["Name"],
        instance_type=instance["InstanceType"],
        image_id=instance.get("ImageId", ""),
        launched_at=instance["LaunchTime"].astimezone(UTC),
        tags=_tags(instance),
        placement=Placement(
            subnet_id=instance.get("SubnetId", ""),
            security_group_ids=tuple(group["GroupId"] for group in instance.get("SecurityGroups", [])),
            key_name=instance.get("KeyName", ""),
            instance_profile_arn=instance.get("IamInstanceProfile", {}).get("Arn", ""),
        ),
        state_reason=instance.get("StateReason", {}).get("Message", ""),
        client_token=instance.get("ClientToken", ""),
    )


def unique(found: Iterable[AnyFound]) -> list[AnyFound]:
    """The things without repetitions, in the order of their first appearance."""
    return list({each.id: each for each in found}.values())


def _tags(thing: Mapping[str, Any]) -> dict[str, str]:
    tags: Collection[TagTypeDef] = thing.get("Tags", [])
    return {tag["Key"]: tag["Value"] for tag in tags}


def _is_machines(kind: str, tags: Mapping[str, str]) -> bool:
    return kind in MACHINE_KINDS and MACHINE_TAG in tags


def _ebs_mappings(image: ImageTypeDef) -> list[BlockDeviceMappingTypeDef]:
    return [mapping for mapping in image.get("BlockDeviceMappings", []) if "Ebs" in mapping]


def _root_volume_id(instance: InstanceTypeDef) -> str:
    mappings = instance.get("BlockDeviceMappings", [])
    volumes = {each["DeviceName"]: each["Ebs"]["VolumeId"] for each in mappings if "Ebs" in each}
    # moto calls every instance's root device /dev/sda1; the root is the first in the list.
    return volumes.get(instance.get("RootDeviceName", "")) or next(iter(volumes.values()), "")


def _origin(description: str) -> tuple[str, str]:
    if created := _CREATED.match(description):
        return created[1], created[2] or ""
    copied = _COPIED.match(description)
    return "", copied[1] if copied else ""


def _chunked(name: str, values: Iterable[str]) -> Iterator[list[FilterTypeDef]]:
    """Filters that together ask for all the values; none at all for no values."""
    left = iter(sorted(set(values)))
    while chunk := list(islice(left, FILTER_VALUES_LIMIT)):
        yield [{"Name": name, "Values": chunk}]
