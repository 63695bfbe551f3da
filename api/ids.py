"""Ids in paths."""

import re
from uuid import UUID

from kiln.errors import InvalidRequestError

UUID_TEXT = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def build_id_of(text: str) -> str:
    """The build id in a path. Raises InvalidRequestError for what is no UUID."""
    if not UUID_TEXT.fullmatch(text):
        raise InvalidRequestError("build_id", "must be a UUID")
    return str(UUID(text))
