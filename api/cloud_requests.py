"""What `POST /v5/builds` may ask: the texts of its form, each checked as it comes, and together before a file is kept."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from kiln.catalog import tags
from kiln.catalog.keys import Identity
from kiln.errors import InvalidRequestError
from kiln.models import OwnerType, SourceNotes, Target
from kiln.naming import PLATFORMS
from kiln.redact import is_secret_name
from kiln.references import DEFAULT_TAG, Reference, image_name_problem, image_tag_problem, parse_reference

ARCHIVE: Final = "context_archive"
REVISION_LENGTH: Final = 64
NOTE_LENGTHS: Final = {
    "source_commit": REVISION_LENGTH,
    "source_ref": 255,
    "source_repo": 2048,
    "source_subpath": 4096,
    "working_tree_hash": REVISION_LENGTH,
}
TEXTS: Final = (
    "image_name",
    "image_tag",
    "agent_name",
    "agent_id",
    "image_url",
    "build_args",
    "platform",
    *NOTE_LENGTHS,
    "source_dirty",
)
NAMES: Final = (*TEXTS, ARCHIVE)
AGENT_NAME_LENGTH: Final = 255
ARGUMENTS_LIMIT: Final = 200
ARGUMENT_LENGTH: Final = 16 * 1024
ARGUMENT_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
# BuildKit reads these as orders to itself.
ENGINE_ARGUMENT: Final = re.compile("BUILDKIT_.*", re.IGNORECASE)
CONTROL_CHARACTERS: Final = re.compile(r"[\x00-\x1f\x7f]")
TRUTH: Final = {"true": True, "false": False}

PRINTABLE: Final = r"^[^\u0000-\u001f\u007f]*$"
FORM_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["image_name"],
    "additionalProperties": False,
    "oneOf": [{"required": [ARCHIVE]}, {"required": ["image_url"]}],
    "properties": {
        "image_name": {
            "type": "string",
            "description": "a repository name of the account's",
            "examples": ["support-agent"],
        },
        "image_tag": {"type": "string", "default": DEFAULT_TAG},
        "agent_name": {
            "type": "string",
            "description": "the agent's name; a new one is made",
            "maxLength": AGENT_NAME_LENGTH,
            "pattern": r"^[^\u0000-\u001f\u007f]*[^\s\u0000-\u001f\u007f][^\u0000-\u001f\u007f]*$",
        },
        "agent_id": {"type": "string", "description": "the id of an agent, in the place of its name"},
        ARCHIVE: {"type": "string", "format": "binary", "description": "the build context: a tar.gz with a Dockerfile"},
        "image_url": {"type": "string", "description": "a finished image to register, in the place of an archive"},
        "build_args": {"type": "string", "contentMediaType": "application/json", "description": "an object of strings"},
        "platform": {"enum": list(PLATFORMS), "description": "the builder's own, unless it is sent"},
        **{
            name: {"type": "string", "maxLength": length, "pattern": PRINTABLE} for name, length in NOTE_LENGTHS.items()
        },
        "source_dirty": {"enum": list(TRUTH)},
    },
}


@dataclass(frozen=True)
class CloudOrder:
    """A checked request. Exactly one of the agent's name and id is set; `reference` only without an archive."""

    target: Target
    agent_name: str | None
    agent_id: str | None
    reference: Reference | None
    build_args: dict[str, str]
    secret_args: dict[str, str]
    platform: str | None
    source: SourceNotes


