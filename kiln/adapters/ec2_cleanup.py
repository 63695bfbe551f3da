"""One pass over everything that a build left in EC2."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Final

from botocore.exceptions import ClientError

from kiln.adapters.ec2_errors import code_of
from kiln.adapters.ec2_ownership import BuildFinder, BuildInstances
from kiln.adapters.ec2_reading import (
    AnyFound,
    Ec2Reader,
    Found,
    FoundImage,
    FoundSnapshot,
    FoundVolume,
)
from kiln.adapters.ec2_removal import UNFINISHED_IMAGE_STATES, Ec2Remover
from kiln.ports import Resource

_REMOVABLE_VOLUME_STATES: Final = frozenset({"available", "error"})


class Leftovers:
    """What a build left, less the AMIs in `spare` and their snapshots. Holds for one pass."""

    def __init__(self, finder: BuildFinder, reader: Ec2Reader, remover: Ec2Remover, spare: Collection[str]) -> None:
        self._finder = finder
        self._reader = reader
        self._remover = remover
        self._spare = frozenset(spare)

    def remove(self) -> list[Resource]:
        """Removes what can be removed now; returns what is still there, with its state or EC2's word against it."""
        instances = self._finder.instances()
        ending = self._remover.end(instances.found)
        images = [image for image in self._finder.images(instances) if image.id not in self._spare]
        snapshots = self._removable_snapshots(instances, images)  # read while the AMIs still tell of them
        staying = self._deregister(images)
        return [
            *ending,
            *staying,
            *self._delete_snapshots(snapshots, images, staying),
            *self._delete_volumes({instance.resource_id for instance in ending}),
            *_left(self._finder.key_pairs(), lambda pair: self._remover.delete_key_pair(pair.resource.name)),
            *_left(self._finder.security_groups(), lambda group: self._remover.delete_security_group(group.id)),
        ]

    def _deregister(self, images: list[FoundImage]) -> list[Resource]:
        unfinished = [image for image in images if image.state in UNFINISHED_IMAGE_STATES]
        finished = [image for image in images if image not in unfinished and not image.is_gone]
        return [
            *(image.resource for image in unfinished),
            *_left(finished, lambda image: self._remover.deregister(image.id)),
        ]

    def _removable_snapshots(self, instances: BuildInstances, images: list[FoundImage]) -> dict[str, FoundSnapshot]:
        """The snapshots behind the AMIs, and others of the build, by id; none that a spared AMI has or had."""
        behind = {snapshot_id for image in images for snapshot_id in image.ami.snapshot_ids}
        spared = self._reader.images("image-id", self._spare)
        spared_ids = {snapshot_id for image in spared for snapshot_id in image.ami.snapshot_ids}
        # While EC2 does not show a spared AMI, a snapshot goes only if it is certainly another AMI's.
        is_complete = {image.id for image in spared} >= self._spare
        return {
            snapshot.id: snapshot
            for snapshot in self._snapshots(instances, {image.id for image in images}, behind)
            if snapshot.id not in spared_ids
            and snapshot.made_for not in self._spare
            and (is_complete or snapshot.made_for or snapshot.id in behind)
        }

    def _snapshots(
        self, instances: BuildInstances, image_ids: Collection[str], behind: Collection[str]
    ) -> list[FoundSnapshot]:
        of_build = self._finder.snapshots(instances, image_ids)
        others = {*behind} - {snapshot.id for snapshot in of_build}
        shown = self._reader.snapshots("snapshot-id", others)
        # An AMI that is about to be deregistered is the last to name those that EC2 doesn't list just now.
        unlisted = [self._reader.unlisted_snapshot(each) for each in others - {snapshot.id for snapshot in shown}]
        return [*of_build, *(each for each in shown if not self._finder.is_anothers(each)), *unlisted]

    def _delete_snapshots(
        self, snapshots: dict[str, FoundSnapshot], images: list[FoundImage], staying: list[Resource]
    ) -> list[Resource]:
        staying_ids = {image.resource_id for image in staying}
        # A pending AMI may not name its snapshots yet.
        waiting = {each for each, snapshot in snapshots.items() if snapshot.made_for in staying_ids}
        deregistered = {image.id for image in images} - staying_ids
        deletion = self._remover.delete_snapshots({*snapshots} - waiting, deregistered)
        waiting |= {each for each, users in deletion.kept.items() if users & staying_ids}
        return [
            *(snapshots[each].resource for each in sorted(waiting)),
            *(_hindered(snapshots[each], error) for each, error in deletion.hindered.items()),
        ]

    def _delete_volumes(self, ending_ids: Collection[str]) -> list[Resource]:
        volumes = [volume for volume in self._finder.volumes() if not volume.is_gone]
        removable = [volume for volume in volumes if volume.state in _REMOVABLE_VOLUME_STATES]
        waiting = [
            volume.resource for volume in volumes if volume not in removable and not _goes_with(volume, ending_ids)
        ]
        return [*waiting, *_left(removable, lambda volume: self._remover.delete_volume(volume.id))]


def _goes_with(volume: FoundVolume, instance_ids: Collection[str]) -> bool:
    """Whether the volume hangs on instances that are reported as still there themselves."""
    return bool(volume.attached_to) and volume.attached_to <= {*instance_ids}


def _left(found: Iterable[AnyFound], delete: Callable[[AnyFound], ClientError | None]) -> list[Resource]:
    """Deletes each; those that EC2 does not let go, with its word against it."""
    return [_hindered(each, error) for each in found if (error := delete(each))]


def _hindered(found: Found, error: ClientError) -> Resource:
    return replace(found.resource, state=code_of(error))
