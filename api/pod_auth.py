"""Who calls pods: key, organization, match, scope, in this order, each with the contract's own code."""

from typing import Annotated

from fastapi import Depends, Path, Request
from starlette.concurrency import run_in_threadpool

from api.deps import P, Parts
from api.pod_errors import (
    API_KEY_DISABLED,
    API_KEY_ORG_MISMATCH,
    AUTH_REQUIRED,
    INSUFFICIENT_SCOPE,
    INVALID_TOKEN,
    RESOURCE_NOT_FOUND,
    TOKEN_EXPIRED,
    PodError,
)
from kiln.catalog import keys
from kiln.catalog.keys import KEY_PREFIX, Identity, KnownKey

PODS_READ = "pods:read"
PODS_WRITE = "pods:write"
RUNNERS_READ = "runners:read"
Slug = Annotated[str, Path(description="the organization's slug", examples=["acme"])]


async def _caller(request: Request, parts: Parts, slug: str, scope: str) -> Identity:
    """The key's identity. Raises PodError."""
    plain = _presented(request)
    if not plain.startswith(KEY_PREFIX):
        raise _unauthorized(AUTH_REQUIRED, "an API key is needed: X-API-Key: amk_…, or Authorization: Bearer amk_…")
    known, is_organization = await run_in_threadpool(_look_up, parts, plain, slug)
    identity = _usable(known)
    if not is_organization:
        raise PodError(404, RESOURCE_NOT_FOUND, "there is no organization of this name")
    if slug != identity.organization_slug:
        raise PodError(403, API_KEY_ORG_MISMATCH, "the API key belongs to another organization")
    if not identity.may(scope):
        message = f"the API key lacks the scope {scope}"
        raise PodError(403, INSUFFICIENT_SCOPE, message, required_scopes=[scope])
    return identity


def _presented(request: Request) -> str:
    """X-API-Key first, also if it is empty, else Bearer; "" if there is neither."""
    sent = request.headers.get("x-api-key")
    if sent is not None:
        return sent
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    return credentials.strip() if scheme.lower() == "bearer" else ""


def _look_up(parts: Parts, plain: str, slug: str) -> tuple[KnownKey | None, bool]:
    with parts.catalog.read() as session:
        return keys.identify(session, plain), keys.has_organization(session, slug)


def _usable(known: KnownKey | None) -> Identity:
    if known is None:
        raise _unauthorized(INVALID_TOKEN, "the API key is not known")
    if known.disabled:
        raise PodError(403, API_KEY_DISABLED, "the API key was disabled")
    if known.expired:
        raise _unauthorized(TOKEN_EXPIRED, "the API key has expired")
    return known.identity


def _unauthorized(code: str, message: str) -> PodError:
    return PodError(401, code, message, headers={"WWW-Authenticate": "Bearer"})


async def _pods_reader(request: Request, parts: P, org: Slug) -> Identity:
    return await _caller(request, parts, org, PODS_READ)


async def _pods_writer(request: Request, parts: P, org: Slug) -> Identity:
    return await _caller(request, parts, org, PODS_WRITE)


async def _runners_reader(request: Request, parts: P, org: Slug) -> Identity:
    return await _caller(request, parts, org, RUNNERS_READ)


PodsReader = Annotated[Identity, Depends(_pods_reader)]
PodsWriter = Annotated[Identity, Depends(_pods_writer)]
RunnersReader = Annotated[Identity, Depends(_runners_reader)]
