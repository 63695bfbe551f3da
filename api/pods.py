"""The contract pods: agents running on runners (`/api/v1/ext/orgs/{org}/pods`)."""

import re
from typing import Annotated, Final

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BeforeValidator
from starlette.concurrency import run_in_threadpool

from api.auth import AUTH_SCHEMES
from api.body import IDEMPOTENCY_PARAMETER, idempotency_key, json_object
from api.deps import P, Parts
from api.ids import Name
from api.log_stream import LOG_RESPONSES, AfterQuery, LastEventId, end_if_nobody_else_does, pod_log_response
from api.organization_requests import body_schema
from api.pod_auth import PodsReader, PodsWriter
from api.pod_requests import CreatePod, PromptPod, understand
from api.pod_submit import PodCreation
from api.pod_views import KEY_EXAMPLE, Message, PodAnswer, PodPage, pod_body, pod_errors
from api.pod_work import end_pod_work
from api.submit import Posted, answer_once
from kiln.catalog import pods
from kiln.catalog.keys import Identity
from kiln.catalog.pods import KEY_CHARACTERS, KEY_PREFIX, KnownPod
from kiln.errors import InvalidRequestError, NotFoundError, RefusedError
from kiln.models import PodRef, PodStatus

KEY: Final = re.compile(f"{KEY_PREFIX}[a-z0-9]{{{KEY_CHARACTERS}}}")
INTEGER: Final = re.compile("-?[0-9]{1,18}")
PAGE_LIMIT: Final = 100
PAGE_DEFAULT: Final = 20
BODY_BYTES: Final = 4 * 1024 * 1024


def _integer(value: object) -> object:
    # Pydantic takes `5.0` and `1_0` as well.
    if isinstance(value, str) and not INTEGER.fullmatch(value):
        raise ValueError("must be an integer")
    return value


PodKey = Annotated[
    str, Path(description="the pod's key", json_schema_extra={"pattern": f"^{KEY.pattern}$"}, examples=[KEY_EXAMPLE])
]
Statuses = Annotated[Name, Query(description=f"several joined with commas: {', '.join(PodStatus)}")]
Limit = Annotated[int, BeforeValidator(_integer), Query(ge=1, le=PAGE_LIMIT, description="how many pods at most")]
Offset = Annotated[int, BeforeValidator(_integer), Query(ge=0, le=2**53, description="how many pods to skip")]
router = APIRouter(prefix="/api/v1/ext/orgs/{org}/pods", tags=["pods"], dependencies=AUTH_SCHEMES)


@router.get("", summary="List pods", response_model=PodPage, responses=pod_errors(400, 401, 403, 404, 500, 503))
def list_pods(
    identity: PodsReader, parts: P, status: Statuses = "", limit: Limit = PAGE_DEFAULT, offset: Offset = 0
) -> JSONResponse:
    """Newest first."""
    with parts.catalog.read() as session:
        found, total = pods.page(session, identity.organization_id, _names(status), limit, offset)
    shown = [pod_body(known) for known in found]
    return JSONResponse({"pods": shown, "total": total, "limit": limit, "offset": offset})


@router.post(
    "",
    status_code=201,
    summary="Create a pod",
    response_model=PodAnswer,
    responses=pod_errors(400, 401, 403, 404, 413, 429, 500, 503),
    openapi_extra={"parameters": [IDEMPOTENCY_PARAMETER], **body_schema(CreatePod)},
)
async def create_pod(request: Request, identity: PodsWriter, parts: P) -> JSONResponse:
    """Sets an agent to work on a runner, or has it wait for a place there."""
    raw, body = await json_object(request, _body_bytes(parts))
    wanted = understand(CreatePod, body).checked()
    await run_in_threadpool(parts.pod_limit.check, identity.key_id)
    # An idempotency key is good for this path only.
    posted = Posted(identity.organization_id, 201, request.url.path.encode() + b"\n" + raw, idempotency_key(request))
    creation = PodCreation(parts, identity, wanted)
    await creation.check_branch()
    return JSONResponse(await answer_once(parts, posted, creation.insert), 201)


@router.get("/{key}", summary="Get a pod", response_model=PodAnswer, responses=pod_errors(401, 403, 404, 500, 503))
def get_pod(key: PodKey, identity: PodsReader, parts: P) -> JSONResponse:
    """A pod; `orphaned` while its runner is away."""
    return JSONResponse({"pod": pod_body(_find(parts, identity, key))})


@router.post(
    "/{key}/prompt",
    summary="Send a prompt to a pod's agent",
    response_model=Message,
    responses=pod_errors(400, 401, 403, 404, 413, 500, 503),
    openapi_extra=body_schema(PromptPod),
)
async def prompt_pod(request: Request, key: PodKey, identity: PodsWriter, parts: P) -> dict[str, str]:
    """The agent of a pod that is still being created gets it at its start."""
    _, body = await json_object(request, _body_bytes(parts))
    wanted = understand(PromptPod, body)
    await run_in_threadpool(_prompt, parts, identity, key, wanted.prompt)
    return {"message": "Prompt sent"}


@router.post(
    "/{key}/terminate",
    summary="Terminate a pod",
    response_model=Message,
    responses=pod_errors(400, 401, 403, 404, 500, 503),
)
async def terminate_pod(key: PodKey, identity: PodsWriter, parts: P) -> dict[str, str]:
    """`terminated` at once; its processes are gone within the grace."""
    await end_pod_work(parts, await run_in_threadpool(_terminate, parts, identity, key))
    return {"message": "Pod terminated"}


@router.get(
    "/{key}/logs",
    summary="Follow a pod's log",
    response_class=Response,
    responses={**LOG_RESPONSES, **pod_errors(400, 401, 403, 404, 500, 503)},
)
def pod_log(  # noqa: PLR0913, PLR0917  what a request carries
    request: Request,
    key: PodKey,
    identity: PodsReader,
    parts: P,
    after: AfterQuery = 0,
    last_event_id: LastEventId = "",
) -> Response:
    """Server-sent events, each line numbered; the stream ends with the pod."""
    return pod_log_response(request, parts, _find(parts, identity, key).pod, after, last_event_id)


def _body_bytes(parts: Parts) -> int:
    """Room for a prompt that is far too long, so that its refusal names the field."""
    return max(parts.settings.max_body_bytes, BODY_BYTES)


def _names(text: str) -> set[str] | None:
    """The names in a comma list; None for no list. One that there is not matches nothing."""
    return {name.strip() for name in text.split(",")} if text else None


def _find(parts: Parts, identity: Identity, key: str) -> KnownPod:
    with parts.catalog.read() as session:
        found = pods.find(session, identity.organization_id, _checked(key))
    if found is None:
        raise _unknown()
    return found


def _prompt(parts: Parts, identity: Identity, key: str, text: str) -> None:
    """Raises NotFoundError, InvalidRequestError, UnavailableError."""
    try:
        with parts.catalog.transaction() as tx:
            pods.prompt(tx, identity.organization_id, _checked(key), text)
    except RefusedError as error:
        raise InvalidRequestError("prompt", str(error)) from None


def _terminate(parts: Parts, identity: Identity, key: str) -> PodRef:
    """Raises NotFoundError, RefusedError."""
    with parts.catalog.transaction() as tx:
        ref = pods.terminate(tx, identity.organization_id, _checked(key))
    end_if_nobody_else_does(parts, _find(parts, identity, key).pod)
    return ref


def _checked(key: str) -> str:
    if not KEY.fullmatch(key):
        raise _unknown()
    return key


def _unknown() -> NotFoundError:
    return NotFoundError("no pod of this organization has this key")
