"""Who calls cloud-builds: a key in `x-api-key`, and the account that the call is for, which must be the key's own."""

from typing import Annotated

from fastapi import Depends, Header, Request
from starlette.concurrency import run_in_threadpool

from api.auth import API_KEY, BUILDS_READ, BUILDS_WRITE
from api.deps import P, Parts
from api.errors import DetailError
from kiln.catalog import keys
from kiln.catalog.keys import Identity

ACCOUNT = "x-selected-account-id"
Account = Annotated[str, Header(alias=ACCOUNT, description="the organization: its id or its slug")]


async def _caller(request: Request, parts: Parts, account: str, scope: str) -> Identity:
    """The key's identity. Raises DetailError: 401 for the key, 403 for the account, 403 for the scope, in this order."""
    identity = await run_in_threadpool(_identify, parts, request.headers.get("x-api-key", ""))
    if not account:
        raise DetailError(403, f"{ACCOUNT}: the header is missing")
    if account not in (identity.organization_id, identity.organization_slug):
        raise DetailError(403, f"{ACCOUNT}: the API key does not belong to this account")
    if not identity.may(scope):
        raise DetailError(403, f"the API key lacks the scope {scope}")
    return identity


def _identify(parts: Parts, plain: str) -> Identity:
    if not plain:
        raise _unauthorized("an API key is needed: x-api-key")
    with parts.catalog.read() as session:
        known = keys.identify(session, plain)
    if known is None or not known.usable:
        raise _unauthorized("the API key is not known, or no longer usable")
    return known.identity


def _unauthorized(message: str) -> DetailError:
    return DetailError(401, message, {"WWW-Authenticate": "APIKey"})


async def _reader(request: Request, parts: P, account: Account = "") -> Identity:
    return await _caller(request, parts, account, BUILDS_READ)


async def _writer(request: Request, parts: P, account: Account = "") -> Identity:
    return await _caller(request, parts, account, BUILDS_WRITE)


CloudReader = Annotated[Identity, Depends(_reader)]
CloudWriter = Annotated[Identity, Depends(_writer)]
CLOUD_SCHEMES = [Depends(API_KEY)]
