"""What calls of pods may ask: the form of their bodies, checked before anything is looked up. Unknown fields are ignored."""

import json
import re
from typing import Annotated, Any, Final, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationError,
)
from pydantic.config import JsonDict

from api.errors import from_validation
from api.ids import WITHOUT_NUL_SCHEMA, Name, without_nul
from kiln.errors import InvalidRequestError
from kiln.models import MAX_PROMPT_BYTES, AgentType, PodLimits, PodSpec, SandboxType
from kiln.ports.pods import PodSecrets

# Linux takes no longer string in an environment or among a program's arguments (MAX_ARG_STRLEN), with room for the name.
STRING_BYTES: Final = 100 * 1024
STRINGS_BYTES: Final = 512 * 1024
STRINGS_COUNT: Final = 1000
MCP_CONFIG_BYTES: Final = 64 * 1024
COMMAND_LENGTH: Final = 4096
SHORT_LENGTH: Final = 255
IMAGE_LENGTH: Final = 1024
MINUTES_LIMIT: Final = 365 * 24 * 60
SECONDS_LIMIT: Final = MINUTES_LIMIT * 60
NUMBER_LIMIT: Final = 2**31 - 1
VARIABLE: Final = re.compile("[A-Za-z_][A-Za-z0-9_]{0,254}")
# Kiln's own variables.
RESERVED: Final = ("KILN_POD", "KILN_MAX_TURNS", "KILN_MCP_CONFIG")
NOT_KILNS: Final = f"^(?!(?:{'|'.join(RESERVED)})$){VARIABLE.pattern}$"
# What git takes for no branch's name: https://git-scm.com/docs/git-check-ref-format
NO_BRANCH: Final = re.compile(
    r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|/\.|^[-/.]|[/.]$|\.lock(?:/|$)|^@$|^HEAD$",
)
NOT_BLANK: Final[JsonDict] = {"pattern": r"^[^\u0000]*[^\s\u0000][^\u0000]*$"}


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    return text


def _prompt(text: str) -> str:
    if len(text.encode()) > MAX_PROMPT_BYTES:
        raise ValueError(f"must have at most {MAX_PROMPT_BYTES} bytes")
    return text


def _string(text: str) -> str:
    if len(text.encode()) > STRING_BYTES:
        raise ValueError(f"must have at most {STRING_BYTES} bytes")
    return text


def _names(variables: object) -> object:
    """Comes before the values are looked at, and never repeats a name that is none: it may be a secret, mixed up."""
    if isinstance(variables, dict) and not all(map(VARIABLE.fullmatch, variables)):
        raise ValueError("a name has at most 255 letters, digits and underscores, and begins with no digit")
    if isinstance(variables, dict) and (reserved := variables.keys() & RESERVED):
        raise ValueError(f"the name {min(reserved)} is Kiln's own")
    return variables


def _together(strings: dict[str, str] | list[str]) -> Any:
    texts = [*strings, *strings.values()] if isinstance(strings, dict) else strings
    if sum(len(text.encode()) for text in texts) > STRINGS_BYTES:
        raise ValueError(f"must have at most {STRINGS_BYTES} bytes together")
    return strings


def _branch(name: str) -> str:
    if NO_BRANCH.search(name):
        raise ValueError("is no name that git allows a branch")
    return name


def _mcp_config(config: dict[str, Any]) -> dict[str, Any]:
    try:
        length = len(json.dumps(config, allow_nan=False).encode())
    except (ValueError, RecursionError):
        raise ValueError("holds a number that is too large, or is nested too deeply") from None
    if length > MCP_CONFIG_BYTES:
        raise ValueError(f"must have at most {MCP_CONFIG_BYTES} bytes")
    return config


Prompt = Annotated[
    Name,
    Field(json_schema_extra=NOT_BLANK, examples=["Fix the login bug"]),
    AfterValidator(_not_blank),
    AfterValidator(_prompt),
]
# A length that comes after a validator would be said to count items.
Short = Annotated[
    str,
    Field(min_length=1, max_length=SHORT_LENGTH, json_schema_extra=WITHOUT_NUL_SCHEMA),
    AfterValidator(without_nul),
]
ImageName = Annotated[
    str,
    Field(min_length=1, max_length=IMAGE_LENGTH, json_schema_extra=WITHOUT_NUL_SCHEMA),
    AfterValidator(without_nul),
]
Command = Annotated[
    str,
    Field(max_length=COMMAND_LENGTH, json_schema_extra=NOT_BLANK),
    AfterValidator(without_nul),
    AfterValidator(_not_blank),
]
String = Annotated[
    str,
    Field(json_schema_extra={**WITHOUT_NUL_SCHEMA, "maxLength": STRING_BYTES}),
    AfterValidator(without_nul),
    AfterValidator(_string),
]
Environment = Annotated[
    dict[str, String],
    Field(max_length=STRINGS_COUNT, json_schema_extra={"propertyNames": {"pattern": NOT_KILNS}}),
    BeforeValidator(_names),
    AfterValidator(_together),
]
Arguments = Annotated[list[String], Field(max_length=STRINGS_COUNT), AfterValidator(_together)]
Positive = Annotated[StrictInt, Field(ge=1, le=NUMBER_LIMIT)]
Body = TypeVar("Body", bound=BaseModel)


class PodRequest(BaseModel):
    """A body of pods. Its errors name the field, and never show what it held."""

    model_config = ConfigDict(hide_input_in_errors=True)


