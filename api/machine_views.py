"""What machine-images shows of builds and images."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from api.ids import AmiText, UuidText
from api.times import Timestamp, iso, iso_or_none
from kiln.catalog.builds import BuildWithImage
from kiln.catalog.images import DELETING
from kiln.catalog.tables import Build, Image
from kiln.models import BuildStatus

STATUS_WORDS = {BuildStatus.TIMED_OUT: "failed"}


class MachineBuild(BaseModel):
    """A build as `GET /api/v1/images/builds/{build_id}` shows it. What is not known yet is null."""

    build_id: UuidText
    status: Literal["queued", "building", "succeeded", "failed", "cancelled"] = Field(examples=["succeeded"])
    provider: str = Field(examples=["claude-code"])
    region: str = Field(examples=["us-east-1"])
    image_id: AmiText | None
    started_at: Timestamp | None
    completed_at: Timestamp | None
    error: str | None = Field(examples=["Packer build timed out after 1800 seconds"], description="why it failed")
    simulated: bool | None = Field(None, description="present and true where EC2 is simulated")
    image_gone: str | None = Field(None, description="present once the image no longer exists: why")


class AcceptedBuild(BaseModel):
    """A build that was taken on."""

    build_id: UuidText
    status: Literal["queued"]
    provider: str = Field(examples=["claude-code"])
    region: str = Field(examples=["us-east-1"])
    created_at: Timestamp
    image_id: None = Field(description="known once the build has succeeded")
    simulated: bool | None = Field(None, description="present and true where EC2 is simulated")


class MachineImage(BaseModel):
    """An AMI that exists in EC2."""

    image_id: AmiText
    provider: str = Field(examples=["claude-code"])
    region: str = Field(examples=["us-east-1"])
    status: Literal["pending", "available", "failed", "deregistering"] = Field(examples=["available"])
    created_at: Timestamp
    build_id: UuidText
    simulated: bool | None = Field(None, description="present and true where EC2 is simulated")


class MachineImageList(BaseModel):
    """The organization's AMIs, newest first."""

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
