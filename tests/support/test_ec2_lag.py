"""EC2's lag as the proxy shows it, to boto3 and to Packer, before real `moto_server`."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from botocore.exceptions import ConnectionClosedError
from mypy_boto3_ec2 import EC2Client
from mypy_boto3_ec2.type_defs import FilterTypeDef

from support.ec2_probe import code_of, eventually, run_instance
from support.ec2_proxy import Ec2Proxy
from support.moto import DUMMY_KEY, NOTHING, Account, AccountState, ec2_client

PACKER_LIMIT = "90s"

TEMPLATE = """
variable "endpoint" {
  type = string
}

source "amazon-ebs" "minimal" {
  region              = "us-east-1"
  custom_endpoint_ec2 = var.endpoint
  communicator        = "none"
  instance_type       = "t3.micro"
  ami_name            = "packer {{timestamp}} ${uuidv4()}"
  snapshot_tags       = { build = "one" }

  source_ami_filter {
    owners      = ["099720109477"]
    most_recent = true
    filters     = { name = "ubuntu/images/*" }
  }
}

build {
  sources = ["source.amazon-ebs.minimal"]
}
"""


def create_image(ec2: EC2Client, name: str) -> str:
    return ec2.create_image(InstanceId=run_instance(ec2), Name=name)["ImageId"]


def state_of(ec2: EC2Client, image_id: str) -> str:
    return ec2.describe_images(ImageIds=[image_id])["Images"][0]["State"]


def snapshots_of(ec2: EC2Client, image_id: str) -> list[str]:
    mappings = ec2.describe_images(ImageIds=[image_id])["Images"][0]["BlockDeviceMappings"]
    return [mapping["Ebs"]["SnapshotId"] for mapping in mappings]


def by(name: str, *values: str) -> list[FilterTypeDef]:
    return [{"Name": name, "Values": list(values)}]


class TestLateAvailable:
    def test_an_ami_is_pending_until_its_time_has_come(self, ec2: EC2Client, proxy: Ec2Proxy) -> None:
        """Its state is first `pending`, then `available`."""
        proxy.late_available(0.5)
        image_id = create_image(ec2, "late")
        first = state_of(ec2, image_id)
        assert first == "pending"
        assert eventually(lambda: state_of(ec2, image_id) == "available")

    def test_a_held_ami_is_pending_until_it_is_released(self, ec2: EC2Client, proxy: Ec2Proxy) -> None:
        """The test decides when it's available."""
        proxy.hold_available()
        image_id = create_image(ec2, "held")
        while_held = state_of(ec2, image_id)
        proxy.release()
        assert (while_held, state_of(ec2, image_id)) == ("pending", "available")

    def test_an_ami_made_before_the_hold_stays_available(self, ec2: EC2Client, proxy: Ec2Proxy) -> None:
        """No AMI becomes pending again."""
        proxy.second_snapshot()
        image_id = create_image(ec2, "made early")
        proxy.hold_available()
        assert state_of(ec2, image_id) == "available"

    def test_an_ami_made_after_the_release_is_available(self, ec2: EC2Client, proxy: Ec2Proxy) -> None:
        """Release ends the hold for later AMIs, too."""
        proxy.hold_available()
        proxy.release()
        assert state_of(ec2, create_image(ec2, "made later")) == "available"

    def test_the_snapshots_of_a_pending_ami_are_pending(self, ec2: EC2Client, proxy: Ec2Proxy) -> None:
        """All of them, until the AMI is available."""
        proxy.hold_available()
        proxy.second_snapshot()
        ids = snapshots_of(ec2, create_image(ec2, "pending with snapshots"))
        while_held = {one["State"] for one in ec2.describe_snapshots(SnapshotIds=ids)["Snapshots"]}
        proxy.release()
        afterwards = {one["State"] for one in ec2.describe_snapshots(SnapshotIds=ids)["Snapshots"]}
        assert (while_held, afterwards) == ({"pending"}, {"completed"})

    def test_filters_of_images_see_the_state_that_is_shown(self, ec2: EC2Client, proxy: Ec2Proxy) -> None:
        """A pending AMI is found by `pending`, beside other filters, and not by `available`."""
        proxy.hold_available()
        image_id = create_image(ec2, "filtered")
        found = {
            state: [image["ImageId"] for image in ec2.describe_images(Filters=filters)["Images"]]
            for state in ("pending", "available")
            for filters in [[*by("name", "filtered"), *by("state", state), *by("image-id", image_id)]]
        }
        assert found == {"pending": [image_id], "available": []}

    def test_filters_of_snapshots_see_the_state_that_is_shown(self, ec2: EC2Client, proxy: Ec2Proxy) -> None:
        """A pending snapshot is found by `pending` and not by `completed`."""
        proxy.hold_available()
        ids = snapshots_of(ec2, create_image(ec2, "snapshots filtered"))
        found = {
            state: [one["SnapshotId"] for one in ec2.describe_snapshots(Filters=filters)["Snapshots"]]
            for state in ("pending", "completed")
            for filters in [[*by("status", state), *by("snapshot-id", *ids)]]
        }
        assert found == {"pending": ids, "completed": []}

    def test_a_pending_ami_keeps_its_tags(self, ec2: EC2Client, proxy: Ec2Proxy) -> None:
        """What is tagged before it's available shows at once."""
        proxy.hold_available()
        image_id = create_image(ec2, "tagged")
        ec2.create_tags(Resources=[image_id], Tags=[{"Key": "a", "Value": "b"}])
        assert ec2.describe_images(ImageIds=[image_id])["Images"][0]["Tags"] == [{"Key": "a", "Value": "b"}]

    def test_a_pending_ami_can_be_deregistered(self, ec2: EC2Client, proxy: Ec2Proxy) -> None:
        """As in EC2, it's gone before it was ever available."""
        proxy.hold_available()
        image_id = create_image(ec2, "given up")
        ec2.deregister_image(ImageId=image_id)
        assert ec2.describe_images(Filters=by("name", "given up"))["Images"] == []

    def test_a_pending_ami_may_show_no_volumes(self, ec2: EC2Client, proxy: Ec2Proxy) -> None:
        """Without a mapping, its snapshots are in it only once it's available."""
        proxy.hold_available(mapped=False)
        image_id = create_image(ec2, "unmapped")
        while_held = snapshots_of(ec2, image_id)
        proxy.release()
        assert (len(while_held), len(snapshots_of(ec2, image_id))) == (0, 1)


