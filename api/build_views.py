"""What kiln shows of a build: `B` of the contract."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, Field

from api.ids import UuidText
from api.times import Timestamp, iso, iso_or_none
from kiln.catalog.builds import BuildWithImage, shown_status
from kiln.catalog.images import AVAILABLE
from kiln.catalog.tables import Build, Image
from kiln.models import BuildKind, BuildStatus, ErrorCode
from kiln.naming import build_workflow_id

AMI_KINDS = (BuildKind.MACHINE, BuildKind.SNAPSHOT)
UI_EXAMPLE = "http://127.0.0.1:8233/namespaces/default/workflows/build-550e8400-e29b-41d4-a716-446655440000"


class ImageBody(BaseModel):
    """A finished image."""

    kind: str = Field(examples=["ami"])
    reference: str = Field(examples=["ami-0abcdef1234567890"])
    ami_id: str | None = Field(examples=["ami-0abcdef1234567890"])
    digest: str | None = Field(examples=["sha256:9f86d081884c7d65…"])
    region: str | None = Field(examples=["us-east-1"])
    platform: str | None = Field(examples=["linux/amd64"])
    size_bytes: int | None = Field(examples=[8589934592])
    simulated: bool
    state: str | None = Field(None, description="present unless it is available: deleting, deleted or gone")
    state_reason: str | None = Field(None, description="present once it is gone without Kiln's doing: why")
    kept_snapshots: list[str] | None = Field(
        None, description="snapshots that its deletion spared: another AMI uses them"
    )


class FailureBody(BaseModel):
    """Why a build failed."""

    code: ErrorCode = Field(examples=["tool_failed"])
    message: str = Field(examples=["Build 'amazon-ebs.agent' errored: Script exited with non-zero exit status: 1."])


class ProgressBody(BaseModel):
    """What a live build is doing now, as its workflow says."""

    phase: str = Field(examples=["building"])
    detail: str = Field(examples=["Packer is running (attempt 1)"])
    attempt: int = Field(ge=0, examples=[1])
    since: Timestamp | None = Field(description="when this phase began")
    last_line: str | None = Field(description="the last line that the tool printed")
    waiting_for: str | None = Field(examples=["waiting for a Packer builder; none is connected"])


class BuildBody(BaseModel):
    """A build of any kind."""

    id: UuidText
    kind: BuildKind
    api: str = Field(examples=["machine-images"])
    status: BuildStatus = Field(examples=["building"])
    image: ImageBody | None = Field(description="null until it exists")
    spec: dict[str, Any] = Field(examples=[{"provider": "claude-code", "region": "us-east-1"}])
    error: FailureBody | None = Field(description="null unless it failed")
    attempt: int = Field(ge=0, examples=[1])
    workflow_id: str = Field(examples=["build-550e8400-e29b-41d4-a716-446655440000"])
    workflow_url: str | None = Field(
        description="its page in the Temporal UI while Temporal keeps it", examples=[UI_EXAMPLE]
    )
    created_by: str = Field(description="the id of the API key", examples=["c0ffee00-0000-4000-8000-000000000000"])
    created_at: Timestamp
    queued_seconds: float = Field(ge=0, examples=[2.5], description="from its creation to its start, its end, or now")
    started_at: Timestamp | None = Field(description="when its tool first started")
    completed_at: Timestamp | None
    progress: ProgressBody | None = Field(description="null once it has ended, and where no worker answers")
    simulated: bool | None = Field(None, description="present and true where EC2 is simulated")


class BuildPage(BaseModel):
    """Builds, newest first."""

    builds: list[BuildBody]
    next_cursor: str | None = Field(description="null on the last page")


@dataclass(frozen=True)
class Live:
    """What only Temporal knows of a build."""

    workflow_url: str | None
    progress: dict[str, Any] | None
    simulated: bool


def build_body(found: BuildWithImage, live: Live) -> dict[str, Any]:
    """`B` of a row, its image, and what Temporal says."""
    build, image = found.build, found.image
    return {
        "id": build.id,
        "kind": build.kind,
        "api": build.api,
        "status": shown_status(build).value,
        "image": _image(image) if image else None,
        "spec": _spec(build),
        "error": {"code": build.error_code, "message": build.error_message} if build.error_code else None,
        "attempt": build.attempt,
        "workflow_id": build_workflow_id(build.id),
        "workflow_url": live.workflow_url,
        "created_by": build.created_by,
        "created_at": iso(build.created_at),
        "queued_seconds": _queued_seconds(build),
        "started_at": iso_or_none(build.started_at),
        "completed_at": iso_or_none(build.completed_at),
        "progress": live.progress,
        **({"simulated": True} if _is_simulated(found, live) else {}),
    }


def _is_simulated(found: BuildWithImage, live: Live) -> bool:
    """Only AMIs are made in an EC2 that may be a simulated one."""
    if found.image is not None:
        return found.image.simulated
    return live.simulated and found.build.kind in AMI_KINDS


def _image(image: Image) -> dict[str, Any]:
    return {
        "kind": image.kind,
        "reference": image.reference,
        "ami_id": image.reference if image.kind == "ami" else None,
        "digest": image.digest,
        "region": image.region or None,
        "platform": image.platform,
        "size_bytes": image.size_bytes,
        "simulated": image.simulated,
        **({"state": image.status} if image.status != AVAILABLE else {}),
        **({"state_reason": image.gone_reason} if image.gone_reason else {}),
        **({"kept_snapshots": image.kept_snapshot_ids} if image.kept_snapshot_ids else {}),
    }


def _spec(build: Build) -> dict[str, Any]:
    """What was asked, secrets left out: their names stay, so that nobody wonders where they went."""
    spec = {name: value for name, value in build.spec.items() if name not in ("kind", "template", "secret_names")}
    if "template" in build.spec:
        spec["template_source"] = build.spec["template"]
    if "secret_names" in build.spec:
        spec["secret_variables"] = build.spec["secret_names"]
    return spec


def _queued_seconds(build: Build) -> float:
    until = build.started_at or build.completed_at or datetime.now(UTC)
    return round(max(0.0, (until - build.created_at).total_seconds()), 3)
