"""What runners of agent pods ask and report: `/api/v1/runner/*`, Kiln's own contract, with a runner's token.

A runner's process registers first. Each later call names it, and is refused once another one has registered.
"""

import asyncio
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Annotated, Any, Final, TypeVar

from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool

from api.body import bounded_body
from api.deps import P, Parts
from api.pod_errors import AUTH_REQUIRED, INVALID_TOKEN, PodError
from api.runner_models import (
    CALLER_UNKNOWN,
    BeatAnswer,
    BeatBody,
    EndedBody,
    LogAnswer,
    LogBody,
    NewsAnswer,
    NewsBody,
    RegisterAnswer,
    RegisterBody,
    Said,
    ShimBody,
    runner_errors,
)
from kiln.catalog import runners
from kiln.catalog.tables import Organization
from kiln.errors import InvalidRequestError, NotFoundError
from kiln.pod_orders import write_order
from kiln.ports.pods import News, PodOrder, RunnerProcess
from kiln.references import repository_at

BEAT_SECONDS: Final = 5.0
NEWS_SECONDS: Final = 20.0
LOOK_SECONDS: Final = 0.5
# A large image takes its time, and a runner that was away asks again.
PULL_TIME: Final = timedelta(hours=6)
NOT_TO_KEEP: Final = {"Cache-Control": "no-store"}
CHALLENGE: Final = {"WWW-Authenticate": "Bearer"}
KEY_LENGTH: Final = 16
# What runners send is of Kiln's own making: however little users may send, a batch of log lines passes.
BODY_BYTES: Final = 1024 * 1024
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

Body = TypeVar("Body", bound=Said)
Key = Annotated[str, Path(description="the pod's key", examples=["pod-k3v9m2x7q1zt"])]

# For OpenAPI's sake; the header is read below, where the form of the token counts too.
RUNNER_TOKEN = HTTPBearer(
    auto_error=False, scheme_name="RunnerToken", description="A runner's token: `Authorization: Bearer krt_…`"
)
router = APIRouter(prefix="/api/v1/runner", tags=["runners"], dependencies=[Depends(RUNNER_TOKEN)])


@dataclass(frozen=True)
class Speaker:
    """Whose token a call carries."""

    id: str
    name: str
    organization_id: str


async def _speaker(request: Request, parts: P) -> Speaker:
    """Raises PodError 401 for a token that is missing, no runner's, unknown or disabled."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token.startswith(runners.RUNNER_PREFIX):
        raise PodError(401, AUTH_REQUIRED, CALLER_UNKNOWN, headers=CHALLENGE)
    speaker = await run_in_threadpool(_identify, parts, token)
    if speaker is None:
        raise PodError(401, INVALID_TOKEN, "the runner's token is not known, or no longer usable", headers=CHALLENGE)
    return speaker


def _identify(parts: Parts, token: str) -> Speaker | None:
    with parts.catalog.read() as session:
        row = runners.identify(session, token)
    return None if row is None else Speaker(row.id, row.name, row.organization_id)


Runner = Annotated[Speaker, Depends(_speaker)]


def _body(model: type[Said]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


@router.post(
    "/register",
    summary="Register a runner's process",
    response_model=RegisterAnswer,
    responses=runner_errors(400, 401, 403, 413, 500, 503),
    openapi_extra=_body(RegisterBody),
)
async def register(request: Request, parts: P, runner: Runner) -> dict[str, Any]:
    """What an earlier process of this runner says is refused from now on."""
    said = await _said(request, parts, RegisterBody)
    if said.runner_name not in (None, runner.name):
        # Before anything else: the process that is registered goes on.
        raise InvalidRequestError("runner_name", f"KILN_RUNNER_TOKEN belongs to the runner {runner.name}")
    await run_in_threadpool(parts.pods.register, runner.id, said.report())
    return {
        "runner_id": runner.id,
        "name": runner.name,
        "organization": await run_in_threadpool(_slug, parts, runner.organization_id),
        "lease_seconds": parts.settings.pod_lease_seconds,
        "beat_seconds": BEAT_SECONDS,
    }


def _slug(parts: Parts, organization_id: str) -> str:
    with parts.catalog.read() as session:
        return session.get_one(Organization, organization_id).slug


@router.post(
    "/beat",
    summary="Say that the runner is there",
    response_model=BeatAnswer,
    responses=runner_errors(400, 401, 403, 413, 500, 503),
    openapi_extra=_body(BeatBody),
)
async def beat(request: Request, parts: P, runner: Runner) -> dict[str, Any]:
    """The leases of the pods that it lists go on. To be repeated every few seconds."""
    said = await _said(request, parts, BeatBody)
    told = await run_in_threadpool(parts.pods.beat, _process(runner, said), said.pods)
    return {"end": sorted(told.end), "remove": sorted(told.remove)}


@router.post(
    "/news",
    summary="Wait for news of pods",
    response_model=NewsAnswer,
    responses=runner_errors(400, 401, 403, 413, 500, 503),
    openapi_extra=_body(NewsBody),
)
async def news(request: Request, response: Response, parts: P, runner: Runner) -> dict[str, Any]:
    """Answers as soon as there are any, and after 20 s without. Prompts up to the numbers given are noted as taken."""
    said = await _said(request, parts, NewsBody)
    found = await _news(request, parts, _process(runner, said), said)
    response.headers.update(NOT_TO_KEEP)
    return {"end": sorted(found.end), "prompts": found.prompts}


async def _news(request: Request, parts: Parts, process: RunnerProcess, said: NewsBody) -> News:
    """Looks twice a second, each time for a moment only: those who wait hold no thread. Whoever has left, and all who
    wait when the server stops, are told nothing."""
    until = time.monotonic() + NEWS_SECONDS
    while True:
        found = await run_in_threadpool(parts.pods.news, process, said.pods)
        if found.end or found.prompts or time.monotonic() >= until:
            return found
        if await _closes(parts, LOOK_SECONDS) or await request.is_disconnected():
            return News()


async def _closes(parts: Parts, seconds: float) -> bool:
    """Whether the server stops within so many seconds."""
    try:
        return await asyncio.wait_for(parts.closing.wait(), seconds)
    except TimeoutError:
        return False


@router.post(
    "/pods/{key}/begin",
    summary="Take a pod up",
    responses={
        200: {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/PodOrder"}}}},
        **runner_errors(400, 401, 403, 404, 409, 413, 500, 503),
    },
    openapi_extra=_body(ShimBody),
)
async def begin(key: Key, request: Request, parts: P, runner: Runner) -> Response:
    """The pod's order, with its secrets in clear. The first shim that asks has the pod, and only it may ask again."""
    said = await _said(request, parts, ShimBody)
    order = await run_in_threadpool(parts.pods.begin, _process(runner, said), _known(key), said.shim)
    return Response(
        write_order(_with_password(parts, runner, order)), media_type="application/json", headers=NOT_TO_KEEP
    )


