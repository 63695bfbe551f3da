"""What `PATCH /api/v1/images` takes, and what it answers."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictBool, StrictStr, model_validator
from pydantic.config import JsonDict

from api.container_names import (
    PLATFORM,
    Namespace,
    personal,
    require_admin,
    resolve_reference,
    team,
)
from api.container_views import VisibilityWord
from api.ids import UUID_EXAMPLE
from kiln.catalog.keys import Identity
from kiln.models import OwnerType, Visibility

UPDATES_LIMIT = 100

# For OpenAPI: what the models check by themselves.
NULL: JsonDict = {"type": "null"}
SOURCE_FORMS: list[JsonValue] = [
    {
        "required": ["owner", "name", "tag"],
        "properties": {
            "owner": {"type": "object"},
            "name": {"type": "string"},
            "tag": {"type": "string"},
            "reference": NULL,
        },
    },
    {
        "required": ["reference"],
        "properties": {"owner": NULL, "name": NULL, "tag": NULL, "reference": {"type": "string"}},
    },
]
OWNER_FORMS: list[JsonValue] = [
    {"properties": {"type": {"enum": ["personal", "platform"]}}},
    {"required": ["teamId"], "properties": {"teamId": {"type": "string", "minLength": 1}}},
]


class ImageOwner(BaseModel):
    """Whose an image is."""

    model_config = ConfigDict(json_schema_extra={"anyOf": OWNER_FORMS})

    type: OwnerType
    team_id: StrictStr | None = Field(None, alias="teamId", description="of a team", examples=[UUID_EXAMPLE])

    @model_validator(mode="after")
    def _has_its_team(self) -> Self:
        if self.type is OwnerType.TEAM and not self.team_id:
            raise ValueError("a team's owner has a teamId")
        return self

    def namespace(self, identity: Identity) -> Namespace:
        """Where its images stand. Raises DetailError 403 if that is not for this key to change."""
        if self.type is OwnerType.PERSONAL:
            return personal(identity)
        if self.type is OwnerType.TEAM:
            return team(identity, self.team_id or "")
        require_admin(identity)
        return PLATFORM


class UpdateSource(BaseModel):
    """An image: owner, name and tag, or a reference to it; never both."""

    model_config = ConfigDict(json_schema_extra={"anyOf": SOURCE_FORMS})

    owner: ImageOwner | None = None
    name: StrictStr | None = None
    tag: StrictStr | None = None
    reference: StrictStr | None = Field(None, examples=["acme/myapp:v1"])

    @model_validator(mode="after")
    def _has_one_form(self) -> Self:
        coordinate = (self.owner, self.name, self.tag)
        if self.reference is not None:
            if any(value is not None for value in coordinate):
                raise ValueError("a reference, or owner, name and tag; not both")
        elif any(value is None for value in coordinate):
            raise ValueError("needs owner, name and tag, or a reference")
        return self

    def place(self, identity: Identity) -> tuple[Namespace, str, str]:
        """Namespace, name and tag. Raises DetailError 403, InvalidRequestError."""
        if self.reference is None and self.owner is not None:
            return self.owner.namespace(identity), self.name or "", self.tag or ""
        namespace, name, tag = resolve_reference(identity, self.reference or "")
        if namespace is PLATFORM:
            require_admin(identity)
        return namespace, name, tag


class ImageChanges(BaseModel):
    """What an image is to be; a field that is left out stays as it is."""

    name: StrictStr | None = None
    tag: StrictStr | None = None
    owner: ImageOwner | None = None
    visibility: Visibility | None = None


class Update(BaseModel):
    """One image and what is to change about it. What is wrong with `set` is this update's own error."""

    source: UpdateSource
    changes: dict[str, Any] = Field(
        alias="set", description="name, tag, owner, visibility: at least one", examples=[{"visibility": "PUBLIC"}]
    )


class UpdateRequest(BaseModel):
    """Updates of images. Unknown fields are ignored."""

    mode: Literal["explicit"] = "explicit"
    dry_run: StrictBool = Field(False, alias="dryRun", description="only say what would become of each")
    updates: Annotated[list[Update], Field(max_length=UPDATES_LIMIT)]

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "updates": [
                        {
                            "source": {"owner": {"type": "personal"}, "name": "myapp", "tag": "v1"},
                            "set": {"tag": "v2", "visibility": "PUBLIC"},
                        }
                    ]
                }
            ]
        }
    )


class ImageState(BaseModel):
    """An image's whole name, and who may pull it."""

    owner: dict[str, str] = Field(examples=[{"type": "personal"}])
    name: str = Field(examples=["myapp"])
    tag: str = Field(examples=["v1"])
    visibility: VisibilityWord


class UpdateError(BaseModel):
    """Why an update failed."""

    code: str = Field(examples=["image_not_found"])
    message: str


class UpdateResult(BaseModel):
    """What became of one update."""

    source: dict[str, Any] = Field(description="as it came")
    success: bool
    before: ImageState | None
    after: ImageState | None
    error: UpdateError | None


class UpdateAnswer(BaseModel):
    """What became of each update, in the request's order; `success` if all succeeded."""

    success: bool
    dryRun: bool  # noqa: N815  the wire's name
    results: list[UpdateResult]
