"""The envelope of organization-images: `{"client_code", "message", "timestamp"}` around every answer, also every error.

The numeric code travels in the body of a true 4xx, since its clients raise on HTTP statuses only.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from api.times import Timestamp, iso
from kiln.models import ClientCode

CLIENT_PREFIX = "/organization-management/"
# Codes from here on are the contract's own; below it a code is its HTTP status.
FIRST_OWN_CODE = 4000
OK_CODE = 200
OK_MESSAGE = "OK"


class ClientErrorBody(BaseModel):
    """The error of organization-images."""

    client_code: int = Field(examples=[404], description="the contract's own code, or the HTTP status")
    message: str = Field(examples=["no image of this organization has this id"], description="one plain sentence")
    timestamp: Timestamp


class ClientError(Exception):
    """An answer other than success in organization-images' shape; the HTTP status follows from `code`."""

    def __init__(self, code: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.headers = dict(headers or {})

    @property
    def status(self) -> int:
        if self.code == ClientCode.PERMISSION_REQUIRED:
            return HTTPStatus.FORBIDDEN
        return HTTPStatus.BAD_REQUEST if self.code >= FIRST_OWN_CODE else self.code

    def response(self) -> JSONResponse:
        return JSONResponse(client_body(self.code, self.message), self.status, headers=self.headers)


def envelope(**fields: Any) -> dict[str, Any]:
    """The body of a success: its own fields, and beside them `client_code` 200, `message` OK and the time."""
    return {**fields, **client_body(OK_CODE, OK_MESSAGE)}


def client_body(code: int, message: str) -> dict[str, Any]:
    """The three fields that every body has."""
    return {"client_code": int(code), "message": message, "timestamp": iso(datetime.now(UTC))}


def speaks_client_codes(request: Request) -> bool:
    """Whether this request's errors are organization-images'."""
    path: str = request.scope["path"]
    return path.startswith(CLIENT_PREFIX)
