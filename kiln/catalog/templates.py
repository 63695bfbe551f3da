"""Queries about templates, the images of organizations: insert, look up, page, delete.

Locks are taken in one order by everybody: a template's row, machines' rows by id, a build's row, an image's row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from sqlalchemy import ColumnElement, Row, Select, and_, bindparam, or_, select
from sqlalchemy.orm import Session

from kiln.catalog import attempts, builds, images
from kiln.catalog.builds import UNBEGUN, NewBuild
from kiln.catalog.names import contains, is_id, search_key
from kiln.catalog.numbered_pages import page_of_ids
from kiln.catalog.tables import Build, Image, Machine, Template
from kiln.errors import NotFoundError, RefusedError
from kiln.models import BuildStatus, ClientCode, ImageRef, Software, TemplateSource, TemplateStatus

NAMED_AT_MOST = 5


@dataclass(frozen=True)
class NewTemplate:
    """A template to insert, with the build that makes its AMI. `name` None: `Template #{id}`."""

    organization_id: str
    new_build: NewBuild
    size_gb: int
    source: TemplateSource
    region: str
    name: str | None = None
    software: Sequence[Software] = ()
    machine_id: int | None = None


@dataclass(frozen=True)
class ListedTemplate:
    """A template's row, and all that a list says of its build and its AMI. `updated_at`: when its status changed last."""

    template: Template
    status: TemplateStatus
    updated_at: datetime


@dataclass(frozen=True)
class KnownTemplate:
    """A template's row, its build's, and its AMI's where there is one."""

    template: Template
    build: Build
    image: Image | None

    @property
    def status(self) -> TemplateStatus:
        """Its build's status, and its AMI's once there is one, in the words of `organization-images.md`."""
        return _status(self.build.status, self.image.status if self.image else None)

    @property
    def updated_at(self) -> datetime:
        """When its status changed last."""
        gone_at = self.image.gone_at if self.image else None
        return _newest(self.template.created_at, self.build.started_at, self.build.completed_at, gone_at)


@dataclass(frozen=True)
class Deleted:
    """A template that was taken off the list, and what is still to be told Temporal: a build whose cancellation was asked
    for, or an AMI whose deletion begins."""

    template: Template
    build_to_cancel: str | None = None
    image: ImageRef | None = None


def insert(tx: Session, new: NewTemplate) -> KnownTemplate:
    """Writes a template, `pending`, and the build that is to make it."""
    build = builds.insert(tx, new.new_build)
    row = Template(
        organization_id=new.organization_id,
        name="",
        name_key="",
        region=new.region,
        size_gb=new.size_gb,
        source=new.source.value,
        software=[each.model_dump(mode="json") for each in new.software],
        build_id=build.id,
        machine_id=new.machine_id,
        created_at=build.created_at,
    )
    tx.add(row)
    tx.flush()
    row.name = f"Template #{row.id}" if new.name is None else new.name
    row.name_key = search_key(row.name)
    tx.flush()
    return KnownTemplate(row, build, None)


def find(session: Session, organization_id: str, template_id: int, *, lock: bool = False) -> KnownTemplate | None:
    """An organization's template that is not deleted. With `lock`, neither deletion nor assignment comes in between
    until the transaction's end: so a machine that is to be made from it can be written."""
    if not is_id(template_id):
        return None
    own = (Template.id == template_id, Template.organization_id == organization_id, Template.deleted_at.is_(None))
    if lock:
        # By itself: PostgreSQL would read the joined rows as they were before it waited for this one.
        session.execute(select(Template.id).where(*own).with_for_update(key_share=True))
    row = session.execute(_rows().where(*own).execution_options(populate_existing=lock)).first()
    return None if row is None else _known(row)


def page(session: Session, organization_id: str, q: str, page: int, per_page: int) -> tuple[list[ListedTemplate], int]:
    """The `page`th page (from 1 on), newest first, of the templates whose name contains `q` whatever its case, and how
    many there are in all."""
    ids = select(Template.id).where(*_listed(session, organization_id, q))
    shown, total = page_of_ids(session, ids, page, per_page, newest_first=True, behind=(Template.deleted_at,))
    return [_shown(*row) for row in session.execute(_SHOWN, {"ids": shown})], total


