"""Queries about builds that the API asks: insert, look up, page, cancel. What attempts do stands in `attempts.py`."""

import uuid
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime

from sqlalchemy import ColumnElement, Row, Select, and_, func, literal, or_, select, tuple_, update
from sqlalchemy.orm import Session

from kiln.catalog.tables import Build, Image, UtcDateTime
from kiln.models import OPEN_STATUSES, Api, BuildKind, BuildSpec, BuildStatus

OPEN = tuple(status.value for status in OPEN_STATUSES)


@dataclass(frozen=True)
class NewBuild:
    """A build to insert. `secrets` is encrypted already (kiln/sealing.py)."""

    organization_id: str
    api: Api
    spec: BuildSpec
    created_by: str
    secrets: bytes | None = None
    platform: str = "linux/amd64"
    id: str = field(default_factory=lambda: str(uuid.uuid4()))


@dataclass(frozen=True)
class BuildFilter:
    """What a page of builds is narrowed to; None means any. `api` None means every API's builds."""

    organization_id: str
    apis: Collection[str] | None = None
    kinds: Collection[str] | None = None
    statuses: Collection[str] | None = None
    images: Collection[str] | None = None


@dataclass(frozen=True)
class BuildWithImage:
    """A build's row and its image's, where it has one."""

    build: Build
    image: Image | None


def insert(tx: Session, new: NewBuild) -> Build:
    """Writes a build as `queued`; the row is the order that the dispatcher carries out."""
    row = Build(
        id=new.id,
        organization_id=new.organization_id,
        kind=new.spec.kind.value,
        api=new.api.value,
        platform=new.platform,
        status=BuildStatus.QUEUED.value,
        spec=new.spec.model_dump(mode="json"),
        secrets=new.secrets,
        created_by=new.created_by,
        created_at=datetime.now(UTC),
        attempt=0,
        known_ids=[],
        region=new.spec.region,
    )
    tx.add(row)
    tx.flush()
    return row


def get(session: Session, build_id: str) -> Build | None:
    """A build by its id, whoever's it is. For Kiln's own use: the API asks `find`."""
    return session.get(Build, build_id)


def find(session: Session, organization_id: str, build_id: str, api: Api | None = None) -> BuildWithImage | None:
    """An organization's build, made through `api` if that is given; None otherwise."""
    query = _with_images().where(Build.organization_id == organization_id, Build.id == build_id)
    if api is not None:
        query = query.where(Build.api == api.value)
    return _pair(session.execute(query).first())


def page(session: Session, wanted: BuildFilter, limit: int, after: tuple[datetime, str] | None) -> list[BuildWithImage]:
    """At most `limit` builds, newest first, older than `after` (its time and id): one index range, however far back."""
    query = _with_images().where(*_conditions(wanted))
    if after is not None:
        created_at, build_id = after
        query = query.where(tuple_(Build.created_at, Build.id) < tuple_(literal(created_at, UtcDateTime), build_id))
    rows = session.execute(query.order_by(Build.created_at.desc(), Build.id.desc()).limit(limit))
    return [BuildWithImage(build, image) for build, image in rows]


def _with_images() -> Select[Build, Image]:
    return select(Build, Image).outerjoin(Image, Image.build_id == Build.id)


def _pair(row: Row[Build, Image] | None) -> BuildWithImage | None:
    return None if row is None else BuildWithImage(row[0], row[1])


def _conditions(wanted: BuildFilter) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = [Build.organization_id == wanted.organization_id]
    if wanted.apis is not None:
        conditions.append(Build.api.in_(wanted.apis))
    if wanted.kinds is not None:
        conditions.append(Build.kind.in_(wanted.kinds))
    if wanted.statuses is not None:
        conditions.append(_has_status(wanted.statuses))
    if wanted.images is not None:
        conditions.append(Image.reference.in_(wanted.images))
    return conditions


def _has_status(shown: Collection[str]) -> ColumnElement[bool]:
    """`cancelling` is no stored status: it is an open build whose cancellation was asked for."""
    stored = [status for status in shown if status != BuildStatus.CANCELLING]
    matches = and_(Build.status.in_(stored), or_(Build.cancel_requested_at.is_(None), Build.status.not_in(OPEN)))
    if BuildStatus.CANCELLING in shown:
        return or_(matches, and_(Build.status.in_(OPEN), Build.cancel_requested_at.is_not(None)))
    return matches


def request_cancel(tx: Session, build_id: str) -> None:
    """Asks for a build's cancellation; a closed build, or one asked already, is left as it is.

    A build that no run has claimed is closed at once: a run that starts later loses its claim.
    """
    now = datetime.now(UTC)
    tx.execute(
        update(Build)
        .where(Build.id == build_id, Build.status.in_(OPEN), Build.cancel_requested_at.is_(None))
        .values(cancel_requested_at=now)
    )
    tx.execute(
        update(Build)
        .where(Build.id == build_id, Build.status == BuildStatus.QUEUED.value, Build.run_id.is_(None))
        .values(status=BuildStatus.CANCELLED.value, completed_at=now, cleaned_at=now, secrets=None)
    )
    tx.flush()
    tx.expire_all()


def building_image(session: Session, organization_id: str, api: Api, reference: str) -> Build | None:
    """The open build that is making this AMI, if one is."""
    return session.scalars(_pending(organization_id, api).where(Build.pending_image == reference)).first()


def pending_images(session: Session, organization_id: str, api: Api) -> list[Build]:
    """The open builds whose AMI EC2 is making, newest first."""
    return list(session.scalars(_pending(organization_id, api).order_by(Build.created_at.desc(), Build.id.desc())))


def _pending(organization_id: str, api: Api) -> Select[Build]:
    return select(Build).where(
        Build.organization_id == organization_id,
        Build.api == api.value,
        Build.status == BuildStatus.BUILDING.value,
        Build.pending_image.is_not(None),
    )


def count_by_status(session: Session) -> dict[tuple[str, str], int]:
    """How many builds stand at each kind and status, for the metrics."""
    rows = session.execute(select(Build.kind, Build.status, func.count()).group_by(Build.kind, Build.status))
    return {(BuildKind(kind).value, status): count for kind, status, count in rows}


def shown_status(row: Build) -> BuildStatus:
    """The build's status in the words of `kiln.md`."""
    if row.status in OPEN and row.cancel_requested_at is not None:
        return BuildStatus.CANCELLING
    return BuildStatus(row.status)
