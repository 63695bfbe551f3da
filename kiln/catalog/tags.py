"""Tags of container images: one row a tag, whose namespace it stands in, and what it points at."""

import uuid
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Select, and_, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from kiln.catalog.images import AVAILABLE, DELETED
from kiln.catalog.session import database_now
from kiln.catalog.tables import Build, Image, Tag
from kiln.errors import ConflictError, ImageBuildingError, ImageNotFoundError
from kiln.models import OPEN_STATUSES, OwnerType, Target, Visibility
from kiln.naming import STAGING_OWNER

PLATFORM_OWNER = "platform"
TEAM_PREFIX = "team-"
OPEN = tuple(status.value for status in OPEN_STATUSES)


class DestinationExistsError(ConflictError):
    """A tag of this name is there already."""


@dataclass(frozen=True)
class TagRow:
    """A tag, its newest build, and the image that it points at, where it points at one."""

    tag: Tag
    build: Build
    image: Image | None


@dataclass(frozen=True)
class TagFilter:
    """What a page of tags is narrowed to: one namespace. `organization_id` does not matter for the platform's."""

    organization_id: str
    owner_type: OwnerType
    owner: str
    search: str | None = None


def team_owner(organization_id: str) -> str:
    """The first path segment of an organization's `team` namespace."""
    return f"{TEAM_PREFIX}{organization_id}"


def owners_of(organization_id: str, slug: str) -> dict[str, OwnerType]:
    """An organization's own namespaces by the first segment of their paths."""
    return {slug: OwnerType.PERSONAL, team_owner(organization_id): OwnerType.TEAM}


def is_reserved(segment: str) -> bool:
    """Whether a path's first segment is never an organization's slug."""
    return segment in (PLATFORM_OWNER, STAGING_OWNER) or segment.startswith(TEAM_PREFIX)


def claim(tx: Session, build: Build, target: Target) -> Tag:
    """Makes a new build its tag's newest one, and the tag if there is none.

    An existing tag keeps its visibility until the build's publication. Where another transaction makes the tag at the
    same moment, the block raises AlreadyThereError: the next try finds it.
    """
    row = _locked(tx, target.owner, target.name, target.tag)
    if row is None:
        return _insert(tx, build, target)
    if row.built_at <= build.created_at:
        row.build_id, row.built_at = build.id, build.created_at
        tx.flush()
    return row


def resolved_visibility(session: Session, target: Target) -> Visibility:
    """The visibility that a build gives its tag: what was asked, else the tag's own, else that of a new one."""
    if target.visibility is not None:
        return target.visibility
    known = session.scalar(select(Tag.visibility).where(*_named(target.owner, target.name, target.tag)))
    return Visibility(known) if known is not None else _first_visibility(target)


def publish(tx: Session, build: Build, image: Image, target: Target) -> Tag:
    """Points the tag at a build's image. The newest build of the tag stays its newest, if that is a later one."""
    row = claim(tx, build, target)
    row.digest, row.image_id, row.pushed_at = image.digest, image.id, image.created_at
    if target.visibility is not None:
        row.visibility = target.visibility.value
    tx.flush()
    return row


def find(session: Session, owner: str, name: str, tag: str) -> TagRow | None:
    """A tag by its whole name, whoever's it is."""
    row = session.execute(_rows().where(*_named(owner, name, tag))).first()
    return None if row is None else TagRow(row[0], row[1], row[2])


def page(session: Session, wanted: TagFilter, offset: int, limit: int) -> tuple[list[TagRow], int]:
    """At most `limit` tags of a namespace from the `offset`-th on, newest build first, and how many there are in all."""
    conditions = _conditions(wanted)
    total = session.scalar(select(func.count()).select_from(Tag).where(*conditions)) or 0
    query = _rows().where(*conditions).order_by(Tag.built_at.desc(), Tag.id.desc()).offset(offset).limit(limit)
    return [TagRow(tag, build, image) for tag, build, image in session.execute(query)], total


def readable(session: Session, organization_id: str, organization_slug: str, repositories: Collection[str]) -> set[str]:
    """Those of the repositories that an organization may pull from.

    Its own and the platform's; another's only if something is published there and all of that is PUBLIC: a registry's
    token opens a repository, not a tag.
    """
    open_to_it = {*owners_of(organization_id, organization_slug), PLATFORM_OWNER}
    own = {repository for repository in repositories if _split(repository)[0] in open_to_it}
    others = set(repositories) - own
    return own | (others & _public(session, others)) if others else own


def retag(  # noqa: PLR0913, PLR0917  a tag's whole name
    tx: Session,
    tag: Tag,
    owner_type: OwnerType,
    owner: str,
    organization_id: str | None,
    name: str,
    tag_name: str,
    visibility: Visibility | None = None,
) -> Tag:
    """Gives a tag another name, another visibility, or both; its image's reference follows it.

    Raises ImageNotFoundError if it is no longer there, ImageBuildingError while a build is to publish it under the name
    that it has, DestinationExistsError.
    """
    row = _again(tx, tag)
    if (row.owner, row.name, row.tag) != (owner, name, tag_name):
        _check_settled(tx, row)
        _move(tx, row, (owner_type, owner, organization_id, name, tag_name))
    if visibility is not None:
        row.visibility = visibility.value
        tx.flush()
    return row


