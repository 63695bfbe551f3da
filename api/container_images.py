"""The contract container-images: an image registry's build API (`/api/v1/images`, shared with machine-images)."""

import contextlib
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from api import agent_requests, container_bulk, errands, signed_uploads
from api.auth import AUTH_SCHEMES, BUILDS_WRITE, Reader, Writer, require
from api.body import idempotency_key, json_object
from api.cancel import cancel
from api.container_names import PLATFORM, personal_or_team, require_admin, resolve
from api.container_requests import (
    StartRequest,
    WantedBuild,
    WantedTransfers,
    check_sources,
    understand,
)
from api.container_updates import UpdateAnswer
from api.container_views import (
    NO_UPLOAD,
    ContainerBuildStatus,
    DeletedAnswer,
    build_status,
    copies_answer,
    display,
    image_row,
    taken_on,
)
from api.deps import P, Parts
from api.errors import IMAGES_PATH, answer_in_detail, detail_errors, from_validation
from api.ids import UUID_TEXT, BuildId
from api.limits import RateLimit
from api.patience import promptly
from api.signed_uploads import takes_uploads_itself, upload_url
from api.submit import Posted, TakenOn, answer_once
from kiln.catalog import builds, contexts, tags
from kiln.catalog import errands as errand_rows
from kiln.catalog.builds import BuildWithImage, NewBuild
from kiln.catalog.contexts import ContextRow
from kiln.catalog.keys import Identity
from kiln.catalog.session import Transaction
from kiln.catalog.tables import RegistryErrand
from kiln.catalog.tags import TagFilter
from kiln.errors import (
    BuildNotFoundError,
    ConflictError,
    ContextInvalidError,
    ImageNotFoundError,
    InvalidRequestError,
    UnavailableError,
)
from kiln.models import Api, BuildStatus, ContainerBuildSpec, Failure, TransferSpec
from kiln.naming import context_key
from kiln.ports import ContextFacts
from kiln.references import image_name_problem, image_tag_problem
from workflows.start import announce_context

# One namespace of images: what cloud-builds made is listed, watched and managed here too.
APIS = (Api.CONTAINER_IMAGES, Api.CLOUD_BUILDS)
PAGE_LIMIT = 250
PAGE_DEFAULT = 50
TeamQuery = Annotated[str, Query(alias="teamId", description="the organization's id or slug: its team's image")]
_images = APIRouter(prefix=IMAGES_PATH, tags=["container-images"], dependencies=AUTH_SCHEMES)


# Shared with machine-images


async def build(request: Request, parts: Parts, identity: Identity, raw: bytes, body: dict[str, Any]) -> JSONResponse:
    """The answer to `POST /build` with a container-images body: a build that waits for its context, one from the
    agents' template, or copies."""
    answer_in_detail(request)
    require(identity, BUILDS_WRITE)
    await run_in_threadpool(parts.container_limits.build.check, _address(request), identity.key_id)
    wanted = _understood(parts, identity, body)
    parts.containers.require()
    if isinstance(wanted, WantedBuild) and wanted.spec.agent is not None:
        await run_in_threadpool(agent_requests.check_base_image, parts, identity, wanted.spec.agent)
        insert = _agent_build(parts, identity, wanted)
    elif isinstance(wanted, WantedBuild):
        insert = await _context_build(request, parts, identity, wanted)
    else:
        insert = _copies(parts, identity, await run_in_threadpool(check_sources, wanted, parts.containers.public))
    posted = Posted(identity.organization_id, 201, raw, idempotency_key(request))
    return JSONResponse(await answer_once(parts, posted, insert), posted.status_code)


def list_page(  # noqa: PLR0913, PLR0917  the contract's filters
    request: Request,
    parts: Parts,
    identity: Identity,
    offset: int | None,
    limit: int | None,
    search: str,
    team_id: str,
    owner_scope: str,
) -> dict[str, Any]:
    """The answer to `GET` with `offset` or `limit`. Raises ApiError 429, DetailError 403, InvalidRequestError."""
    _count(request, parts.container_limits.listing, identity)
    wanted = _filter(identity, search, team_id, owner_scope)
    first, size = offset or 0, limit or PAGE_DEFAULT
    if "\0" in search:  # no name holds it, and PostgreSQL does not compare with it
        return {"data": [], "totalCount": 0, "offset": first, "limit": size}
    with parts.catalog.read() as session:
        rows, total = tags.page(session, wanted, first, size)
    data = [image_row(row, parts.settings.registry_host) for row in rows]
    return {"data": data, "totalCount": total, "offset": first, "limit": size}


# Its own


@_images.get(
    "/build/{build_id}",
    summary="Get a container build's status",
    response_model=ContainerBuildStatus,
    responses=detail_errors(401, 403, 404, 422, 500, 503),
)
def get_build(build_id: BuildId, identity: Reader, parts: P) -> dict[str, Any]:
    """`UPLOADING` until its context has come and it is started, `PENDING` until a builder takes it up."""
    with parts.catalog.read() as session:
        return build_status(session, _find(session, identity, build_id), parts.settings.registry_host)


