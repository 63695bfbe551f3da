"""What a pod's workflow and its runner write. Each writes under the lock of the pod's row, and a runner only while no other
process has registered in its place.

A pod is begun for one shim, once and for all: no other ever runs its agent, so that there are never two of them.
"""

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta

from sqlalchemy import ColumnElement, case, or_, select, update
from sqlalchemy.orm import Session

from kiln.catalog import agents, pods, runners
from kiln.catalog.pod_tables import Pod, PodPrompt, Runner
from kiln.catalog.runners import OPEN_PODS
from kiln.catalog.session import database_now
from kiln.catalog.tables import Image
from kiln.errors import NotFoundError, OperationOverError
from kiln.models import PodRef, PodResult, PodSpec, PodStatus
from kiln.ports.pods import Instructions, News, PodBrief, RunnerProcess

NOT_BACK = "its runner did not come back"
RUNNER_DISABLED = "its runner was disabled"
BEGUN_ELSEWHERE = "its runner has it no more: it was begun on another host, or in another directory"
LOST = "its runner has it no more: nothing of its agent is left there"


def claim(tx: Session, ref: PodRef, run_id: str) -> Pod | None:
    """Makes an open pod this run's own; None if it has ended, or is another run's. Repeating it is harmless."""
    unclaimed = or_(Pod.run_id.is_(None), Pod.run_id == run_id)
    return tx.scalars(update(Pod).where(*_is_open(ref), unclaimed).values(run_id=run_id).returning(Pod)).first()


def release(tx: Session, ref: PodRef, run_id: str) -> bool:
    """Gives an open pod of this run back to the dispatcher; False if it has ended, or is another run's."""
    released = update(Pod).where(*_is_open(ref), Pod.run_id == run_id).values(run_id=None)
    return tx.execute(released.returning(Pod.id)).first() is not None


def finish(tx: Session, ref: PodRef, result: PodResult) -> Pod:
    """Closes a pod that is still open, and notes that its workflow ends with it. Raises NotFoundError."""
    row = pods.locked(tx, ref.key, organization_id=ref.organization_id)
    _end(tx, row, result)
    row.run_id = None
    tx.flush()
    return row


def open_briefs(session: Session, older_than: timedelta, *, unclaimed: bool = False) -> list[PodBrief]:
    """Open pods that have had `older_than` to get going, oldest first; with `unclaimed`, those that no run has."""
    wanted = [Pod.status.in_(OPEN_PODS), Pod.created_at <= datetime.now(UTC) - older_than]
    if unclaimed:
        wanted.append(Pod.run_id.is_(None))
    # There may be thousands, each with its spec, prompt and secrets: no more is read than is told.
    query = select(Pod.id, Pod.key, Pod.organization_id, Pod.runner_id, Pod.run_id).where(*wanted)
    rows = session.execute(query.order_by(Pod.created_at, Pod.id))
    return [
        PodBrief(
            PodRef(pod_id=row.id, key=row.key, organization_id=row.organization_id, runner_id=row.runner_id), row.run_id
        )
        for row in rows
    ]


def unsettled_rows(session: Session, older_than: timedelta) -> list[Pod]:
    """Pods that ended at least `older_than` ago and whose workflow has not, the oldest end first."""
    ended_before = datetime.now(UTC) - older_than
    unsettled = (Pod.run_id.is_not(None), Pod.status.not_in(OPEN_PODS), Pod.updated_at <= ended_before)
    return list(session.scalars(select(Pod).where(*unsettled).order_by(Pod.updated_at, Pod.id)))


def lapse(tx: Session) -> list[Pod]:
    """Closes pods that nobody vouches for any more: their lease is over, or they wait for a runner that was disabled."""
    disabled = select(Runner.id).where(Runner.disabled_at.is_not(None))
    waiting_in_vain = Pod.shim.is_(None) & Pod.runner_id.in_(disabled)
    lapsed = or_(Pod.lease_until <= database_now(tx), waiting_in_vain)
    # One that is being written at this moment is seen in the next round.
    query = (
        select(Pod)
        .where(Pod.status.in_(OPEN_PODS), lapsed)
        .order_by(Pod.id)
        .with_for_update(skip_locked=True, key_share=True)
    )
    rows = list(tx.scalars(query))
    for row in rows:
        error = RUNNER_DISABLED if row.shim is None else NOT_BACK
        pods.close(row, PodStatus.FAILED, datetime.now(UTC), error=error)
    tx.flush()
    return rows


