"""What `POST /api/v1/images/build` may ask of machine-images, and how it becomes a build's specification."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError
from pydantic.config import JsonDict

from api.errors import from_validation
from kiln.errors import InvalidRequestError
from kiln.models import MachineBuildSpec, Provider
from kiln.naming import DEFAULT_TEMPLATE, RESERVED_TAG_PREFIXES
from kiln.ports import TemplateShelf, TemplateView
from kiln.settings import Settings

# EC2's limits (CreateTags): 50 tags a resource; Kiln and Packer need a few of them.
TAGS_LIMIT = 40
TAG_KEY_LENGTH = 128
TAG_VALUE_LENGTH = 256
VARIABLES_LIMIT = 100
VARIABLE_LENGTH = 16 * 1024
# Variables that a field also sets.
FIELD_VARIABLES = ("provider", "region", "instance_type")
# https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instance-types.html: family, generation, size.
INSTANCE_TYPE = re.compile(r"[a-z][a-z0-9-]{0,15}\.[a-z0-9-]{1,20}")
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")

# For OpenAPI: what `understand` checks by itself, because its messages say more than a pattern.
PRINTABLE_SCHEMA: JsonDict = {"pattern": r"^[^\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f]*$"}
TAG_NAME_SCHEMA: JsonDict = {
    "pattern": r"^(?![Kk][Ii][Ll][Nn]:|[Aa][Ww][Ss]:)[^\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f]+$",
    "maxLength": TAG_KEY_LENGTH,
}
TEMPLATE_SCHEMA: JsonDict = {"pattern": "^(builtin|operator)://[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"}

VariableValue = Annotated[StrictStr, Field(max_length=VARIABLE_LENGTH, json_schema_extra=PRINTABLE_SCHEMA)]
TagValue = Annotated[StrictStr, Field(json_schema_extra={**PRINTABLE_SCHEMA, "maxLength": TAG_VALUE_LENGTH})]


class TemplateChoice(BaseModel):
    """The object form of `template_source`."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["builtin"]
    name: StrictStr = Field(examples=["default-ec2"])


