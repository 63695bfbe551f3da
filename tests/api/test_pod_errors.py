"""The errors of pods and of runners' calls: one shape, whatever went wrong."""

import asyncio
from typing import Annotated

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Query

from api.errors import ApiError, install_error_handlers
from api.pod_errors import EXT_PREFIX, RUNNER_PREFIX, PodError
from kiln.errors import (
    ConflictError,
    InvalidRequestError,
    KilnError,
    NotFoundError,
    OperationFailedError,
    OperationOverError,
    RefusedError,
    UnavailableError,
)
from support.api_server import RunningApi
from support.pod_tenants import pod_refusal

FAILED = (500, "INTERNAL_ERROR", "the server failed; the failure is in its log")
RAISED = {
    "own": (PodError(401, "INVALID_TOKEN", "not known"), (401, "INVALID_TOKEN", "not known")),
    "over": (OperationOverError("it has ended"), (409, "POD_OVER", "it has ended")),
    "failed": (OperationFailedError("no repository"), (409, "POD_FAILED", "no repository")),
    "unknown": (NotFoundError("no such pod"), (404, "RESOURCE_NOT_FOUND", "no such pod")),
    "invalid": (InvalidRequestError("branch", "is none"), (400, "VALIDATION_FAILED", "branch: is none")),
    "conflict": (ConflictError("twice"), (400, "VALIDATION_FAILED", "twice")),
    "media": (ApiError(415, "unsupported_media_type", "not text"), (400, "VALIDATION_FAILED", "not text")),
    "long": (ApiError(413, "payload_too_large", "too long"), (413, "PAYLOAD_TOO_LARGE", "too long")),
    "away": (UnavailableError("no answer"), (503, "SERVICE_UNAVAILABLE", "no answer")),
    "unexpected": (KilnError("/home/kiln: SELECT secret"), FAILED),
    "bug": (RuntimeError("/home/kiln: SELECT secret"), FAILED),
}
REFUSED = RefusedError("the pod has ended")
EACH_PREFIX = pytest.mark.parametrize("prefix", [EXT_PREFIX, RUNNER_PREFIX])


class Raising:
    """The error handlers alone, over routes that fail as they are told to, below both prefixes and elsewhere."""

    def __init__(self) -> None:
        self._app = FastAPI(redirect_slashes=False)
        install_error_handlers(self._app)
        for prefix in (EXT_PREFIX, RUNNER_PREFIX, "/api/v1/"):
            self._app.include_router(_failing_routes(), prefix=prefix.removesuffix("/"))

    def get(self, path: str) -> httpx.Response:
        return asyncio.run(self._get(path))

    async def _get(self, path: str) -> httpx.Response:
        transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://kiln", verify=False) as client:
            return await client.get(path)


def _failing_routes() -> APIRouter:
    router = APIRouter()

    @router.get("/raise/{name}")
    def _raise(name: str) -> None:
        raise REFUSED if name == "refused" else RAISED[name][0]

    @router.get("/things")
    def _things(page: Annotated[int, Query(ge=1)] = 1) -> int:
        return page

    return router


@pytest.fixture(scope="module")
def raising() -> Raising:
    return Raising()


@EACH_PREFIX
@pytest.mark.parametrize("name", RAISED)
def test_every_error_is_in_one_shape(raising: Raising, prefix: str, name: str) -> None:
    """With a code of its own; what failed inside is not shown."""
    assert pod_refusal(raising.get(f"{prefix}raise/{name}")) == RAISED[name][1]


def test_a_refusal_is_the_users_mistake_or_the_runners_end(raising: Raising) -> None:
    """Users read a 400; a runner that may say no more, a 403."""
    users, runners = (raising.get(f"{prefix}raise/refused") for prefix in (EXT_PREFIX, RUNNER_PREFIX))
    assert pod_refusal(users) == (400, "VALIDATION_FAILED", "the pod has ended")
    assert pod_refusal(runners) == (403, "SUPERSEDED", "the pod has ended")


@EACH_PREFIX
def test_whoever_is_told_to_wait_is_told_how_long(raising: Raising, prefix: str) -> None:
    """A 503 carries Retry-After."""
    assert int(raising.get(f"{prefix}raise/away").headers["Retry-After"]) > 0


@EACH_PREFIX
def test_a_wrong_query_is_a_400(raising: Raising, prefix: str) -> None:
    """The message names the field."""
    status, code, message = pod_refusal(raising.get(f"{prefix}things?page=0"))
    assert (status, code) == (400, "VALIDATION_FAILED")
    assert message.startswith("page: ")


def test_other_contracts_keep_their_own_shape(raising: Raising) -> None:
    """Codes of pods are those of two paths only."""
    answer = raising.get("/api/v1/raise/refused")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")


@pytest.mark.parametrize("path", ["ext/orgs/acme", "ext/orgs/acme/pods/", "ext/orgs//pods", "ext/x", "runner/nothing"])
def test_an_unlisted_path_is_a_404(api: RunningApi, path: str) -> None:
    """In the shape of pods, also to those who show no key."""
    assert pod_refusal(api.http.get(f"/api/v1/{path}")) == (404, "RESOURCE_NOT_FOUND", "Not Found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("PUT", "pods", "GET, POST"), ("GET", "pods/pod-000000000000/terminate", "POST"), ("DELETE", "runners/a", "GET")],
)
def test_an_unlisted_method_is_a_405(api: RunningApi, method: str, path: str, allowed: str) -> None:
    """With the methods that the path knows."""
    answer = api.http.request(method, f"/api/v1/ext/orgs/acme/{path}")
    assert pod_refusal(answer) == (405, "METHOD_NOT_ALLOWED", "Method Not Allowed")
    assert answer.headers["Allow"] == allowed
