"""Images made from a list of software: what was chosen, how large it gets, and the build that makes it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from api.deps import Parts
from api.errors import NAME_LENGTH
from kiln.catalog.builds import NewBuild
from kiln.catalog.keys import Identity
from kiln.catalog.templates import NewTemplate
from kiln.errors import InvalidRequestError, NotFoundError
from kiln.models import Api, BuildSpec, MachineBuildSpec, Software, TemplateSource
from kiln.naming import WORKSTATION_TEMPLATE
from kiln.ports import BaseImage, Program, SoftwareShelf
from kiln.settings import Settings

PROVIDER = "workstation"
# The contract's: room for what software writes once it is installed.
ROOM = Decimal("1.05")


@dataclass(frozen=True)
class Workstation:
    """A base image and the programs to install on it."""

    base: BaseImage
    programs: tuple[Program, ...]

    @property
    def size_gb(self) -> int:
        """Whole GB, rounded up; reckoned in decimals, so that 20 GB with their room are 21 and not a bit more."""
        sizes = (self.base.size, *(program.size for program in self.programs))
        return math.ceil(sum(Decimal(str(size)) for size in sizes) * ROOM)

    @property
    def software(self) -> tuple[Software, ...]:
        return tuple(Software(id=program.id, name=program.name, size=program.size) for program in self.programs)

    def build_spec(self, settings: Settings, region: str) -> MachineBuildSpec:
        """The Packer build that makes its image in a region."""
        owner, name = self.base.lookup(simulated=settings.simulated)
        return MachineBuildSpec(
            provider=PROVIDER,
            region=region,
            instance_type=settings.instance_type,
            template=WORKSTATION_TEMPLATE,
            variables={
                "software": ",".join(program.script for program in self.programs),
                "source_ami_owner": owner,
                "source_ami_name": name,
                "root_device_name": self.base.root_device_name,
                "ssh_username": self.base.ssh_username,
                "volume_size_gb": str(self.size_gb),
            },
        )


def choose(shelf: SoftwareShelf, software_ids: Sequence[int] | None, base_image_id: int | None) -> Workstation:
    """What the ids stand for, each once; without a base image's, the newest.

    Raises InvalidRequestError for software that is unknown, or does not install on that base image; NotFoundError for
    an unknown base image.
    """
    programs = tuple(_program(shelf, program_id) for program_id in dict.fromkeys(software_ids or ()))
    base = shelf.newest_base if base_image_id is None else shelf.base_image(base_image_id)
    if base is None:
        raise NotFoundError("no base image has this id")
    for program in programs:
        if base.id not in program.bases:
            raise InvalidRequestError("software_ids", f"{program.name} ({program.id}) does not install on {base.name}")
    return Workstation(base, programs)


def _program(shelf: SoftwareShelf, program_id: int) -> Program:
    program = shelf.program(program_id)
    if program is None:
        raise InvalidRequestError("software_ids", f"there is no software {str(program_id)[:NAME_LENGTH]}")
    return program


def installed(
    identity: Identity, parts: Parts, chosen: Workstation, region: str, name: str | None = None
) -> NewTemplate:
    """An image of software that is still to be made."""
    return NewTemplate(
        organization_id=identity.organization_id,
        new_build=new_build(identity, chosen.build_spec(parts.settings, region)),
        size_gb=chosen.size_gb,
        source=TemplateSource.PRE_INSTALLATION,
        region=region,
        name=name,
        software=chosen.software,
    )


def new_build(identity: Identity, spec: BuildSpec) -> NewBuild:
    """A build of an organization's image."""
    return NewBuild(identity.organization_id, Api.ORGANIZATION_IMAGES, spec, created_by=identity.key_id)
