"""Two at the same moment on pods and their runners: one shim has a pod, and no end is undone."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest

from kiln.catalog import pod_work, pods, repositories, runners
from kiln.catalog.pod_ledger import RETENTION, CatalogPodLedger
from kiln.catalog.pods import NewPod
from kiln.catalog.session import Catalog
from kiln.catalog.tables import Organization
from kiln.errors import NotFoundError, OperationOverError, RefusedError
from kiln.models import PodRef, PodResult, PodSpec
from kiln.ports.pods import PodOrder, RunnerProcess
from support.parallel import Pending, in_parallel
from support.pod_rows import (
    POD_LEASE,
    add_pod,
    add_runner,
    pod_row,
    prompt,
    prompts_of,
    register,
    report,
    rewrite_pod,
    terminate,
)

AT_ONCE = 5
ROUNDS = 5
SHIM = "a-shim"
DONE = PodResult(exit_code=0)


@pytest.fixture
def runner(catalog: Catalog, organization: str) -> RunnerProcess:
    return add_runner(catalog, organization)


@pytest.fixture
def pod(catalog: Catalog, organization: str, runner: RunnerProcess) -> PodRef:
    return add_pod(catalog, organization, runner.runner_id)


def failures(outcomes: list[object]) -> list[Exception]:
    return [outcome for outcome in outcomes if isinstance(outcome, Exception)]


def run(ledger: CatalogPodLedger, runner: RunnerProcess, ref: PodRef) -> None:
    ledger.begin(runner, ref.key, SHIM)
    ledger.started(runner, ref.key, SHIM)


def overdue(catalog: Catalog, ref: PodRef) -> None:
    rewrite_pod(catalog, ref.key, lease_until=datetime.now(UTC) - timedelta(seconds=1))


def test_one_shim_has_a_pod(
    pod_ledger: CatalogPodLedger, catalog: Catalog, runner: RunnerProcess, organization: str
) -> None:
    """However many shims begin a pod at once, one has it; it alone may ask again and say that its agent runs."""
    for _ in range(ROUNDS):
        key = add_pod(catalog, organization, runner.runner_id).key
        shims = [f"shim-{number}" for number in range(AT_ONCE)]
        outcomes = in_parallel([partial(pod_ledger.begin, runner, key, shim) for shim in shims])
        assert [type(each) for each in failures(outcomes)] == [OperationOverError] * (AT_ONCE - 1)
        (winner,) = [shim for shim, each in zip(shims, outcomes, strict=True) if isinstance(each, PodOrder)]
        assert pod_ledger.begin(runner, key, winner).attempt == 2
        started = in_parallel([partial(pod_ledger.started, runner, key, shim) for shim in shims])
        assert [shim for shim, each in zip(shims, started, strict=True) if each is None] == [winner]
        with pytest.raises(OperationOverError):
            pod_ledger.begin(runner, key, winner)


def test_one_run_has_a_pod(pod_ledger: CatalogPodLedger, pod: PodRef) -> None:
    """However many runs claim a pod at once, one has it."""
    claims = in_parallel([partial(pod_ledger.claim_pod, pod, f"run-{number}") for number in range(AT_ONCE)])
    assert sorted(claim is not None for claim in claims) == [False] * (AT_ONCE - 1) + [True]


def test_a_begin_waits_for_the_new_process(
    pod_ledger: CatalogPodLedger, catalog: Catalog, runner: RunnerProcess, pod: PodRef
) -> None:
    """A process that begins a pod while another one registers in its place is refused."""
    with catalog.transaction() as tx:
        runners.register(tx, runner.runner_id, report())
        beginning = Pending(partial(pod_ledger.begin, runner, pod.key, SHIM))
        assert beginning.is_waiting()
    with pytest.raises(RefusedError):
        beginning.result()
    assert pod_row(catalog, pod.key).shim is None


def test_a_new_process_waits_for_the_begin(catalog: Catalog, runner: RunnerProcess, pod: PodRef) -> None:
    """A process that registers while the one before it begins a pod comes after that."""
    with catalog.transaction() as tx:
        pod_work.begin(tx, runner, pod.key, SHIM, POD_LEASE)
        registration = Pending(partial(register, catalog, runner.runner_id))
        assert registration.is_waiting()
    registration.result()
    assert pod_row(catalog, pod.key).shim == SHIM


def test_a_start_waits_for_the_termination(
    pod_ledger: CatalogPodLedger, catalog: Catalog, runner: RunnerProcess, pod: PodRef
) -> None:
    """An agent that starts while its pod is terminated hears so, and the pod stays terminated."""
    pod_ledger.begin(runner, pod.key, SHIM)
    with catalog.transaction() as tx:
        pods.terminate(tx, pod.organization_id, pod.key)
        start = Pending(partial(pod_ledger.started, runner, pod.key, SHIM))
        assert start.is_waiting()
    with pytest.raises(OperationOverError):
        start.result()
    assert pod_row(catalog, pod.key).status == "terminated"


def test_a_pod_ends_once(
    pod_ledger: CatalogPodLedger, catalog: Catalog, runner: RunnerProcess, organization: str
) -> None:
    """Of a termination, an agent's own end and a lease's, one counts, and a second termination is refused."""
    for _ in range(ROUNDS):
        ref = add_pod(catalog, organization, runner.runner_id)
        run(pod_ledger, runner, ref)
        overdue(catalog, ref)
        calls: list[Callable[[], object]] = [
            partial(terminate, catalog, ref),
            partial(terminate, catalog, ref),
            partial(pod_ledger.ended, runner, ref.key, SHIM, DONE),
            pod_ledger.lapse_pods,
        ]
        first, second, said, lapsed = in_parallel(calls)
        row = pod_row(catalog, ref.key)
        assert said == row.status
        assert (ref in (first, second)) is (row.status == "terminated")
        assert (lapsed == [ref]) is (row.status == "failed")
        assert len(failures([first, second])) == (1 if row.status == "terminated" else 2)


def test_a_lease_is_renewed_or_over(
    pod_ledger: CatalogPodLedger, catalog: Catalog, runner: RunnerProcess, organization: str
) -> None:
    """A runner that comes back at the last moment keeps its pods, or hears that they are over: never neither."""
    for _ in range(ROUNDS):
        refs = [add_pod(catalog, organization, runner.runner_id) for _ in range(3)]
        for ref in refs:
            run(pod_ledger, runner, ref)
            overdue(catalog, ref)
        keys = [ref.key for ref in refs]
        calls: list[Callable[[], object]] = [
            partial(pod_ledger.beat, runner, keys[::-1]),
            pod_ledger.lapse_pods,
            partial(pod_ledger.beat, runner, keys),
        ]
        assert failures(in_parallel(calls)) == []
        said = pod_ledger.beat(runner, keys)
        assert said.end == {key for key in keys if pod_row(catalog, key).status == "failed"}
        assert pod_ledger.lapse_pods() == []


def test_a_lapse_passes_over_what_is_renewed(
    pod_ledger: CatalogPodLedger, catalog: Catalog, runner: RunnerProcess, pod: PodRef
) -> None:
    """A pod whose lease is renewed at this moment is not closed for the old one."""
    run(pod_ledger, runner, pod)
    overdue(catalog, pod)
    with catalog.transaction() as tx:
        pod_work.beat(tx, runner, [pod.key], POD_LEASE, RETENTION)
        lapse = Pending(pod_ledger.lapse_pods)
        lapse.is_waiting()
    assert lapse.result() == []
    assert pod_row(catalog, pod.key).status == "running"


def test_a_beat_waits_for_the_lapse(
    pod_ledger: CatalogPodLedger, catalog: Catalog, runner: RunnerProcess, pod: PodRef
) -> None:
    """A runner that comes back while a lease is found to be over hears that its pod is to end."""
    run(pod_ledger, runner, pod)
    overdue(catalog, pod)
    with catalog.transaction() as tx:
        pod_work.lapse(tx)
        beat = Pending(partial(pod_ledger.beat, runner, [pod.key]))
        assert beat.is_waiting()
    assert beat.result().end == {pod.key}
    assert pod_row(catalog, pod.key).lease_until is None


def test_prompts_have_no_gap(catalog: Catalog, pod: PodRef) -> None:
    """However many prompt a pod at once, each prompt has a number of its own, from 1 on."""
    texts = [f"prompt {number}" for number in range(AT_ONCE)]
    numbers = in_parallel([partial(prompt, catalog, pod, text) for text in texts])
    assert sorted(numbers) == list(range(1, AT_ONCE + 1))
    kept = {row.number: row.text for row in prompts_of(catalog, pod)}
    assert [kept[number] for number in numbers] == texts


def test_a_prompt_waits_for_the_begin(
    pod_ledger: CatalogPodLedger, catalog: Catalog, runner: RunnerProcess, pod: PodRef
) -> None:
    """A prompt that comes while the pod is begun is not in the order, and is there to be asked for."""
    with catalog.transaction() as tx:
        pod_work.begin(tx, runner, pod.key, SHIM, POD_LEASE)
        late = Pending(partial(prompt, catalog, pod, "late"))
        assert late.is_waiting()
    assert late.result() == 1
    assert pod_ledger.news(runner, {pod.key: 0}).prompts == {pod.key: [(1, "late")]}


def test_a_repository_is_worked_on_or_removed(catalog: Catalog, organization: str, runner: RunnerProcess) -> None:
    """A pod that is being written keeps its repository, and one that is being removed takes no pod."""

    def submit(repository: int) -> None:
        with catalog.transaction() as tx:
            if repositories.find(tx, organization, repository, lock=True) is None:
                raise NotFoundError("no such repository")
            spec = PodSpec(repository_id=repository)
            pods.insert(tx, NewPod(organization, runner.runner_id, spec, created_by="a-key"))

    def remove(repository: int) -> None:
        with catalog.transaction() as tx:
            repositories.remove(tx, repository)

    for number in range(ROUNDS):
        with catalog.transaction() as tx:
            owner = tx.get_one(Organization, organization)
            repository = repositories.add(tx, owner, f"repository-{number}", "https://host/x", "main").id
        submitted, removed = in_parallel([partial(submit, repository), partial(remove, repository)])
        assert (type(submitted), type(removed)) in {(NotFoundError, type(None)), (type(None), RefusedError)}
