"""What runners say to Kiln and what they are told: the bodies of `/api/v1/runner/*`."""

from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from api.errors import EXAMPLES, documented
from api.pod_errors import (
    AUTH_REQUIRED,
    INTERNAL_ERROR,
    PAYLOAD_TOO_LARGE,
    POD_OVER,
    RESOURCE_NOT_FOUND,
    SERVICE_UNAVAILABLE,
    SUPERSEDED,
    VALIDATION_FAILED,
    PodErrorBody,
)
from kiln.models import PodResult
from kiln.ports.pods import HostReport

# A runner that has more directories on its host asks in several calls.
KEYS_LIMIT = 4000
LARGEST_INT32 = 2**31 - 1
LARGEST_NUMBER = 2**53
NAME_LENGTH = 255
TEXT_LENGTH = 4000

CALLER_UNKNOWN = "a runner's token is needed: Authorization: Bearer krt_…"
_WITHOUT_NUL = r"^[^\u0000]*$"
ShortText = Annotated[str, Field(max_length=NAME_LENGTH, pattern=_WITHOUT_NUL)]
LongText = Annotated[str, Field(max_length=TEXT_LENGTH, pattern=_WITHOUT_NUL)]
Token = Annotated[str, Field(pattern=r"^[0-9A-Za-z_-]{1,36}$", examples=["550e8400-e29b-41d4-a716-446655440000"])]
Incarnation = Annotated[Token, Field(description="the process that speaks, as it registered")]
Shim = Annotated[Token, Field(description="the shim's name, which the pod has for ever")]
Key = Annotated[ShortText, Field(examples=["pod-k3v9m2x7q1zt"])]
Number = Annotated[int, Field(ge=1, le=LARGEST_NUMBER)]
Microseconds = Annotated[int, Field(ge=0, le=LARGEST_NUMBER)]
PromptNumber = Annotated[int, Field(ge=0, le=LARGEST_INT32)]
# FastAPI writes no schema of tuples that others can read.
Prompt = Annotated[list[int | str], Field(min_length=2, max_length=2, examples=[[2, "and on"]])]
Line = tuple[Number, Microseconds, Literal["stdout", "kiln"], str]


class Said(BaseModel):
    """What every call carries."""

    model_config = ConfigDict(frozen=True, strict=True, hide_input_in_errors=True)

    incarnation: Incarnation


class RegisterBody(Said):
    name: Annotated[ShortText, Field(description="the host's own word for itself")]
    max_concurrent_pods: Annotated[int, Field(ge=1, le=1000)]
    allows_custom_commands: bool = False
    available_agents: Annotated[list[ShortText], Field(max_length=100, examples=[["claude-code"]])] = []
    limits: Annotated[list[ShortText], Field(max_length=100, description="what the host can enforce")] = []
    host_info: Annotated[dict[ShortText, LongText], Field(max_length=100)] = {}
    runner_name: Annotated[ShortText | None, Field(description="the runner that the token must be of")] = None

    def report(self) -> HostReport:
        return HostReport(**self.model_dump())


class BeatBody(Said):
    pods: Annotated[list[Key], Field(max_length=KEYS_LIMIT, description="pods with a directory on the host")]


class NewsBody(Said):
    pods: Annotated[
        dict[Key, PromptNumber],
        Field(max_length=KEYS_LIMIT, description="the number of the last prompt that each has had"),
    ]


class ShimBody(Said):
    shim: Shim


class ResultBody(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, hide_input_in_errors=True)

    exit_code: Annotated[int | None, Field(ge=-LARGEST_INT32, le=LARGEST_INT32)] = None
    error: Annotated[LongText | None, Field(description="why it failed, for the pod's users")] = None
    ended_at: AwareDatetime | None = None


class EndedBody(ShimBody):
    result: ResultBody

    def pod_result(self) -> PodResult:
        return PodResult(**self.result.model_dump())


class LogBody(Said):
    lines: Annotated[
        list[Line],
        Field(
            min_length=1,
            description="number, microseconds since 1970, stream and text of each; the numbers follow each other",
            examples=[[[1, 1774449067000000, "stdout", "Hello"]]],
        ),
    ]

    @model_validator(mode="after")
    def _check_numbers(self) -> Self:
        first = self.lines[0][0]
        if any(line[0] != number for number, line in enumerate(self.lines, first)):
            raise ValueError("the lines' numbers must follow each other")
        return self


class RegisterAnswer(BaseModel):
    runner_id: str
    name: str
    organization: str = Field(description="the organization's slug")
    lease_seconds: float = Field(description="how long a pod goes on without word of its runner", examples=[300.0])
    beat_seconds: float = Field(description="how often a runner is to say that it is there", examples=[5.0])


class BeatAnswer(BaseModel):
    end: list[str] = Field(description="not, or no longer, this runner's to run")
    remove: list[str] = Field(description="whose sandbox is to go")


class NewsAnswer(BaseModel):
    end: list[str] = Field(description="not, or no longer, this runner's to run")
    prompts: dict[str, list[Prompt]] = Field(description="number and text of each that has come")


class LogAnswer(BaseModel):
    kept: int = Field(description="no line up to this one need be sent again")


BODIES = (RegisterBody, BeatBody, NewsBody, ShimBody, EndedBody, LogBody)


_ERRORS = {
    400: (VALIDATION_FAILED, "incarnation: Field required"),
    401: (AUTH_REQUIRED, CALLER_UNKNOWN),
    403: (SUPERSEDED, "another process has registered as this runner, or its token is no more"),
    404: (RESOURCE_NOT_FOUND, "this runner has no pod pod-k3v9m2x7q1zt"),
    409: (POD_OVER, "pod-k3v9m2x7q1zt is terminated"),
    413: (PAYLOAD_TOO_LARGE, EXAMPLES[413][1]),
    500: (INTERNAL_ERROR, EXAMPLES[500][1]),
    503: (SERVICE_UNAVAILABLE, EXAMPLES[503][1]),
}


def runner_errors(*statuses: int) -> dict[int | str, dict[str, object]]:
    """OpenAPI's `responses` for these statuses, in the shape of pods."""
    found = {status: _ERRORS[status] for status in statuses}
    return {
        status: documented(status, PodErrorBody, {"error": message, "code": code})
        for status, (code, message) in found.items()
    }