def _with_password(parts: Parts, runner: Speaker, order: PodOrder) -> PodOrder:
    """The order with what opens its image, where that is in Kiln's own registry."""
    if order.image is None or repository_at(parts.settings.registry_host, order.image.reference) is None:
        return order
    expires_at = datetime.now(UTC) + PULL_TIME
    password = parts.containers.pod_credentials.issue(order.pod_id, runner.organization_id, expires_at)
    return replace(order, image=replace(order.image, token=password))


@router.post(
    "/pods/{key}/started",
    summary="Say that an agent runs",
    status_code=HTTPStatus.NO_CONTENT,
    responses=runner_errors(400, 401, 403, 404, 409, 413, 500, 503),
    openapi_extra=_body(ShimBody),
)
async def started(key: Key, request: Request, parts: P, runner: Runner) -> None:
    """The pod is `running`."""
    said = await _said(request, parts, ShimBody)
    await run_in_threadpool(parts.pods.started, _process(runner, said), _known(key), said.shim)


@router.post(
    "/pods/{key}/ended",
    summary="Say that an agent is no more",
    status_code=HTTPStatus.NO_CONTENT,
    responses=runner_errors(400, 401, 403, 404, 409, 413, 500, 503),
    openapi_extra=_body(EndedBody),
)
async def ended(key: Key, request: Request, parts: P, runner: Runner) -> None:
    """Closes a pod that is still open; its log is whole."""
    said = await _said(request, parts, EndedBody)
    await run_in_threadpool(parts.pods.ended, _process(runner, said), _known(key), said.shim, said.pod_result())


@router.post(
    "/pods/{key}/log",
    summary="Keep lines of a pod's log",
    response_model=LogAnswer,
    responses=runner_errors(400, 401, 403, 404, 413, 500, 503),
    openapi_extra=_body(LogBody),
)
async def log(key: Key, request: Request, parts: P, runner: Runner) -> dict[str, Any]:
    """Lines that are there already are not added again, and a log that has ended takes none."""
    raw = await _raw(request, parts)
    return {"kept": await run_in_threadpool(_keep, parts, runner, _known(key), raw)}


def _keep(parts: Parts, runner: Speaker, key: str, raw: bytes) -> int:
    """Everything about it in one thread: reading a large body takes a while, too."""
    said = LogBody.model_validate_json(raw)
    pod = parts.pods.locate(_process(runner, said), key)
    lines = [(EPOCH + timedelta(microseconds=moment), stream, text) for _, moment, stream, text in said.lines]
    return parts.logs.keep(pod.pod_id, said.lines[0][0], lines)


async def _said(request: Request, parts: Parts, model: type[Body]) -> Body:
    """The body. Raises ApiError 413, ValidationError."""
    return model.model_validate_json(await _raw(request, parts))


async def _raw(request: Request, parts: Parts) -> bytes:
    return await bounded_body(request, max(parts.settings.max_body_bytes, BODY_BYTES))


def _process(runner: Speaker, said: Said) -> RunnerProcess:
    return RunnerProcess(runner.id, said.incarnation)


def _known(key: str) -> str:
    """Raises NotFoundError for what can be no pod's key."""
    if not key.isascii() or not key.isprintable() or len(key) > KEY_LENGTH:
        raise NotFoundError("this runner has no such pod")
    return key