class TestSecondSnapshot:
    def test_both_snapshots_exist_and_no_volume_is_left(
        self, ec2: EC2Client, proxy: Ec2Proxy, account: Account, before: AccountState
    ) -> None:
        """The block device mapping shows what EC2 really has."""
        proxy.second_snapshot()
        instance_id = run_instance(ec2)
        image_id = ec2.create_image(InstanceId=instance_id, Name="two volumes")["ImageId"]
        ec2.terminate_instances(InstanceIds=[instance_id])
        snapshots = frozenset(snapshots_of(ec2, image_id))
        assert len(snapshots) == 2
        assert account.left_since(before) == AccountState(images=frozenset({image_id}), snapshots=snapshots)

    def test_the_second_snapshot_is_described_like_the_first(self, ec2: EC2Client, proxy: Ec2Proxy) -> None:
        """Both name the instance and the AMI."""
        proxy.second_snapshot()
        image_id = create_image(ec2, "described")
        ids = snapshots_of(ec2, image_id)
        told = {one["Description"] for one in ec2.describe_snapshots(SnapshotIds=ids)["Snapshots"]}
        assert len(told) == 1
        assert told.pop().endswith(f"for {image_id}")

    @pytest.mark.parametrize("which", [0, 1])
    def test_a_snapshot_in_use_cannot_be_deleted(self, ec2: EC2Client, proxy: Ec2Proxy, which: int) -> None:
        """InvalidSnapshot.InUse, for the first as for the second."""
        proxy.second_snapshot()
        ids = snapshots_of(ec2, create_image(ec2, f"in use {which}"))
        assert code_of(lambda: ec2.delete_snapshot(SnapshotId=ids[which])) == "InvalidSnapshot.InUse"

    def test_after_deregistering_both_are_deleted(
        self, ec2: EC2Client, proxy: Ec2Proxy, account: Account, before: AccountState
    ) -> None:
        """Nothing holds them any longer."""
        proxy.second_snapshot()
        image_id = create_image(ec2, "not in use")
        ids = snapshots_of(ec2, image_id)
        ec2.deregister_image(ImageId=image_id)
        for snapshot_id in ids:
            ec2.delete_snapshot(SnapshotId=snapshot_id)
        assert account.left_since(before).snapshots == frozenset()


