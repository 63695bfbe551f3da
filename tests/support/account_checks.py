"""What must hold of an account after a build, asked of EC2 itself.

A build reads `succeeded` once its image is published; what lost attempts left goes right after that.
"""

from support.moto import NOTHING, AccountState
from support.processes import eventually
from support.rig import Rig

CLEANUP_SECONDS = 30


def one_image_and_nothing_else(rig: Rig, before: AccountState, image_id: str, snapshots: int = 1) -> None:
    """Asserts that EC2 comes to have exactly this AMI more than before, with its snapshots, and nothing else."""

    def cleaned() -> bool:
        left = rig.account.left_since(before)
        return left.images == {image_id} and AccountState(images=left.images, snapshots=left.snapshots) == left

    assert eventually(cleaned, CLEANUP_SECONDS), f"{rig.account.left_since(before)} instead of {image_id} alone"
    image = rig.seen.ec2.describe_images(ImageIds=[image_id])["Images"][0]
    behind = {mapping["Ebs"]["SnapshotId"] for mapping in image["BlockDeviceMappings"] if "Ebs" in mapping}
    assert rig.account.left_since(before).snapshots == behind
    assert len(behind) == snapshots


def nothing_left(rig: Rig, before: AccountState) -> None:
    """Asserts that the account is as it was found, and that no Packer lives: a build that ended badly is clean."""
    assert rig.account.left_since(before) == NOTHING
    assert rig.packers() == set()
