"""A whole Kiln before a faulty EC2, as a client of organization-images and its operator see it."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kiln.catalog.session import Catalog
from kiln.catalog.tables import Machine, Template
from support.moto import AccountState
from support.rig import Rig, running_rig
from support.signing import NOTHING, ORGANIZATION_API, SignedClient
from support.stack import run_kiln

UBUNTU = "ubuntu/images/hvm-ssd/ubuntu-xenial-16.04-amd64-server-*"


@dataclass
class OrganizationRig:
    """What a test of machines works with: signed calls, and EC2's own word on what there is."""

    rig: Rig
    signed: SignedClient
    catalog: Catalog

    def call(self, method: str, path: str, body: Any = NOTHING, *, expected: int = 200) -> dict[str, Any]:
        """A signed call below the contract's base, and its answer of the status that is expected."""
        answer = self.signed.request(method, ORGANIZATION_API + path, body)
        assert answer.status_code == expected, answer.text
        shown: dict[str, Any] = answer.json()
        return shown

    def launch(self, *, wait: bool = True, **body: Any) -> list[int]:
        """The numbers of new machines, ready unless nobody waits."""
        numbers = [made["attributes"]["id"] for made in self.call("POST", "/machines", body)["machines"]]
        for number in numbers if wait else ():
            self.until(number, "ready", seconds=60)
        return numbers

    def machine(self, number: int) -> dict[str, Any]:
        """A machine's attributes."""
        attributes: dict[str, Any] = self.call("GET", f"/machines/{number}")["attributes"]
        return attributes

    def until(self, number: int, status: str, seconds: float = 40) -> dict[str, Any]:
        """The machine's attributes once it has the status. Fails after so many seconds."""
        end = time.monotonic() + seconds
        while (shown := self.machine(number))["friendly_status"] != status:
            assert time.monotonic() < end, f"still {shown}, not {status}: {self.row(number).operation_error}"
            time.sleep(0.1)
        return shown

    def image_of(self, number: int, **body: Any) -> int:
        """The id of an image that was made of a machine."""
        made = self.call("POST", "/images", {"machine_id": number, **body})["attributes"]
        assert (made["status"], made["source"]) == ("pending", "seat")
        image_id: int = made["id"]
        self.until_image(image_id, "available")
        return image_id

    def until_image(self, image_id: int, status: str, seconds: float = 60) -> dict[str, Any]:
        """The image's attributes once it has the status. Fails after so many seconds."""
        end = time.monotonic() + seconds
        while (shown := self.call("GET", f"/images/{image_id}")["attributes"])["status"] != status:
            assert time.monotonic() < end, f"still {shown}\n{self.rig.log(self.build_of(image_id))}"
            time.sleep(0.1)
        attributes: dict[str, Any] = shown
        return attributes

    def build_of(self, image_id: int) -> str:
        """The build that makes an image."""
        with self.catalog.read() as session:
            return session.get_one(Template, image_id).build_id

    def row(self, number: int) -> Machine:
        """A machine as the catalog has it."""
        with self.catalog.read() as session:
            return session.get_one(Machine, number)

    def instance_of(self, number: int) -> dict[str, Any]:
        """The machine's instance, as EC2 describes it."""
        return self.instance(str(self.row(number).instance_id))

    def instance(self, instance_id: str) -> dict[str, Any]:
        """An instance, as EC2 describes it."""
        shown = self.rig.account.ec2.describe_instances(InstanceIds=[instance_id])
        return dict(shown["Reservations"][0]["Instances"][0])

    def state_of(self, instance_id: str) -> str:
        """EC2's word for an instance's state."""
        state: str = self.instance(instance_id)["State"]["Name"]
        return state

    def instances_for(self, number: int) -> set[str]:
        """Every instance that lives and says by its tag that it is this machine's."""
        filters = [{"Name": "tag:kiln:machine-id", "Values": [str(number)]}]
        pages = self.rig.account.ec2.describe_instances(Filters=filters)["Reservations"]  # type: ignore[arg-type]
        found = [instance for page in pages for instance in page["Instances"]]
        return {each["InstanceId"] for each in found if each["State"]["Name"] not in ("terminated", "shutting-down")}

    def disk_of(self, instance: Mapping[str, Any]) -> int:
        """The size of an instance's root volume in GiB."""
        volume_id = instance["BlockDeviceMappings"][0]["Ebs"]["VolumeId"]
        size: int = self.rig.account.ec2.describe_volumes(VolumeIds=[volume_id])["Volumes"][0]["Size"]
        return size

    def left(self, before: AccountState) -> AccountState:
        """What exists in EC2 now and did not then."""
        return self.rig.account.left_since(before)

    def forget_places(self, number: int) -> None:
        """What a restart of a simulated EC2 does to a machine: neither its instance nor its subnet is known any more."""
        placement = {"subnet_id": "subnet-00000000000000000", "security_group_ids": ["sg-00000000000000000"]}
        with self.catalog.transaction() as tx:
            row = tx.get_one(Machine, number)
            row.instance_id, row.placement = "i-00000000000000000", {**row.placement, **placement}

    def foreign_instance(self, tags: Mapping[str, str]) -> str:
        """An instance that somebody else launched."""
        ec2 = self.rig.account.ec2
        ami = ec2.describe_images(Filters=[{"Name": "name", "Values": [UBUNTU]}])["Images"][0]["ImageId"]
        pairs = [{"Key": key, "Value": value} for key, value in tags.items()]
        specification: Any = [{"ResourceType": "instance", "Tags": pairs}]
        made = ec2.run_instances(
            ImageId=ami, MinCount=1, MaxCount=1, InstanceType="t3.medium", TagSpecifications=specification
        )
        return made["Instances"][0]["InstanceId"]

    def kiln(self, *arguments: str) -> str:
        """What a `kiln` command on this home prints; it must succeed."""
        settings = self.rig.stack.settings
        ran = run_kiln(settings.home_dir, *arguments, KILN_EC2_ENDPOINT=settings.ec2_endpoint)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout


@contextmanager
def running_organization_rig(home: Path, **settings: object) -> Iterator[OrganizationRig]:
    """A rig with an organization that signs its calls."""
    with running_rig(home, **settings) as rig:
        printed = run_kiln(home, "keys", "create", "--hmac", "--json").stdout
        made = json.loads(printed)
        catalog = Catalog(rig.stack.settings.catalog_dsn)
        with SignedClient(rig.stack.api_url, made["key"], made["secret"]) as signed:
            yield OrganizationRig(rig, signed, catalog)
        catalog.close()