class MachineBuildRequest(BaseModel):
    """An AMI to bake. Only the provider is required; every other field takes the server's default."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"provider": "claude-code"},
                {
                    "provider": "claude-code",
                    "region": "us-east-1",
                    "instance_type": "t3.medium",
                    "template_source": "builtin://default-ec2",
                    "variables": {"extra_packages": "ripgrep"},
                    "tags": {"team": "platform"},
                },
            ],
        },
    )

    provider: Provider | None = Field(None, description="the coding agent to install")
    agent_provider: Provider | None = Field(None, description="another spelling of `provider`")
    region: StrictStr | None = Field(None, description="AWS region of the AMI, one that the server is configured for")
    instance_type: StrictStr | None = Field(
        None, description="EC2 instance type for the build", json_schema_extra={"pattern": f"^{INSTANCE_TYPE.pattern}$"}
    )
    template_source: StrictStr | None = Field(
        None, description="`builtin://NAME` or `operator://NAME`", json_schema_extra=TEMPLATE_SCHEMA
    )
    template: TemplateChoice | None = Field(None, description="the object form of `template_source`")
    variables: Annotated[dict[StrictStr, VariableValue], Field(max_length=VARIABLES_LIMIT)] | None = Field(
        None, description="handed to Packer; the template declares their names"
    )
    tags: Annotated[dict[StrictStr, TagValue], Field(max_length=TAGS_LIMIT)] | None = Field(
        None, description="added to all that the build makes", json_schema_extra={"propertyNames": TAG_NAME_SCHEMA}
    )


@dataclass(frozen=True)
class Wanted:
    """A request that is understood: the specification, and its secret values apart."""

    spec: MachineBuildSpec
    secrets: dict[str, str]


def understand(body: dict[str, Any], settings: Settings, shelf: TemplateShelf) -> Wanted:
    """The specification of a body. Raises ApiError or InvalidRequestError, both naming the field."""
    try:
        request = MachineBuildRequest.model_validate({name: value for name, value in body.items() if value is not None})
    except ValidationError as error:
        raise from_validation(error) from None
    template = _template(request, shelf)
    variables, tags = request.variables or {}, request.tags or {}
    _check_variables(variables, template)
    _check_tags(tags)
    secrets = {name: value for name, value in variables.items() if template.is_secret(name)}
    spec = MachineBuildSpec(
        provider=_provider(request),
        region=_region(request, settings),
        instance_type=_instance_type(request, settings),
        template=template.source,
        variables={name: value for name, value in variables.items() if name not in secrets},
        secret_names=tuple(sorted(secrets)),
        tags=tags,
    )
    return Wanted(spec, secrets)


def _template(request: MachineBuildRequest, shelf: TemplateShelf) -> TemplateView:
    if request.template is None:
        return shelf.find(DEFAULT_TEMPLATE if request.template_source is None else request.template_source)
    if request.template_source is not None:
        raise InvalidRequestError("template", "template and template_source are two forms of one field; send one")
    try:
        return shelf.find(f"builtin://{request.template.name}")
    except InvalidRequestError as error:
        raise InvalidRequestError("template.name", error.problem) from None


def _provider(request: MachineBuildRequest) -> str:
    if request.provider and request.agent_provider and request.provider is not request.agent_provider:
        raise InvalidRequestError("agent_provider", "is another spelling of provider, and must agree with it")
    field = request.provider or request.agent_provider
    place, provider = _field_or_variable(request, "provider", field.value if field else None)
    if provider is None:
        raise InvalidRequestError(place, "Field required")
    if provider not in set(Provider):
        raise InvalidRequestError(place, f"must be one of {', '.join(Provider)}")
    return provider


def _region(request: MachineBuildRequest, settings: Settings) -> str:
    place, region = _field_or_variable(request, "region", request.region)
    if region is None:
        return settings.default_region
    if region not in settings.regions:
        raise InvalidRequestError(place, f"this server builds in {', '.join(settings.regions)} only")
    return region


def _instance_type(request: MachineBuildRequest, settings: Settings) -> str:
    place, chosen = _field_or_variable(request, "instance_type", request.instance_type)
    if chosen is None:
        return settings.instance_type
    if not INSTANCE_TYPE.fullmatch(chosen):
        raise InvalidRequestError(place, "must be an EC2 instance type, such as t3.medium")
    return chosen


def _field_or_variable(request: MachineBuildRequest, name: str, field: str | None) -> tuple[str, str | None]:
    """Where a field's value came from, and the value: a variable alone counts as the field, beside it they must agree."""
    variable = (request.variables or {}).get(name)
    if field is not None and variable is not None and field != variable:
        raise InvalidRequestError(f"variables.{name}", f"disagrees with the field {name}")
    return (f"variables.{name}", variable) if field is None and variable is not None else (name, field)


def _check_variables(variables: dict[str, str], template: TemplateView) -> None:
    declared = template.public_names
    for name, value in variables.items():
        if name not in declared:
            raise InvalidRequestError(
                f"variables.{name}", f"the template does not declare it; it declares {', '.join(declared)}"
            )
        if CONTROL_CHARACTERS.search(value):
            raise InvalidRequestError(f"variables.{name}", "holds control characters")


def _check_tags(tags: dict[str, str]) -> None:
    for key, value in tags.items():
        if key.lower().startswith(RESERVED_TAG_PREFIXES):
            raise InvalidRequestError(f"tags.{key}", "names that begin with kiln: or aws: are reserved")
        if not 1 <= len(key) <= TAG_KEY_LENGTH or CONTROL_CHARACTERS.search(key):
            raise InvalidRequestError(
                f"tags.{key[:TAG_KEY_LENGTH]}", f"a tag's name has 1 to {TAG_KEY_LENGTH} characters"
            )
        if len(value) > TAG_VALUE_LENGTH or CONTROL_CHARACTERS.search(value):
            raise InvalidRequestError(f"tags.{key}", f"a tag's value has at most {TAG_VALUE_LENGTH} characters")
