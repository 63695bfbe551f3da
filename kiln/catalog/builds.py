"""Queries about builds that the API asks: insert, look up, page, cancel. What attempts do stands in `attempts.py`."""

import re
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, and_, func, literal, not_, or_, select, tuple_, update
from sqlalchemy.orm import Session

from kiln.catalog import images
from kiln.catalog.tables import Agent, Build, Image, Tag, UtcDateTime
from kiln.models import (
    OPEN_STATUSES,
    Api,
    BuildKind,
    BuildSpec,
    BuildStatus,
    BuiltImage,
    ContainerBuildSpec,
    MachineBuildSpec,
    RegistrationSpec,
    SnapshotSpec,
)
from kiln.ports import ContextFacts, ImageFacts

OPEN = tuple(status.value for status in OPEN_STATUSES)
UNBEGUN = (BuildStatus.AWAITING_CONTEXT.value, BuildStatus.QUEUED.value)
TAG_REFERENCE = re.compile(r"([^/]+)/([^/]+)/([^@]+):([^:/@]+)")


@dataclass(frozen=True)
class NewBuild:
    """A build to insert. `secrets` is encrypted already (kiln/sealing.py). `upload_until` for a build that is to wait
    for its context until then; `context` for one that has it already."""

    organization_id: str
    api: Api
    spec: BuildSpec
    created_by: str
    secrets: bytes | None = None
    platform: str = "linux/amd64"
    agent: Agent | None = None
    upload_until: datetime | None = None
    context: ContextFacts | None = None
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
    """Writes a build, `awaiting_context` with an `upload_until`, else `queued`; the row is the order that the dispatcher
    carries out. A container image's tag is claimed beside it (tags.py)."""
    row = _row(new)
    tx.add(row)
    tx.flush()
    return row


def insert_finished(tx: Session, new: NewBuild, facts: ImageFacts, host: str) -> BuildWithImage:
    """Writes a registration: a build that has `succeeded`, with its image, in the registry at `host`.

    It has no tag: only what Kiln put into its own registry can be pulled, renamed or deleted there.
    """
    if not isinstance(new.spec, RegistrationSpec):
        raise TypeError(f"a {new.spec.kind} is not finished when it is asked for")
    row = _row(new)
    row.status = BuildStatus.SUCCEEDED.value
    row.started_at = row.publishing_at = row.completed_at = row.cleaned_at = row.created_at
    tx.add(row)
    tx.flush()
    built = BuiltImage(image_id=facts.digest, region="", account=host, attempt=0)
    return BuildWithImage(row, images.insert_container(tx, row, facts, built, host))


def _row(new: NewBuild) -> Build:
    return Build(
        id=new.id,
        organization_id=new.organization_id,
        kind=new.spec.kind.value,
        api=new.api.value,
        platform=new.platform,
        status=(BuildStatus.AWAITING_CONTEXT if new.upload_until else BuildStatus.QUEUED).value,
        spec=new.spec.model_dump(mode="json"),
        secrets=new.secrets,
        created_by=new.created_by,
        created_at=datetime.now(UTC),
        attempt=0,
        known_ids=[],
        agent_id=new.agent.id if new.agent else None,
        agent_name=new.agent.name if new.agent else None,
        upload_until=new.upload_until,
        **_place(new.spec),
        **_notes(new.spec),
        **(_here_already(new.context) if new.context else {}),
    )


def _place(spec: BuildSpec) -> dict[str, Any]:
    if isinstance(spec, MachineBuildSpec | SnapshotSpec):
        return {"region": spec.region}
    return {"repository": spec.target.repository, "tag": spec.target.tag}


def _notes(spec: BuildSpec) -> dict[str, Any]:
    """What builds are found by of where their context came from."""
    if isinstance(spec, ContainerBuildSpec | RegistrationSpec):
        return {"source_commit": spec.source.source_commit, "working_tree_hash": spec.source.working_tree_hash}
    return {}


