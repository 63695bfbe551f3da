"""The software catalogue as it stands in `packer/software.yaml`, checked when it is read."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError
from pydantic_core import ErrorDetails

from kiln.errors import KilnError
from kiln.ports import BaseImage, Program

SCRIPTS = Path("scripts", "software")
SECTIONS = {"base_images": "base image", "software": "software"}

Id = Annotated[StrictInt, Field(gt=0)]
Name = Annotated[StrictStr, Field(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]+$")]
Size = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Script = Annotated[StrictStr, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
Text = Annotated[StrictStr, Field(min_length=1)]
AccountId = Annotated[StrictStr, Field(pattern=r"^[0-9]{12}$")]


class SoftwareError(KilnError):
    """The catalogue cannot be used; the message is one line that names the file and the entry."""

    retryable = False


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _AmiFilter(_Part):
    owner: AccountId
    name: Text


class _BaseImageEntry(_Part):
    id: Id
    name: Name
    size: Size
    released: date
    root_device_name: Text
    ssh_username: Text
    ami: _AmiFilter
    simulated_ami: _AmiFilter

    def base_image(self) -> BaseImage:
        return BaseImage(
            id=self.id,
            name=self.name,
            size=self.size,
            released=self.released.isoformat(),
            owner=self.ami.owner,
            ami_name=self.ami.name,
            root_device_name=self.root_device_name,
            ssh_username=self.ssh_username,
            simulated_owner=self.simulated_ami.owner,
            simulated_ami_name=self.simulated_ami.name,
        )


class _SoftwareEntry(_Part):
    id: Id
    name: Name
    size: Size
    script: Script
    bases: Annotated[frozenset[Id], Field(min_length=1)]

    def program(self) -> Program:
        return Program(self.id, self.name, self.size, self.script, self.bases)


class _File(_Part):
    base_images: Annotated[tuple[_BaseImageEntry, ...], Field(min_length=1)]
    software: tuple[_SoftwareEntry, ...]


class SoftwareCatalogue:
    """`kiln.ports.SoftwareShelf` over a file that was read once."""

    def __init__(self, base_images: Iterable[BaseImage], programs: Iterable[Program]) -> None:
        """`base_images` must not be empty."""
        self._base_images = {base.id: base for base in sorted(base_images, key=lambda base: base.id)}
        self._programs = {program.id: program for program in sorted(programs, key=lambda program: program.id)}

    @classmethod
    def load(cls, path: Path) -> Self:
        """The catalogue of a file, whose scripts are `scripts/software/NAME.sh` beside it.

        Raises SoftwareError: it cannot be read, an entry is wrong or there twice, or a script or base is missing.
        """
        file = _parse(path)
        for section in SECTIONS:
            _check_unique(path, section, getattr(file, section))
        for entry in file.software:
            _check_references(path, entry, {base.id for base in file.base_images})
        return cls([entry.base_image() for entry in file.base_images], [entry.program() for entry in file.software])

    @property
    def programs(self) -> Sequence[Program]:
        return tuple(self._programs.values())

    @property
    def base_images(self) -> Sequence[BaseImage]:
        return tuple(self._base_images.values())

    @property
    def newest_base(self) -> BaseImage:
        return max(self._base_images.values(), key=lambda base: (base.released, base.id))

    def program(self, program_id: int) -> Program | None:
        return self._programs.get(program_id)

    def base_image(self, base_id: int) -> BaseImage | None:
        return self._base_images.get(base_id)


def _parse(path: Path) -> _File:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _wrong(path, f"cannot be read: {' '.join(str(error).split())}") from None
    try:
        return _File.model_validate(content)
    except ValidationError as error:
        raise _wrong(path, _told(error.errors()[0], content)) from None


def _wrong(path: Path, problem: str) -> SoftwareError:
    return SoftwareError(f"{path.name}: {problem}")


def _told(error: ErrorDetails, content: Any) -> str:
    """Pydantic's error with the entry's name in place of its number."""
    section, *rest = error["loc"] or ("the file",)
    if section not in SECTIONS or not rest or not isinstance(rest[0], int):
        return f"{section}: {error['msg']}"
    entry = _title(str(section), content[section][rest[0]], rest[0])
    field = ".".join(str(part) for part in rest[1:])
    return ": ".join(part for part in (entry, field, error["msg"]) if part)


def _title(section: str, entry: object, position: int) -> str:
    """`software 'Docker'`; an entry without a name goes by its place in the list."""
    name = entry.get("name") if isinstance(entry, Mapping) else None
    return f"{SECTIONS[section]} {name!r}" if isinstance(name, str) and name else f"{SECTIONS[section]} {position + 1}"


Entry = TypeVar("Entry", _BaseImageEntry, _SoftwareEntry)


def _check_unique(path: Path, section: str, entries: Sequence[Entry]) -> None:
    for field in ("id", "name"):
        counted = Counter(getattr(entry, field) for entry in entries)
        for entry in entries:
            if counted[getattr(entry, field)] > 1:
                raise _wrong(path, f"{SECTIONS[section]} {entry.name!r}: another one has its {field}")


def _check_references(path: Path, entry: _SoftwareEntry, bases: set[int]) -> None:
    script = SCRIPTS / f"{entry.script}.sh"
    if not (path.parent / script).is_file():
        raise _wrong(path, f"software {entry.name!r}: script: there is no {script}")
    for base in sorted(entry.bases - bases):
        raise _wrong(path, f"software {entry.name!r}: bases: there is no base image {base}")
