"""Ids in paths, and names in queries."""

import re
from typing import Annotated
from uuid import UUID

from fastapi import Path, Query
from pydantic import AfterValidator

from kiln.errors import InvalidRequestError

UUID_TEXT = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
# EC2's own ids are hexadecimal; what merely looks like one is unknown rather than malformed.
AMI_TEXT = re.compile(r"ami-[0-9A-Za-z]{1,64}")

BuildId = Annotated[str, Path(json_schema_extra={"format": "uuid"}, examples=["550e8400-e29b-41d4-a716-446655440000"])]
ImageId = Annotated[
    str, Path(json_schema_extra={"pattern": f"^{AMI_TEXT.pattern}$"}, examples=["ami-0abcdef1234567890"])
]


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


def _without_nul(text: str | None) -> str | None:
    # PostgreSQL keeps no such text, and refuses to compare with it.
    if text is not None and "\0" in text:
        raise ValueError("must not hold a NUL character")
    return text


Name = Annotated[str | None, AfterValidator(_without_nul), Query(json_schema_extra={"pattern": r"^[^\u0000]*$"})]