def require_available(known: KnownTemplate) -> None:
    """Raises RefusedError unless machines can be launched from it."""
    if known.status is not TemplateStatus.AVAILABLE:
        raise RefusedError(f"image {known.template.name} is {known.status}", ClientCode.IMAGE_UNAVAILABLE)


def delete(tx: Session, organization_id: str, template_id: int) -> Deleted:
    """Takes a template off the list for good: its build is asked to end, or its AMI is `deleting` from now on, with
    its snapshots; of one that EC2 has no more, the snapshots that it left.

    Raises NotFoundError; RefusedError while it is being built, or a machine awaits it.
    """
    known = find(tx, organization_id, template_id, lock=True)
    if known is None:
        raise NotFoundError("no image of this organization has this id")
    attempts.row_of(tx, known.build.id, lock=True)  # no attempt may begin or publish from here on
    # What one published while this waited for the row is not among what was read before.
    known = replace(known, image=images.of_build(tx, known.build.id))
    if known.status is TemplateStatus.BUILDING:
        raise RefusedError(f"image {known.template.name} is building", ClientCode.IMAGE_BUILDING)
    _require_unawaited(tx, known.template)
    known.template.deleted_at = datetime.now(UTC)
    tx.flush()
    if known.status is TemplateStatus.PENDING:
        builds.request_cancel(tx, known.build.id)
        return Deleted(known.template, build_to_cancel=known.build.id)
    return Deleted(known.template, image=_begin_deletion(tx, known.image))


def _begin_deletion(tx: Session, image: Image | None) -> ImageRef | None:
    if image is None or not images.begin_deletion(tx, image.id, gone_too=True):
        return None
    return ImageRef(image_id=image.id, organization_id=image.organization_id)


def _require_unawaited(tx: Session, template: Template) -> None:
    assigned = and_(Machine.template_id == template.id, Machine.assignment > Machine.built_assignment)
    awaiting = or_(assigned, Machine.launching_template_id == template.id)
    names = list(tx.scalars(select(Machine.name).where(awaiting).order_by(Machine.id).limit(NAMED_AT_MOST + 1)))
    if names:
        shown = ", ".join(names[:NAMED_AT_MOST]) + (" and others" if len(names) > NAMED_AT_MOST else "")
        raise RefusedError(f"image {template.name} is awaited by: {shown}")


def _listed(session: Session, organization_id: str, q: str) -> list[ColumnElement[bool]]:
    wanted = [Template.organization_id == organization_id, Template.deleted_at.is_(None)]
    return [*wanted, contains(session, Template.name_key, q)] if q else wanted


def _rows() -> Select[Template, Build, Image]:
    return (
        select(Template, Build, Image)
        .join(Build, Build.id == Template.build_id)
        .outerjoin(Image, Image.build_id == Build.id)
    )


# Built once, and without the rows of builds and images: reading them whole would take twice as long.
_SHOWN = (
    select(Template, Build.status, Image.status, Build.started_at, Build.completed_at, Image.gone_at)
    .join(Build, Build.id == Template.build_id)
    .outerjoin(Image, Image.build_id == Build.id)
    .where(Template.id.in_(bindparam("ids", expanding=True)))
    .order_by(Template.id.desc())
)


def _shown(template: Template, build: str, image: str | None, *moments: datetime | None) -> ListedTemplate:
    return ListedTemplate(template, _status(build, image), _newest(template.created_at, *moments))


def _status(build: str, image: str | None) -> TemplateStatus:
    """By the statuses of its build, and of its AMI where there is one."""
    if build in UNBEGUN:
        return TemplateStatus.PENDING
    if build == BuildStatus.BUILDING.value:
        return TemplateStatus.BUILDING
    return TemplateStatus.AVAILABLE if image == images.AVAILABLE else TemplateStatus.FAILED


def _newest(*moments: datetime | None) -> datetime:
    return max(moment for moment in moments if moment is not None)


def _known(row: Row[Template, Build, Image]) -> KnownTemplate:
    return KnownTemplate(row[0], row[1], row[2])
