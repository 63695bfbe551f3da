"""Times on the wire: ISO 8601 in UTC with a `Z`, whole seconds unless a contract wants milliseconds."""

from datetime import UTC, datetime
from typing import Annotated

from pydantic import Field

Timestamp = Annotated[str, Field(examples=["2026-03-25T14:30:00Z"], json_schema_extra={"format": "date-time"})]


def iso(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def iso_milliseconds(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def iso_or_none(moment: datetime | None) -> str | None:
    return None if moment is None else iso(moment)