class CloudForm:
    """The texts of a form as they come in. Every method raises InvalidRequestError, which names the part."""

    def __init__(self, identity: Identity) -> None:
        self._owner = identity.organization_slug
        self._owners = {*tags.owners_of(identity.organization_id, self._owner), tags.PLATFORM_OWNER}
        self._values: dict[str, Any] = {}
        self._checks: dict[str, Callable[[str], Any]] = {
            "image_name": self._image_name,
            "image_tag": _image_tag,
            "agent_name": _agent_name,
            "agent_id": lambda text: text,
            "image_url": lambda text: parse_reference(text, "image_url"),
            "build_args": _build_args,
            "platform": _platform,
            "source_dirty": _source_dirty,
        }

    @property
    def agent_id(self) -> str | None:
        return self._values.get("agent_id")

    def add(self, name: str, text: str) -> None:
        """Takes a text, one of `TEXTS`."""
        check = self._checks.get(name)
        self._values[name] = check(text) if check is not None else _note(name, text)

    def check_before_archive(self) -> None:
        """Refuses an archive that cannot belong to the texts so far; later ones may still be to come."""
        self._check_together(archive=True)

    def order(self, *, archive: bool) -> CloudOrder:
        """The request, now that all of it is there."""
        self._check_together(archive=archive)
        for name, other in (("image_name", None), ("agent_name", "agent_id"), (ARCHIVE, "image_url")):
            if not (self._has(name) or self._has(other) or (archive and name == ARCHIVE)):
                raise InvalidRequestError(name, f"either it or {other} must be sent" if other else "must be sent")
        return self._order()

    def _order(self) -> CloudOrder:
        given = self._values
        arguments: dict[str, str] = given.get("build_args", {})
        secret = {name: value for name, value in arguments.items() if is_secret_name(name)}
        return CloudOrder(
            target=Target(
                owner_type=OwnerType.PERSONAL,
                owner=self._owner,
                name=given["image_name"],
                tag=given.get("image_tag", DEFAULT_TAG),
            ),
            agent_name=given.get("agent_name"),
            agent_id=given.get("agent_id"),
            reference=given.get("image_url"),
            build_args={name: value for name, value in arguments.items() if name not in secret},
            secret_args=secret,
            platform=given.get("platform"),
            source=SourceNotes(**{name: given[name] for name in (*NOTE_LENGTHS, "source_dirty") if name in given}),
        )

    def _check_together(self, *, archive: bool) -> None:
        if self._has("agent_name") and self._has("agent_id"):
            raise InvalidRequestError("agent_id", "only one of agent_name and agent_id may be sent")
        if self._has("image_url") and archive:
            raise InvalidRequestError("image_url", f"only one of {ARCHIVE} and image_url may be sent")
        for name in ("build_args", "platform"):
            if self._has("image_url") and self._has(name):
                raise InvalidRequestError(name, "an image that is finished already is not built; leave it out")

    def _has(self, name: str | None) -> bool:
        return name in self._values

    def _image_name(self, text: str) -> str:
        first, slash, _ = text.partition("/")
        if slash and first in self._owners:
            raise InvalidRequestError("image_name", f"may not begin with {first}/, which names an owner")
        return _sound("image_name", text, image_name_problem(text, self._owner))


def _sound(name: str, text: str, problem: str | None) -> str:
    if problem is not None:
        raise InvalidRequestError(name, problem)
    return text


def _image_tag(text: str) -> str:
    return _sound("image_tag", text, image_tag_problem(text))


def _agent_name(text: str) -> str:
    if not text.strip():
        raise InvalidRequestError("agent_name", "must not be empty")
    return _bounded("agent_name", text, AGENT_NAME_LENGTH)


def _note(name: str, text: str) -> str:
    return _bounded(name, text, NOTE_LENGTHS[name])


def _bounded(name: str, text: str, length: int) -> str:
    if len(text) > length:
        raise InvalidRequestError(name, f"must have at most {length} characters")
    if CONTROL_CHARACTERS.search(text):
        raise InvalidRequestError(name, "holds control characters")
    return text


def _platform(text: str) -> str:
    if text not in PLATFORMS:
        raise InvalidRequestError("platform", f"must be one of {', '.join(PLATFORMS)}")
    return text


def _source_dirty(text: str) -> bool:
    if text not in TRUTH:
        raise InvalidRequestError("source_dirty", "must be true or false")
    return TRUTH[text]


def _build_args(text: str) -> dict[str, str]:
    try:
        parsed = json.loads(text)
        json.dumps(parsed, ensure_ascii=False).encode()  # half a surrogate pair is valid JSON, and no text
    except (ValueError, RecursionError):
        raise InvalidRequestError("build_args", "must be valid JSON") from None
    if not isinstance(parsed, dict):
        raise InvalidRequestError("build_args", "must be a JSON object of strings")
    if len(parsed) > ARGUMENTS_LIMIT:
        raise InvalidRequestError("build_args", f"must have at most {ARGUMENTS_LIMIT} names")
    for name, value in parsed.items():
        _check_argument(name, value)
    return parsed


def _check_argument(name: str, value: object) -> None:
    place = f"build_args.{name[:100]}"
    if not ARGUMENT_NAME.fullmatch(name):
        raise InvalidRequestError(place, "a name has letters, digits and underscores, and begins with no digit")
    if ENGINE_ARGUMENT.fullmatch(name):
        raise InvalidRequestError(place, "names that begin with BUILDKIT_ are reserved")
    if not isinstance(value, str):
        raise InvalidRequestError(place, "must be a string")
    if len(value) > ARGUMENT_LENGTH:
        raise InvalidRequestError(place, f"must have at most {ARGUMENT_LENGTH} characters")
    if "\0" in value:
        raise InvalidRequestError(place, "holds a NUL character")
