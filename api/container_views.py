"""What container-images shows of builds and images."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from api.container_requests import WantedTransfers
from api.ids import UUID_EXAMPLE, UuidText
from api.times import Timestamp, iso, iso_or_none
from kiln.catalog import tags
from kiln.catalog.builds import BuildWithImage
from kiln.catalog.session import Transaction
from kiln.catalog.tables import Build, Image, Tag
from kiln.catalog.tags import TagRow
from kiln.models import BuildStatus, OwnerType, Target, Visibility

ARTIFACT_TYPE = "VM_SANDBOX"
DIGEST = "sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"
STATUS_WORDS = {
    BuildStatus.AWAITING_CONTEXT: "UPLOADING",
    BuildStatus.QUEUED: "PENDING",
    BuildStatus.BUILDING: "BUILDING",
    BuildStatus.SUCCEEDED: "COMPLETED",
    BuildStatus.FAILED: "FAILED",
    BuildStatus.TIMED_OUT: "FAILED",
    BuildStatus.CANCELLED: "CANCELLED",
}
# What answers have to what is not built from an uploaded context.
NO_UPLOAD: dict[str, Any] = {"upload_url": None, "expires_in": None}
ERROR_STATUSES = frozenset({BuildStatus.FAILED, BuildStatus.TIMED_OUT})

StatusWord = Literal["PENDING", "UPLOADING", "BUILDING", "COMPLETED", "FAILED", "CANCELLED"]
VisibilityWord = Literal["PRIVATE", "PUBLIC"]


class ContainerBuildAnswer(BaseModel):
    """A build that was taken on, or copies of public images: the first one's fields, and every one's id."""

    build_id: UuidText | None
    fullImagePath: str | None = Field(examples=["registry.example/acme/myapp:v1"])  # noqa: N815  the wire's name
    buildIds: list[UuidText]  # noqa: N815  the wire's name
    upload_url: str | None = Field(description="takes the context by PUT, without a key; null where none is awaited")
    expires_in: int | None = Field(description="seconds for which it does", examples=[3600])
    visibility: VisibilityWord | None = Field(examples=["PRIVATE"])
    results: list[dict[str, Any]] | None = Field(
        None, description="present for several sources: what became of each, in their order"
    )


class ContainerBuildStatus(BaseModel):
    """A build of a container image. What is not known yet is null."""

    id: UuidText
    imageName: str = Field(examples=["myapp"])  # noqa: N815  the wire's name
    imageTag: str = Field(examples=["v1"])  # noqa: N815  the wire's name
    fullImagePath: str = Field(examples=["registry.example/acme/myapp:v1"])  # noqa: N815  the wire's name
    status: StatusWord
    errorMessage: str | None  # noqa: N815  the wire's name
    createdAt: Timestamp  # noqa: N815  the wire's name
    startedAt: Timestamp | None  # noqa: N815  the wire's name
    completedAt: Timestamp | None  # noqa: N815  the wire's name
    sizeBytes: int | None = Field(description="compressed, each layer once")  # noqa: N815  the wire's name
    visibility: VisibilityWord


class ContainerImageRow(ContainerBuildStatus):
    """A tag, showing its newest build."""

    artifactType: Literal["VM_SANDBOX"]  # noqa: N815  the wire's name
    displayRef: str = Field(examples=["acme/myapp:v1"])  # noqa: N815  the wire's name
    pushedAt: Timestamp | None = Field(description="when its image was published")  # noqa: N815  the wire's name
    teamId: str | None = Field(examples=[UUID_EXAMPLE])  # noqa: N815  the wire's name
    ownerType: OwnerType  # noqa: N815  the wire's name


class ContainerImageList(BaseModel):
    """Tags, newest build first."""

    data: list[ContainerImageRow]
    totalCount: int = Field(ge=0)  # noqa: N815  the wire's name
    offset: int = Field(ge=0)
    limit: int = Field(ge=1)


class UploadAnswer(BaseModel):
    """A context that was checked and kept."""

    success: Literal[True]
    sizeBytes: int = Field(ge=0)  # noqa: N815  the wire's name
    sha256: str = Field(examples=[DIGEST.removeprefix("sha256:")])


class DeletedAnswer(BaseModel):
    """A tag that is no more."""

    success: Literal[True]
    message: str = Field(examples=["acme/myapp:v1 was deleted"])


def target_of(build: Build) -> Target:
    """Where a container build was to go when it was asked for."""
    return Target.model_validate(build.spec["target"])


def full_path(host: str, target: Target) -> str:
    """`{registry}/{owner}/{name}:{tag}`."""
    return f"{host}/{target.display}"


def taken_on(build: Build, host: str, visibility: Visibility) -> dict[str, Any]:
    """What every answer to a new build has."""
    return {
        "build_id": build.id,
        "buildIds": [build.id],
        "fullImagePath": full_path(host, target_of(build)),
        "visibility": visibility.value,
    }


def copies_answer(wanted: WantedTransfers, taken: list[dict[str, Any] | None]) -> dict[str, Any]:
    """The answer to a transfer, by what was taken on of it; None for a source that was refused."""
    accepted = [one for one in taken if one is not None]
    first = accepted[0] if accepted else {"build_id": None, "fullImagePath": None, "visibility": None}
    every = [build_id for one in accepted for build_id in one["buildIds"]]
    answer: dict[str, Any] = {**first, "buildIds": every, **NO_UPLOAD}
    if wanted.several:
        answer["results"] = [
            {
                "sourceImage": transfer.source,
                "build": one,
                "error": transfer.error.message if transfer.error is not None else None,
                "retryable": transfer.retryable,
            }
            for transfer, one in zip(wanted.transfers, taken, strict=True)
        ]
    return answer


def build_status(session: Transaction, found: BuildWithImage, host: str) -> dict[str, Any]:
    """A build under the name that was asked for, with the visibility that its tag has or will have."""
    target = target_of(found.build)
    tag = tags.find(session, target.owner, target.name, target.tag)
    published = tag is not None and found.image is not None
    visibility = tag.tag.visibility if tag and published else tags.resolved_visibility(session, target).value
    return {
        **_build(found.build),
        "imageName": target.name,
        "imageTag": target.tag,
        "fullImagePath": full_path(host, target),
        "sizeBytes": _size(found.image),
        "visibility": visibility,
    }


def image_row(row: TagRow, host: str) -> dict[str, Any]:
    """A tag as the list shows it."""
    tag = row.tag
    return {
        **_build(row.build),
        "artifactType": ARTIFACT_TYPE,
        "imageName": tag.name,
        "imageTag": tag.tag,
        "fullImagePath": f"{host}/{display(tag)}",
        "displayRef": display(tag),
        "sizeBytes": _size(row.image),
        "visibility": tag.visibility,
        "pushedAt": iso_or_none(tag.pushed_at),
        "teamId": tag.organization_id if tag.owner_type == OwnerType.TEAM else None,
        "ownerType": tag.owner_type,
    }


def display(tag: Tag) -> str:
    """`{owner}/{name}:{tag}`."""
    return f"{tag.owner}/{tag.name}:{tag.tag}"


def _build(build: Build) -> dict[str, Any]:
    status = BuildStatus(build.status)
    return {
        "id": build.id,
        "status": STATUS_WORDS[status],
        "errorMessage": build.error_message if status in ERROR_STATUSES else None,
        "createdAt": iso(build.created_at),
        "startedAt": iso_or_none(build.started_at),
        "completedAt": iso_or_none(build.completed_at),
    }


def _size(image: Image | None) -> int | None:
    return None if image is None else image.size_bytes
