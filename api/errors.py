"""Error bodies: `{"error": {"code", "message"}}` of machine-images and kiln, `{"detail"}` of container-images, cloud-builds
and the registry's token endpoint, the envelope of organization-images (`api/client_errors.py`), `{"error", "code"}` of pods
(`api/pod_errors.py`).

Whose shape an answer has follows from the request's path (`speaks_detail`); where two contracts share a route, from what
the route found in the request (`answer_in_detail`).
"""

import logging
import re
from collections.abc import Mapping
from http import HTTPStatus
from types import UnionType

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from api.client_errors import ClientError, ClientErrorBody, client_body, speaks_client_codes
from api.pod_errors import PodError, pod_error, pod_refusal, speaks_pod_codes
from kiln.errors import (
    BuildNotFoundError,
    ConflictError,
    ContextInvalidError,
    ContextMissingError,
    ContextTooLargeError,
    IdempotencyKeyReusedError,
    ImageBuildingError,
    ImageNotFoundError,
    InvalidRequestError,
    KilnError,
    NotFoundError,
    RefusedError,
    SourceUnavailableError,
    UnavailableError,
)
from kiln.models import ClientCode

RETRY_AFTER_SECONDS = 5
# A caller's own names are repeated to them, but not at any length.
NAME_LENGTH = 100
INTERNAL_MESSAGE = "the server failed; the failure is in its log"
IMAGES_PATH = "/api/v1/images"
DETAIL_PREFIXES = ("/v5/", "/registry/")
# What only container-images lists below /api/v1/images, by method.
CONTAINER_PATHS = {
    "GET": re.compile(r"/build/[^/]+"),
    "POST": re.compile(r"/build/[^/]+/(start|cancel)"),
    "PUT": re.compile(r"/uploads/.*"),
    "PATCH": re.compile(""),
    "DELETE": re.compile(r"/.+/[^/]+"),
}
# In paths, what may itself be a path.
NAMES_WITH_SLASHES = ("image_name",)
# A listing with one of these is a container listing.
PAGING = ("offset", "limit")
# Clients of container-images look for these digits in a message to learn the status.
STATUS_DIGITS = re.compile("40[34]")
log = logging.getLogger("kiln.api")


class ErrorText(BaseModel):
    code: str = Field(examples=["invalid_request"], description="snake_case, permanent")
    message: str = Field(examples=["provider: Field required"], description="one plain sentence")


class ErrorBody(BaseModel):
    """The error of machine-images and kiln."""

    error: ErrorText


class SharedErrorBody(ErrorBody):
    """The error of a POST that was refused before it was clear whose it is: both contracts' at once."""

    detail: str = Field(examples=["the body is not valid JSON"])


class DetailBody(BaseModel):
    """The error of container-images."""

    detail: str


class ApiError(Exception):
    """An answer other than success, in machine-images' shape; `shared` adds container-images' beside it."""

    def __init__(
        self, status: int, code: str, message: str, *, shared: bool = False, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.shared = shared
        self.headers = dict(headers or {})

    def as_shared(self) -> "ApiError":
        """The same error in both contracts' shapes."""
        return ApiError(self.status, self.code, self.message, shared=True, headers=self.headers)

    def response(self) -> JSONResponse:
        body: dict[str, object] = {"error": {"code": self.code, "message": self.message}}
        if self.shared:
            body["detail"] = self.message
        return JSONResponse(body, self.status, headers=self.headers)


class DetailError(Exception):
    """An answer other than success in the shape `{"detail": message}`, wherever it is raised."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = STATUS_DIGITS.sub(lambda found: found[0] if found[0] == str(status) else "…", message)
        self.headers = dict(headers or {})

    def response(self) -> JSONResponse:
        return JSONResponse({"detail": self.message}, self.status, headers=self.headers)


def answer_in_detail(request: Request) -> None:
    """Has every error of this request from now on answered as `{"detail": …}`: it is a container-images request."""
    request.state.detail = True


def speaks_detail(request: Request) -> bool:
    """Whether this request's errors are `{"detail": …}`: it belongs to container-images, cloud-builds or the registry."""
    path = request.url.path
    if getattr(request.state, "detail", False) or path.startswith(DETAIL_PREFIXES):
        return True
    if path != IMAGES_PATH and not path.startswith(f"{IMAGES_PATH}/"):
        return False
    if request.method == "GET" and path == IMAGES_PATH:
        return lists_containers(request)
    listed = CONTAINER_PATHS.get(request.method)
    return listed is not None and listed.fullmatch(path.removeprefix(IMAGES_PATH)) is not None


def lists_containers(request: Request) -> bool:
    """Whether `GET /api/v1/images` asks for container images."""
    return any(name in request.query_params for name in PAGING)


def invalid(field: str, problem: str) -> ApiError:
    """A 422 that names the field."""
    return ApiError(422, "invalid_request", f"{field}: {problem}")


def from_validation(error: ValidationError | RequestValidationError) -> ApiError:
    """The first thing that Pydantic found, with the field's name as the caller wrote it."""
    first = error.errors()[0]
    # FastAPI's errors begin with where the value stood: query, path or header.
    names = first["loc"][1:] if isinstance(error, RequestValidationError) else first["loc"]
    place = [str(name)[:NAME_LENGTH] for name in names]
    problem = str(first["msg"]).removeprefix("Value error, ")
    return invalid(".".join(place) or "body", problem)


CODES: dict[type[KilnError], tuple[int, str]] = {
    InvalidRequestError: (422, "invalid_request"),
    BuildNotFoundError: (404, "build_not_found"),
    ImageNotFoundError: (404, "image_not_found"),
    NotFoundError: (404, "not_found"),
    ImageBuildingError: (409, "image_building"),
    IdempotencyKeyReusedError: (409, "idempotency_key_reused"),
    ConflictError: (409, "conflict"),
    ContextMissingError: (409, "context_missing"),
    ContextTooLargeError: (413, "payload_too_large"),
    ContextInvalidError: (422, "context_invalid"),
    SourceUnavailableError: (422, "source_unavailable"),
    UnavailableError: (503, "unavailable"),
}


def from_kiln(error: KilnError) -> ApiError:
    """The answer to an error of Kiln's own; one that no caller can cause is a 500."""
    for kind in type(error).__mro__:
        if kind in CODES:
            status, code = CODES[kind]
            headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == HTTPStatus.SERVICE_UNAVAILABLE else {}
            return ApiError(status, code, str(error), headers=headers)
    log.error("unexpected", exc_info=error)
    return internal()


def internal() -> ApiError:
    return ApiError(500, "internal", INTERNAL_MESSAGE)


HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "payload_too_large"}


