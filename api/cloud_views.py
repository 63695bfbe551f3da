"""What cloud-builds shows of builds."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from api.ids import UuidText
from api.times import Timestamp, iso, iso_or_none
from kiln.catalog.agents import Undeployed
from kiln.catalog.builds import BuildWithImage, shown_status
from kiln.catalog.cloud_builds import OWN_FAULTS, CloudPage
from kiln.catalog.tables import Build
from kiln.models import BuildStatus
from kiln.naming import build_workflow_id

STATUS_WORDS = {
    BuildStatus.AWAITING_CONTEXT: "queued",
    BuildStatus.BUILDING: "running",
    BuildStatus.SUCCEEDED: "success",
}
SOURCE_FIELDS = (
    "source_commit",
    "source_dirty",
    "source_ref",
    "source_repo",
    "source_subpath",
    "working_tree_hash",
)
CloudStatus = Literal[
    "queued",
    "running",
    "success",
    "failed",
    "cancelling",
    "cancelled",
    "deleting",
    "delete_failed",
    "timed_out",
    "error",
    "unknown",
]


class CloudIdentity(BaseModel):
    """Whose key the build was asked for with."""

    id: UuidText
    type: Literal["user", "service_account"]
    object: Literal["identity"]


class CloudBuild(BaseModel):
    """A build of an agent's image. What is not known yet, or was not said, is null."""

    id: UuidText
    object: Literal["agentex_cloud_build"]
    account_id: UuidText
    agent_name: str = Field(examples=["support-agent"])
    agent_id: UuidText
    build_status: CloudStatus = Field(examples=["queued"])
    cloud_provider_build_id: str = Field(
        description="the Temporal workflow's id", examples=["build-550e8400-e29b-41d4-a716-446655440000"]
    )
    created_at: Timestamp
    created_by: CloudIdentity
    image_name: str = Field(examples=["support-agent"])
    image_tag: str = Field(examples=["latest"])
    image_url: str | None = Field(description="the image by its digest, once it is there")
    build_start_time: Timestamp | None
    build_end_time: Timestamp | None
    source_commit: str | None
    source_dirty: bool | None
    source_ref: str | None
    source_repo: str | None
    source_subpath: str | None
    working_tree_hash: str | None


class CloudBuildList(BaseModel):
    """One page of builds."""

    object: Literal["list"]
    items: list[CloudBuild]
    has_more: bool = Field(description="whether there is more beyond the page, in the direction that was asked")
    total: int = Field(ge=0, description="how many builds match the filters, on all pages")
    limit: int


class UndeployedAgent(BaseModel):
    """An agent of which nothing was ever deployed."""

    agent_name: str = Field(examples=["support-agent"])
    latest_build: CloudBuild
    total_builds: int = Field(ge=1)


def cloud_build(found: BuildWithImage) -> dict[str, Any]:
    """A build as the contract shows it."""
    build, image = found.build, found.image
    target, source = build.spec["target"], build.spec["source"]
    return {
        "id": build.id,
        "object": "agentex_cloud_build",
        "account_id": build.organization_id,
        "agent_name": build.agent_name,
        "agent_id": build.agent_id,
        "build_status": _status(build),
        "cloud_provider_build_id": build_workflow_id(build.id),
        "created_at": iso(build.created_at),
        "created_by": {"id": build.created_by, "type": "user", "object": "identity"},
        "image_name": target["name"],
        "image_tag": target["tag"],
        "image_url": image.reference if image else None,
        "build_start_time": iso_or_none(build.started_at),
        "build_end_time": iso_or_none(build.completed_at),
        **{name: source[name] for name in SOURCE_FIELDS},
    }


def cloud_page(page: CloudPage, limit: int) -> dict[str, Any]:
    """A page of the list."""
    items = [cloud_build(row) for row in page.rows]
    return {"object": "list", "items": items, "has_more": page.has_more, "total": page.total, "limit": limit}


def undeployed_agent(found: Undeployed) -> dict[str, Any]:
    """An agent that was built and never deployed."""
    latest = cloud_build(found.latest)
    return {"agent_name": found.agent_name, "latest_build": latest, "total_builds": found.total_builds}


def _status(build: Build) -> str:
    """In the contract's words: a build whose failure is Kiln's own fault ended in `error`."""
    status = shown_status(build)
    if status is BuildStatus.FAILED and build.error_code in OWN_FAULTS:
        return "error"
    return STATUS_WORDS.get(status, status.value)
