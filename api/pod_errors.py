"""The errors of pods, and of the calls that runners make: `{"error": "text", "code": "CODE"}`."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Final

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from kiln.errors import KilnError, OperationFailedError, OperationOverError, RefusedError

EXT_PREFIX: Final = "/api/v1/ext/"
RUNNER_PREFIX: Final = "/api/v1/runner/"
POD_PREFIXES: Final = (EXT_PREFIX, RUNNER_PREFIX)

AUTH_REQUIRED: Final = "AUTH_REQUIRED"
INVALID_TOKEN: Final = "INVALID_TOKEN"  # noqa: S105  a code
TOKEN_EXPIRED: Final = "TOKEN_EXPIRED"  # noqa: S105  a code
API_KEY_DISABLED: Final = "API_KEY_DISABLED"
API_KEY_ORG_MISMATCH: Final = "API_KEY_ORG_MISMATCH"
INSUFFICIENT_SCOPE: Final = "INSUFFICIENT_SCOPE"
VALIDATION_FAILED: Final = "VALIDATION_FAILED"
CUSTOM_COMMAND_NOT_ALLOWED: Final = "CUSTOM_COMMAND_NOT_ALLOWED"
RESOURCE_NOT_FOUND: Final = "RESOURCE_NOT_FOUND"
METHOD_NOT_ALLOWED: Final = "METHOD_NOT_ALLOWED"
PAYLOAD_TOO_LARGE: Final = "PAYLOAD_TOO_LARGE"
RATE_LIMITED: Final = "RATE_LIMITED"
INTERNAL_ERROR: Final = "INTERNAL_ERROR"
SERVICE_UNAVAILABLE: Final = "SERVICE_UNAVAILABLE"
NO_AVAILABLE_RUNNER: Final = "NO_AVAILABLE_RUNNER"
# To runners only.
SUPERSEDED: Final = "SUPERSEDED"
POD_OVER: Final = "POD_OVER"
POD_FAILED: Final = "POD_FAILED"

# What is wrong with a request is a 400 here, whatever other contracts call it.
CODES: Final = {
    400: VALIDATION_FAILED,
    401: AUTH_REQUIRED,
    403: INSUFFICIENT_SCOPE,
    404: RESOURCE_NOT_FOUND,
    405: METHOD_NOT_ALLOWED,
    413: PAYLOAD_TOO_LARGE,
    429: RATE_LIMITED,
    500: INTERNAL_ERROR,
    503: SERVICE_UNAVAILABLE,
}


class PodErrorBody(BaseModel):
    """The error of pods."""

    error: str = Field(examples=["no pod of this organization has this key"], description="one plain sentence")
    code: str = Field(examples=[RESOURCE_NOT_FOUND], description="permanent")
    required_scopes: list[str] = Field([], examples=[["pods:write"]], description="only with INSUFFICIENT_SCOPE")


class PodError(Exception):
    """An answer other than success in the shape of pods; `required_scopes` are those that the key lacks."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        headers: Mapping[str, str] | None = None,
        required_scopes: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = dict(headers or {})
        self.required_scopes = list(required_scopes)

    def response(self) -> JSONResponse:
        body: dict[str, object] = {"error": self.message, "code": self.code}
        if self.required_scopes:
            body["required_scopes"] = self.required_scopes
        return JSONResponse(body, self.status, headers=self.headers)


def speaks_pod_codes(request: Request) -> bool:
    """Whether this request's errors are those of pods."""
    path: str = request.scope["path"]
    return path.startswith(POD_PREFIXES)


def pod_error(status: int, message: str, headers: Mapping[str, str]) -> PodError:
    """An error of any other contract's as pods say it."""
    status = status if status in CODES else HTTPStatus.BAD_REQUEST
    return PodError(status, CODES[status], message, headers=headers)


def pod_refusal(request: Request, error: KilnError) -> PodError | None:
    """What only pods and runners hear of Kiln's own errors; None for one that all hear alike."""
    if isinstance(error, OperationOverError):
        return PodError(409, POD_OVER, str(error))
    if isinstance(error, OperationFailedError):
        return PodError(409, POD_FAILED, str(error))
    if not isinstance(error, RefusedError):
        return None
    if request.scope["path"].startswith(RUNNER_PREFIX):
        return PodError(403, SUPERSEDED, str(error))
    return PodError(400, VALIDATION_FAILED, str(error))
