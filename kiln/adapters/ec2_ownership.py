"""Whose a thing in EC2 is. What is not provably a build's is not the build's: unknown means keep.

Only instances and AMIs are known by the ids in a log: it names snapshots, volumes and groups of the user's as well.
A machine's instance and volumes are never a build's, even if they were once, or are called as if they were.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Final

from kiln.adapters.ec2_reading import (
    AnyFound,
    Ec2Reader,
    Found,
    FoundImage,
    FoundInstance,
    FoundSnapshot,
    FoundVolume,
    unique,
)
from kiln.naming import BUILD_TAG, INSTALLATION_TAG, build_of_name
from kiln.ports import Marks

_BUILD_TAG_FILTER: Final = f"tag:{BUILD_TAG}"


@dataclass(frozen=True)
class BuildInstances:
    """A build's instances, terminated ones too. `ids` also has those that only the log knows: EC2 forgets."""

    found: tuple[FoundInstance, ...]
    ids: frozenset[str]

    @property
    def source_images(self) -> frozenset[str]:
        """The AMIs that the instances were started from."""
        return frozenset(found.instance.image_id for found in self.found)


class BuildFinder:
    """Finds what one build made, by tag, by name, by known id and by what EC2 says of its origin."""

    def __init__(self, reader: Ec2Reader, marks: Marks) -> None:
        self._reader = reader
        self._marks = marks

    def instances(self) -> BuildInstances:
        """The build's instances in any state, by tag and by known id."""
        known = self._known("i-")
        seen = [*self._tagged(self._reader.instances), *self._reader.instances("instance-id", known)]
        found = [instance for instance in unique(seen) if self._owns_instance(instance)]
        anothers = {instance.id for instance in seen} - {instance.id for instance in found}
        ids = known - anothers | {instance.id for instance in found}
        return BuildInstances(tuple(found), frozenset(ids))

    def images(self, instances: BuildInstances) -> list[FoundImage]:
        """The build's AMIs in any state, newest first.

        Packer tags an AMI only when it is available, so a pending one has just its name and its instance.
        """
        seen = [
            *self._tagged(self._reader.images),
            *self._reader.images("name", [self._name_pattern]),
            *self._reader.images("image-id", self._known("ami-")),
            *self._reader.images("source-instance-id", instances.ids),
        ]
        found = [image for image in unique(seen) if self._owns_image(image, instances)]
        return sorted(found, key=lambda image: image.ami.created_at, reverse=True)

    def snapshots(self, instances: BuildInstances, image_ids: Collection[str]) -> list[FoundSnapshot]:
        """The build's snapshots: by tag, and those that EC2 says it made from the build's instances or for its AMIs."""
        origins = [f"*{origin}*" for origin in (*instances.ids, *image_ids)]
        seen = [
            *self._tagged(self._reader.snapshots),
            *self._reader.snapshots("description", origins),
        ]
        return [each for each in unique(seen) if self._owns_snapshot(each, instances, image_ids)]

    def volumes(self) -> list[FoundVolume]:
        """The build's volumes, by tag."""
        return [volume for volume in self._tagged(self._reader.volumes) if self._is_marked(volume)]

    def key_pairs(self) -> list[Found]:
        """The build's key pairs, by tag and by name."""
        named = self._reader.key_pairs("key-name", [self._name_pattern])
        seen = unique([*self._tagged(self._reader.key_pairs), *named])
        return [key_pair for key_pair in seen if self._is_marked(key_pair)]

    def security_groups(self) -> list[Found]:
        """The build's security groups, by tag and by name."""
        named = self._reader.security_groups("group-name", [self._name_pattern])
        seen = unique([*self._tagged(self._reader.security_groups), *named])
        return [group for group in seen if self._is_marked(group)]

    def is_anothers(self, found: Found) -> bool:
        """Whether tags or name say that it is another build's or another installation's."""
        return not self._is_marked(found) and not self._is_unclaimed(found)

    @property
    def _name_pattern(self) -> str:
        return f"*{self._marks.build_id}-*"

    def _tagged(self, listing: Callable[[str, Iterable[str]], list[AnyFound]]) -> list[AnyFound]:
        return listing(_BUILD_TAG_FILTER, [self._marks.build_id])

    def _known(self, prefix: str) -> frozenset[str]:
        return frozenset(known for known in self._marks.known_ids if known.startswith(prefix))

    def _owns_instance(self, instance: FoundInstance) -> bool:
        known = instance.id in self._marks.known_ids
        return self._is_marked(instance) or (known and self._is_unclaimed(instance))

    def _owns_image(self, image: FoundImage, instances: BuildInstances) -> bool:
        if self._is_marked(image):
            return True
        if not self._is_unclaimed(image):
            return False
        if image.source_instance_id:
            return image.source_instance_id in instances.ids
        # A log names the source AMI as well, and that may be the account's own.
        return image.id in self._marks.known_ids and image.id not in instances.source_images

    def _owns_snapshot(self, snapshot: FoundSnapshot, instances: BuildInstances, image_ids: Collection[str]) -> bool:
        is_made = snapshot.made_from in instances.ids or snapshot.made_for in image_ids
        return self._is_marked(snapshot) or (is_made and self._is_unclaimed(snapshot))

    def _is_marked(self, found: Found) -> bool:
        """Whether tags or, where there are none, the name say that it is the build's."""
        installation, build_id = found.tags.get(INSTALLATION_TAG), found.tags.get(BUILD_TAG)
        if found.is_machines:
            return False
        if installation is None:
            return build_id in (None, self._marks.build_id) and self._is_named(found)
        if installation != self._marks.installation:
            return False
        return self._is_named(found) if build_id is None else build_id == self._marks.build_id

    def _is_unclaimed(self, found: Found) -> bool:
        """Whether neither tags nor name say whose it is."""
        claims = found.is_machines or INSTALLATION_TAG in found.tags or BUILD_TAG in found.tags
        return not claims and build_of_name(found.resource.name) is None

    def _is_named(self, found: Found) -> bool:
        named = build_of_name(found.resource.name)
        return named is not None and named[0] == self._marks.build_id
