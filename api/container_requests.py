"""What `POST /api/v1/images/build` may ask of container-images, and which images it then makes."""

import posixpath
import re
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, ValidationError

from api.container_names import (
    ADMIN,
    PLATFORM,
    Namespace,
    checked_tag,
    new_name,
    personal_or_team,
    require_admin,
)
from api.errors import DetailError, as_detail, from_kiln, from_validation
from kiln.catalog.keys import Identity
from kiln.errors import InvalidRequestError, UnavailableError
from kiln.models import ContainerBuildSpec, TransferSpec, Visibility
from kiln.ports import PublicRegistries
from kiln.references import DOCKER_HUB, Reference, derived_name, parse_reference

# A body with one of these is container-images', whatever else it holds.
CONTAINER_FIELDS = ("image_name", "source_image", "sourceImage")
SOURCES_LIMIT = 100
PATH_LENGTH = 1024
INHERIT: Final = "INHERIT"
PLATFORM_SCOPE: Final = "platform"
CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f]")


class ContainerBuildRequest(BaseModel):
    """A container image to build from an uploaded context, or public images to copy. Unknown fields are ignored."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"image_name": "myapp", "image_tag": "v1.0.0", "dockerfile_path": "Dockerfile"},
                {"source_image": "ghcr.io/acme/tool:1.2", "visibility": "PRIVATE"},
            ]
        }
    )

    image_name: StrictStr | None = Field(None, description="lower case, may hold `/`; required for a build")
    image_tag: StrictStr | None = Field(None, description="required for a build")
    dockerfile_path: StrictStr | None = Field("Dockerfile", description="within the context")
    source_image: StrictStr | None = Field(
        None, description="a public image to copy, or several joined with commas, instead of a build"
    )
    source_image_camel: StrictStr | None = Field(
        None, alias="sourceImage", description="another spelling of `source_image`"
    )
    platform: Literal["linux/amd64", "linux/arm64"] | None = Field(
        "linux/amd64", description="of a build; a copy has all of its source's"
    )
    team_id: StrictStr | None = Field(None, description="the organization's id or slug: its team's image")
    team_id_camel: StrictStr | None = Field(None, alias="teamId", description="another spelling of `team_id`")
    visibility: Literal["INHERIT", "PRIVATE", "PUBLIC"] | None = Field(
        INHERIT, description="INHERIT: an existing tag keeps its own, a new one is PRIVATE"
    )
    owner_scope: Literal["platform"] | None = Field(None, description="an image of no organization, always PUBLIC")
    owner_scope_camel: Literal["platform"] | None = Field(
        None, alias="ownerScope", description="another spelling of `owner_scope`"
    )


class StartRequest(BaseModel):
    """The context has been uploaded: the build may begin."""

    context_uploaded: StrictBool = Field(examples=[True], json_schema_extra={"const": True})


@dataclass(frozen=True)
class WantedTransfer:
    """One source of a transfer, as it was written: what is to be made of it, or why nothing is."""

    source: str
    spec: TransferSpec | None = None
    error: DetailError | None = None
    retryable: bool = False


@dataclass(frozen=True)
class WantedBuild:
    """A build to make from a context that is still to come."""

    spec: ContainerBuildSpec
    platform: str


@dataclass(frozen=True)
class WantedTransfers:
    """Images to copy. `several`: the answer has a result for each."""

    transfers: tuple[WantedTransfer, ...]
    platform: str
    several: bool


def is_container_body(body: dict[str, Any]) -> bool:
    """Whether a body is container-images'; a field that is null is not there."""
    return any(body.get(name) is not None for name in CONTAINER_FIELDS)


def understand(body: dict[str, Any], identity: Identity) -> WantedBuild | WantedTransfers:
    """What a body asks for. Raises ApiError, DetailError or InvalidRequestError, which names the field.

    Of several sources, each has its own error; a single one's is raised.
    """
    request = _validated(body)
    source = _agreed(request.source_image, request.source_image_camel, "source_image")
    namespace = _namespace(request, identity)
    if source is None:
        return _build(request, identity, namespace)
    return _transfers(request, identity, namespace, source)


def check_sources(wanted: WantedTransfers, public: PublicRegistries) -> WantedTransfers:
    """The same, with those refused whose registry may not be copied from. Blocks: names are looked up.

    Raises DetailError or UnavailableError where there is but one source.
    """
    checked = tuple(_with_host_checked(one, public) for one in wanted.transfers)
    return _raising_alone(replace(wanted, transfers=checked))


def dockerfile_path(path: str) -> str:
    """A path within a context, in its shortest form. Raises InvalidRequestError."""
    problem = _path_problem(path)
    if problem is not None:
        raise InvalidRequestError("dockerfile_path", problem)
    return posixpath.normpath(path)


def _path_problem(path: str) -> str | None:
    if not path or len(path) > PATH_LENGTH:
        return f"must have 1 to {PATH_LENGTH} characters"
    if CONTROL_CHARACTERS.search(path):
        return "must hold no control characters"
    if path.startswith("/") or ".." in path.split("/"):
        return "must be a path within the context"
    if path.endswith("/") or posixpath.normpath(path) == ".":
        return "must be a file's path"
    return None


