"""What organization-images shows: images (`R` of the contract), machines (`M`), and what can be installed."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from api.times import Timestamp, iso_milliseconds
from kiln.catalog.machines import KnownMachine
from kiln.catalog.templates import KnownTemplate, ListedTemplate
from kiln.models import FriendlyStatus, TemplateSource, TemplateStatus
from kiln.ports import BaseImage, Program, SoftwareShelf

ID_EXAMPLE = "347"


class Envelope(BaseModel):
    """What every body has beside its own fields."""

    client_code: int = Field(examples=[200])
    message: str = Field(examples=["OK"])
    timestamp: Timestamp


class SoftwareAttributes(BaseModel):
    id: int
    name: str = Field(examples=["Blender"])
    size: float = Field(examples=[1.4], description="GB")


class SoftwareResource(BaseModel):
    """A program on an image."""

    id: str = Field(examples=["1"])
    type: Literal["software"]
    attributes: SoftwareAttributes


class ImageAttributes(BaseModel):
    id: int = Field(examples=[int(ID_EXAMPLE)])
    name: str = Field(examples=[f"Template #{ID_EXAMPLE}"])
    size: int = Field(examples=[21], description="GB, rounded up")
    status: TemplateStatus
    source: TemplateSource = Field(description="`seat` from a machine, `pre_installation` from a list of software")
    created_at: Timestamp
    updated_at: Timestamp
    softwares: list[SoftwareResource]


class ImageResource(BaseModel):
    """An organization's image."""

    id: str = Field(examples=[ID_EXAMPLE])
    type: Literal["image"]
    attributes: ImageAttributes


class MachineAttributes(BaseModel):
    id: int = Field(examples=[7])
    name: str = Field(examples=["Machine #7"])
    region: str = Field(examples=["us-east-1"])
    friendly_status: FriendlyStatus
    disk_size: int = Field(examples=[30], description="GB")
    machine_type: str = Field(examples=["t3.medium"])
    assigned_image_id: int | None
    assigned_image_name: str | None
    created_at: Timestamp
    updated_at: Timestamp


class MachineResource(BaseModel):
    """A machine of an organization."""

    id: str = Field(examples=["7"])
    type: Literal["machine"]
    attributes: MachineAttributes


class ShelfItem(BaseModel):
    """A program or a base image, flat and nested: clients read either."""

    id: int
    type: Literal["software", "base_image"]
    name: str = Field(examples=["Blender"])
    size: float = Field(examples=[1.4], description="GB")
    attributes: SoftwareAttributes


class ImageAnswer(ImageResource, Envelope):
    """An image."""


class MachineAnswer(MachineResource, Envelope):
    """A machine."""


class SoftwareAnswer(Envelope):
    """What images can be made of."""

    software: list[ShelfItem]
    base_images: list[ShelfItem]


class Page(Envelope):
    count: int = Field(ge=0, description="all that match, not only this page's")
    page: int = Field(ge=1)
    next_page: int | None = Field(description="null on the last page")


class ImagePage(Page):
    """Images, newest first."""

    images: list[ImageResource]


class MachinePage(Page):
    """Machines, oldest first."""

    machines: list[MachineResource]


class NewMachines(Envelope):
    """Machines that are being created."""

    machines: list[MachineResource]
    count: int


def image_resource(known: KnownTemplate | ListedTemplate) -> dict[str, Any]:
    """`R`."""
    template = known.template
    attributes = {
        "id": template.id,
        "name": template.name,
        "size": template.size_gb,
        "status": known.status.value,
        "source": template.source,
        "created_at": iso_milliseconds(template.created_at),
        "updated_at": iso_milliseconds(known.updated_at),
        "softwares": [_resource("software", software) for software in template.software],
    }
    return _resource("image", attributes)


def machine_resource(known: KnownMachine) -> dict[str, Any]:
    """`M`. An image that was deleted is assigned to nobody any more."""
    machine, image = known.machine, known.template
    attributes = {
        "id": machine.id,
        "name": machine.name,
        "region": machine.region,
        "friendly_status": known.status.value,
        "disk_size": machine.disk_gib,
        "machine_type": machine.instance_type,
        "assigned_image_id": image.id if image else None,
        "assigned_image_name": image.name if image else None,
        "created_at": iso_milliseconds(machine.created_at),
        "updated_at": iso_milliseconds(machine.updated_at),
    }
    return _resource("machine", attributes)


def _resource(kind: str, attributes: dict[str, Any]) -> dict[str, Any]:
    """Ids are integers but at the top level."""
    return {"id": str(attributes["id"]), "type": kind, "attributes": attributes}


def page_body(name: str, resources: Sequence[dict[str, Any]], count: int, page: int, per_page: int) -> dict[str, Any]:
    """A page of a list; `count` is of the whole list."""
    next_page = page + 1 if page * per_page < count else None
    return {name: resources, "count": count, "page": page, "next_page": next_page}


def shelf_body(shelf: SoftwareShelf) -> dict[str, Any]:
    """The catalogue of software."""
    return {
        "software": _items("software", shelf.programs),
        "base_images": _items("base_image", shelf.base_images),
    }


def _items(kind: str, entries: Iterable[Program | BaseImage]) -> list[dict[str, Any]]:
    shown = ({"id": entry.id, "name": entry.name, "size": entry.size} for entry in entries)
    return [{**attributes, "type": kind, "attributes": attributes} for attributes in shown]
