"""What only Temporal knows of a build, asked with a second's patience: a list stays quick when nobody answers."""

import asyncio
import json
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from starlette.concurrency import run_in_threadpool
from temporalio.client import Client, WorkflowExecutionDescription, WorkflowQueryFailedError, WorkflowQueryRejectedError
from temporalio.service import RPCError, RPCStatusCode

from api.build_views import Live
from api.deps import Parts
from api.submit import ref_of
from api.times import iso_or_none
from kiln.catalog import workers
from kiln.catalog.tables import Build
from kiln.models import BuildKind, BuildStatus, Progress
from kiln.naming import build_workflow_id
from workflows.build_image import BuildImageWorkflow
from workflows.options import builder_queue

PATIENCE = timedelta(seconds=1)


async def live_view(parts: Parts, build: Build) -> Live:
    """The build's page in the Temporal UI while Temporal keeps it, and its progress while it is live."""
    simulated = parts.settings.simulated
    if not BuildStatus(build.status).is_open:
        return Live(_url(parts, build, await _look(parts.temporal, build)), None, simulated)
    seen, progress = await asyncio.gather(_look(parts.temporal, build), _progress(parts, build))
    if progress is None:
        return Live(_url(parts, build, seen), None, simulated)
    waiting = await _waiting_for(parts, build)
    return Live(_url(parts, build, seen), _body(progress, seen.description, waiting), simulated)


@dataclass(frozen=True)
class _Seen:
    """What Temporal says of a workflow: its description, that it has none (`unknown`), or nothing at all."""

    description: WorkflowExecutionDescription | None = None
    unknown: bool = False


async def _look(client: Client, build: Build) -> _Seen:
    handle = client.get_workflow_handle(build_workflow_id(build.id))
    try:
        return _Seen(await asyncio.wait_for(handle.describe(rpc_timeout=PATIENCE), PATIENCE.total_seconds()))
    except RPCError as error:
        return _Seen(unknown=error.status is RPCStatusCode.NOT_FOUND)
    except (TimeoutError, RuntimeError):
        return _Seen()


def _url(parts: Parts, build: Build, seen: _Seen) -> str | None:
    """A Temporal that does not answer has not forgotten the workflow."""
    if seen.unknown:
        return None
    return f"{parts.settings.ui_url}/namespaces/{parts.temporal.namespace}/workflows/{build_workflow_id(build.id)}"


async def _progress(parts: Parts, build: Build) -> Progress | None:
    """The workflow's own word; None when no worker answers within the patience."""
    handle = parts.temporal.get_workflow_handle(build_workflow_id(build.id))
    try:
        query = handle.query(BuildImageWorkflow.status, rpc_timeout=PATIENCE)
        view = await asyncio.wait_for(query, PATIENCE.total_seconds())
    except (RPCError, TimeoutError, RuntimeError, WorkflowQueryFailedError, WorkflowQueryRejectedError):
        return None
    return view.progress


async def _waiting_for(parts: Parts, build: Build) -> str | None:
    """A queued build waits for a builder; one that nobody can take up says so."""
    if build.status != BuildStatus.QUEUED:
        return None
    served = await run_in_threadpool(_is_served, parts, builder_queue(ref_of(build)))
    return f"waiting for {_builder(build)}" + ("" if served else "; none is connected")


def _builder(build: Build) -> str:
    match BuildKind(build.kind):
        case BuildKind.CONTAINER:
            return f"a {build.platform} builder"
        case BuildKind.TRANSFER:
            return "a transfer builder"
        case BuildKind.SNAPSHOT:
            return "a worker with the role control"
        case _:
            return "a Packer builder"


def _is_served(parts: Parts, queue: str) -> bool:
    with parts.catalog.read() as session:
        return workers.serves(session, queue)


def _body(progress: Progress, described: WorkflowExecutionDescription | None, waiting: str | None) -> dict[str, Any]:
    return {
        "phase": progress.phase,
        "detail": progress.detail,
        "attempt": progress.attempt,
        "since": iso_or_none(progress.since),
        "last_line": _last_line(described),
        "waiting_for": waiting,
    }


def _last_line(described: WorkflowExecutionDescription | None) -> str | None:
    """What the builder's heartbeat last said of its tool's output; redacted before it was sent."""
    if described is None:
        return None
    for pending in described.raw_description.pending_activities:
        for payload in pending.heartbeat_details.payloads:
            details = _decoded(payload.data)
            if isinstance(details, dict) and details.get("last_line"):
                return str(details["last_line"])
    return None


def _decoded(data: bytes) -> object:
    try:
        return json.loads(data)
    except ValueError:
        return None
