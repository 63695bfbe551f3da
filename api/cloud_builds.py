"""The contract cloud-builds: container images of agents, built from uploaded archives (`/v5/builds`)."""

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from api.cancel import cancel
from api.cloud_auth import CLOUD_SCHEMES, CloudReader, CloudWriter
from api.cloud_requests import FORM_SCHEMA
from api.cloud_submit import CloudSubmission
from api.cloud_views import CloudBuild, CloudBuildList, UndeployedAgent, cloud_build, cloud_page, undeployed_agent
from api.deps import P, Parts
from api.errors import detail_errors
from api.ids import UUID_EXAMPLE, UUID_TEXT, Name
from api.log_stream import line_response
from api.uploads import UploadRoute
from kiln.catalog import agents, builds, cloud_builds
from kiln.catalog.builds import BuildWithImage
from kiln.catalog.cloud_builds import CloudFilter, CloudPage, SortBy, UnknownCursorError
from kiln.catalog.keys import Identity
from kiln.errors import BuildNotFoundError, InvalidRequestError
from kiln.models import Api

LOG_RESPONSES: dict[int | str, dict[str, object]] = {
    200: {
        "description": "An event a line, from the first line on; the connection closes when the build has ended",
        "content": {
            "text/event-stream": {
                "schema": {"type": "string"},
                "example": 'data: {"line": "#1 [internal] load build definition from Dockerfile"}\n\n',
            }
        },
    }
}
BuildId = Annotated[str, Path(description="the build's id", examples=[UUID_EXAMPLE])]
Cursor = Annotated[Name, Query(description="the id of a build")]
router = APIRouter(prefix="/v5/builds", tags=["cloud-builds"], dependencies=CLOUD_SCHEMES)


async def create_build(request: Request, identity: CloudWriter, parts: P) -> JSONResponse:
    """Builds an uploaded archive, or registers a finished image, which is a success at once.

    Exactly one of `context_archive` and `image_url` is sent, and exactly one of `agent_name` and `agent_id`. The archive
    is best sent last: the rest is checked before any of it is stored.
    """
    found = await CloudSubmission(request, parts, identity).take()
    return JSONResponse(cloud_build(found))


router.add_api_route(
    "",
    create_build,
    methods=["POST"],
    route_class_override=UploadRoute,
    summary="Submit a build",
    response_model=CloudBuild,
    responses=detail_errors(401, 403, 404, 413, 422, 500, 503),
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FORM_SCHEMA}}}},
)


@router.get("", summary="List builds", response_model=CloudBuildList, responses=detail_errors(401, 403, 422, 500, 503))
def list_builds(  # noqa: PLR0913, PLR0917  the contract's query
    identity: CloudReader,
    parts: P,
    agent_name: Annotated[Name, Query(description="only builds of this agent")] = "",
    source_commit: Annotated[Name, Query(description="only builds of this commit")] = "",
    working_tree_hash: Annotated[Name, Query(description="only builds of this content")] = "",
    limit: Annotated[int, Query(ge=1, le=10000, description="how many builds at most")] = 100,
    sort_by: Annotated[SortBy, Query(description="what the list is sorted by")] = "created_at",
    sort_order: Annotated[Literal["asc", "desc"], Query(description="upwards or downwards")] = "desc",
    starting_after: Cursor = "",
    ending_before: Cursor = "",
) -> JSONResponse:
    """A page after one build, or immediately before another. A build that arrives meanwhile makes no duplicate and no
    gap."""
    if starting_after and ending_before:
        raise InvalidRequestError("ending_before", "only one of starting_after and ending_before may be sent")
    filters = (text or None for text in (agent_name, source_commit, working_tree_hash))
    wanted = CloudFilter(identity.organization_id, *filters)
    page = _page(parts, wanted, limit, sort_by, sort_order == "desc", starting_after or None, ending_before or None)
    return JSONResponse(cloud_page(page, limit))


@router.get(
    "/undeployed",
    summary="List agents that were never deployed",
    response_model=list[UndeployedAgent],
    responses=detail_errors(401, 403, 500, 503),
)
def list_undeployed(identity: CloudReader, parts: P) -> JSONResponse:
    """Agents none of whose builds ever ran in a pod, the one with the newest build first."""
    with parts.catalog.read() as session:
        found = agents.undeployed(session, identity.organization_id)
    return JSONResponse([undeployed_agent(agent) for agent in found])


@router.get(
    "/{build_id}",
    summary="Get a build",
    response_model=CloudBuild,
    responses=detail_errors(401, 403, 404, 500, 503),
)
def get_build(build_id: BuildId, identity: CloudReader, parts: P) -> JSONResponse:
    """A build as it stands now."""
    return JSONResponse(cloud_build(_find(parts, identity, build_id)))


@router.get(
    "/{build_id}/logs",
    summary="Follow a build's log",
    response_class=Response,
    responses={**LOG_RESPONSES, **detail_errors(401, 403, 404, 500, 503)},
)
def build_log(build_id: BuildId, identity: CloudReader, parts: P) -> Response:
    """Server-sent events, whatever the request accepts; the stream ends with the build."""
    return line_response(parts, _find(parts, identity, build_id).build)


@router.post(
    "/{build_id}/cancel",
    status_code=202,
    summary="Cancel a build",
    response_model=CloudBuild,
    responses=detail_errors(401, 403, 404, 500, 503),
)
async def cancel_build(build_id: BuildId, identity: CloudWriter, parts: P) -> JSONResponse:
    """Asks for the build's end. The answer is the build before that; a build that has ended is left as it is."""
    found = await run_in_threadpool(_find, parts, identity, build_id)
    await cancel(parts, identity, found.build.id, Api.CLOUD_BUILDS)
    return JSONResponse(cloud_build(found), 202)


def _find(parts: Parts, identity: Identity, build_id: str) -> BuildWithImage:
    """Raises BuildNotFoundError, also for what is no id at all."""
    found = None
    if UUID_TEXT.fullmatch(build_id):
        with parts.catalog.read() as session:
            found = builds.find(session, identity.organization_id, build_id.lower(), Api.CLOUD_BUILDS)
    if found is None:
        raise BuildNotFoundError("no build of this account has this id")
    return found


def _page(  # noqa: PLR0913, PLR0917  the contract's query
    parts: Parts,
    wanted: CloudFilter,
    limit: int,
    sort_by: SortBy,
    descending: bool,  # noqa: FBT001
    starting_after: str | None,
    ending_before: str | None,
) -> CloudPage:
    name = "starting_after" if ending_before is None else "ending_before"
    try:
        with parts.catalog.read() as session:
            return cloud_builds.page(session, wanted, limit, sort_by, descending, starting_after, ending_before)
    except UnknownCursorError as error:
        raise InvalidRequestError(name, str(error)) from None
