"""What only Temporal knows of a build, asked with a second's patience: a list stays quick when nobody answers."""

import asyncio
import json
from datetime import timedelta
from typing import Any

from starlette.concurrency import run_in_threadpool
from temporalio.client import Client, WorkflowExecutionDescription, WorkflowQueryFailedError, WorkflowQueryRejectedError
from temporalio.service import RPCError, RPCStatusCode

from api.build_views import Live
from api.deps import Parts
from api.times import iso_or_none
from kiln.catalog import workers
from kiln.catalog.tables import Build
from kiln.models import BuildKind, BuildStatus, Progress
from kiln.naming import build_workflow_id
from workflows.build_image import BuildImageWorkflow
from workflows.options import BUILDER_QUEUES

PATIENCE = timedelta(seconds=1)
QUEUE_WORDS = {BuildKind.MACHINE: "a Packer builder"}


async def live_view(parts: Parts, build: Build) -> Live:
    """The build's page in the Temporal UI while Temporal keeps it, and its progress while it is live."""
    simulated = parts.settings.simulated
    url = f"{parts.settings.ui_url}/namespaces/{parts.temporal.namespace}/workflows/{build_workflow_id(build.id)}"
    if not BuildStatus(build.status).is_open:
        kept = await _is_kept(parts.temporal, build)
        return Live(url if kept else None, None, simulated)
    described, progress = await asyncio.gather(_describe(parts.temporal, build), _progress(parts, build))
    if progress is None:
        return Live(url, None, simulated)
    waiting = await _waiting_for(parts, build)
    return Live(url, _body(progress, described, waiting), simulated)


async def _is_kept(client: Client, build: Build) -> bool:
    """Whether Temporal still has the workflow. A Temporal that does not answer has not forgotten it."""
    handle = client.get_workflow_handle(build_workflow_id(build.id))
    try:
        await asyncio.wait_for(handle.describe(rpc_timeout=PATIENCE), PATIENCE.total_seconds())
    except RPCError as error:
        return error.status is not RPCStatusCode.NOT_FOUND
    except (TimeoutError, RuntimeError):
        return True
    return True


async def _describe(client: Client, build: Build) -> WorkflowExecutionDescription | None:
    handle = client.get_workflow_handle(build_workflow_id(build.id))
    try:
        return await asyncio.wait_for(handle.describe(rpc_timeout=PATIENCE), PATIENCE.total_seconds())
    except (RPCError, TimeoutError, RuntimeError):
        return None


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
    kind = BuildKind(build.kind)
    served = await run_in_threadpool(_is_served, parts, BUILDER_QUEUES[kind])
    return f"waiting for {QUEUE_WORDS[kind]}" + ("" if served else "; none is connected")


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