def from_http(error: HTTPException) -> ApiError:
    """What the routing itself refuses: unknown paths and methods."""
    code = HTTP_CODES.get(error.status_code, "invalid_request")
    return ApiError(error.status_code, code, HTTPStatus(error.status_code).phrase, headers=error.headers)


def install_error_handlers(app: FastAPI) -> None:
    """Every way in which a request can fail ends in a contract's shape."""

    @app.exception_handler(DetailError)
    @app.exception_handler(ClientError)
    @app.exception_handler(PodError)
    async def _shaped_already(_request: Request, error: DetailError | ClientError | PodError) -> JSONResponse:
        return error.response()

    @app.exception_handler(ApiError)
    async def _api(request: Request, error: ApiError) -> JSONResponse:
        return _shaped(request, error)

    @app.exception_handler(KilnError)
    async def _kiln(request: Request, error: KilnError) -> JSONResponse:
        return _refused(request, error) or _shaped(request, from_kiln(error))

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return _shaped(request, _unknown_id(request, error) or from_validation(error))

    @app.exception_handler(ValidationError)
    async def _model(request: Request, error: ValidationError) -> JSONResponse:
        return _shaped(request, from_validation(error))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        answer = from_http(error)
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            answer.headers["Allow"] = _allowed(request)
        return _shaped(request, answer)

    @app.exception_handler(ClientDisconnect)
    async def _gone(_request: Request, _error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # nobody reads it: the caller left in mid-body

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, _error: Exception) -> JSONResponse:
        return _shaped(request, internal())


def _allowed(request: Request) -> str:
    """The methods that a path knows, by the app's document: those of the template that says most of it literally."""
    paths: dict[str, dict[str, object]] = request.app.openapi()["paths"]
    here = request.url.path
    known = [path for path in paths if path == here or _template(path).fullmatch(here)]
    closest = max(known, key=lambda path: (path == here, len(re.sub(r"\{\w+\}", "", path))), default="")
    return ", ".join(sorted(method.upper() for method in paths.get(closest, {})))


