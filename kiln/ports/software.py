"""The software catalogue: what can be installed on an organization's images, and what those begin with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Program:
    """An entry of the catalogue. `size` in GB; `script` is the name of a file below `packer/scripts/software/`, without
    `.sh`; `bases` are the ids of the base images that it installs on."""

    id: int
    name: str
    size: float
    script: str
    bases: frozenset[int]


@dataclass(frozen=True)
class BaseImage:
    """An operating system's AMI, found by filter: the newest of `owner` whose name matches `ami_name`.

    `released` orders base images by age (ISO date). A simulated EC2 has other AMIs than AWS, and is asked for those of
    `simulated_owner` named `simulated_ami_name`.
    """

    id: int
    name: str
    size: float
    released: str
    owner: str
    ami_name: str
    root_device_name: str
    ssh_username: str
    simulated_owner: str
    simulated_ami_name: str

    def lookup(self, *, simulated: bool) -> tuple[str, str]:
        """The owner and the name pattern to look for."""
        return (self.simulated_owner, self.simulated_ami_name) if simulated else (self.owner, self.ami_name)


class SoftwareShelf(Protocol):
    """`packer/software.yaml`, read once at start-up."""

    @property
    def programs(self) -> Sequence[Program]:
        """By id."""
        ...

    @property
    def base_images(self) -> Sequence[BaseImage]:
        """By id."""
        ...

    @property
    def newest_base(self) -> BaseImage:
        """The one that was released last."""
        ...

    def program(self, program_id: int) -> Program | None: ...

    def base_image(self, base_id: int) -> BaseImage | None: ...
