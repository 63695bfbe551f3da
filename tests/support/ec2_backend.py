"""Questions and side effects that the proxy itself needs of the simulated EC2, on behalf of one caller."""

from dataclasses import dataclass

from support.ec2_message import EC2_API_VERSION, Request, Upstream
from support.ec2_xml import Document


@dataclass(frozen=True)
class Backend:
    """EC2 in the account and region of `caller`, asked directly: no fault and no lag stands in between."""

    upstream: Upstream
    caller: Request

    def snapshot_ids_of(self, image_id: str) -> list[str]:
        """Snapshots in the block device mapping that moto keeps of the AMI."""
        images = self._ask("DescribeImages", {"ImageId.1": image_id})
        return images.texts("imagesSet/item/blockDeviceMapping/item/ebs/snapshotId")

    def is_registered(self, image_id: str) -> bool:
        return image_id in self._own_images({"Filter.1.Name": "image-id", "Filter.1.Value.1": image_id})

    def image_named(self, name: str) -> str | None:
        """The account's own AMI of that name."""
        return next(iter(self._own_images({"Filter.1.Name": "name", "Filter.1.Value.1": name})), None)

    def add_snapshot_like(self, snapshot_id: str) -> str:
        """Make one of another volume with the same description and size. The volume goes again."""
        first = self._ask("DescribeSnapshots", {"SnapshotId.1": snapshot_id})
        size = first.texts("snapshotSet/item/volumeSize")[0]
        description = first.texts("snapshotSet/item/description")[0]
        place = {"AvailabilityZone": f"{self.caller.region}a", "Size": size}
        volume_id = self._ask("CreateVolume", place).texts("volumeId")[0]
        try:
            made = self._ask("CreateSnapshot", {"VolumeId": volume_id, "Description": description})
        finally:
            self._ask("DeleteVolume", {"VolumeId": volume_id})
        return made.texts("snapshotId")[0]

    def _own_images(self, params: dict[str, str]) -> list[str]:
        return self._ask("DescribeImages", {"Owner.1": "self", **params}).texts("imagesSet/item/imageId")

    def _ask(self, action: str, params: dict[str, str]) -> Document:
        request = self.caller.asking({"Action": action, "Version": EC2_API_VERSION, **params})
        reply = self.upstream.send(request)
        if not reply.is_success:
            raise RuntimeError(f"{action} {params} answered {reply.status}: {reply.body!r}")
        return Document(reply.body)