@_images.post(
    "/build/{build_id}/start",
    summary="Start a build whose context has been uploaded",
    response_model=ContainerBuildStatus,
    responses=detail_errors(401, 403, 404, 409, 413, 415, 422, 500, 503),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/StartRequest"}}},
        }
    },
)
async def start_build(request: Request, build_id: BuildId, identity: Writer, parts: P) -> dict[str, Any]:
    """Lets the build begin. Repeating it is harmless."""
    _, body = await json_object(request, parts.settings.max_body_bytes)
    _check_start(body)
    answer, fresh = await run_in_threadpool(_start, parts, identity, build_id)
    if fresh:
        with contextlib.suppress(UnavailableError):  # the row holds: the workflow looks at it by itself
            await promptly(announce_context(parts.temporal, answer["id"]))
    return answer


@_images.post(
    "/build/{build_id}/cancel",
    status_code=202,
    summary="Cancel a container build",
    response_model=ContainerBuildStatus,
    responses=detail_errors(401, 403, 404, 422, 500, 503),
)
async def cancel_build(build_id: BuildId, identity: Writer, parts: P) -> dict[str, Any]:
    """Asks for the build's end; it reads `CANCELLED` once nothing of it is left. Repeating it changes nothing."""
    found = await cancel(parts, identity, _id(build_id), APIS)
    return await run_in_threadpool(_status, parts, found)


@_images.patch(
    "",
    summary="Rename images, or change who may pull them",
    response_model=UpdateAnswer,
    responses=detail_errors(401, 403, 413, 415, 422, 429, 500, 503),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/UpdateRequest"}}},
        }
    },
)
async def update_images(request: Request, identity: Writer, parts: P) -> dict[str, Any]:
    """Each update stands alone, and says what became of it; with `dryRun` nothing is written."""
    await run_in_threadpool(_count, request, parts.container_limits.patch, identity)
    _, body = await json_object(request, parts.settings.max_body_bytes)
    return await run_in_threadpool(container_bulk.update, parts, identity, body)


@_images.delete(
    "/{image_name:path}/{image_tag}",
    summary="Delete a container image's tag",
    response_model=DeletedAnswer,
    responses=detail_errors(401, 403, 404, 409, 422, 429, 500, 503),
)
def delete_image(  # noqa: PLR0913, PLR0917  what a request carries
    request: Request,
    image_name: Annotated[str, Path(description="may hold `/`, and an owner before it", examples=["myapp"])],
    image_tag: Annotated[str, Path(description="the tag", examples=["v1"])],
    identity: Writer,
    parts: P,
    team_id: TeamQuery = "",
) -> dict[str, Any]:
    """The tag goes from the list, and its manifest from the registry unless another tag needs it."""
    _count(request, parts.container_limits.delete, identity)
    namespace, name = resolve(identity, image_name, personal_or_team(identity, team_id))
    if namespace is PLATFORM:
        require_admin(identity)
    shown, errand = _delete(parts, namespace.owner, name, image_tag)
    if errand is not None:
        errands.run(parts, errand)
    return {"success": True, "message": f"{shown} was deleted"}


router = APIRouter()
router.include_router(_images)
router.include_router(signed_uploads.router)


# What they are made of


def _understood(parts: Parts, identity: Identity, body: dict[str, Any]) -> WantedBuild | WantedTransfers:
    if agent_requests.is_agent_body(body):
        return agent_requests.understand(body, identity, parts.settings.agent_base_image)
    return understand(body, identity)


def _address(request: Request) -> str:
    return request.client.host if request.client is not None else ""


def _count(request: Request, limit: RateLimit, identity: Identity) -> None:
    limit.check(_address(request), identity.key_id)


def _id(text: str) -> str:
    if not UUID_TEXT.fullmatch(text):
        raise BuildNotFoundError("no build of this organization has this id")
    return text.lower()


def _find(session: Transaction, identity: Identity, build_id: str) -> BuildWithImage:
    found = builds.find(session, identity.organization_id, _id(build_id), APIS)
    if found is None:
        raise BuildNotFoundError("no build of this organization has this id")
    return found


def _status(parts: Parts, found: BuildWithImage) -> dict[str, Any]:
    with parts.catalog.read() as session:
        return build_status(session, found, parts.settings.registry_host)


async def _context_build(
    request: Request, parts: Parts, identity: Identity, wanted: WantedBuild
) -> Callable[[Transaction], TakenOn]:
    until = datetime.now(UTC) + parts.settings.upload_patience
    new = NewBuild(
        organization_id=identity.organization_id,
        api=Api.CONTAINER_IMAGES,
        spec=wanted.spec,
        created_by=identity.key_id,
        platform=wanted.platform,
        upload_until=until,
    )
    upload = {
        "upload_url": await upload_url(parts, request, new.id, until),
        "expires_in": parts.settings.upload_seconds,
    }

    def insert(tx: Transaction) -> TakenOn:
        taken = _take_on(tx, parts, new)
        return TakenOn(taken.builds, {**taken.response, **upload})

    return insert


