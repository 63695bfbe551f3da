"""What machine-images shows of builds and images."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field

from api.times import iso, iso_or_none
from kiln.catalog.builds import BuildWithImage
from kiln.catalog.images import DELETING
from kiln.catalog.tables import Build, Image
from kiln.models import BuildStatus

STATUS_WORDS = {BuildStatus.TIMED_OUT: "failed"}


class MachineBuild(BaseModel):
    """A build as `GET /api/v1/images/builds/{build_id}` shows it. What is not known yet is null."""

    build_id: str = Field(examples=["550e8400-e29b-41d4-a716-446655440000"])
    status: str = Field(examples=["succeeded"], description="queued, building, succeeded, failed or cancelled")
    provider: str = Field(examples=["claude-code"])
    region: str = Field(examples=["us-east-1"])
    image_id: str | None = Field(examples=["ami-0abcdef1234567890"])
    started_at: str | None = Field(examples=["2026-03-25T14:30:00Z"])
    completed_at: str | None = Field(examples=["2026-03-25T14:45:00Z"])
    error: str | None = Field(examples=[None])
    simulated: bool | None = Field(None, description="present and true where EC2 is simulated")
    image_gone: str | None = Field(None, description="present once the image no longer exists: why")


class AcceptedBuild(BaseModel):
    """A build that was taken on."""

    build_id: str = Field(examples=["550e8400-e29b-41d4-a716-446655440000"])
    status: str = Field(examples=["queued"])
    provider: str = Field(examples=["claude-code"])
    region: str = Field(examples=["us-east-1"])
    created_at: str = Field(examples=["2026-03-25T14:30:00Z"])
    image_id: str | None = Field(examples=[None])
    simulated: bool | None = Field(None, description="present and true where EC2 is simulated")


class MachineImage(BaseModel):
    """An AMI that exists in EC2."""

    image_id: str = Field(examples=["ami-0abcdef1234567890"])
    provider: str = Field(examples=["claude-code"])
    region: str = Field(examples=["us-east-1"])
    status: str = Field(examples=["available"], description="pending, available, failed or deregistering")
    created_at: str = Field(examples=["2026-03-25T14:30:00Z"])
    build_id: str = Field(examples=["550e8400-e29b-41d4-a716-446655440000"])
    simulated: bool | None = Field(None, description="present and true where EC2 is simulated")


class MachineImageList(BaseModel):
    images: list[MachineImage]


def shown(status: BuildStatus) -> str:
    """A stored status in the words of machine-images. `cancelling` never gets here: it is shown as what it was."""
    return STATUS_WORDS.get(status, status.value)


def accepted(build: Build, *, simulated: bool) -> dict[str, Any]:
    """The answer to a build that was taken on."""
    return {
        "build_id": build.id,
        "status": build.status,
        "provider": build.spec["provider"],
        "region": build.spec["region"],
        "created_at": iso(build.created_at),
        "image_id": None,
        **_mark(simulated=simulated),
    }


def machine_build(found: BuildWithImage, *, simulated: bool) -> dict[str, Any]:
    """A build; a cancelled one reads as before the cancel until nothing of it is left."""
    build, image = found.build, found.image
    gone = {"image_gone": image.gone_reason} if image is not None and image.gone_reason else {}
    return {
        "build_id": build.id,
        "status": shown(BuildStatus(build.status)),
        "provider": build.spec["provider"],
        "region": build.spec["region"],
        "image_id": image.reference if image else None,
        "started_at": iso_or_none(build.started_at),
        "completed_at": iso_or_none(build.completed_at),
        "error": build.error_message,
        **_mark(simulated=image.simulated if image else simulated),
        **gone,
    }


def finished_image(image: Image) -> dict[str, Any]:
    """An AMI that Kiln published."""
    return {
        "image_id": image.reference,
        "provider": image.provider,
        "region": image.region,
        "status": "deregistering" if image.status == DELETING else "available",
        "created_at": iso(image.created_at),
        "build_id": image.build_id,
        **_mark(simulated=image.simulated),
    }


def pending_since(build: Build) -> datetime:
    """When EC2 began to make the AMI, as nearly as Kiln knows."""
    return build.started_at or build.created_at


def pending_image(build: Build, *, simulated: bool) -> dict[str, Any]:
    """An AMI that EC2 is making for an open build."""
    return {
        "image_id": build.pending_image,
        "provider": build.spec["provider"],
        "region": build.spec["region"],
        "status": "pending",
        "created_at": iso(pending_since(build)),
        "build_id": build.id,
        **_mark(simulated=simulated),
    }


def _mark(*, simulated: bool) -> dict[str, bool]:
    """What is simulated says so, in every answer."""
    return {"simulated": True} if simulated else {}
