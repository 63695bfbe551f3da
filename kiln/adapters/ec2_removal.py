"""Taking single things out of EC2. Every removal may be repeated: what is gone already counts as removed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

from botocore.exceptions import ClientError

from kiln.adapters.ec2_errors import code_of, hindrance, is_busy
from kiln.adapters.ec2_reading import (
    IMAGE,
    INSTANCE,
    KEY_PAIR,
    SECURITY_GROUP,
    SNAPSHOT,
    VOLUME,
    Ec2Reader,
    FoundImage,
    FoundInstance,
)
from kiln.ports import ImageDeletion, Resource

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client

_ENDING_STATES: Final = frozenset({"shutting-down", "terminated"})
UNFINISHED_IMAGE_STATES: Final = frozenset({"pending", "transient"})
_SNAPSHOT_FILTER: Final = "block-device-mapping.snapshot-id"


@dataclass(frozen=True)
class SnapshotDeletion:
    """What a pass over snapshots left: EC2's word against a deletion by snapshot, and the AMIs that need a kept one."""

    hindered: Mapping[str, ClientError]
    kept: Mapping[str, frozenset[str]]


class Ec2Remover:
    """Removes single things. Every method may be repeated, and raises botocore's errors.

    `simulated`: moto does not know the filter that finds the AMIs of a snapshot.
    """

    def __init__(self, ec2: EC2Client, reader: Ec2Reader, *, simulated: bool) -> None:
        self._ec2 = ec2
        self._reader = reader
        self._simulated = simulated

    def remove(self, resource: Resource) -> bool:
        """Asks EC2 to remove one thing. True when it is gone."""
        removals: dict[str, Callable[[str], bool]] = {
            INSTANCE: self._remove_instance,
            IMAGE: lambda image_id: self.delete_image(image_id, ()).done,
            SNAPSHOT: self._remove_snapshot,
            VOLUME: lambda volume_id: not is_busy(self.delete_volume(volume_id)),
            KEY_PAIR: lambda _: not is_busy(self.delete_key_pair(resource.name)),
            SECURITY_GROUP: lambda group_id: not is_busy(self.delete_security_group(group_id)),
        }
        return removals[resource.kind](resource.resource_id)

    def end(self, instances: Collection[FoundInstance]) -> list[Resource]:
        """Terminates instances; those that are not terminated yet, each with its state or EC2's word against it."""
        ended = [self._ended(instance) for instance in instances]
        return [instance.resource for instance in ended if not instance.is_gone]

    def delete_image(self, image_id: str, snapshot_ids: Collection[str]) -> ImageDeletion:
        """Deregisters an AMI, then deletes the given snapshots and all that EC2 shows behind it."""
        # Once the AMI is deregistered, EC2 no longer tells which snapshots were behind it.
        shown = self._reader.images("image-id", [image_id])
        if any(image.state in UNFINISHED_IMAGE_STATES for image in shown):
            return ImageDeletion(remaining=(image_id, *sorted(snapshot_ids)))
        behind = {*snapshot_ids, *(each for image in shown for each in image.ami.snapshot_ids)}
        behind |= self._snapshots_made_for(image_id)
        if is_busy(self.deregister(image_id)):
            return ImageDeletion(remaining=(image_id, *sorted(behind)))
        deletion = self.delete_snapshots(behind, deregistered={image_id})
        remaining = [snapshot_id for snapshot_id, error in deletion.hindered.items() if is_busy(error)]
        return ImageDeletion(remaining=tuple(sorted(remaining)), kept=tuple(sorted(deletion.kept)))

    def delete_snapshots(self, snapshot_ids: Collection[str], deregistered: Collection[str]) -> SnapshotDeletion:
        """Deletes snapshots, less those that an AMI needs. EC2 may still show AMIs that are `deregistered`."""
        # EC2 itself protects only the snapshot of an AMI's root device (EC2 DeleteSnapshot).
        kept = self._needed(snapshot_ids, deregistered)
        hindrances = {each: self._delete_snapshot(each) for each in sorted({*snapshot_ids} - {*kept})}
        return SnapshotDeletion({each: error for each, error in hindrances.items() if error}, kept)

    def deregister(self, image_id: str) -> ClientError | None:
        return hindrance(partial(self._ec2.deregister_image, ImageId=image_id))

    def delete_volume(self, volume_id: str) -> ClientError | None:
        return hindrance(partial(self._ec2.delete_volume, VolumeId=volume_id))

    def delete_key_pair(self, name: str) -> ClientError | None:
        return hindrance(partial(self._ec2.delete_key_pair, KeyName=name))

    def delete_security_group(self, group_id: str) -> ClientError | None:
        return hindrance(partial(self._ec2.delete_security_group, GroupId=group_id))

    def _delete_snapshot(self, snapshot_id: str) -> ClientError | None:
        return hindrance(partial(self._ec2.delete_snapshot, SnapshotId=snapshot_id))

    def _remove_instance(self, instance_id: str) -> bool:
        return not self.end(self._reader.instances("instance-id", [instance_id]))

    def _remove_snapshot(self, snapshot_id: str) -> bool:
        deletion = self.delete_snapshots([snapshot_id], deregistered=())
        return not deletion.kept and not any(is_busy(error) for error in deletion.hindered.values())

    def _ended(self, instance: FoundInstance) -> FoundInstance:
        if instance.state in _ENDING_STATES:
            return instance
        # One by one: an instance that EC2 doesn't know fails the whole call (TerminateInstances). If it doesn't know
        # one that it has just shown, the next look tells: a fresh instance is not everywhere in EC2 at once.
        states: list[str] = []
        error = hindrance(lambda: states.extend(self._terminate(instance.id)))
        state = code_of(error) if error else "".join(states) or instance.state
        return replace(instance, resource=replace(instance.resource, state=state))

    def _terminate(self, instance_id: str) -> list[str]:
        answer = self._ec2.terminate_instances(InstanceIds=[instance_id])
        return [change["CurrentState"]["Name"] for change in answer["TerminatingInstances"]]

    def _snapshots_made_for(self, image_id: str) -> set[str]:
        described = self._reader.snapshots("description", [f"*{image_id}*"])
        return {snapshot.id for snapshot in described if snapshot.made_for == image_id}

    def _needed(self, snapshot_ids: Collection[str], deregistered: Collection[str]) -> dict[str, frozenset[str]]:
        """Those of the snapshots that AMIs need, with those AMIs."""
        needed: defaultdict[str, set[str]] = defaultdict(set)
        for image in self._images_of(snapshot_ids):
            if image.id not in deregistered and not image.is_gone:
                for snapshot_id in {*image.ami.snapshot_ids} & {*snapshot_ids}:
                    needed[snapshot_id].add(image.id)
        return {snapshot_id: frozenset(image_ids) for snapshot_id, image_ids in needed.items()}

    def _images_of(self, snapshot_ids: Collection[str]) -> list[FoundImage]:
        if not snapshot_ids:
            return []
        if self._simulated:
            return self._reader.own_images()
        return self._reader.anyones_images(_SNAPSHOT_FILTER, snapshot_ids)
