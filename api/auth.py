"""Who calls, and whether they may. A key is looked up by its hash in one indexed query."""

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.concurrency import run_in_threadpool

from api.deps import P, Parts
from api.errors import ApiError
from kiln.catalog import keys
from kiln.catalog.keys import Identity

# For OpenAPI's sake; the header is read below, since both schemes stand for the same key.
BEARER = HTTPBearer(auto_error=False, description="A Kiln API key: `Authorization: Bearer amk_…`")
API_KEY = APIKeyHeader(name="X-API-Key", auto_error=False, description="A Kiln API key: `X-API-Key: amk_…`")
BUILDS_READ = "builds:read"
BUILDS_WRITE = "builds:write"


async def caller(request: Request, parts: Parts) -> Identity:
    """The key's identity. Raises ApiError 401 for a missing, unknown, disabled or expired key."""
    plain = _presented(request)
    if not plain:
        raise _unauthorized("an API key is needed: Authorization: Bearer …, or X-API-Key")
    known = await run_in_threadpool(_identify, parts, plain)
    if known is None or not known.usable:
        raise _unauthorized("the API key is not known, or no longer usable")
    return known.identity


def require(identity: Identity, scope: str) -> None:
    """Raises ApiError 403 unless the key carries the scope."""
    if not identity.may(scope):
        raise ApiError(403, "insufficient_scope", f"the API key lacks the scope {scope}")


def _presented(request: Request) -> str:
    """Bearer first, also if it is empty, else X-API-Key; "" if there is neither."""
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip()
    return request.headers.get("x-api-key", "")


def _identify(parts: Parts, plain: str) -> keys.KnownKey | None:
    with parts.catalog.read() as session:
        return keys.identify(session, plain)


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, "unauthorized", message, headers={"WWW-Authenticate": "Bearer"})


async def _reader(request: Request, parts: P) -> Identity:
    identity = await caller(request, parts)
    require(identity, BUILDS_READ)
    return identity


async def _writer(request: Request, parts: P) -> Identity:
    identity = await caller(request, parts)
    require(identity, BUILDS_WRITE)
    return identity


Reader = Annotated[Identity, Depends(_reader)]
Writer = Annotated[Identity, Depends(_writer)]
AUTH_SCHEMES = [Depends(BEARER), Depends(API_KEY)]
