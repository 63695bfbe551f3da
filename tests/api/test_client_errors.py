"""The errors of organization-images: one envelope, whatever went wrong."""

import asyncio
from collections.abc import Iterator
from typing import Annotated

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Query, Request

from api.client_errors import ClientError, envelope
from api.errors import install_error_handlers
from kiln.errors import (
    ConflictError,
    InvalidRequestError,
    KilnError,
    NotFoundError,
    RefusedError,
    UnavailableError,
)
from kiln.models import ClientCode
from support.api_server import RunningApi
from support.signed_tenants import new_signer, refusal
from support.signing import ORGANIZATION_API, SignedClient
from support.tenants import Tenant

IMAGES = f"{ORGANIZATION_API}/images"
FAILED = "the server failed; the failure is in its log"
RAISED = {
    "refused": (RefusedError("it is not stopped", ClientCode.NOT_STOPPED), (400, 4209, "it is not stopped")),
    "refused-otherwise": (RefusedError("it is awaited"), (400, 400, "it is awaited")),
    "forbidden": (ClientError(4710, "no scope"), (403, 4710, "no scope")),
    "too-large": (ClientError(4510, "larger than the disk"), (400, 4510, "larger than the disk")),
    "unknown": (NotFoundError("no such machine"), (404, 404, "no such machine")),
    "invalid": (InvalidRequestError("name", "is too long"), (400, 400, "name: is too long")),
    "conflict": (ConflictError("twice"), (409, 409, "twice")),
    "away": (UnavailableError("the catalog does not answer"), (503, 503, "the catalog does not answer")),
    "unexpected": (KilnError("/home/kiln: SELECT secret"), (500, 500, FAILED)),
    "bug": (RuntimeError("/home/kiln: SELECT secret"), (500, 500, FAILED)),
}


class Raising:
    """The error handlers alone, over routes that fail as they are told to, below the contract's path and elsewhere."""

    def __init__(self) -> None:
        self._app = FastAPI(redirect_slashes=False)
        install_error_handlers(self._app)
        for prefix in (ORGANIZATION_API, "/api/v1"):
            self._app.include_router(_failing_routes(), prefix=prefix)

    def get(self, path: str) -> httpx.Response:
        return asyncio.run(self._get(path))

    async def _get(self, path: str) -> httpx.Response:
        transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://kiln", verify=False) as client:
            return await client.get(path)


def _failing_routes() -> APIRouter:
    router = APIRouter()

    @router.get("/raise/{name}")
    def _raise(request: Request, name: str) -> None:
        raise RAISED[name][0]

    @router.get("/things/{number}")
    def _thing(number: int, page: Annotated[int, Query(ge=1)] = 1) -> dict[str, object]:
        return envelope(number=number, page=page)

    return router


@pytest.fixture(scope="module")
def raising() -> Raising:
    return Raising()


@pytest.fixture
def signer(tenant: Tenant) -> Iterator[SignedClient]:
    """A client with a key that may do everything."""
    with new_signer(tenant, "admin") as client:
        yield client


@pytest.mark.parametrize("name", RAISED)
def test_every_error_is_in_the_envelope(raising: Raising, name: str) -> None:
    """With the contract's own code in a true 4xx, else with the HTTP status; what failed inside is not shown."""
    assert refusal(raising.get(f"{ORGANIZATION_API}/raise/{name}")) == RAISED[name][1]


def test_whoever_is_told_to_wait_is_told_how_long(raising: Raising) -> None:
    """A 503 carries Retry-After."""
    assert int(raising.get(f"{ORGANIZATION_API}/raise/away").headers["Retry-After"]) > 0


@pytest.mark.parametrize(("query", "named"), [("page=0", "page"), ("page=x", "page"), ("page=", "page")])
def test_a_wrong_query_is_a_400(raising: Raising, query: str, named: str) -> None:
    """The message names the field."""
    status, code, message = refusal(raising.get(f"{ORGANIZATION_API}/things/1?{query}"))
    assert (status, code) == (400, 400)
    assert message.startswith(f"{named}: ")


@pytest.mark.parametrize("number", ["x", "1.5", "0x1", "%F0%9F%94%A5"])
def test_an_id_that_is_no_integer_is_a_404(raising: Raising, number: str) -> None:
    """As an unknown one, whatever else is wrong with the request."""
    assert refusal(raising.get(f"{ORGANIZATION_API}/things/{number}?page=0"))[:2] == (404, 404)


def test_other_contracts_keep_their_own_shape(raising: Raising) -> None:
    """The envelope is that of one path only."""
    answer = raising.get("/api/v1/raise/refused")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")
    answer = raising.get("/api/v1/things/1?page=0")
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_request")


@pytest.mark.parametrize("path", ["", "/", "/images/", "/images/1/2/3", "/images/1/assign/", "/%00", "/software/1"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unlisted_path_is_a_404(api: RunningApi, method: str, path: str) -> None:
    """In the envelope, also to those who sign nothing."""
    answer = api.http.request(method, ORGANIZATION_API + path)
    assert refusal(answer) == (404, 404, "Not Found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("PUT", "/images", "GET, POST"), ("GET", "/images/1/assign", "POST"), ("PATCH", "/images/1", "DELETE, GET")],
)
def test_an_unlisted_method_is_a_405(api: RunningApi, method: str, path: str, allowed: str) -> None:
    """With the methods that the path knows."""
    answer = api.http.request(method, ORGANIZATION_API + path)
    assert refusal(answer) == (405, 405, "Method Not Allowed")
    assert answer.headers["Allow"] == allowed


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"null", b'"text"', b'{"name": NaN}', rb'{"name": "\ud800"}', b"\xff", b" ", b"[" * 100_000]
)
def test_a_body_that_is_no_json_object_is_a_400(signer: SignedClient, body: bytes) -> None:
    """The message names the body."""
    status, code, message = refusal(signer.post(IMAGES, body))
    assert (status, code) == (400, 400)
    assert message.startswith("body: ")


def test_a_body_that_is_too_long_is_a_413(api: RunningApi, signer: SignedClient) -> None:
    """It is not read to its end, and neither is one whose length nobody declared."""
    limit = api.settings.max_body_bytes
    expected = (413, 413, f"body: at most {limit} bytes are read")
    body = b"x" * (limit + 1)
    assert refusal(signer.post(IMAGES, body)) == expected
    signed = {"Authorization": signer.authorize("POST", IMAGES, body)}
    assert refusal(signer.http.post(IMAGES, content=iter([body]), headers=signed)) == expected
