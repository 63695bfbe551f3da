"""`/registry/token`: the registry asks Kiln who may pull and push, and Docker's clients ask here for the proof.

Protocol: https://distribution.github.io/distribution/spec/auth/token/ (GET) and .../auth/oauth/ (POST).
"""

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal
from urllib.parse import parse_qs

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from api.auth import BUILDS_READ
from api.deps import P, Parts
from api.errors import HEADERS, DetailBody, DetailError, detail_errors
from api.times import Timestamp, iso
from kiln.catalog import builds, keys, pod_work, tags
from kiln.catalog.session import Transaction
from kiln.catalog.tables import Organization
from kiln.models import BuildStatus
from kiln.naming import staging_repository
from kiln.references import image_name_problem, repository_at
from kiln.registry_tokens import BUILD_USER, POD_USER, SERVICE, TOKEN_LIFETIME, Access, BuildCredential

PULL = "pull"
PUSH = "push"
PASSWORD_GRANT: Final = "password"  # noqa: S105  the name of a way to ask (RFC 6749)
FORM_LIMIT_BYTES = 64 * 1024
REPOSITORIES_LIMIT = 100
NOT_TO_KEEP = {"Cache-Control": "no-store"}
CHALLENGE = {"WWW-Authenticate": 'Basic realm="kiln", charset="UTF-8"'}
NO_CREDENTIALS = "credentials are needed: any user name, and a Kiln API key as its password"
BAD_CREDENTIALS = "the API key is not known, or no longer usable"
BAD_BUILD_CREDENTIALS = "the build's credentials are not known, or its build is over"
BAD_POD_CREDENTIALS = "the pod's credentials are not known, or its pod has ended"


class TokenAnswer(BaseModel):
    """A token, under both names that clients look for."""

    token: str = Field(description="a JWT for the registry")
    access_token: str = Field(description="the same token")
    expires_in: int = Field(description="seconds", examples=[300])
    issued_at: Timestamp


class GrantAnswer(TokenAnswer):
    scope: str = Field(examples=["repository:acme/app:pull"], description="what was granted")


class TokenQuery(BaseModel):
    """The query of a GET."""

    service: Literal["kiln-registry"] | None = Field(None, description="the registry's own name")
    scope: list[str] = Field([], description="repository:NAME:ACTIONS, repeated or parted by spaces")
    account: str = Field("", description="the user name, as Docker repeats it; not looked at")


class TokenForm(BaseModel):
    """The body of a POST, as a form."""

    grant_type: Literal["password"] = PASSWORD_GRANT
    service: Literal["kiln-registry"] = SERVICE
    client_id: str = Field("", examples=["docker"])
    scope: str = Field("", examples=["repository:acme/app:pull"], description="several are parted by spaces")
    username: str = Field("", description="any, for an API key")
    password: str = Field("", description="a Kiln API key with the scope builds:read")


class _Basic(HTTPBasic):
    """For OpenAPI's sake: what it reads of the header is read below, where a POST's form counts too."""

    async def __call__(self, request: Request) -> HTTPBasicCredentials | None:  # type: ignore[override]  # noqa: ARG002
        return None


@dataclass(frozen=True)
class _Asked:
    """A request for a token. `wanted` are actions by repository."""

    user: str
    password: str
    wanted: Mapping[str, frozenset[str]]


RESPONSES: dict[int | str, dict[str, Any]] = {
    401: {"model": DetailBody, "description": "No credentials, or none that open", "headers": HEADERS[401]},
    422: {"model": DetailBody, "description": "The request asks for another service's token, or in another way"},
    **detail_errors(500, 503),
}
FORM = {
    "requestBody": {
        "required": False,  # the credentials may stand in the header
        "content": {"application/x-www-form-urlencoded": {"schema": TokenForm.model_json_schema()}},
    }
}

BASIC = _Basic(
    auto_error=False, scheme_name="HTTPBasic", description="any user name, and a Kiln API key as its password"
)

router = APIRouter(tags=["registry"], dependencies=[Depends(BASIC)])


@router.get("/registry/token", summary="Get a token", response_model=TokenAnswer, responses=RESPONSES)
def get_token(request: Request, response: Response, parts: P, asked: Annotated[TokenQuery, Query()]) -> dict[str, Any]:
    """Grants what the credentials allow of what is asked for, be it nothing. Without a scope it is a login's check."""
    user, password = _basic(request)
    response.headers.update(NOT_TO_KEEP)
    return _answer(parts, _Asked(user, password, _wanted(asked.scope)))[0]


@router.post(
    "/registry/token",
    summary="Get a token by OAuth 2",
    response_model=GrantAnswer,
    responses={**RESPONSES, **detail_errors(413)},
    openapi_extra=FORM,
)
async def post_token(request: Request, response: Response, parts: P) -> dict[str, Any]:
    """The same with the credentials in a form. There are no refresh tokens."""
    form = await _form(request)
    for field, wanted in (("service", SERVICE), ("grant_type", PASSWORD_GRANT)):
        if form.get(field, wanted) != wanted:
            raise DetailError(422, f"{field}: must be {wanted}")
    response.headers.update(NOT_TO_KEEP)
    user, password = (form.get("username", ""), form["password"]) if form.get("password") else _basic(request)
    asked = _Asked(user, password, _wanted([form.get("scope", "")]))
    answer, granted = await run_in_threadpool(_answer, parts, asked)
    scope = " ".join(f"repository:{one.repository}:{','.join(one.actions)}" for one in granted)
    return {**answer, "scope": scope}


