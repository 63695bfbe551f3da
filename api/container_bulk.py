"""`PATCH /api/v1/images`: renames and changes of visibility, one by one, each whole or not at all."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from api import errands
from api.container_names import (
    PLATFORM,
    Namespace,
    checked_tag,
    new_name,
)
from api.container_updates import ImageChanges, Update, UpdateRequest
from api.deps import Parts
from api.errors import DetailError, from_validation
from kiln.catalog import errands as errand_rows
from kiln.catalog import tags
from kiln.catalog.keys import Identity
from kiln.catalog.session import AlreadyThereError, Transaction
from kiln.catalog.tables import RegistryErrand, Tag
from kiln.catalog.tags import DestinationExistsError, TagRow
from kiln.errors import (
    ImageBuildingError,
    ImageNotFoundError,
    InvalidRequestError,
    KilnError,
    SourceUnavailableError,
    UnavailableError,
)
from kiln.models import BuildStatus, OwnerType, Visibility

INVALID = "invalid_update"
CODES: dict[type[Exception], str] = {
    ImageNotFoundError: "image_not_found",
    SourceUnavailableError: "image_not_found",
    DestinationExistsError: "destination_exists",
    AlreadyThereError: "destination_exists",
    DetailError: "permission_denied",
    InvalidRequestError: INVALID,
    ImageBuildingError: "image_building",
    UnavailableError: "unavailable",
}


@dataclass(frozen=True)
class _Plan:
    """An update that may be made: which row becomes what."""

    row: TagRow
    to: Namespace
    name: str
    tag: str
    visibility: Visibility | None

    @property
    def renames(self) -> bool:
        known = self.row.tag
        return (known.owner, known.name, known.tag) != (self.to.owner, self.name, self.tag)

    @property
    def repository(self) -> str:
        return f"{self.to.owner}/{self.name}"

    @property
    def old_repository(self) -> str:
        return f"{self.row.tag.owner}/{self.row.tag.name}"


@dataclass
class _Seen:
    """What is known of an image while its update goes on."""

    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None


class _RehearsalOverError(Exception):
    """Rolls a rehearsal's transaction back."""


Act = Callable[[Update, _Seen], None]