Make = Callable[[EC2Client, str], str]
Ask = Callable[[EC2Client, str], object]


def make_snapshot(ec2: EC2Client, name: str) -> str:
    volume_id = ec2.create_volume(AvailabilityZone="us-east-1a", Size=1)["VolumeId"]
    snapshot_id = ec2.create_snapshot(VolumeId=volume_id, Description=name)["SnapshotId"]
    ec2.delete_volume(VolumeId=volume_id)
    return snapshot_id


KINDS: dict[str, tuple[Make, Ask, str]] = {
    "instance": (
        lambda ec2, _: run_instance(ec2),
        lambda ec2, one: ec2.describe_instances(InstanceIds=[one]),
        "InvalidInstanceID.NotFound",
    ),
    "image": (create_image, state_of, "InvalidAMIID.NotFound"),
    "snapshot": (
        make_snapshot,
        lambda ec2, one: ec2.describe_snapshots(SnapshotIds=[one]),
        "InvalidSnapshot.NotFound",
    ),
    "security group": (
        lambda ec2, name: ec2.create_security_group(GroupName=name, Description=name)["GroupId"],
        lambda ec2, one: ec2.describe_security_groups(GroupIds=[one]),
        "InvalidGroup.NotFound",
    ),
    "key pair": (
        lambda ec2, name: ec2.create_key_pair(KeyName=name)["KeyName"],
        lambda ec2, one: ec2.describe_key_pairs(KeyNames=[one]),
        "InvalidKeyPair.NotFound",
    ),
}


class TestFreshResources:
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_fresh_resource_is_not_found_by_id(self, ec2: EC2Client, proxy: Ec2Proxy, kind: str) -> None:
        """The error is the one that EC2 has for that kind."""
        make, ask, code = KINDS[kind]
        proxy.hide_fresh(600)
        made = make(ec2, f"asked for {kind}")
        assert code_of(lambda: ask(ec2, made)) == code

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_fresh_resource_is_missing_from_lists(
        self, ec2: EC2Client, proxy: Ec2Proxy, account: Account, before: AccountState, kind: str
    ) -> None:
        """It exists, but through the proxy nothing more than before is seen, but for an instance's volume."""
        proxy.hide_fresh(600)
        KINDS[kind][0](ec2, f"listed {kind}")
        seen = Account(proxy.url).left_since(before)
        assert account.left_since(before) != NOTHING
        assert seen == AccountState(volumes=seen.volumes)

    @pytest.mark.parametrize("kind", KINDS)
    def test_after_its_time_a_resource_is_found(
        self, ec2: EC2Client, proxy: Ec2Proxy, account: Account, kind: str
    ) -> None:
        """The lists through the proxy are those of EC2 again."""
        proxy.hide_fresh(0.3)
        KINDS[kind][0](ec2, f"found {kind}")
        through_proxy = Account(proxy.url)
        assert eventually(lambda: through_proxy.snapshot_of_account() == account.snapshot_of_account())

    def test_a_fresh_security_group_is_not_found_by_name(self, ec2: EC2Client, proxy: Ec2Proxy) -> None:
        """It's unknown by its name as by its id."""
        proxy.hide_fresh(600)
        ec2.create_security_group(GroupName="called", Description="called")
        assert code_of(lambda: ec2.describe_security_groups(GroupNames=["called"])) == "InvalidGroup.NotFound"

    def test_the_reservation_of_a_fresh_instance_is_missing(self, ec2: EC2Client, proxy: Ec2Proxy) -> None:
        """No list has an empty reservation."""
        proxy.hide_fresh(600)
        run_instance(ec2)
        assert all(one["Instances"] for one in ec2.describe_instances()["Reservations"])

    def test_reads_of_older_resources_stay_as_they_are(self, ec2: EC2Client, proxy: Ec2Proxy) -> None:
        """A resource made before the setting is found by id."""
        image_id = create_image(ec2, "older")
        proxy.hide_fresh(600)
        create_image(ec2, "newer")
        assert state_of(ec2, image_id) == "available"