def _here_already(context: ContextFacts) -> dict[str, Any]:
    now = datetime.now(UTC)
    return {
        "context_uploaded_at": now,
        "context_started_at": now,
        "context_sha256": context.sha256,
        "context_bytes": context.size_bytes,
    }


def get(session: Session, build_id: str) -> Build | None:
    """A build by its id, whoever's it is. For Kiln's own use: the API asks `find`."""
    return session.get(Build, build_id)


def find(
    session: Session, organization_id: str, build_id: str, apis: Api | Collection[Api] | None = None
) -> BuildWithImage | None:
    """An organization's build, made through one of `apis` if any are given; None otherwise."""
    query = with_images().where(Build.organization_id == organization_id, Build.id == build_id)
    if apis is not None:
        wanted = [apis] if isinstance(apis, Api) else apis
        query = query.where(Build.api.in_([api.value for api in wanted]))
    return _pair(session.execute(query).first())


def page(session: Session, wanted: BuildFilter, limit: int, after: tuple[datetime, str] | None) -> list[BuildWithImage]:
    """At most `limit` builds, newest first, older than `after` (its time and id): one index range, however far back."""
    query = with_images().where(*_conditions(wanted))
    if after is not None:
        created_at, build_id = after
        query = query.where(tuple_(Build.created_at, Build.id) < tuple_(literal(created_at, UtcDateTime), build_id))
    rows = session.execute(query.order_by(Build.created_at.desc(), Build.id.desc()).limit(limit))
    return [BuildWithImage(build, image) for build, image in rows]


def with_images() -> Select[Build, Image]:
    """The query of builds, each with its image where it has one."""
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
        conditions.append(_has_image(wanted.images))
    return conditions


def _has_image(names: Collection[str]) -> ColumnElement[bool]:
    """By exact reference (of an AMI, or `host/owner/name@digest`), digest, or what a `host/owner/name:tag` points at."""
    tagged = [_tagged(*match.groups()) for match in map(TAG_REFERENCE.fullmatch, names) if match]
    return or_(Image.reference.in_(names), Image.digest.in_(names), *tagged)


def _tagged(host: str, owner: str, name: str, tag: str) -> ColumnElement[bool]:
    pointed_at = select(Tag.image_id).where(Tag.owner == owner, Tag.name == name, Tag.tag == tag)
    return and_(Image.account == host, Image.id.in_(pointed_at))


def _has_status(shown: Collection[str]) -> ColumnElement[bool]:
    """`cancelling` is no stored status: it is an open build whose cancellation was asked for."""
    stored = [status for status in shown if status != BuildStatus.CANCELLING]
    matches = and_(Build.status.in_(stored), not_(is_cancelling()))
    return or_(matches, is_cancelling()) if BuildStatus.CANCELLING in shown else matches


def is_cancelling() -> ColumnElement[bool]:
    """Whether a row's `shown_status` is `cancelling`."""
    return and_(Build.status.in_(OPEN), Build.cancel_requested_at.is_not(None), Build.publishing_at.is_(None))


def request_cancel(tx: Session, build_id: str) -> None:
    """Asks for a build's cancellation; a closed build, one asked already, or one whose image is being published is left
    as it is.

    A build that no run has claimed is closed at once: a run that starts later loses its claim.
    """
    now = datetime.now(UTC)
    open_row = (Build.id == build_id, Build.status.in_(OPEN), Build.publishing_at.is_(None))
    tx.execute(update(Build).where(*open_row, Build.cancel_requested_at.is_(None)).values(cancel_requested_at=now))
    tx.execute(
        update(Build)
        .where(*open_row, Build.status.in_(UNBEGUN), Build.run_id.is_(None))
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


def installs_agent(row: Build) -> bool:
    """Whether it is a container build from the agents' template."""
    return bool(row.spec.get("agent"))


def shown_status(row: Build) -> BuildStatus:
    """The build's status in the words of `kiln.md`."""
    if row.status in OPEN and row.cancel_requested_at is not None and row.publishing_at is None:
        return BuildStatus.CANCELLING
    return BuildStatus(row.status)