def beat(
    tx: Session, process: RunnerProcess, keys: Collection[str], lease: timedelta, retention: timedelta
) -> Instructions:
    """Notes that the runner is there, with these pods: what is begun and open of them has its lease renewed, and what is
    not open is to end. The sandbox of an agent that ended by itself is to go after `retention`. Raises RefusedError."""
    runners.note_presence(tx, process)
    listed = (Pod.key.in_(keys), Pod.runner_id == process.runner_id)
    # In one order whoever locks many; renewed under the lock, lest one is closed in between.
    rows = list(tx.scalars(select(Pod).where(*listed).order_by(Pod.id).with_for_update(key_share=True)))
    # One that waits on its host for a place there is to be run, and needs no lease.
    still_its = [row for row in rows if row.status in OPEN_PODS]
    renewed = Pod.id.in_([row.id for row in still_its if row.shim is not None])
    tx.execute(update(Pod).where(renewed).values(lease_until=database_now(tx, ahead=lease)))
    known = [*rows, *_left_by_others(tx, process, frozenset(keys) - {row.key for row in rows})]
    return Instructions(
        end=frozenset(keys) - {row.key for row in still_its},
        remove=frozenset(row.key for row in known if _is_to_go(row, retention)),
    )


def _left_by_others(session: Session, process: RunnerProcess, keys: Collection[str]) -> Sequence[Pod]:
    """Those of the keys that are pods of the organization's other runners: this host had another one's token before."""
    if not keys:
        return ()
    organization = select(Runner.organization_id).where(Runner.id == process.runner_id).scalar_subquery()
    return session.scalars(select(Pod).where(Pod.key.in_(keys), Pod.organization_id == organization)).all()


def begin(tx: Session, process: RunnerProcess, key: str, shim: str, lease: timedelta) -> Pod:
    """Gives a `creating` pod to a shim, for ever; the same one may ask again until its agent runs.

    Raises RefusedError, NotFoundError; OperationOverError if the pod has ended, runs already, or has another shim.
    """
    row = _runners_row(tx, process, key)
    if row.status not in OPEN_PODS:
        raise OperationOverError(f"{key} is {row.status}")
    # These two become the pod's error: whoever asks has the runner's pods now, and not this one.
    if row.shim not in (None, shim):
        raise OperationOverError(BEGUN_ELSEWHERE)
    if row.status != PodStatus.CREATING.value:
        raise OperationOverError(LOST)
    row.shim = shim
    row.attempt += 1
    _renew(tx, row, lease)
    return row


def started(tx: Session, process: RunnerProcess, key: str, shim: str, lease: timedelta) -> Pod:
    """Writes `running`, and that the agent of the image's builds is deployed. Repeating it is harmless.

    Raises RefusedError, NotFoundError; OperationOverError if the pod has ended, or has another shim.
    """
    row = _runners_row(tx, process, key, shim)
    if row.status not in OPEN_PODS:
        raise OperationOverError(f"{key} is {row.status}")
    if row.status == PodStatus.CREATING.value:
        row.status = PodStatus.RUNNING.value
        _note_start(tx, row)
    _renew(tx, row, lease)
    return row


def ended(tx: Session, process: RunnerProcess, key: str, shim: str, result: PodResult) -> Pod:
    """Closes a pod whose agent is no more; one that is closed stays as it is. Raises RefusedError, NotFoundError;
    OperationOverError if it has another shim."""
    row = _runners_row(tx, process, key, shim)
    _end(tx, row, result)
    tx.flush()
    return row


def find(session: Session, process: RunnerProcess, key: str) -> Pod:
    """A pod of the runner's, open or ended. Raises RefusedError, NotFoundError."""
    runners.require_current(session, process)
    row = session.scalars(select(Pod).where(Pod.key == key, Pod.runner_id == process.runner_id)).first()
    if row is None:
        raise NotFoundError(f"this runner has no pod {key}")
    return row


def image_reference(session: Session, organization_id: str, pod_id: str) -> str | None:
    """The image that an open pod of the organization runs from; None if there is no such pod, or it has none."""
    open_pod = (Pod.id == pod_id, Pod.organization_id == organization_id, Pod.status.in_(OPEN_PODS))
    return session.scalar(select(Image.reference).join(Pod, Pod.image_id == Image.id).where(*open_pod))


