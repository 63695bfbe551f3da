"""Ids in paths, and names in queries."""

import re
from typing import Annotated, Final
from uuid import UUID

from fastapi import Path
from pydantic import AfterValidator, Field
from pydantic.config import JsonDict

from kiln.errors import InvalidRequestError

UUID_TEXT = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
# EC2's own ids are hexadecimal; what merely looks like one is unknown rather than malformed.
AMI_TEXT = re.compile(r"ami-[0-9A-Za-z]{1,64}")

UUID_SCHEMA = {"format": "uuid"}
AMI_SCHEMA = {"pattern": f"^{AMI_TEXT.pattern}$"}
UUID_EXAMPLE = "550e8400-e29b-41d4-a716-446655440000"
AMI_EXAMPLE = "ami-0abcdef1234567890"

# In paths
BuildId = Annotated[str, Path(description="the build's id", json_schema_extra=UUID_SCHEMA, examples=[UUID_EXAMPLE])]
ImageId = Annotated[str, Path(description="the AMI's id", json_schema_extra=AMI_SCHEMA, examples=[AMI_EXAMPLE])]
# In bodies
UuidText = Annotated[str, Field(json_schema_extra=UUID_SCHEMA, examples=[UUID_EXAMPLE])]
AmiText = Annotated[str, Field(json_schema_extra=AMI_SCHEMA, examples=[AMI_EXAMPLE])]


def build_id_of(text: str) -> str:
    """The build id in a path. Raises InvalidRequestError for what is no UUID."""
    if not UUID_TEXT.fullmatch(text):
        raise InvalidRequestError("build_id", "must be a UUID")
    return str(UUID(text))


def ami_id_of(text: str) -> str:
    """The AMI id in a path. Raises InvalidRequestError for what cannot be one."""
    if not AMI_TEXT.fullmatch(text):
        raise InvalidRequestError("image_id", "must be the id of an AMI, such as ami-0abcdef1234567890")
    return text


def without_nul(text: str) -> str:
    """The text itself. Raises ValueError if it holds a NUL character."""
    # PostgreSQL keeps no such text, and refuses to compare with it.
    if "\0" in text:
        raise ValueError("must not hold a NUL character")
    return text


WITHOUT_NUL_SCHEMA: Final[JsonDict] = {"pattern": r"^[^\u0000]*$"}
# In queries
Name = Annotated[str, AfterValidator(without_nul), Field(json_schema_extra=WITHOUT_NUL_SCHEMA)]
