"""Queries about pods that the API asks: insert, look up, page, prompt, terminate. What workflows and runners write stands
in `pod_work.py`.

A pod is changed under the lock of its row, and its runner's row comes before it where both are locked.
"""

import json
import secrets
import string
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import reduce
from operator import add

from sqlalchemy import ColumnElement, Row, Select, and_, case, func, select, true, union_all
from sqlalchemy.orm import Session

from kiln.catalog.pod_tables import Pod, PodPrompt, Runner
from kiln.catalog.runners import OPEN_PODS, is_offline, presence_horizon
from kiln.errors import NotFoundError, RefusedError, UnavailableError
from kiln.models import PodRef, PodSpec, PodStatus
from kiln.ports.pods import PodSecrets
from kiln.sealing import Sealer

KEY_PREFIX = "pod-"
KEY_CHARACTERS = 12
KEY_ALPHABET = string.ascii_lowercase + string.digits
# In the place of a run: the pod ended without one, and the house-keeping is to close its log.
NO_RUN = "none"
_NEWEST_FIRST = (Pod.created_at.desc(), Pod.id.desc())


@dataclass(frozen=True)
class NewPod:
    """A pod to insert. `secrets` as `seal_secrets` makes them; `image_id` the catalog's id of the image that it runs from.

    Of a repository, the caller holds the row (`repositories.find` with `lock`), lest it is removed meanwhile.
    """

    organization_id: str
    runner_id: str
    spec: PodSpec
    created_by: str
    initial_prompt: str | None = None
    secrets: bytes | None = None
    image_id: str | None = None


@dataclass(frozen=True)
class KnownPod:
    """A pod's row, and its status in the words of `pods.md`."""

    pod: Pod
    status: PodStatus


def insert(tx: Session, new: NewPod) -> Pod:
    """Writes a pod, `creating`: the row is the order that the dispatcher carries out. An initial prompt is its first."""
    now = datetime.now(UTC)
    row = Pod(
        id=str(uuid.uuid4()),
        key=_new_key(),
        organization_id=new.organization_id,
        runner_id=new.runner_id,
        status=PodStatus.CREATING.value,
        spec=new.spec.model_dump(mode="json"),
        initial_prompt=new.initial_prompt,
        secrets=new.secrets,
        image_id=new.image_id,
        created_by=new.created_by,
        created_at=now,
        updated_at=now,
    )
    tx.add(row)
    tx.flush()
    if new.initial_prompt is not None:
        _add_prompt(tx, row, new.initial_prompt)
    return row


def _new_key() -> str:
    return KEY_PREFIX + "".join(secrets.choice(KEY_ALPHABET) for _ in range(KEY_CHARACTERS))


def seal_secrets(sealer: Sealer, given: PodSecrets) -> bytes | None:
    """A pod's secrets as its row keeps them until its end; None when there are none."""
    kept = {"environment": dict(given.environment), "args": list(given.custom_args), "mcp_config": given.mcp_config}
    return sealer.seal_text(json.dumps(kept)) if any(kept.values()) else None


def open_secrets(sealer: Sealer, sealed: bytes | None) -> PodSecrets:
    """A pod's secrets again. Raises SealError if they were sealed with another key."""
    if sealed is None:
        return PodSecrets()
    kept = json.loads(sealer.open_text(sealed))
    return PodSecrets(kept["environment"], tuple(kept["args"]), kept["mcp_config"])


def find(session: Session, organization_id: str, key: str) -> KnownPod | None:
    """An organization's pod."""
    own = (Pod.key == key, Pod.organization_id == organization_id)
    row = session.execute(_rows(presence_horizon(session)).where(*own)).first()
    return None if row is None else _known(row)


def page(
    session: Session, organization_id: str, statuses: Collection[str] | None, limit: int, offset: int
) -> tuple[list[KnownPod], int]:
    """At most `limit` pods, newest first, after the first `offset`, whose status is one of `statuses` where any are given;
    and how many there are in all. An unknown status matches nothing."""
    horizon = presence_horizon(session)
    wanted = _wanted(organization_id, statuses, horizon)
    if not wanted:
        return [], 0
    ids = list(session.scalars(_newest_first(wanted, limit, offset)))
    rows = session.execute(_rows(horizon).where(Pod.id.in_(ids)).order_by(*_NEWEST_FIRST))
    return [_known(row) for row in rows], _count(session, wanted)


def prompt(tx: Session, organization_id: str, key: str, text: str) -> int:
    """Keeps a prompt for an open pod's agent; its number, from 1 on without a gap.

    Raises NotFoundError; RefusedError for an ended pod, UnavailableError while the runner of a running one is away.
    """
    row = locked(tx, key, organization_id=organization_id)
    if row.status not in OPEN_PODS:
        raise RefusedError("the pod has ended")
    if row.status == PodStatus.RUNNING.value and _is_orphaned(tx, row):
        raise UnavailableError("the pod's runner is away")
    return _add_prompt(tx, row, text)