def update(parts: Parts, identity: Identity, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to a body. Raises ApiError 422 where the body as a whole cannot be understood. Blocks."""
    try:
        request = UpdateRequest.model_validate(body)
    except ValidationError as error:
        raise from_validation(error) from None
    updates = _Updates(parts, identity)
    results = updates.rehearse(request.updates) if request.dry_run else updates.carry_out(request.updates)
    return {"success": all(one["success"] for one in results), "dryRun": request.dry_run, "results": results}


class _Updates:
    def __init__(self, parts: Parts, identity: Identity) -> None:
        self._parts = parts
        self._identity = identity

    def carry_out(self, updates: list[Update]) -> list[dict[str, Any]]:
        return [_result(one, self._apply) for one in updates]

    def rehearse(self, updates: list[Update]) -> list[dict[str, Any]]:
        """Each against what those before it would have made; nothing of it is kept."""
        results: list[dict[str, Any]] = []
        with contextlib.suppress(_RehearsalOverError), self._parts.catalog.transaction() as tx:

            def apply(one: Update, seen: _Seen) -> None:
                _write(tx, self._plan(tx, one, seen), seen)

            results = [_result(one, apply) for one in updates]
            raise _RehearsalOverError
        return results

    def _apply(self, one: Update, seen: _Seen) -> None:
        """A rename is made in the registry first: the catalog never names what the registry does not have."""
        with self._parts.catalog.read() as session:
            plan = self._plan(session, one, seen)
        arrival = self._announce(plan)
        departure = None
        try:
            if arrival is not None:
                self._copy(plan, arrival)
            with self._parts.catalog.transaction() as tx:
                again = self._plan(tx, one, seen)
                if again.row.tag.digest != plan.row.tag.digest:
                    raise ImageBuildingError("a build has just changed the image")
                departure = _depart(tx, again)
                _write(tx, again, seen)
        finally:
            # Whatever has become of it: the registry ends as the catalog says.
            for errand in (arrival, departure):
                if errand is not None:
                    errands.run(self._parts, errand)

    def _plan(self, session: Transaction, one: Update, seen: _Seen) -> _Plan:
        """Raises DetailError 403, InvalidRequestError, ImageNotFoundError, ImageBuildingError, DestinationExistsError."""
        namespace, name, tag = one.source.place(self._identity)
        row = tags.find(session, namespace.owner, name, tag) if _is_text(name, tag) else None
        if row is None:
            raise ImageNotFoundError("no image of this organization has this name and tag")
        seen.before = _state(row.tag)
        plan = _planned(self._identity, row, namespace, _changes(one))
        if BuildStatus(row.build.status).is_open and (plan.renames or row.tag.digest is None):
            raise ImageBuildingError("the image is being built")
        if plan.renames and tags.find(session, plan.to.owner, plan.name, plan.tag) is not None:
            raise DestinationExistsError("an image of that name and tag is there already")
        return plan

    def _announce(self, plan: _Plan) -> RegistryErrand | None:
        """The errand that undoes the copy, should this process die before the catalog knows of it."""
        digest = plan.row.tag.digest
        if not plan.renames or digest is None:
            return None
        with self._parts.catalog.transaction() as tx:
            return errand_rows.add(tx, plan.repository, plan.tag, digest, plan.old_repository)

    def _copy(self, plan: _Plan, errand: RegistryErrand) -> None:
        """Raises SourceUnavailableError if the registry has lost the image, UnavailableError."""
        registry = self._parts.containers.registry
        if plan.repository != plan.old_repository:
            registry.copy(plan.old_repository, errand.digest, plan.repository)
        registry.tag(plan.repository, errand.digest, plan.tag)


def _result(one: Update, act: Act) -> dict[str, Any]:
    seen = _Seen()
    error = None
    try:
        act(one, seen)
    except (KilnError, DetailError) as refusal:
        error = {"code": _code(refusal), "message": str(refusal)}
    return {
        "source": one.source.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True),
        "success": error is None,
        "before": seen.before,
        "after": seen.after if error is None else None,
        "error": error,
    }


def _code(refusal: Exception) -> str:
    """Raises the refusal itself if no caller can have caused it."""
    for kind in type(refusal).__mro__:
        if kind in CODES:
            return CODES[kind]
    raise refusal


def _changes(one: Update) -> ImageChanges:
    try:
        changes = ImageChanges.model_validate(one.changes)
    except ValidationError as error:
        refused = from_validation(error)
        raise InvalidRequestError("set", refused.message) from None
    if all(getattr(changes, name) is None for name in ImageChanges.model_fields):
        raise InvalidRequestError("set", "changes nothing")
    return changes


def _planned(identity: Identity, row: TagRow, namespace: Namespace, changes: ImageChanges) -> _Plan:
    to = namespace if changes.owner is None else changes.owner.namespace(identity)
    if to is PLATFORM and changes.visibility is Visibility.PRIVATE:
        raise InvalidRequestError("visibility", "platform images are always PUBLIC")
    moves_there = to is PLATFORM and namespace is not PLATFORM
    return _Plan(
        row=row,
        to=to,
        name=new_name(identity, to, row.tag.name if changes.name is None else changes.name, "name"),
        tag=row.tag.tag if changes.tag is None else checked_tag(changes.tag, "tag"),
        visibility=Visibility.PUBLIC if moves_there else changes.visibility,
    )


def _write(tx: Transaction, plan: _Plan, seen: _Seen) -> None:
    to = plan.to
    row = tags.retag(tx, plan.row.tag, to.type, to.owner, to.organization_id, plan.name, plan.tag, plan.visibility)
    seen.after = _state(row)


def _depart(tx: Transaction, plan: _Plan) -> RegistryErrand | None:
    """The errand that takes the old tag away, written together with the new name."""
    digest = plan.row.tag.digest
    if not plan.renames or digest is None:
        return None
    return errand_rows.add(tx, plan.old_repository, plan.row.tag.tag, digest)


def _state(tag: Tag) -> dict[str, Any]:
    owner = {"type": tag.owner_type}
    if tag.owner_type == OwnerType.TEAM and tag.organization_id is not None:
        owner["teamId"] = tag.organization_id
    return {"owner": owner, "name": tag.name, "tag": tag.tag, "visibility": tag.visibility}


def _is_text(*names: str) -> bool:
    # PostgreSQL refuses to compare with NUL.
    return all("\0" not in name for name in names)
