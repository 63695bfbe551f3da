"""The contract machine-images: AMIs built with Packer (`/api/v1/images`)."""

import asyncio
import contextlib
import time
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from api import container_images
from api.auth import AUTH_SCHEMES, BUILDS_WRITE, Reader, Writer, caller, require
from api.body import IDEMPOTENCY_PARAMETER, idempotency_key, json_object
from api.cancel import cancel
from api.container_requests import is_container_body
from api.container_views import ContainerBuildAnswer, ContainerImageList
from api.deps import P, Parts
from api.errors import ApiError, either_errors, errors, from_kiln, lists_containers, shared_errors
from api.ids import BuildId, ImageId, Name, ami_id_of, build_id_of
from api.log_stream import LOG_RESPONSES, AfterQuery, LastEventId, log_response
from api.machine_requests import understand
from api.machine_views import (
    AcceptedBuild,
    MachineBuild,
    MachineImageList,
    accepted,
    finished_image,
    machine_build,
    pending_image,
    pending_since,
    shown,
)
from api.openapi import EITHER_BODY
from api.patience import promptly
from api.submit import Submission, submit
from kiln.catalog import builds, images
from kiln.catalog.builds import BuildWithImage, NewBuild
from kiln.catalog.images import ImageFilter
from kiln.catalog.keys import Identity
from kiln.catalog.session import Transaction
from kiln.catalog.tables import Image
from kiln.errors import (
    BuildNotFoundError,
    ImageBuildingError,
    ImageNotFoundError,
    UnavailableError,
)
from kiln.models import Api, ImageRef
from workflows.start import start_deletion

DELETE_PATIENCE = timedelta(seconds=20)
DELETE_POLL_SECONDS = 0.05
# What both databases count to.
OFFSET_LIMIT = 2**53
KEPT_SNAPSHOTS = "Kiln-Kept-Snapshots"
KEPT_SNAPSHOTS_SCHEMA = {"schema": {"type": "string"}, "description": "snapshots that another AMI also uses"}
router = APIRouter(prefix="/api/v1/images", tags=["machine-images"], dependencies=AUTH_SCHEMES)


@router.post(
    "/build",
    status_code=202,
    response_model=AcceptedBuild,
    summary="Start an image build",
    responses={
        201: {"model": ContainerBuildAnswer, "description": "A container image is being built, or images copied"},
        **shared_errors(401, 413, 415),
        **either_errors(403, 409, 422, 429, 500, 503),
    },
    openapi_extra={
        "parameters": [IDEMPOTENCY_PARAMETER],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": EITHER_BODY}},
        },
    },
)
async def build_image(request: Request, parts: P) -> JSONResponse:
    """Bakes an AMI with a coding agent installed, or makes a container image: the body's fields say which.

    The build is queued; watch it by its id.
    """
    identity = await _caller_of_either(request, parts)
    raw, body = await json_object(request, parts.settings.max_body_bytes, shared=True)
    if is_container_body(body):
        return await container_images.build(request, parts, identity, raw, body)
    require(identity, BUILDS_WRITE)
    parts.build_limit.check(identity.key_id)
    submission = _submission(identity, parts, raw, body, idempotency_key(request))
    answer = await submit(parts, submission, lambda build: accepted(build, simulated=parts.settings.simulated))
    return JSONResponse(answer, submission.status_code)


async def _caller_of_either(request: Request, parts: Parts) -> Identity:
    """Who calls. Raises ApiError in both contracts' shapes: it is not clear yet whose the request is."""
    try:
        return await caller(request, parts)
    except ApiError as error:
        raise error.as_shared() from None
    except UnavailableError as error:
        raise from_kiln(error).as_shared() from error


def _submission(identity: Identity, parts: Parts, raw: bytes, body: dict[str, Any], key: str | None) -> Submission:
    wanted = understand(body, parts.settings, parts.templates)
    new = NewBuild(
        organization_id=identity.organization_id,
        api=Api.MACHINE_IMAGES,
        spec=wanted.spec,
        created_by=identity.key_id,
        secrets=parts.sealer.seal(wanted.secrets),
    )
    return Submission(new=new, status_code=202, body=raw, idempotency_key=key)


@router.delete("/build", include_in_schema=False)
def delete_build() -> Response:
    """`build` is a path of its own, and no AMI's id: it knows no DELETE."""
    raise HTTPException(405, headers={"Allow": "POST"})


@router.get(
    "",
    summary="List images",
    response_model=MachineImageList | ContainerImageList,
    responses=either_errors(401, 403, 422, 429, 500, 503),
)
def list_images(  # noqa: PLR0913, PLR0917  two contracts' filters
    request: Request,
    identity: Reader,
    parts: P,
    region: Annotated[Name, Query(description="only AMIs of this region")] = "",
    provider: Annotated[Name, Query(description="only AMIs with this agent")] = "",
    offset: Annotated[
        int | None, Query(ge=0, le=OFFSET_LIMIT, description="of container images: how many to skip")
    ] = None,
    limit: Annotated[
        int | None, Query(ge=1, le=container_images.PAGE_LIMIT, description="of container images: how many at most")
    ] = None,
    search: Annotated[str, Query(description="in a container image's `owner/name:tag`, in any case")] = "",
    team_id: container_images.TeamQuery = "",
    owner_scope: Annotated[
        Literal["", "platform"],
        Query(alias="ownerScope", description="`platform`: container images of no organization"),
    ] = "",
) -> JSONResponse:
    """Every AMI of the organization that exists in EC2; with `offset` or `limit` its container images. Newest first."""
    if lists_containers(request):
        page = container_images.list_page(request, parts, identity, offset, limit, search, team_id, owner_scope)
        return JSONResponse(page)
    return JSONResponse({"images": _machine_images(parts, identity, region, provider)})