def terminate(tx: Session, organization_id: str, key: str) -> PodRef:
    """Writes `terminated` for an open pod: its workflow and its runner are still to be told.

    Raises NotFoundError; RefusedError for a pod that has ended, however it did.
    """
    row = locked(tx, key, organization_id=organization_id)
    if row.status not in OPEN_PODS:
        raise RefusedError("Pod already terminated")
    row.terminate_requested_at = datetime.now(UTC)
    close(row, PodStatus.TERMINATED, row.terminate_requested_at)
    tx.flush()
    return pod_ref(row)


def locked(tx: Session, key: str, *, organization_id: str | None = None, runner_id: str | None = None) -> Pod:
    """The pod, kept from all others' writes until the transaction's end; an organization's, or a runner's.

    Raises NotFoundError.
    """
    query = select(Pod).where(Pod.key == key)
    if organization_id is not None:
        query = query.where(Pod.organization_id == organization_id)
    if runner_id is not None:
        query = query.where(Pod.runner_id == runner_id)
    locking = query.with_for_update(key_share=True).execution_options(populate_existing=True)
    row = tx.scalars(locking).first()
    if row is None:
        raise NotFoundError(f"there is no pod {key}")
    return row


def close(
    row: Pod, status: PodStatus, ended_at: datetime, *, error: str | None = None, exit_code: int | None = None
) -> None:
    """Ends a pod whose row is locked, and forgets its secrets. Unsettled until its workflow ends, or there is none."""
    row.status = status.value
    row.finished_at = ended_at
    row.updated_at = datetime.now(UTC)
    row.error, row.exit_code = error, exit_code
    row.secrets = row.lease_until = None
    row.run_id = row.run_id or NO_RUN


def pod_ref(row: Pod) -> PodRef:
    """The pod as its workflow knows it."""
    return PodRef(pod_id=row.id, key=row.key, organization_id=row.organization_id, runner_id=row.runner_id)


def _add_prompt(tx: Session, row: Pod, text: str) -> int:
    last = tx.scalar(select(func.max(PodPrompt.number)).where(PodPrompt.pod_id == row.id)) or 0
    tx.add(PodPrompt(pod_id=row.id, number=last + 1, text=text, created_at=datetime.now(UTC)))
    tx.flush()
    return last + 1


def _is_orphaned(tx: Session, row: Pod) -> bool:
    away = select(Runner.id).where(Runner.id == row.runner_id, is_offline(presence_horizon(tx)))
    return tx.scalar(away) is not None


def _wanted(organization_id: str, statuses: Collection[str] | None, horizon: datetime) -> list[ColumnElement[bool]]:
    """What is looked for, as conditions that exclude each other: all pods, or those of each status."""
    own = Pod.organization_id == organization_id
    if statuses is None:
        return [own]
    away = select(Runner.id).where(Runner.organization_id == organization_id, is_offline(horizon))
    where_runner = {PodStatus.RUNNING: Pod.runner_id.not_in(away), PodStatus.ORPHANED: Pod.runner_id.in_(away)}
    return [
        and_(own, Pod.status == _stored(status), where_runner.get(status, true()))
        for status in PodStatus
        if status.value in statuses
    ]


def _stored(status: PodStatus) -> str:
    return (PodStatus.RUNNING if status is PodStatus.ORPHANED else status).value


def _newest_first(wanted: list[ColumnElement[bool]], limit: int, offset: int) -> Select[str]:
    """The ids of the page. An index has each condition's rows in order: no more of each are merged than the page needs."""
    if len(wanted) == 1:
        return select(Pod.id).where(wanted[0]).order_by(*_NEWEST_FIRST).limit(limit).offset(offset)
    ranges = (select(Pod.created_at, Pod.id).where(each).order_by(*_NEWEST_FIRST) for each in wanted)
    merged = union_all(*(select(each.limit(offset + limit).subquery()) for each in ranges)).subquery()
    newest_first = select(merged.c.id).order_by(merged.c.created_at.desc(), merged.c.id.desc())
    return newest_first.limit(limit).offset(offset)


def _count(session: Session, wanted: list[ColumnElement[bool]]) -> int:
    counts = [select(func.count()).select_from(Pod).where(each).scalar_subquery() for each in wanted]
    return session.scalar(select(reduce(add, counts))) or 0


def _rows(horizon: datetime) -> Select[Pod, str]:
    orphaned = and_(Pod.status == PodStatus.RUNNING.value, is_offline(horizon))
    status = case((orphaned, PodStatus.ORPHANED.value), else_=Pod.status)
    return select(Pod, status).join(Runner, Runner.id == Pod.runner_id)


def _known(row: Row[Pod, str]) -> KnownPod:
    return KnownPod(row[0], PodStatus(row[1]))