def news(session: Session, process: RunnerProcess, after: Mapping[str, int]) -> tuple[News, dict[str, int]]:
    """What there is to say of these pods; and by id, those that have had prompts which are not noted as taken yet, with
    the number up to which. Raises RefusedError."""
    runners.require_current(session, process)
    asked = (Pod.key.in_(after), Pod.runner_id == process.runner_id, Pod.status.in_(OPEN_PODS))
    keys = {row.id: row.key for row in session.execute(select(Pod.id, Pod.key).where(*asked))}
    had = {pod_id: after[key] for pod_id, key in keys.items()}
    coming: dict[str, list[tuple[int, str]]] = {}
    untaken: dict[str, int] = {}
    for row in _prompts_after(session, had):
        if row.number > had[row.pod_id]:
            coming.setdefault(keys[row.pod_id], []).append((row.number, row.text))
        else:
            untaken[row.pod_id] = had[row.pod_id]
    return News(frozenset(after) - frozenset(keys.values()), coming), untaken


def prompts_of(session: Session, pod: Pod) -> Sequence[PodPrompt]:
    """A pod's prompts in their order."""
    query = select(PodPrompt).where(PodPrompt.pod_id == pod.id).order_by(PodPrompt.number)
    return session.scalars(query).all()


def take_prompts(tx: Session, upto: Mapping[str, int]) -> None:
    """Notes that the shims of pods, by id, have had their prompts up to a number."""
    for pod_id, number in sorted(upto.items()):
        had = (PodPrompt.pod_id == pod_id, PodPrompt.number <= number, PodPrompt.taken_at.is_(None))
        tx.execute(update(PodPrompt).where(*had).values(taken_at=datetime.now(UTC)))


def _prompts_after(session: Session, had: Mapping[str, int]) -> Sequence[PodPrompt]:
    """Prompts of pods, by id, numbered above what each has had, and those that are not noted as taken."""
    if not had:
        return ()
    wanted = or_(PodPrompt.number > case(had, value=PodPrompt.pod_id), PodPrompt.taken_at.is_(None))
    query = select(PodPrompt).where(PodPrompt.pod_id.in_(had), wanted)
    return session.scalars(query.order_by(PodPrompt.pod_id, PodPrompt.number)).all()


def _is_open(ref: PodRef) -> tuple[ColumnElement[bool], ...]:
    return (Pod.id == ref.pod_id, Pod.status.in_(OPEN_PODS))


def _runners_row(tx: Session, process: RunnerProcess, key: str, shim: str | None = None) -> Pod:
    """A pod of the runner's with its row locked; begun for `shim`, if one is named."""
    runners.require_current(tx, process, lock=True)
    row = pods.locked(tx, key, runner_id=process.runner_id)
    if shim is not None and row.shim != shim:
        raise OperationOverError(f"{key} was begun for another shim")
    return row


def _renew(tx: Session, row: Pod, lease: timedelta) -> None:
    tx.flush()
    tx.execute(update(Pod).where(Pod.id == row.id).values(lease_until=database_now(tx, ahead=lease)))


def _note_start(tx: Session, row: Pod) -> None:
    row.started_at = row.updated_at = datetime.now(UTC)
    if row.image_id is not None:
        agents.note_deployed(tx, row.image_id)


def _end(tx: Session, row: Pod, result: PodResult) -> None:
    """What an agent leaves: `completed` for exit code 0 and no error, else `failed`."""
    if row.status not in OPEN_PODS:
        return
    if result.exit_code is not None and row.started_at is None:
        _note_start(tx, row)  # it was over before anybody could say that it runs
    error = result.error or _error_of(result.exit_code)
    status = PodStatus.COMPLETED if error is None else PodStatus.FAILED
    pods.close(row, status, _ended_at(row, result), error=error, exit_code=result.exit_code)


def _error_of(exit_code: int | None) -> str | None:
    if exit_code is None:
        return "the agent ended without an exit code"
    return None if exit_code == 0 else f"the agent exited with code {exit_code}"


def _ended_at(row: Pod, result: PodResult) -> datetime:
    """By the runner's clock, which may differ: neither in the future nor before the start."""
    now = datetime.now(UTC)
    return max(row.started_at or row.created_at, min(result.ended_at or now, now))


def _is_to_go(row: Pod, retention: timedelta) -> bool:
    """Whether an ended pod's sandbox is to go. What an agent left by itself stays for a while."""
    if row.status in OPEN_PODS or row.finished_at is None:
        return False
    if row.status == PodStatus.TERMINATED.value or row.error in (NOT_BACK, RUNNER_DISABLED):
        return True
    spec = PodSpec.model_validate(row.spec)
    delay = timedelta(seconds=spec.auto_close_delay_seconds or 0) if spec.auto_close else retention
    return datetime.now(UTC) - row.finished_at >= delay
