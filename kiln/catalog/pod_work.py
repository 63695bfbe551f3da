"""What a pod's workflow and its runner write. Each writes under the lock of the pod's row, and a runner only while no other
process has registered in its place.

A pod is begun for one shim, once and for all: no other ever runs its agent, so that there are never two of them.
"""

from collections.abc import Collection, Sequence
from datetime import UTC, datetime, timedelta

from sqlalchemy import ColumnElement, or_, select, update
from sqlalchemy.orm import Session

from kiln.catalog import agents, pods, runners
from kiln.catalog.pod_tables import Pod, PodPrompt, Runner
from kiln.catalog.runners import OPEN_PODS
from kiln.catalog.session import database_now
from kiln.errors import NotFoundError, OperationOverError
from kiln.models import PodRef, PodResult, PodSpec, PodStatus
from kiln.ports.pods import Instructions, RunnerProcess

NOT_BACK = "its runner did not come back"
RUNNER_DISABLED = "its runner was disabled"


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


def open_rows(session: Session, older_than: timedelta) -> list[Pod]:
    """Open pods that have had `older_than` to get going, oldest first."""
    born_before = datetime.now(UTC) - older_than
    query = select(Pod).where(Pod.status.in_(OPEN_PODS), Pod.created_at <= born_before)
    return list(session.scalars(query.order_by(Pod.created_at, Pod.id)))


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


def beat(tx: Session, process: RunnerProcess, keys: Collection[str], lease: timedelta) -> Instructions:
    """Notes that the runner is there, with these pods: what is begun and open of them has its lease renewed, and the
    rest is to end. Raises RefusedError."""
    runners.note_presence(tx, process)
    listed = (Pod.key.in_(keys), Pod.runner_id == process.runner_id)
    # In one order whoever locks many; renewed under the lock, lest one is closed in between.
    rows = list(tx.scalars(select(Pod).where(*listed).order_by(Pod.id).with_for_update(key_share=True)))
    alive = [row for row in rows if row.status in OPEN_PODS and row.shim is not None]
    renewed = Pod.id.in_([row.id for row in alive])
    tx.execute(update(Pod).where(renewed).values(lease_until=database_now(tx, ahead=lease)))
    return Instructions(
        end=frozenset(keys) - {row.key for row in alive},
        remove=frozenset(row.key for row in rows if _is_to_go(row)),
    )


def begin(tx: Session, process: RunnerProcess, key: str, shim: str, lease: timedelta) -> Pod:
    """Gives a `creating` pod to a shim, for ever; the same one may ask again until its agent runs.

    Raises RefusedError, NotFoundError; OperationOverError if the pod has ended, runs already, or has another shim.
    """
    row = _runners_row(tx, process, key)
    if row.status != PodStatus.CREATING.value:
        raise OperationOverError(f"{key} is {row.status}")
    if row.shim not in (None, shim):
        raise OperationOverError(f"{key} was begun for another shim")
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


def prompts(session: Session, pod: Pod, after: int) -> list[tuple[int, str]]:
    """A pod's prompts numbered above `after`. Raises OperationOverError once it has ended."""
    if pod.status not in OPEN_PODS:
        raise OperationOverError(f"{pod.key} is {pod.status}")
    return [(row.number, row.text) for row in prompts_of(session, pod) if row.number > after]


def prompts_of(session: Session, pod: Pod) -> Sequence[PodPrompt]:
    """A pod's prompts in their order."""
    query = select(PodPrompt).where(PodPrompt.pod_id == pod.id).order_by(PodPrompt.number)
    return session.scalars(query).all()


def awaits_taking(session: Session, pod: Pod, upto: int) -> bool:
    """Whether a prompt up to this number is not noted as taken yet."""
    return session.scalar(select(PodPrompt.number).where(*_untaken(pod.id, upto)).limit(1)) is not None


def take_prompts(tx: Session, pod: Pod, upto: int) -> None:
    """Notes that the pod's shim has had its prompts up to this number."""
    tx.execute(update(PodPrompt).where(*_untaken(pod.id, upto)).values(taken_at=datetime.now(UTC)))


def _untaken(pod_id: str, upto: int) -> tuple[ColumnElement[bool], ...]:
    return (PodPrompt.pod_id == pod_id, PodPrompt.number <= upto, PodPrompt.taken_at.is_(None))


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


def _is_to_go(row: Pod) -> bool:
    """Whether an ended pod's sandbox is to go. What an agent left by itself stays, unless it was to be closed."""
    if row.status in OPEN_PODS or row.finished_at is None:
        return False
    if row.status == PodStatus.TERMINATED.value or row.error in (NOT_BACK, RUNNER_DISABLED):
        return True
    spec = PodSpec.model_validate(row.spec)
    delay = timedelta(seconds=spec.auto_close_delay_seconds)
    return spec.auto_close and row.finished_at + delay <= datetime.now(UTC)
