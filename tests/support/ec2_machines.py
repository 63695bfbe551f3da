"""Machines of one installation in simulated EC2, launched as Kiln launches them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from uuid import uuid4

from kiln.naming import LAUNCH_TAG, NAME_TAG, launch_token, machine_tags
from kiln.ports import Instance, Launch, MachineCloud, Placement
from support.ec2_things import MOTO_IMAGE_ID
from support.moto import REGION

INSTANCE_TYPE = "t3.micro"
DISK_GIB = 20


@dataclass(frozen=True)
class MachineThings:
    """Launches instances of an installation that no other test knows."""

    cloud: MachineCloud
    installation: str = field(default_factory=lambda: f"installation-{uuid4()}")

    def order(
        self,
        machine_id: int = 7,
        number: int = 1,
        *,
        image_id: str = MOTO_IMAGE_ID,
        disk_gib: int = DISK_GIB,
        tags: Mapping[str, str] | None = None,
        placement: Placement = Placement(),  # noqa: B008  frozen
    ) -> Launch:
        ours = machine_tags(self.installation, machine_id) | {LAUNCH_TAG: str(number)}
        return Launch(
            image_id=image_id,
            instance_type=INSTANCE_TYPE,
            disk_gib=disk_gib,
            client_token=launch_token(self.installation, machine_id, number),
            tags={NAME_TAG: f"Machine #{machine_id}", **(tags or {}), **ours},
            placement=placement,
        )

    def launch(self, machine_id: int = 7, number: int = 1, *, tags: Mapping[str, str] | None = None) -> str:
        """The id of an instance of the machine, which runs."""
        return self.cloud.launch(REGION, self.order(machine_id, number, tags=tags))

    def seen(self, instance_id: str) -> Instance:
        return self.cloud.instances(REGION, [instance_id])[instance_id]
