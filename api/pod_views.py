"""Pods and runners as pods.md shows them."""

from typing import Any

from pydantic import BaseModel, Field

from api.errors import EXAMPLES, documented
from api.pod_errors import CODES, CUSTOM_COMMAND_NOT_ALLOWED, NO_AVAILABLE_RUNNER, POD_OVER, PodErrorBody
from api.times import Timestamp, iso, iso_or_none
from kiln.catalog.pods import KEY_PREFIX, KnownPod
from kiln.catalog.runners import KnownRunner
from kiln.models import AgentType, PodSpec, PodStatus, RunnerStatus, SandboxType

KEY_EXAMPLE = f"{KEY_PREFIX}3k9x0m2p7q1z"
UUID_EXAMPLE = "550e8400-e29b-41d4-a716-446655440000"


class PodBody(BaseModel):
    """An agent at work on a runner. What was not asked for is null."""

    key: str = Field(examples=[KEY_EXAMPLE])
    status: PodStatus
    agent_type_id: AgentType
    runner_id: str = Field(examples=[UUID_EXAMPLE])
    initial_prompt: str | None
    repository_id: int | None
    branch: str | None
    ticket_slug: str | None
    channel_id: int | None
    sandbox_type: SandboxType
    auto_close: bool
    auto_close_delay_seconds: int | None
    pod_timeout_minutes: int | None
    max_turns: int | None
    exit_code: int | None
    error: str | None
    created_at: Timestamp
    started_at: Timestamp | None
    finished_at: Timestamp | None
    updated_at: Timestamp


class PodAnswer(BaseModel):
    """One pod."""

    pod: PodBody


class PodPage(BaseModel):
    """A page of pods; `total` counts all that match."""

    pods: list[PodBody]
    total: int
    limit: int
    offset: int


class RunnerBody(BaseModel):
    """A worker process on some host, and how many of its places are taken."""

    id: str = Field(examples=[UUID_EXAMPLE])
    name: str = Field(examples=["local"])
    status: RunnerStatus
    current_pods: int
    max_concurrent_pods: int
    available_agents: list[str] = Field(examples=[["claude-code"]])
    host_info: dict[str, Any]


class RunnerAnswer(BaseModel):
    """One runner."""

    runner: RunnerBody


class RunnerList(BaseModel):
    """The organization's runners."""

    runners: list[RunnerBody]


class Message(BaseModel):
    """What was done."""

    message: str


def pod_body(known: KnownPod) -> dict[str, Any]:
    """P. A pod's secrets are not among it, nor the names of its variables."""
    row, spec = known.pod, PodSpec.model_validate(known.pod.spec)
    return {
        "key": row.key,
        "status": known.status.value,
        "agent_type_id": spec.agent_type.value,
        "runner_id": row.runner_id,
        "initial_prompt": row.initial_prompt,
        "repository_id": spec.repository_id,
        "branch": spec.branch,
        "ticket_slug": spec.ticket_slug,
        "channel_id": spec.channel_id,
        "sandbox_type": spec.sandbox_type.value,
        "auto_close": spec.auto_close,
        "auto_close_delay_seconds": spec.auto_close_delay_seconds,
        "pod_timeout_minutes": spec.timeout_minutes,
        "max_turns": spec.max_turns,
        "exit_code": row.exit_code,
        "error": row.error,
        "created_at": iso(row.created_at),
        "started_at": iso_or_none(row.started_at),
        "finished_at": iso_or_none(row.finished_at),
        "updated_at": iso(row.updated_at),
    }


def runner_body(known: KnownRunner) -> dict[str, Any]:
    """R."""
    row = known.runner
    return {
        "id": row.id,
        "name": row.name,
        "status": known.status.value,
        "current_pods": known.current_pods,
        "max_concurrent_pods": row.max_concurrent_pods,
        "available_agents": row.available_agents,
        "host_info": row.host_info,
    }


_EXAMPLES = {
    **{status: (code, EXAMPLES.get(status, ("", ""))[1]) for status, code in CODES.items()},
    400: (CODES[400], "runner_id: Field required"),
    401: (CODES[401], "an API key is needed: X-API-Key: amk_…, or Authorization: Bearer amk_…"),
    403: (CUSTOM_COMMAND_NOT_ALLOWED, "custom_agent_command: runner build-7 runs no custom commands"),
    404: (CODES[404], "no pod of this organization has this key"),
    409: (POD_OVER, f"{KEY_EXAMPLE} has ended"),
    503: (NO_AVAILABLE_RUNNER, "runner_id: runner build-7 is offline"),
}


def pod_errors(*statuses: int) -> dict[int | str, dict[str, object]]:
    """OpenAPI's `responses` for these statuses, in the shape of pods."""
    found: dict[int | str, dict[str, object]] = {}
    for status in statuses:
        code, message = _EXAMPLES[status]
        found[status] = documented(status, PodErrorBody, {"error": message, "code": code})
    return found