def remove(tx: Session, tag: Tag) -> None:
    """Takes a tag off the list; images that no other tag of the repository needs are `deleted` with it.

    The registry is the caller's business (errands.py). Raises ImageNotFoundError if it is no longer there,
    ImageBuildingError while a build is to publish it.
    """
    row = _again(tx, tag)
    _check_settled(tx, row)
    repository, digest = f"{row.owner}/{row.name}", row.digest
    tx.delete(row)
    tx.flush()
    if digest is not None and not needed(tx, repository, digest):
        tx.execute(
            update(Image)
            .where(Image.repository == repository, Image.digest == digest, Image.status == AVAILABLE, _is_kept_there())
            .values(status=DELETED, gone_at=database_now(tx))
        )


def needed(session: Session, repository: str, digest: str) -> list[str]:
    """The tags of a repository that point at this digest, by name."""
    owner, name = _split(repository)
    query = select(Tag.tag).where(Tag.owner == owner, Tag.name == name, Tag.digest == digest)
    return list(session.scalars(query.order_by(Tag.tag)))


def _insert(tx: Session, build: Build, target: Target) -> Tag:
    platform = target.owner_type is OwnerType.PLATFORM
    row = Tag(
        id=str(uuid.uuid4()),
        organization_id=None if platform else build.organization_id,
        owner_type=target.owner_type.value,
        owner=target.owner,
        name=target.name,
        tag=target.tag,
        visibility=(target.visibility or _first_visibility(target)).value,
        build_id=build.id,
        built_at=build.created_at,
    )
    tx.add(row)
    tx.flush()
    return row


def _public(session: Session, repositories: Collection[str]) -> set[str]:
    """Repositories in which all that is published is PUBLIC: the given ones among them, by two ranges of one index."""
    owners, names = zip(*map(_split, repositories), strict=True)
    query = (
        select(Tag.owner, Tag.name)
        .where(Tag.owner.in_(set(owners)), Tag.name.in_(set(names)), Tag.digest.is_not(None))
        .group_by(Tag.owner, Tag.name)
        .having(func.min(Tag.visibility) == Visibility.PUBLIC.value)
        .having(func.max(Tag.visibility) == Visibility.PUBLIC.value)
    )
    return {f"{owner}/{name}" for owner, name in session.execute(query)}


def _first_visibility(target: Target) -> Visibility:
    return Visibility.PUBLIC if target.owner_type is OwnerType.PLATFORM else Visibility.PRIVATE


def _move(tx: Session, row: Tag, to: tuple[OwnerType, str, str | None, str, str]) -> None:
    owner_type, owner, organization_id, name, tag_name = to
    here = (Image.id == row.image_id, Image.repository == f"{row.owner}/{row.name}", _is_kept_there())
    try:
        with tx.begin_nested():
            row.owner_type, row.owner, row.organization_id = owner_type.value, owner, organization_id
            row.name, row.tag = name, tag_name
            tx.flush()
    except IntegrityError as error:
        raise DestinationExistsError(f"{owner}/{name}:{tag_name} is there already") from error
    image = tx.scalars(select(Image).where(*here)).first()
    if image is not None:
        image.repository, image.reference = f"{owner}/{name}", f"{image.account}/{owner}/{name}@{image.digest}"
        tx.flush()


def _is_kept_there() -> ColumnElement[bool]:
    """Not so where the image was registered: it is whoever's it was, and stays where it is."""
    return Image.reference == Image.account + "/" + Image.repository + "@" + Image.digest


def _again(tx: Session, tag: Tag) -> Tag:
    """The tag as it is now, kept from others until the transaction's end."""
    row = _locked(tx, tag.owner, tag.name, tag.tag)
    if row is None or row.id != tag.id:
        raise ImageNotFoundError(f"there is no image {tag.owner}/{tag.name}:{tag.tag} any more")
    return row


def _locked(tx: Session, owner: str, name: str, tag: str) -> Tag | None:
    query = select(Tag).where(*_named(owner, name, tag)).with_for_update()
    return tx.scalars(query.execution_options(populate_existing=True)).first()


def _check_settled(tx: Session, row: Tag) -> None:
    """A submission takes the tag's lock too: whoever holds it sees every build that is to publish the tag."""
    same_target = and_(Build.repository == f"{row.owner}/{row.name}", Build.tag == row.tag)
    building = tx.scalar(select(Build.id).where(same_target, Build.status.in_(OPEN)).limit(1))
    if building is not None:
        raise ImageBuildingError(f"{row.owner}/{row.name}:{row.tag} is being built")


def _rows() -> Select[Tag, Build, Image]:
    return select(Tag, Build, Image).join(Build, Build.id == Tag.build_id).outerjoin(Image, Image.id == Tag.image_id)


def _named(owner: str, name: str, tag: str) -> tuple[ColumnElement[bool], ...]:
    return Tag.owner == owner, Tag.name == name, Tag.tag == tag


def _conditions(wanted: TagFilter) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = [Tag.owner == wanted.owner, Tag.owner_type == wanted.owner_type.value]
    if wanted.owner_type is not OwnerType.PLATFORM:
        conditions.append(Tag.organization_id == wanted.organization_id)
    if wanted.search:
        conditions.append((Tag.owner + "/" + Tag.name + ":" + Tag.tag).icontains(wanted.search, autoescape=True))
    return conditions


def _split(repository: str) -> tuple[str, str]:
    owner, _, name = repository.partition("/")
    return owner, name