def _validated(body: dict[str, Any]) -> ContainerBuildRequest:
    try:
        return ContainerBuildRequest.model_validate(body)
    except ValidationError as error:
        raise from_validation(error) from None


def _agreed(first: str | None, second: str | None, field: str) -> str | None:
    """The value of a field that has two spellings."""
    if first is not None and second is not None and first != second:
        raise InvalidRequestError(field, "its two spellings say different things")
    return first if first is not None else second


def _namespace(request: ContainerBuildRequest, identity: Identity) -> Namespace:
    team_id = _agreed(request.team_id, request.team_id_camel, "team_id")
    if _agreed(request.owner_scope, request.owner_scope_camel, "owner_scope") is None:
        return personal_or_team(identity, team_id)
    if team_id:
        raise InvalidRequestError("team_id", "a platform image has no team")
    if request.visibility != Visibility.PUBLIC:
        raise InvalidRequestError("visibility", "a platform image is PUBLIC")
    return PLATFORM


def _visibility(request: ContainerBuildRequest) -> Visibility | None:
    return None if request.visibility in (None, INHERIT) else Visibility(request.visibility)


def _build(request: ContainerBuildRequest, identity: Identity, namespace: Namespace) -> WantedBuild:
    if namespace is PLATFORM:
        require_admin(identity)
    if request.image_name is None:
        raise InvalidRequestError("image_name", "a build needs one")
    if request.image_tag is None:
        raise InvalidRequestError("image_tag", "a build needs one")
    target = namespace.target(
        new_name(identity, namespace, request.image_name, "image_name"),
        checked_tag(request.image_tag, "image_tag"),
        _visibility(request),
    )
    path = dockerfile_path("Dockerfile" if request.dockerfile_path is None else request.dockerfile_path)
    return WantedBuild(ContainerBuildSpec(target=target, dockerfile=path), request.platform or "linux/amd64")


def _transfers(
    request: ContainerBuildRequest, identity: Identity, namespace: Namespace, source: str
) -> WantedTransfers:
    sources = [one.strip() for one in source.split(",") if one.strip()]
    if not sources:
        raise InvalidRequestError("source_image", "names no image")
    if len(sources) > SOURCES_LIMIT:
        raise InvalidRequestError("source_image", f"at most {SOURCES_LIMIT} images are copied at once")
    for field in ("image_name", "image_tag"):
        if len(sources) > 1 and getattr(request, field) is not None:
            raise InvalidRequestError(field, "several images cannot all have the same")
    transfers = tuple(_transfer(request, identity, namespace, one) for one in sources)
    return _raising_alone(WantedTransfers(transfers, request.platform or "linux/amd64", several=len(sources) > 1))


def _transfer(request: ContainerBuildRequest, identity: Identity, namespace: Namespace, source: str) -> WantedTransfer:
    try:
        return WantedTransfer(source, _transfer_spec(request, identity, namespace, source))
    except InvalidRequestError as error:
        return WantedTransfer(source, error=DetailError(422, str(error)))
    except DetailError as error:
        return WantedTransfer(source, error=error)


def _transfer_spec(
    request: ContainerBuildRequest, identity: Identity, namespace: Namespace, source: str
) -> TransferSpec:
    reference = parse_reference(source, "source_image")
    if namespace is PLATFORM and not _open_to_all(request, reference) and not identity.may(ADMIN):
        raise DetailError(
            403, "without an admin's API key, platform images are copied from Docker Hub under their own name"
        )
    name, tag = derived_name(reference, platform=namespace is PLATFORM)
    target = namespace.target(
        new_name(identity, namespace, request.image_name if request.image_name is not None else name, "image_name"),
        checked_tag(request.image_tag if request.image_tag is not None else tag, "image_tag"),
        _visibility(request),
    )
    return TransferSpec(target=target, reference=str(reference))


def _open_to_all(request: ContainerBuildRequest, reference: Reference) -> bool:
    """Clients ask for every copy from Docker Hub as a platform image; under another name it could pass for what it is
    not."""
    return reference.host == DOCKER_HUB and request.image_name is None and request.image_tag is None


def _with_host_checked(wanted: WantedTransfer, public: PublicRegistries) -> WantedTransfer:
    if wanted.spec is None:
        return wanted
    host = wanted.spec.reference.partition("/")[0]
    try:
        problem = public.problem(host)
    except UnavailableError as error:
        return WantedTransfer(wanted.source, error=as_detail(from_kiln(error)), retryable=True)
    if problem is None:
        return wanted
    return WantedTransfer(wanted.source, error=DetailError(422, f"source_image: {problem}"))


def _raising_alone(wanted: WantedTransfers) -> WantedTransfers:
    error = wanted.transfers[0].error
    if not wanted.several and error is not None:
        raise error
    return wanted