class TestRulesOfEc2:
    def test_a_repeated_client_token_starts_no_second_instance(
        self, proxy: Ec2Proxy, account: Account, before: AccountState
    ) -> None:
        """A client that repeats RunInstances after a lost reply gets the instance that it has started."""
        proxy.drop_reply("RunInstances")
        instance_id = run_instance(ec2_client(proxy.url, attempts=2))
        assert [call.fault for call in proxy.calls_of("RunInstances")] == ["drop_reply", "client_token"]
        assert account.left_since(before).instances == {instance_id}

    def test_a_client_token_with_other_parameters_is_refused(self, ec2: EC2Client) -> None:
        """IdempotentParameterMismatch."""
        ec2.create_volume(AvailabilityZone="us-east-1a", Size=1, ClientToken="one")
        again = lambda: ec2.create_volume(AvailabilityZone="us-east-1a", Size=2, ClientToken="one")  # noqa: E731
        assert code_of(again) == "IdempotentParameterMismatch"

    def test_a_name_that_is_taken_is_refused(self, ec2: EC2Client) -> None:
        """CreateImage answers InvalidAMIName.Duplicate."""
        create_image(ec2, "taken")
        assert code_of(lambda: create_image(ec2, "taken")) == "InvalidAMIName.Duplicate"

    def test_a_lost_reply_to_create_image_leaves_an_ami(self, ec2: EC2Client, proxy: Ec2Proxy) -> None:
        """Who repeats the call is told the AMI's name is taken, and not its id."""
        instance_id = run_instance(ec2)
        proxy.drop_reply("CreateImage")
        with pytest.raises(ConnectionClosedError):
            ec2.create_image(InstanceId=instance_id, Name="unheard of")
        assert len(ec2.describe_images(Filters=by("name", "unheard of"))["Images"]) == 1


def packer_build(url: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    template = folder / "minimal.pkr.hcl"
    template.write_text(TEMPLATE)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "AWS_ACCESS_KEY_ID": DUMMY_KEY,
        "AWS_SECRET_ACCESS_KEY": DUMMY_KEY,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_POLL_DELAY_SECONDS": "1",
        "CHECKPOINT_DISABLE": "1",
    }
    command = ["timeout", PACKER_LIMIT, "packer", "build", "-var", f"endpoint={url}", str(template)]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


class TestPacker:
    def test_packer_builds_an_ami_of_two_volumes_that_is_late(
        self, proxy: Ec2Proxy, account: Account, before: AccountState, tmp_path: Path
    ) -> None:
        """It waits for the AMI, and leaves that, its two snapshots and nothing else."""
        proxy.late_available(2)
        proxy.second_snapshot()
        build = packer_build(proxy.url, tmp_path)
        assert build.returncode == 0, build.stdout + build.stderr
        left = account.left_since(before)
        assert (len(left.images), len(left.snapshots)) == (1, 2)
        assert left == AccountState(images=left.images, snapshots=left.snapshots)

    def test_packer_waits_while_the_ami_is_pending(self, proxy: Ec2Proxy, tmp_path: Path) -> None:
        """Between CreateImage and the tags on its snapshots lie the seconds that the AMI takes."""
        proxy.late_available(2)
        build = packer_build(proxy.url, tmp_path)
        assert build.returncode == 0, build.stdout + build.stderr
        (made,), (tagged,) = proxy.calls_of("CreateImage"), proxy.calls_of("CreateTags")
        assert tagged.time - made.time >= 2
