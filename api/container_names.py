"""Whose a container image is, and what it is called: an organization's namespaces, and references into them."""

from dataclasses import dataclass

from api.errors import DetailError
from kiln.catalog.keys import Identity
from kiln.catalog.tags import PLATFORM_OWNER, owners_of, team_owner
from kiln.errors import InvalidRequestError
from kiln.models import OwnerType, Target, Visibility
from kiln.references import image_name_problem, image_tag_problem

# What some clients put before every reference; it is no owner.
DROPPED_PREFIX = "prime/"
ADMIN = "admin"


@dataclass(frozen=True)
class Namespace:
    """Where images stand: `owner` is the first segment of their path. The platform's has no organization."""

    type: OwnerType
    owner: str
    organization_id: str | None

    @property
    def team_id(self) -> str | None:
        """As answers show it."""
        return self.organization_id if self.type is OwnerType.TEAM else None

    def target(self, name: str, tag: str, visibility: Visibility | None) -> Target:
        """An image of this namespace."""
        return Target(owner_type=self.type, owner=self.owner, name=name, tag=tag, visibility=visibility)


PLATFORM = Namespace(OwnerType.PLATFORM, PLATFORM_OWNER, None)


def personal(identity: Identity) -> Namespace:
    """The namespace under the organization's slug."""
    return Namespace(OwnerType.PERSONAL, identity.organization_slug, identity.organization_id)


def team(identity: Identity, team_id: str) -> Namespace:
    """The `team` namespace. Raises DetailError 403 unless `team_id` is the key's own organization, by id or slug."""
    if team_id not in (identity.organization_id, identity.organization_slug):
        raise DetailError(403, "the team is not this API key's organization")
    return Namespace(OwnerType.TEAM, team_owner(identity.organization_id), identity.organization_id)


def personal_or_team(identity: Identity, team_id: str | None) -> Namespace:
    """The team's namespace where one is named, else the personal one. Raises DetailError 403."""
    return team(identity, team_id) if team_id else personal(identity)


def require_admin(identity: Identity) -> None:
    """Raises DetailError 403 unless the key may change what belongs to no organization."""
    if not identity.may(ADMIN):
        raise DetailError(403, "platform images are changed with an admin's API key only")


def resolve(identity: Identity, path: str, otherwise: Namespace) -> tuple[Namespace, str]:
    """The namespace and the name that a path means: its first segment is an owner only if it is one of the caller's, or
    `platform`; else the whole is a name of the namespace `otherwise`."""
    path = path.removeprefix(DROPPED_PREFIX)
    owner, _, name = path.partition("/")
    if not name:
        return otherwise, path
    if owner == PLATFORM_OWNER:
        return PLATFORM, name
    kind = owners_of(identity.organization_id, identity.organization_slug).get(owner)
    if kind is None:
        return otherwise, path
    return Namespace(kind, owner, identity.organization_id), name


def resolve_reference(identity: Identity, reference: str) -> tuple[Namespace, str, str]:
    """The namespace, name and tag of `[owner/]name:tag`. Raises InvalidRequestError if it has no tag."""
    path, colon, tag = reference.rpartition(":")
    if not colon or "/" in tag:
        raise InvalidRequestError("reference", "must be name:tag, with or without its owner before it")
    namespace, name = resolve(identity, path, personal(identity))
    return namespace, name, tag


def new_name(identity: Identity, namespace: Namespace, name: str, field: str) -> str:
    """A name for a new image, without what is dropped of every reference.

    Raises InvalidRequestError if it is no name, or would be read as another owner's.
    """
    name = name.removeprefix(DROPPED_PREFIX)
    first, slash, _ = name.partition("/")
    owners = (PLATFORM_OWNER, *owners_of(identity.organization_id, identity.organization_slug))
    if slash and first in owners:
        raise InvalidRequestError(field, "must not begin with an owner; team_id and owner_scope choose it")
    problem = image_name_problem(name, namespace.owner)
    if problem is not None:
        raise InvalidRequestError(field, problem)
    return name


def checked_tag(tag: str, field: str) -> str:
    """The tag itself. Raises InvalidRequestError if it is none."""
    problem = image_tag_problem(tag)
    if problem is not None:
        raise InvalidRequestError(field, problem)
    return tag
