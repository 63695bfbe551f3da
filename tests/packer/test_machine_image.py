"""An AMI by real Packer against simulated EC2, judged by EC2's own state."""

from collections.abc import Iterable

import pytest
from mypy_boto3_ec2.type_defs import FilterTypeDef, TagTypeDef

from packer.tools import Packer
from support.moto import NOTHING, Account, AccountState, MotoServer

NAME = "agent-codex-0b6e5c1e-1"
TAGS = {"kiln:installation": "test", "kiln:build-id": "0b6e5c1e", "kiln:attempt": "1", "team": "a b, c=d é"}


@pytest.fixture
def variables(moto: MotoServer, request: pytest.FixtureRequest) -> dict[str, object]:
    """Those that Kiln sets for simulated EC2, with names of this test's own."""
    return {
        "provider": "codex",
        "communicator": "none",
        "volume_size_gb": "20",
        "kiln_image_name": f"{NAME}-{request.node.name}",
        "kiln_key_pair_name": f"key-{request.node.name}",
        "kiln_ec2_endpoint": moto.url,
        "kiln_tags": TAGS,
    }


@pytest.fixture
def before(account: Account) -> AccountState:
    return account.snapshot_of_account()


@pytest.fixture
def made(packer: Packer, variables: dict[str, object], before: AccountState, account: Account) -> AccountState:
    """What a build leaves in the account."""
    built = packer.build("amazon-ebs.agent", variables)
    assert built.returncode == 0, built.stdout
    return account.left_since(before)


def as_dict(tags: Iterable[TagTypeDef]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in tags}


class TestBuild:
    def test_it_leaves_one_ami_and_its_snapshot(self, made: AccountState) -> None:
        """No instance, key pair, security group or volume is left."""
        assert (len(made.images), len(made.snapshots)) == (1, 1)
        assert AccountState(images=made.images, snapshots=made.snapshots) == made

    def test_the_ami_has_the_name_that_was_given(
        self, made: AccountState, account: Account, variables: dict[str, object]
    ) -> None:
        """Kiln finds an AMI by its name when it has no tags yet."""
        (image,) = account.ec2.describe_images(ImageIds=list(made.images))["Images"]
        assert image["Name"] == variables["kiln_image_name"]

    def test_the_ami_has_the_tags_that_were_given(self, made: AccountState, account: Account) -> None:
        """Tags come through as they are, whatever is in them."""
        (image,) = account.ec2.describe_images(ImageIds=list(made.images))["Images"]
        assert TAGS.items() <= as_dict(image["Tags"]).items()

    def test_the_snapshot_has_the_tags_that_were_given(self, made: AccountState, account: Account) -> None:
        """Cleanup knows a snapshot by its tags."""
        (snapshot,) = account.ec2.describe_snapshots(SnapshotIds=list(made.snapshots))["Snapshots"]
        assert TAGS.items() <= as_dict(snapshot["Tags"]).items()

    def test_the_instance_had_the_tags_that_were_given(
        self, made: AccountState, account: Account, variables: dict[str, object]
    ) -> None:
        """A build that dies half-way leaves an instance that says whose it is."""
        assert made.images
        name: FilterTypeDef = {"Name": "tag:Name", "Values": [str(variables["kiln_image_name"])]}
        (reservation,) = account.ec2.describe_instances(Filters=[name])["Reservations"]
        assert TAGS.items() <= as_dict(reservation["Instances"][0]["Tags"]).items()

    def test_a_name_is_made_where_none_is_given(
        self, packer: Packer, variables: dict[str, object], before: AccountState, account: Account
    ) -> None:
        """Without Kiln, an AMI is named by prefix, provider and time."""
        built = packer.build("amazon-ebs.agent", variables | {"kiln_image_name": "", "ami_name_prefix": "mine"})
        assert built.returncode == 0, built.stdout
        (image,) = account.ec2.describe_images(ImageIds=list(account.left_since(before).images))["Images"]
        assert image["Name"].startswith("mine-codex-20")

    def test_a_security_group_that_is_given_is_kept(
        self, packer: Packer, variables: dict[str, object], account: Account
    ) -> None:
        """Packer makes and deletes no group of its own then."""
        vpc = account.ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
        group = account.ec2.create_security_group(GroupName="kiln", Description="kiln", VpcId=vpc)["GroupId"]
        built = packer.build("amazon-ebs.agent", variables | {"kiln_security_group_id": group})
        account.ec2.delete_security_group(GroupId=group)
        assert (built.returncode, "temporary security group" in built.stdout) == (0, False), built.stdout

    def test_a_failed_build_leaves_nothing(
        self, packer: Packer, variables: dict[str, object], before: AccountState, account: Account
    ) -> None:
        """A source AMI that does not exist ends the build before anything is made."""
        built = packer.build("amazon-ebs.agent", variables | {"source_ami_name": "no-such-image"})
        assert (built.returncode, account.left_since(before)) == (1, NOTHING), built.stdout