def _answer(parts: Parts, asked: _Asked) -> tuple[dict[str, Any], Sequence[Access]]:
    """The token, and what it opens. Raises DetailError 401."""
    if not asked.password:
        raise _unauthorized(NO_CREDENTIALS)
    with parts.catalog.read() as session:
        if asked.user == BUILD_USER:
            subject, allowed = _build_access(parts, session, asked)
        elif asked.user == POD_USER:
            subject, allowed = _pod_access(parts, session, asked)
        else:
            subject, allowed = _key_access(session, asked)
    granted = [
        Access(repository, tuple(sorted(actions & allowed.get(repository, frozenset()))))
        for repository, actions in asked.wanted.items()
        if actions & allowed.get(repository, frozenset())
    ]
    now = datetime.now(UTC)
    token = parts.containers.tokens.issue(subject, granted, TOKEN_LIFETIME)
    seconds = int(TOKEN_LIFETIME.total_seconds())
    return {"token": token, "access_token": token, "expires_in": seconds, "issued_at": iso(now)}, granted


def _key_access(session: Transaction, asked: _Asked) -> tuple[str, dict[str, frozenset[str]]]:
    """A key pulls what its organization may read, and pushes nothing: images come from builds."""
    known = keys.identify(session, asked.password)
    if known is None or not known.usable:
        raise _unauthorized(BAD_CREDENTIALS)
    if not known.identity.may(BUILDS_READ):
        raise _unauthorized(f"the API key lacks the scope {BUILDS_READ}")
    identity = known.identity
    readable = tags.readable(session, identity.organization_id, identity.organization_slug, asked.wanted)
    return f"key:{identity.key_id}", dict.fromkeys(readable, frozenset({PULL}))


def _build_access(parts: Parts, session: Transaction, asked: _Asked) -> tuple[str, dict[str, frozenset[str]]]:
    """A build's engine pushes where the build's attempts do, and pulls what its organization may read.

    It also pulls where the organization's other builds push: an engine that knows a layer from there mounts it.
    """
    credential = parts.containers.credentials.open(asked.password)
    if credential is None or not _is_going_on(session, credential):
        raise _unauthorized(BAD_BUILD_CREDENTIALS)
    organization = session.get(Organization, credential.organization_id)
    if organization is None:
        raise _unauthorized(BAD_BUILD_CREDENTIALS)
    readable = tags.readable(session, organization.id, organization.slug, asked.wanted)
    readable |= _own_staging(session, organization.id, asked.wanted)
    allowed = dict.fromkeys(readable, frozenset({PULL}))
    allowed[staging_repository(credential.build_id)] = frozenset({PULL, PUSH})
    return f"build:{credential.build_id}", allowed


def _pod_access(parts: Parts, session: Transaction, asked: _Asked) -> tuple[str, dict[str, frozenset[str]]]:
    """A runner's engine pulls from the repository of an open pod's image, and from no other."""
    credential = parts.containers.pod_credentials.open(asked.password)
    if credential is None:
        raise _unauthorized(BAD_POD_CREDENTIALS)
    reference = pod_work.image_reference(session, credential.organization_id, credential.pod_id)
    if reference is None:
        raise _unauthorized(BAD_POD_CREDENTIALS)
    repository = repository_at(parts.settings.registry_host, reference)
    return f"pod:{credential.pod_id}", {} if repository is None else {repository: frozenset({PULL})}


def _is_going_on(session: Transaction, credential: BuildCredential) -> bool:
    """Whether the build is open, and not closing: what a fenced attempt would push, nobody would clean up."""
    build = builds.get(session, credential.build_id)
    if build is None or build.organization_id != credential.organization_id:
        return False
    return BuildStatus(build.status).is_open and build.closing_at is None


def _own_staging(session: Transaction, organization_id: str, repositories: Iterable[str]) -> set[str]:
    """Those of the repositories into which builds of this organization push."""
    prefix = staging_repository("")
    found = {one: builds.get(session, one.removeprefix(prefix)) for one in repositories if one.startswith(prefix)}
    return {one for one, build in found.items() if build is not None and build.organization_id == organization_id}


def _wanted(scopes: Sequence[str]) -> dict[str, frozenset[str]]:
    """Actions by repository, in the order of the request; scopes of other resources, and broken ones, are left out.

    Raises DetailError 422 for too many at once.
    """
    wanted: dict[str, frozenset[str]] = {}
    for scope in (one for several in scopes for one in several.split()):
        resource, _, rest = scope.partition(":")
        name, _, actions = rest.rpartition(":")
        if resource == "repository" and image_name_problem(name) is None:
            wanted[name] = wanted.get(name, frozenset()) | frozenset(actions.split(","))
    if len(wanted) > REPOSITORIES_LIMIT:
        raise DetailError(422, f"scope: at most {REPOSITORIES_LIMIT} repositories are opened at once")
    return wanted


def _basic(request: Request) -> tuple[str, str]:
    """User name and password of the Authorization header; both empty if it has none."""
    scheme, _, encoded = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return "", ""
    try:
        user, _, password = base64.b64decode(encoded.strip(), validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        return "", ""
    return user, password


async def _form(request: Request) -> dict[str, str]:
    """The form's fields; of a repeated one the first, but every scope. Raises DetailError 413."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > FORM_LIMIT_BYTES:
            raise DetailError(413, f"body: at most {FORM_LIMIT_BYTES} bytes are read")
    fields = parse_qs(body.decode(errors="replace"), keep_blank_values=True)
    return {name: " ".join(values) if name == "scope" else values[0] for name, values in fields.items()}


def _unauthorized(message: str) -> DetailError:
    return DetailError(401, message, CHALLENGE)