def _template(path: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", path)
    names = (".*" if name in NAMES_WITH_SLASHES else "[^/]+" for name in pieces[1::2])
    return re.compile(
        "".join(literal + name for literal, name in zip(map(re.escape, pieces[::2]), [*names, ""], strict=True))
    )


def as_detail(error: ApiError) -> DetailError:
    """The same error in the other shape."""
    return DetailError(error.status, error.message, error.headers)


def as_client(error: ApiError) -> ClientError:
    """The same error as organization-images says it: what is wrong with a request's form is a 400 there."""
    code = HTTPStatus.BAD_REQUEST if error.status == HTTPStatus.UNPROCESSABLE_ENTITY else error.status
    return ClientError(code, error.message, error.headers)


def _refused(request: Request, error: KilnError) -> JSONResponse | None:
    """What the state of an organization's image or machine forbids has organization-images' own code, or none; that of a
    pod has pods' own."""
    if speaks_pod_codes(request):
        refusal = pod_refusal(request, error)
        return None if refusal is None else refusal.response()
    if not isinstance(error, RefusedError) or not speaks_client_codes(request):
        return None
    return ClientError(error.code or HTTPStatus.BAD_REQUEST, str(error)).response()


def _unknown_id(request: Request, error: RequestValidationError) -> ApiError | None:
    """An id in a path that has not even an id's form is an unknown one to organization-images."""
    if error.errors()[0]["loc"][0] != "path" or not speaks_client_codes(request):
        return None
    return ApiError(404, "not_found", HTTPStatus.NOT_FOUND.phrase)


def _shaped(request: Request, error: ApiError) -> JSONResponse:
    """The error in its request's own shape; one that carries both is both contracts' already."""
    if speaks_client_codes(request):
        return as_client(error).response()
    if speaks_pod_codes(request):
        return pod_error(error.status, error.message, error.headers).response()
    if not error.shared and speaks_detail(request):
        return as_detail(error).response()
    return error.response()


HEADERS: dict[int, dict[str, object]] = {
    401: {"WWW-Authenticate": {"schema": {"type": "string"}, "description": "the scheme to use"}},
    429: {
        "Retry-After": {"schema": {"type": "integer"}, "description": "seconds until the next request is served"},
        "X-RateLimit-Limit": {"schema": {"type": "integer"}, "description": "requests served in a window"},
        "X-RateLimit-Remaining": {"schema": {"type": "integer"}, "description": "requests that are left in it"},
        "X-RateLimit-Reset": {"schema": {"type": "integer"}, "description": "seconds until the next request is served"},
    },
    503: {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds after which to try again"}},
}


EXAMPLES = {
    401: ("unauthorized", "an API key is needed: Authorization: Bearer …, or X-API-Key"),
    403: ("insufficient_scope", "the API key lacks the scope builds:write"),
    404: ("build_not_found", "no build of this organization has this id"),
    409: ("image_building", "ami-0abcdef1234567890 is still being built"),
    413: ("payload_too_large", "body: at most 1048576 bytes are read"),
    415: ("unsupported_media_type", "Content-Type: must be application/json, not text/plain"),
    422: ("invalid_request", "build_id: must be a UUID"),
    429: ("rate_limited", "at most 150 requests in 1 minute are served"),
    500: ("internal", INTERNAL_MESSAGE),
    503: ("unavailable", "the catalog does not answer: OperationalError"),
}


CLIENT_EXAMPLES = {
    400: (ClientCode.NOT_STOPPED, "the machine is not stopped"),
    401: (401, "the Authorization header is missing: HMAC {key}:{signature}:{nonce}:{timestamp}"),
    403: (ClientCode.PERMISSION_REQUIRED, "the API key lacks the scope organization:write"),
    404: (404, "no image of this organization has this id"),
    409: (409, "Idempotency-Key: the key came before with another body"),
    413: (413, EXAMPLES[413][1]),
    500: (500, INTERNAL_MESSAGE),
    503: (503, EXAMPLES[503][1]),
}


def errors(*statuses: int) -> dict[int | str, dict[str, object]]:
    """OpenAPI's `responses` for these statuses, in machine-images' shape."""
    return {status: documented(status, ErrorBody, _example(status)) for status in statuses}


def shared_errors(*statuses: int) -> dict[int | str, dict[str, object]]:
    """OpenAPI's `responses` for a request that is refused before it is clear whose it is."""
    return {status: documented(status, SharedErrorBody, _shared_example(status)) for status in statuses}


def detail_errors(*statuses: int) -> dict[int | str, dict[str, object]]:
    """OpenAPI's `responses` for these statuses, in the shape `{"detail": …}`."""
    return {status: documented(status, DetailBody, {"detail": EXAMPLES[status][1]}) for status in statuses}


def either_errors(*statuses: int) -> dict[int | str, dict[str, object]]:
    """OpenAPI's `responses` where a refusal has either contract's shape, or both."""
    model = SharedErrorBody | ErrorBody | DetailBody
    return {status: documented(status, model, _shared_example(status)) for status in statuses}


def client_errors(*statuses: int) -> dict[int | str, dict[str, object]]:
    """OpenAPI's `responses` for these HTTP statuses, in organization-images' shape."""
    return {status: documented(status, ClientErrorBody, client_body(*CLIENT_EXAMPLES[status])) for status in statuses}


def documented(status: int, model: type[BaseModel] | UnionType, example: dict[str, object]) -> dict[str, object]:
    """OpenAPI's word on an answer of this status."""
    return {
        "model": model,
        "description": HTTPStatus(status).phrase,
        "headers": HEADERS.get(status, {}),
        "content": {"application/json": {"example": example}},
    }


def _example(status: int) -> dict[str, object]:
    code, message = EXAMPLES[status]
    return {"error": {"code": code, "message": message}}


def _shared_example(status: int) -> dict[str, object]:
    return {**_example(status), "detail": EXAMPLES[status][1]}
