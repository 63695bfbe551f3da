"""The list of builds that came through cloud-builds, page by page, and the build that a repeated POST made before."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, and_, case, func, literal, select, tuple_
from sqlalchemy.orm import Session

from kiln.catalog.builds import BuildWithImage, is_cancelling, with_images
from kiln.catalog.tables import Build, UtcDateTime
from kiln.errors import KilnError
from kiln.models import Api, BuildStatus, ErrorCode

SortBy = Literal["created_at", "agent_name", "build_status", "build_end_time"]
# A build that has not ended sorts as if it ended after all others; a year short of where a zone would overflow.
NOT_YET = datetime(9999, 1, 1, tzinfo=UTC)
# Failures that are Kiln's own fault: the contract calls such a build `error`.
OWN_FAULTS = (ErrorCode.WORKFLOW_TERMINATED.value, ErrorCode.INTERNAL.value)


class UnknownCursorError(KilnError):
    """No build of the organization that came through cloud-builds has the id that a page is to begin at."""

    retryable = False


@dataclass(frozen=True)
class CloudFilter:
    """What a page is narrowed to; None means any."""

    organization_id: str
    agent_name: str | None = None
    source_commit: str | None = None
    working_tree_hash: str | None = None


@dataclass(frozen=True)
class CloudPage:
    """One page in its order. `has_more`: beyond it, in the direction that was asked; `total`: over the filters."""

    rows: list[BuildWithImage]
    has_more: bool
    total: int


def page(  # noqa: PLR0913, PLR0917  the contract's query
    session: Session,
    wanted: CloudFilter,
    limit: int,
    sort_by: SortBy,
    descending: bool,  # noqa: FBT001
    starting_after: str | None = None,
    ending_before: str | None = None,
) -> CloudPage:
    """At most `limit` builds after one id, or immediately before another, in the order that was asked.

    Equal values are ordered by id. A build stands where its row says now: one whose status or end changes between two
    pages moves. Raises UnknownCursorError.
    """
    key = _sort_key(sort_by)
    backward = ending_before is not None
    upward = descending == backward
    query = with_images().where(*_conditions(wanted))
    cursor = ending_before or starting_after
    if cursor is not None:
        query = query.where(_beyond(session, wanted.organization_id, key, cursor, upward=upward))
    order = (key, Build.id) if upward else (key.desc(), Build.id.desc())
    found = [BuildWithImage(build, image) for build, image in session.execute(query.order_by(*order).limit(limit + 1))]
    rows = found[:limit]
    return CloudPage(rows[::-1] if backward else rows, len(found) > limit, _total(session, wanted))


def recent_twin(  # noqa: PLR0913
    session: Session,
    organization_id: str,
    repository: str,
    tag: str,
    *,
    sha256: str | None = None,
    reference: str | None = None,
    since: datetime,
) -> BuildWithImage | None:
    """The newest build since then of the same archive, or the same registered image, to the same tag.

    In the transaction that inserts the build otherwise: after `agents.ensure`, two such transactions follow each other.
    """
    same = [Build.repository == repository, Build.tag == tag, Build.created_at >= since]
    if sha256 is not None:
        same.append(Build.context_sha256 == sha256)
    if reference is not None:
        same.append(Build.spec["reference"].as_string() == reference)
    query = with_images().where(*_made_through(organization_id), *same)
    row = session.execute(query.order_by(Build.created_at.desc(), Build.id.desc()).limit(1)).first()
    return None if row is None else BuildWithImage(row[0], row[1])


def _made_through(organization_id: str) -> list[ColumnElement[bool]]:
    return [Build.organization_id == organization_id, Build.api == Api.CLOUD_BUILDS.value]


def _conditions(wanted: CloudFilter) -> list[ColumnElement[bool]]:
    conditions = _made_through(wanted.organization_id)
    if wanted.agent_name is not None:
        conditions.append(Build.agent_name == wanted.agent_name)
    if wanted.source_commit is not None:
        conditions.append(Build.source_commit == wanted.source_commit)
    if wanted.working_tree_hash is not None:
        conditions.append(Build.working_tree_hash == wanted.working_tree_hash)
    return conditions


def _total(session: Session, wanted: CloudFilter) -> int:
    return session.scalar(select(func.count()).select_from(Build).where(*_conditions(wanted))) or 0


def _beyond(
    session: Session, organization_id: str, key: ColumnElement[Any], cursor: str, *, upward: bool
) -> ColumnElement[bool]:
    """Everything past the build at the cursor. The filters do not matter for it: it has its place all the same."""
    query = select(key).where(*_made_through(organization_id), Build.id == cursor)
    found = session.execute(query).first()
    if found is None:
        raise UnknownCursorError(f"no build has the id {cursor}")
    here = tuple_(literal(found[0], key.type), literal(cursor))
    there = tuple_(key, Build.id)
    return there > here if upward else there < here


def _sort_key(sort_by: SortBy) -> ColumnElement[Any]:
    keys: dict[SortBy, ColumnElement[Any]] = {
        "created_at": Build.__table__.c.created_at,
        "agent_name": Build.__table__.c.agent_name,
        "build_status": _word(),
        "build_end_time": func.coalesce(Build.completed_at, literal(NOT_YET, UtcDateTime), type_=UtcDateTime),
    }
    return keys[sort_by]


def _word() -> ColumnElement[str]:
    """A build's status in the words of cloud-builds, so that a page is in the order of what it shows."""
    waiting = (BuildStatus.AWAITING_CONTEXT.value, BuildStatus.QUEUED.value)
    return case(
        (is_cancelling(), "cancelling"),
        (Build.status.in_(waiting), "queued"),
        (Build.status == BuildStatus.BUILDING.value, "running"),
        (Build.status == BuildStatus.SUCCEEDED.value, "success"),
        (and_(Build.status == BuildStatus.FAILED.value, Build.error_code.in_(OWN_FAULTS)), "error"),
        else_=Build.status,
    )