class Limits(PodRequest):
    """What a pod may use at most; the runner must be able to enforce it."""

    # No other's clients know it: a limit that is misspelt would be none.
    model_config = ConfigDict(extra="forbid")

    memory_mb: Positive | None = None
    processes: Positive | None = None
    disk_mb: Positive | None = None


class CreatePod(PodRequest):
    """An agent to set to work on a runner. Unknown fields are ignored, and one that is null is not there."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"runner_id": "local", "agent_type_id": "claude-code", "initial_prompt": "Fix the login bug"}]
        }
    )

    runner_id: Annotated[Name, Field(json_schema_extra=NOT_BLANK), AfterValidator(_not_blank)] = Field(
        examples=["local"], description="its id or its name"
    )
    agent_type_id: AgentType | None = Field(None, description=f"{AgentType.CLAUDE_CODE} unless it is sent")
    initial_prompt: Prompt | None = Field(None, description="given to the agent at its start")
    repository_id: StrictInt | None = Field(None, description="a repository of the organization", examples=[1])
    branch: Annotated[Short, AfterValidator(_branch)] | None = Field(
        None,
        description="to work on: the repository's own unless it is sent; without a repository only kept and shown",
        examples=["main"],
    )
    ticket_slug: Short | None = Field(None, description="kept and shown", examples=["AM-42"])
    channel_id: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = Field(None, description="kept and shown")
    sandbox_type: SandboxType | None = Field(
        None, description="worktree where a repository is named, container where an image is, else tempdir"
    )
    image: ImageName | None = Field(
        None,
        description="of a container: a name with or without its tag, a digest, or a build's id",
        examples=["app:v1"],
    )
    environment_variables: Environment | None = Field(
        None, repr=False, description="for the agent only; never shown again"
    )
    custom_agent_command: Command | None = Field(
        None, description="a program to run instead of the agent's own, where the runner allows it"
    )
    custom_agent_args: Arguments | None = Field(None, repr=False, description="its arguments; never shown again")
    custom_mcp_config: Annotated[dict[str, Any], AfterValidator(_mcp_config)] | None = Field(
        None, repr=False, description="the agent's MCP configuration; never shown again"
    )
    auto_close: StrictBool | None = Field(None, description="whether the sandbox goes when the agent is done")
    auto_close_delay_seconds: Annotated[StrictInt, Field(ge=0, le=SECONDS_LIMIT)] | None = Field(
        None, description="how long after"
    )
    pod_timeout_minutes: Annotated[StrictInt, Field(ge=1, le=MINUTES_LIMIT)] | None = Field(
        None, description="the pod's longest life"
    )
    max_turns: Positive | None = Field(None, description="handed to the agent")
    limits: Limits | None = Field(None, description="what it may use at most: an extension of Kiln's")

    @property
    def sandbox(self) -> SandboxType:
        if self.sandbox_type is not None:
            return self.sandbox_type
        if self.repository_id is not None:
            return SandboxType.WORKTREE
        return SandboxType.TEMPDIR if self.image is None else SandboxType.CONTAINER

    @property
    def secrets(self) -> PodSecrets:
        """What of it is kept sealed."""
        return PodSecrets(self.environment_variables or {}, self.custom_agent_args or (), self.custom_mcp_config)

    def spec(self) -> PodSpec:
        """The rest of it, less the prompt."""
        limits = self.limits or Limits()
        return PodSpec(
            agent_type=self.agent_type_id or AgentType.CLAUDE_CODE,
            repository_id=self.repository_id,
            branch=self.branch,
            ticket_slug=self.ticket_slug,
            channel_id=self.channel_id,
            sandbox_type=self.sandbox,
            image=self.image,
            environment_names=tuple(sorted(self.environment_variables or {})),
            custom_command=self.custom_agent_command,
            auto_close=self.auto_close or False,
            auto_close_delay_seconds=self.auto_close_delay_seconds,
            timeout_minutes=self.pod_timeout_minutes,
            max_turns=self.max_turns,
            limits=PodLimits(**limits.model_dump()),
        )

    def checked(self) -> Self:
        """The request itself, if its fields go together. Raises InvalidRequestError."""
        if self.custom_agent_args is not None and self.custom_agent_command is None:
            raise InvalidRequestError("custom_agent_args", "needs a custom_agent_command")
        self._check_sandbox()
        return self

    def _check_sandbox(self) -> None:
        if self.sandbox is SandboxType.WORKTREE and self.repository_id is None:
            raise InvalidRequestError("repository_id", "sandbox_type worktree needs it")
        if self.sandbox is SandboxType.CONTAINER and self.image is None:
            raise InvalidRequestError("image", "sandbox_type container needs it")
        if self.sandbox is not SandboxType.CONTAINER and self.image is not None:
            raise InvalidRequestError("image", f"goes with sandbox_type container, and not with {self.sandbox}")


class PromptPod(PodRequest):
    """What an agent is to hear. Unknown fields are ignored."""

    prompt: Prompt


def understand(model: type[Body], body: dict[str, Any]) -> Body:
    """A body's meaning. Raises ApiError, which names the field."""
    try:
        return model.model_validate({name: value for name, value in body.items() if value is not None})
    except ValidationError as error:
        raise from_validation(error) from None


POD_BODIES: Final = (CreatePod, PromptPod)