def _agent_build(parts: Parts, identity: Identity, wanted: WantedBuild) -> Callable[[Transaction], TakenOn]:
    new = _order(identity, wanted.platform, wanted.spec)

    def insert(tx: Transaction) -> TakenOn:
        taken = _take_on(tx, parts, new)
        return TakenOn(taken.builds, {**taken.response, **NO_UPLOAD})

    return insert


def _take_on(tx: Transaction, parts: Parts, new: NewBuild) -> TakenOn:
    """A build's row, and its tag's."""
    target = new.spec.target  # type: ignore[union-attr]  # every container spec has one
    visibility = tags.resolved_visibility(tx, target)
    row = builds.insert(tx, new)
    tags.claim(tx, row, target)
    return TakenOn([row], taken_on(row, parts.settings.registry_host, visibility))


def _copies(parts: Parts, identity: Identity, wanted: WantedTransfers) -> Callable[[Transaction], TakenOn]:
    orders = [None if one.spec is None else _order(identity, wanted.platform, one.spec) for one in wanted.transfers]

    def insert(tx: Transaction) -> TakenOn:
        taken = [None if order is None else _take_on(tx, parts, order) for order in orders]
        rows = [row for one in taken if one is not None for row in one.builds]
        return TakenOn(rows, copies_answer(wanted, [None if one is None else one.response for one in taken]))

    return insert


def _order(identity: Identity, platform: str, spec: ContainerBuildSpec | TransferSpec) -> NewBuild:
    """A build that waits for nothing."""
    return NewBuild(
        organization_id=identity.organization_id,
        api=Api.CONTAINER_IMAGES,
        spec=spec,
        created_by=identity.key_id,
        platform=platform,
    )


def _filter(identity: Identity, search: str, team_id: str, owner_scope: str) -> TagFilter:
    namespace = personal_or_team(identity, team_id)
    if owner_scope and team_id:
        raise InvalidRequestError("teamId", "platform images have no team")
    if owner_scope:
        namespace = PLATFORM
    return TagFilter(identity.organization_id, namespace.type, namespace.owner, search or None)


def _check_start(body: dict[str, Any]) -> None:
    try:
        wanted = StartRequest.model_validate(body)
    except ValidationError as error:
        raise from_validation(error) from None
    if not wanted.context_uploaded:
        raise InvalidRequestError(
            "context_uploaded", "must be true; a build that is not to be started may be cancelled"
        )


def _start(parts: Parts, identity: Identity, build_id: str) -> tuple[dict[str, Any], bool]:
    """The build's status, and whether this call started it. Raises BuildNotFoundError, ConflictError, ContextError."""
    with parts.catalog.read() as session:
        known = _find(session, identity, build_id).build.id
        context = _startable(contexts.of(session, known))
    facts = None if context.started else _facts(parts, context)
    with parts.catalog.transaction() as tx:
        if not contexts.start(tx, known, facts):
            _startable(contexts.of(tx, known))
            raise ConflictError("the build context has not been uploaded yet")
        return build_status(tx, _find(tx, identity, known), parts.settings.registry_host), not context.started


def _startable(context: ContextRow | None) -> ContextRow:
    if context is None or context.upload_until is None:
        raise ConflictError("the build takes no upload")
    if not context.open:
        raise ConflictError("the build has ended")
    if context.status is BuildStatus.CANCELLING:
        raise ConflictError("the build is being cancelled")
    return context


def _facts(parts: Parts, context: ContextRow) -> ContextFacts | None:
    """What the archive is that came past Kiln; one that came through it was checked then. An unfit one fails the build."""
    if not takes_uploads_itself(parts, context.build_id):
        return None
    key = context_key(context.build_id)
    try:
        return parts.contexts.check(key, context.dockerfile)
    except ContextInvalidError as error:
        with parts.catalog.transaction() as tx:
            rejected = contexts.reject(tx, context.build_id, Failure(code=error.code, message=str(error)))
        if rejected:
            parts.logs.end(context.build_id, BuildStatus.FAILED.value)
            parts.contexts.delete(key)
        raise


def _delete(parts: Parts, owner: str, name: str, tag: str) -> tuple[str, RegistryErrand | None]:
    """Takes the tag off the list; what the registry is to do for it. Raises ImageNotFoundError, ImageBuildingError."""
    if image_name_problem(name, owner) or image_tag_problem(tag):
        raise ImageNotFoundError("no image of this organization has this name and tag")
    with parts.catalog.transaction() as tx:
        row = tags.find(tx, owner, name, tag)
        if row is None:
            raise ImageNotFoundError("no image of this organization has this name and tag")
        shown = display(row.tag)
        tags.remove(tx, row.tag)
        digest = row.tag.digest  # as the removal found it
        errand = None if digest is None else errand_rows.add(tx, f"{owner}/{name}", tag, digest)
        return shown, errand
