"""What calls of organization-images may ask: their bodies' form, checked before anything is looked up."""

import re
from typing import Annotated, Any, Final, TypeVar

from fastapi import Path, Query, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError
from pydantic.config import JsonDict

from api.body import idempotency_key, object_of
from api.errors import from_validation
from api.ids import Name
from api.machine_requests import INSTANCE_TYPE
from api.signed import Signed
from api.submit import Posted
from kiln.errors import InvalidRequestError

IMAGE_NAME_LENGTH: Final = 30
MACHINE_NAME_LENGTH: Final = 255
QUANTITY_LIMIT: Final = 50
# EC2's largest general purpose volume.
DISK_LIMIT: Final = 16384
NOBODYS_ID: Final = 0
ID_TEXT: Final = re.compile("[1-9][0-9]{0,18}")
CONTROL_CHARACTERS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
NAME_SCHEMA: Final[JsonDict] = {
    "pattern": r"^[^\u0000-\u001f\u007f-\u009f]*[^\s\u0000-\u001f\u007f-\u009f][^\u0000-\u001f\u007f-\u009f]*$"
}

PAGE_SIZE: Final = 20
PAGE_SIZE_LIMIT: Final = 100
# A page beyond any row's: further ones would be more than the databases count to.
LAST_PAGE: Final = 2**31
IdText = Annotated[str, Path(description="an integer", json_schema_extra={"pattern": "^[1-9][0-9]*$"}, examples=["7"])]
PageNumber = Annotated[int, Query(ge=1, description="which page")]
PageSize = Annotated[int, Query(ge=1, le=PAGE_SIZE_LIMIT, description="how many a page has")]
Search = Annotated[Name, Query(description="only those whose name holds this, in any case")]


def _printable(name: str) -> str:
    if not name.strip() or CONTROL_CHARACTERS.search(name):
        raise ValueError("must hold more than spaces, and no control characters")
    return name


def _instance_type(text: str) -> str:
    if not INSTANCE_TYPE.fullmatch(text):
        raise ValueError("must be an EC2 instance type, such as t3.medium")
    return text


ImageName = Annotated[
    StrictStr,
    Field(min_length=1, max_length=IMAGE_NAME_LENGTH, json_schema_extra=NAME_SCHEMA),
    AfterValidator(_printable),
]
MachineName = Annotated[
    StrictStr,
    Field(min_length=1, max_length=MACHINE_NAME_LENGTH, json_schema_extra=NAME_SCHEMA),
    AfterValidator(_printable),
]
MachineType = Annotated[
    StrictStr, Field(json_schema_extra={"pattern": f"^{INSTANCE_TYPE.pattern}$"}), AfterValidator(_instance_type)
]
SoftwareIds = Annotated[
    list[StrictInt] | None, Field(description="programs to install, by their ids in `GET /software`")
]
BaseImageId = Annotated[
    StrictInt | None,
    Field(description="what to begin with, by its id in `GET /software`; the newest unless it is sent"),
]


Body = TypeVar("Body", bound=BaseModel)


class StrictRequest(BaseModel):
    """A body that holds nothing but what is listed."""

    model_config = ConfigDict(extra="forbid")


class CreateImage(StrictRequest):
    """An image to make from a machine that is off."""

    machine_id: StrictInt = Field(examples=[7])
    name: ImageName | None = Field(None, description="`Template #{image_id}` unless it is sent", examples=["Design"])


class InstallImage(StrictRequest):
    """An image to make from a list of software. At least one of `software_ids` and `base_image_id` is needed."""

    software_ids: SoftwareIds = None
    base_image_id: BaseImageId = None
    name: ImageName | None = Field(None, description="`Template #{image_id}` unless it is sent", examples=["Design"])


class AssignImage(StrictRequest):
    """The machines that are to be recreated from an image, all of them or none."""

    machine_ids: list[StrictInt] = Field(examples=[[7, 8]])


class CreateMachines(BaseModel):
    """Machines to create: from an image, from a list of software, or from a base image alone. What is not listed is
    ignored."""

    name: MachineName | None = Field(
        None, description="numbered where there are several; `Machine #{id}` unless it is sent", examples=["Studio"]
    )
    quantity: Annotated[StrictInt, Field(ge=1, le=QUANTITY_LIMIT)] = Field(1, description="how many")
    machine_type: MachineType | None = Field(None, description="EC2 instance type", examples=["t3.medium"])
    disk_size: Annotated[StrictInt, Field(ge=1, le=DISK_LIMIT)] | None = Field(
        None, description="GB; what the server is set to, or the image's size if that is more, unless it is sent"
    )
    region: StrictStr | None = Field(None, description="AWS region: the image's own, or the server's first")
    software_ids: SoftwareIds = None
    base_image_id: BaseImageId = None
    image_id: StrictInt | None = Field(None, description="an available image, instead of software and base image")


class StartMachine(BaseModel):
    """How to start a machine. What is not listed is ignored."""

    region: StrictStr | None = Field(None, description="the machine's own, if it is sent")


class StopMachine(BaseModel):
    """How to stop a machine. What is not listed is ignored."""

    gracefully: StrictBool = Field(True, description="whether its operating system is given the time to shut down")


def understand(model: type[Body], raw: bytes) -> Body:
    """A body's meaning; none at all is an empty one, and a field that is null is not there.

    Raises InvalidRequestError, which names the field.
    """
    given: dict[str, Any] = {name: value for name, value in object_of(raw).items() if value is not None}
    try:
        return model.model_validate(given)
    except ValidationError as error:
        field, _, problem = from_validation(error).message.partition(": ")
        raise InvalidRequestError(field, problem) from None


def posted(request: Request, signed: Signed) -> Posted:
    """A POST under its idempotency key, which is good for this path only. Raises InvalidRequestError."""
    body = request.url.path.encode() + b"\n" + signed.body
    return Posted(signed.identity.organization_id, 200, body, idempotency_key(request))


def path_id(text: str) -> int:
    """The id in a path; what cannot be one becomes `NOBODYS_ID`."""
    return int(text) if ID_TEXT.fullmatch(text) else NOBODYS_ID


def body_schema(model: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """OpenAPI's word on a body that a route reads by itself; the schema is added by `api/openapi.py`."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}}


BODIES: Final = (CreateImage, InstallImage, AssignImage, CreateMachines, StartMachine, StopMachine)
