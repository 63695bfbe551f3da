"""A container image with an agent in it, by `POST /api/v1/images/build`: what its body says beside container-images'."""

import re
from dataclasses import replace
from typing import Any

from pydantic import ConfigDict, Field, StrictStr, ValidationError

from api import container_requests
from api.container_requests import ContainerBuildRequest, WantedBuild
from api.deps import Parts
from api.errors import from_validation
from kiln.catalog import tags
from kiln.catalog.keys import Identity
from kiln.errors import InvalidRequestError
from kiln.models import AgentInstall, Provider
from kiln.references import parse_reference, repository_at

AGENT_FIELDS = ("provider", "agent_provider")
VERSION_LENGTH = 128
PACKAGES_LENGTH = 4096
URL_LENGTH = 1024
# As the template has them (packer/agent.pkr.hcl).
VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z._+-]*")
PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]*[a-z0-9+]")
PACKAGES = re.compile(rf"[ ,]*(?:{PACKAGE.pattern}(?:[ ,]+{PACKAGE.pattern})*[ ,]*)?")
URL = re.compile(r"https?://[A-Za-z0-9._~:/-]+")


class AgentImageRequest(ContainerBuildRequest):
    """A container image that Packer makes: a base image, and an agent installed on it. Nothing is uploaded."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"image_name": "agents/claude", "image_tag": "v1", "provider": "claude-code"},
                {
                    "image_name": "agents/codex",
                    "image_tag": "v1",
                    "provider": "codex",
                    "agent_version": "latest",
                    "extra_packages": "ripgrep, jq",
                    "base_image": "docker.io/library/debian:bookworm-slim",
                },
            ]
        }
    )

    provider: Provider | None = Field(None, description="the coding agent to install")
    agent_provider: Provider | None = Field(None, description="another spelling of `provider`")
    agent_version: StrictStr | None = Field("latest", description="`latest`, another tag of its registry, or a version")
    extra_packages: StrictStr | None = Field(
        "", description="Debian packages to install as well, with spaces or commas between them"
    )
    base_image: StrictStr | None = Field(
        None, description="Debian or Ubuntu: an image of Kiln's registry, or a public one; the server has a default"
    )
    npm_registry: StrictStr | None = Field(None, description="URL of the npm registry to install from")


def is_agent_body(body: dict[str, Any]) -> bool:
    """Whether a body of container-images names an agent; a field that is null is not there."""
    return any(body.get(name) is not None for name in AGENT_FIELDS)


def understand(body: dict[str, Any], identity: Identity, default_base_image: str) -> WantedBuild:
    """The build that a body with an agent asks for. Raises ApiError, DetailError or InvalidRequestError, which names
    the field."""
    wanted = container_requests.understand(body, identity)
    if not isinstance(wanted, WantedBuild):
        raise InvalidRequestError("provider", "an image is copied or gets an agent, not both")
    try:
        request = AgentImageRequest.model_validate({name: value for name, value in body.items() if value is not None})
    except ValidationError as error:
        raise from_validation(error) from None
    agent = AgentInstall(
        provider=_provider(request),
        version=_version(request.agent_version or "latest"),
        base_image=str(parse_reference(request.base_image or default_base_image, "base_image")),
        extra_packages=_packages(request.extra_packages or ""),
        npm_registry=_npm_registry(request.npm_registry or ""),
    )
    return replace(wanted, spec=wanted.spec.model_copy(update={"agent": agent}))


def check_base_image(parts: Parts, identity: Identity, agent: AgentInstall) -> None:
    """Raises InvalidRequestError unless a build of the organization may begin with this image, UnavailableError. Blocks:
    a registry's name may be looked up."""
    repository = repository_at(parts.settings.registry_host, agent.base_image)
    if repository is None:
        problem = parts.containers.public.problem(agent.base_image.partition("/")[0])
    else:
        with parts.catalog.read() as session:
            readable = tags.readable(session, identity.organization_id, identity.organization_slug, {repository})
        problem = None if readable else f"{agent.base_image}: no such image, or not yours to use"
    if problem is not None:
        raise InvalidRequestError("base_image", problem)


def _provider(request: AgentImageRequest) -> Provider:
    chosen = request.provider or request.agent_provider
    if chosen is None or request.agent_provider not in (None, chosen):
        raise InvalidRequestError("agent_provider", "is another spelling of provider, and must agree with it")
    return chosen


def _version(text: str) -> str:
    if len(text) > VERSION_LENGTH or not VERSION.fullmatch(text):
        raise InvalidRequestError(
            "agent_version", "must be latest, a tag or a version: letters, digits and . _ + - only"
        )
    return text


def _packages(text: str) -> str:
    if len(text) > PACKAGES_LENGTH:
        raise InvalidRequestError("extra_packages", f"must have at most {PACKAGES_LENGTH} characters")
    names = [name for name in re.split(r"[ ,]+", text) if name]
    for name in names:
        if not PACKAGE.fullmatch(name):
            raise InvalidRequestError(
                "extra_packages", "must be Debian package names, with spaces or commas between them"
            )
    return " ".join(names)


def _npm_registry(text: str) -> str:
    if text and (len(text) > URL_LENGTH or not URL.fullmatch(text)):
        raise InvalidRequestError("npm_registry", "must be an http or https URL")
    return text