def _machine_images(parts: Parts, identity: Identity, region: str, provider: str) -> list[dict[str, Any]]:
    wanted = ImageFilter(identity.organization_id, Api.MACHINE_IMAGES, region or None, provider or None)
    with parts.catalog.read() as session:
        pending = builds.pending_images(session, identity.organization_id, Api.MACHINE_IMAGES)
        finished = images.listing(session, wanted, datetime.now(UTC) - DELETE_PATIENCE)
    simulated = parts.settings.simulated
    dated = [
        (pending_since(build), pending_image(build, simulated=simulated)) for build in pending if wanted.takes(build)
    ]
    dated += [(row.created_at, finished_image(row)) for row in finished]
    dated.sort(key=itemgetter(0), reverse=True)
    return [image for _, image in dated]


@router.get(
    "/builds/{build_id}",
    summary="Get a build's status",
    response_model=MachineBuild,
    response_model_exclude_unset=True,
    responses=errors(401, 403, 404, 422, 500, 503),
)
def get_build(build_id: BuildId, identity: Reader, parts: P) -> dict[str, Any]:
    """`queued` until Packer runs, `building` while it does, then how it ended."""
    with parts.catalog.read() as session:
        return machine_build(_find(session, identity, build_id_of(build_id)), simulated=parts.settings.simulated)


@router.post(
    "/builds/{build_id}/cancel",
    status_code=202,
    summary="Cancel a build",
    response_model=MachineBuild,
    response_model_exclude_unset=True,
    responses=errors(401, 403, 404, 422, 500, 503),
)
async def cancel_build(build_id: BuildId, identity: Writer, parts: P) -> dict[str, Any]:
    """Asks for the build's end; it reads `cancelled` once nothing of it is left in EC2. Repeating it changes nothing."""
    found = await cancel(parts, identity, build_id_of(build_id), Api.MACHINE_IMAGES)
    return machine_build(found, simulated=parts.settings.simulated)


@router.get(
    "/builds/{build_id}/logs",
    summary="Follow a build's log",
    response_class=Response,
    responses={**LOG_RESPONSES, **errors(401, 403, 404, 422, 500, 503)},
)
def build_log(  # noqa: PLR0913, PLR0917  what a request carries
    request: Request,
    build_id: BuildId,
    identity: Reader,
    parts: P,
    after: AfterQuery = 0,
    last_event_id: LastEventId = "",
) -> Response:
    """Server-sent events, each line numbered; the stream ends with the build."""
    with parts.catalog.read() as session:
        found = _find(session, identity, build_id_of(build_id))
    return log_response(request, parts, found.build, after, last_event_id, shown)


@router.delete(
    "/{image_id}",
    status_code=204,
    summary="Delete an image",
    response_class=Response,
    responses={
        202: {"description": "Not all is gone yet; the deletion goes on in the background"},
        204: {"description": "The AMI and its snapshots are gone", "headers": {KEPT_SNAPSHOTS: KEPT_SNAPSHOTS_SCHEMA}},
        **errors(401, 403, 404, 409, 422, 500, 503),
    },
)
async def delete_image(image_id: ImageId, identity: Writer, parts: P) -> Response:
    """Deregisters the AMI and deletes every EBS snapshot behind it. Running instances are not affected.

    A snapshot that another AMI also uses is kept, and named in the header `Kiln-Kept-Snapshots`.
    """
    image = await run_in_threadpool(_begin_deletion, parts, identity, ami_id_of(image_id))
    ref = ImageRef(image_id=image.id, organization_id=image.organization_id)
    deadline = time.monotonic() + DELETE_PATIENCE.total_seconds()
    with contextlib.suppress(UnavailableError):  # the row stands; the dispatcher starts the deletion later
        await promptly(start_deletion(parts.temporal, ref))
    while time.monotonic() < deadline and not parts.closing.is_set():
        row = await run_in_threadpool(_image_row, parts, image.id)
        if row is not None and row.status == images.DELETED:
            kept = {KEPT_SNAPSHOTS: ", ".join(row.kept_snapshot_ids)} if row.kept_snapshot_ids else None
            return Response(status_code=204, headers=kept)
        await asyncio.sleep(DELETE_POLL_SECONDS)
    return Response(status_code=202)


def _find(session: Transaction, identity: Identity, build_id: str) -> BuildWithImage:
    found = builds.find(session, identity.organization_id, build_id, Api.MACHINE_IMAGES)
    if found is None:
        raise BuildNotFoundError("no build of this organization has this id")
    return found


def _begin_deletion(parts: Parts, identity: Identity, reference: str) -> Image:
    with parts.catalog.transaction() as tx:
        image = images.find(tx, identity.organization_id, Api.MACHINE_IMAGES, reference)
        if image is None and builds.building_image(tx, identity.organization_id, Api.MACHINE_IMAGES, reference):
            raise ImageBuildingError(f"{reference} is still being built")
        if image is None or not images.begin_deletion(tx, image.id):
            raise ImageNotFoundError("no image of this organization has this id")
        return image


def _image_row(parts: Parts, image_id: str) -> Image | None:
    with parts.catalog.read() as session:
        return images.get(session, image_id)
