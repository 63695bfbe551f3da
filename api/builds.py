"""The contract kiln: builds of every kind through one lens (`/api/v1/builds`)."""

import asyncio
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic.config import JsonDict
from starlette.concurrency import run_in_threadpool

from api.auth import AUTH_SCHEMES, Reader, Writer
from api.build_views import BuildBody, BuildPage, Live, build_body
from api.cancel import cancel
from api.deps import P, Parts
from api.errors import errors
from api.ids import UUID_TEXT, BuildId, Name, build_id_of
from api.log_stream import LOG_RESPONSES, AfterQuery, LastEventId, log_response
from api.progress import live_view
from kiln.catalog import builds
from kiln.catalog.builds import BuildFilter, BuildWithImage
from kiln.catalog.keys import Identity
from kiln.catalog.session import Transaction
from kiln.errors import BuildNotFoundError, InvalidRequestError
from kiln.models import BuildKind, BuildStatus

NAMES_LIMIT = 500
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
# The creation of a page's last build in microseconds, and its id.
CURSOR = re.compile(f"(?P<moment>[0-9]{{16}})-(?P<id>{UUID_TEXT.pattern})")
CURSOR_SCHEMA: JsonDict = {"pattern": f"^([0-9]{{16}}-{UUID_TEXT.pattern})?$"}
Cursor = Annotated[str, Query(description="`next_cursor` of the page before", json_schema_extra=CURSOR_SCHEMA)]
router = APIRouter(prefix="/api/v1/builds", tags=["kiln"], dependencies=AUTH_SCHEMES)


@router.get(
    "",
    summary="List builds of every kind",
    response_model=BuildPage,
    response_model_exclude_unset=True,
    responses=errors(401, 403, 422, 500, 503),
)
async def list_builds(  # noqa: PLR0913, PLR0917  the contract's filters
    identity: Reader,
    parts: P,
    kind: Annotated[Name, Query(description=f"kinds: {', '.join(BuildKind)}")] = "",
    status: Annotated[Name, Query(description=f"statuses: {', '.join(BuildStatus)}")] = "",
    image: Annotated[Name, Query(description="images, by exact reference, AMI id or digest")] = "",
    api: Annotated[Name, Query(description="contracts through which builds came, such as machine-images")] = "",
    limit: Annotated[int, Query(ge=1, le=500, description="how many builds at most")] = 50,
    cursor: Cursor = "",
) -> dict[str, Any]:
    """Newest first; each filter is one name, or several joined with commas. A build that arrives meanwhile makes no
    duplicate and no gap.
    """
    wanted = BuildFilter(
        identity.organization_id,
        apis=_split("api", api),
        kinds=_split("kind", kind),
        statuses=_split("status", status),
        images=_split("image", image),
    )
    after = _decode(cursor) if cursor else None
    rows = await run_in_threadpool(_page, parts, wanted, limit + 1, after)
    shown = rows[:limit]
    bodies = await _bodies(parts, shown)
    return {"builds": bodies, "next_cursor": _encode(shown[-1]) if len(rows) > limit else None}


@router.get(
    "/{build_id}",
    summary="Get a build",
    response_model=BuildBody,
    response_model_exclude_unset=True,
    responses=errors(401, 403, 404, 422, 500, 503),
)
async def get_build(build_id: BuildId, identity: Reader, parts: P) -> dict[str, Any]:
    """A build, with what it is doing now while it is live."""
    found = await run_in_threadpool(_find, parts, identity, build_id_of(build_id))
    return (await _bodies(parts, [found]))[0]


@router.post(
    "/{build_id}/cancel",
    status_code=202,
    summary="Cancel a build",
    response_model=BuildBody,
    response_model_exclude_unset=True,
    responses=errors(401, 403, 404, 422, 500, 503),
)
async def cancel_build(build_id: BuildId, identity: Writer, parts: P) -> dict[str, Any]:
    """Asks for the build's end; it reads `cancelled` once nothing of it is left. Repeating it changes nothing."""
    found = await cancel(parts, identity, build_id_of(build_id), None)
    return (await _bodies(parts, [found]))[0]


@router.get(
    "/{build_id}/logs",
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
    found = _find(parts, identity, build_id_of(build_id))
    return log_response(request, parts, found.build, after, last_event_id, lambda status: status.value)


async def _bodies(parts: Parts, rows: Sequence[BuildWithImage]) -> list[dict[str, Any]]:
    views: list[Live] = await asyncio.gather(*(live_view(parts, row.build) for row in rows))
    return [build_body(row, view) for row, view in zip(rows, views, strict=True)]


def _page(parts: Parts, wanted: BuildFilter, limit: int, after: tuple[datetime, str] | None) -> list[BuildWithImage]:
    with parts.catalog.read() as session:
        return builds.page(session, wanted, limit, after)


def _find(parts: Parts, identity: Identity, build_id: str) -> BuildWithImage:
    with parts.catalog.read() as session:
        found = _in(session, identity, build_id)
    if found is None:
        raise BuildNotFoundError("no build of this organization has this id")
    return found


def _in(session: Transaction, identity: Identity, build_id: str) -> BuildWithImage | None:
    return builds.find(session, identity.organization_id, build_id)


def _split(parameter: str, text: str) -> list[str] | None:
    """The names in a comma list; None for no list. Raises InvalidRequestError for more than a query can hold."""
    if not text:
        return None
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if len(names) > NAMES_LIMIT:
        raise InvalidRequestError(parameter, f"at most {NAMES_LIMIT} names are served at once")
    return names


def _encode(row: BuildWithImage) -> str:
    return f"{(row.build.created_at - EPOCH) // MICROSECOND:016d}-{row.build.id}"


def _decode(cursor: str) -> tuple[datetime, str]:
    """The place of an earlier page's last build. Raises InvalidRequestError."""
    place = CURSOR.fullmatch(cursor)
    if place is None:
        raise InvalidRequestError("cursor", "must be the next_cursor of an earlier page")
    return EPOCH + int(place["moment"]) * MICROSECOND, place["id"]
