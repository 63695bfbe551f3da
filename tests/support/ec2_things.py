"""What builds leave in EC2, made straight through EC2's API, for tests that remove it."""

from dataclasses import dataclass, field
from uuid import uuid4

from mypy_boto3_ec2 import EC2Client
from mypy_boto3_ec2.literals import ResourceTypeType
from mypy_boto3_ec2.type_defs import TagSpecificationTypeDef

from kiln.naming import image_name, key_pair_name, resource_suffix, resource_tags, security_group_name
from kiln.ports import Marks
from support.moto import REGION

INSTALLATION = "installation-1"
MOTO_IMAGE_ID = "ami-12c6146b"
SUBNET_ZONE = f"{REGION}a"


@dataclass(frozen=True)
class BuildThings:
    """Makes things of one attempt of one build; `ec2` may be a client of the proxy or of moto itself."""

    ec2: EC2Client
    installation: str = INSTALLATION
    build_id: str = field(default_factory=lambda: str(uuid4()))
    attempt: int = 1

    def marks(self, *known_ids: str) -> Marks:
        return Marks(self.installation, self.build_id, frozenset(known_ids))

    @property
    def tags(self) -> dict[str, str]:
        return resource_tags(self.installation, self.build_id, self.attempt)

    def instance(self, *, tagged: bool = True, image_id: str = MOTO_IMAGE_ID, group_id: str = "") -> str:
        answer = self.ec2.run_instances(
            ImageId=image_id,
            InstanceType="t3.micro",
            MinCount=1,
            MaxCount=1,
            TagSpecifications=self._specified("instance", "volume") if tagged else [],
            SecurityGroupIds=[group_id] if group_id else [],
        )
        return answer["Instances"][0]["InstanceId"]

    def image(self, instance_id: str, *, tagged: bool = True, name: str = "") -> str:
        """An AMI of the instance. A tagged one has its snapshots tagged as well, as Packer does at the end."""
        name = name or image_name("kiln", "claude-code", self.build_id, self.attempt)
        image_id = self.ec2.create_image(InstanceId=instance_id, Name=name)["ImageId"]
        if tagged:
            self.tag(image_id, *self.snapshots_of(image_id))
        return image_id

    def snapshots_of(self, image_id: str) -> list[str]:
        image = self.ec2.describe_images(ImageIds=[image_id])["Images"][0]
        return [mapping["Ebs"]["SnapshotId"] for mapping in image["BlockDeviceMappings"]]

    def volume(self, *, tagged: bool = True) -> str:
        specified = self._specified("volume") if tagged else []
        return self.ec2.create_volume(Size=1, AvailabilityZone=SUBNET_ZONE, TagSpecifications=specified)["VolumeId"]

    def snapshot(self, *, tagged: bool = True, description: str = "") -> str:
        """A snapshot of a volume that is gone again."""
        volume_id = self.volume(tagged=False)
        specified = self._specified("snapshot") if tagged else []
        answer = self.ec2.create_snapshot(VolumeId=volume_id, Description=description, TagSpecifications=specified)
        self.ec2.delete_volume(VolumeId=volume_id)
        return answer["SnapshotId"]

    def key_pair(self, *, tagged: bool = True, name: str = "") -> str:
        """The key pair's name."""
        name = name or key_pair_name(self.build_id, self.attempt)
        self.ec2.create_key_pair(KeyName=name, TagSpecifications=self._specified("key-pair") if tagged else [])
        return name

    def security_group(self, *, tagged: bool = True, name: str = "") -> str:
        return self.ec2.create_security_group(
            GroupName=name or security_group_name(self.build_id, self.attempt),
            Description="made by a test",
            TagSpecifications=self._specified("security-group") if tagged else [],
        )["GroupId"]

    def tag(self, *resource_ids: str) -> None:
        pairs = [{"Key": key, "Value": value} for key, value in self.tags.items()]
        self.ec2.create_tags(Resources=list(resource_ids), Tags=pairs)  # type: ignore[arg-type]

    def all(self, *, also_untagged: bool = True) -> str:
        """One of each, all tagged, and unless it is declined an untagged AMI of attempt 9. The instance's id."""
        instance_id = self.instance(group_id=self.security_group())
        self.image(instance_id)
        if also_untagged:
            self.image(instance_id, tagged=False, name=f"kiln-{resource_suffix(self.build_id, 9)}")
        self.volume()
        self.snapshot()
        self.key_pair()
        return instance_id

    def _specified(self, *kinds: ResourceTypeType) -> list[TagSpecificationTypeDef]:
        pairs = [{"Key": key, "Value": value} for key, value in self.tags.items()]
        return [{"ResourceType": kind, "Tags": pairs} for kind in kinds]  # type: ignore[typeddict-item]
