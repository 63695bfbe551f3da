"""What a pod's workflow and its runner write: the order, the lease, the end."""

from datetime import UTC, datetime, timedelta

import pytest

from kiln.catalog import agents, attempts, builds, images, pods, repositories, runners
from kiln.catalog.builds import NewBuild
from kiln.catalog.pod_ledger import CatalogPodLedger
from kiln.catalog.pod_work import NOT_BACK, RUNNER_DISABLED
from kiln.catalog.session import Catalog
from kiln.catalog.tables import Agent, Organization
from kiln.errors import OperationFailedError, OperationOverError, RefusedError
from kiln.models import Api, PodRef, PodResult, PodSpec
from kiln.ports.pods import GitSource, ImageSource, PodBrief, PodSecrets, RunnerProcess
from kiln.sealing import Sealer
from support.pod_rows import add_pod, add_runner, go_away, pod_of, pod_row, rewrite_pod, runner_of, terminate
from support.rows import LEASE, add_organization, ami, built, dump, machine_spec

NOW = timedelta(0)
LATER = timedelta(minutes=1)
NOON = datetime(2026, 3, 25, 12, 0, tzinfo=UTC)
DONE = PodResult(exit_code=0)
SHIM = "a-shim"


@pytest.fixture
def runner(catalog: Catalog, organization: str) -> RunnerProcess:
    return add_runner(catalog, organization)


@pytest.fixture
def pod(catalog: Catalog, organization: str, runner: RunnerProcess, sealer: Sealer) -> PodRef:
    """A pod with a secret, `creating`."""
    secrets = pods.seal_secrets(sealer, PodSecrets({"TOKEN": "hush"}, ("--loud",), {"servers": {}}))
    return add_pod(catalog, organization, runner.runner_id, secrets=secrets, initial_prompt="hello")


@pytest.fixture
def running(pod_ledger: CatalogPodLedger, runner: RunnerProcess, pod: PodRef) -> PodRef:
    pod_ledger.begin(runner, pod.key, SHIM)
    pod_ledger.started(runner, pod.key, SHIM)
    return pod


def status(catalog: Catalog, ref: PodRef) -> str:
    return pod_of(catalog, ref.organization_id, ref.key).status.value


class TestOrder:
    def test_it_has_the_secrets_until_the_end(
        self, pod_ledger: CatalogPodLedger, catalog: Catalog, runner: RunnerProcess, pod: PodRef
    ) -> None:
        """The runner is told a pod's secrets in clear; the catalog keeps them sealed, and forgets them at the end."""
        order = pod_ledger.begin(runner, pod.key, SHIM)
        assert (order.environment, order.custom_args, order.mcp_config) == (
            {"TOKEN": "hush"},
            ("--loud",),
            {"servers": {}},
        )
        assert "hush" not in repr(order)
        with catalog.read() as session:
            assert "hush" not in dump(session)
        assert pod_row(catalog, pod.key).secrets is not None
        terminate(catalog, pod)
        assert pod_row(catalog, pod.key).secrets is None

    def test_it_names_the_repository(
        self, pod_ledger: CatalogPodLedger, catalog: Catalog, runner: RunnerProcess, organization: str, sealer: Sealer
    ) -> None:
        """A worktree's order has the repository's credential and a branch; without the repository there is none."""
        with catalog.transaction() as tx:
            owner = tx.get_one(Organization, organization)
            repository = repositories.add(tx, owner, "tool", "https://host/x", "main", sealer.seal_text("hush")).id
        keys = [
            add_pod(catalog, organization, runner.runner_id, spec=PodSpec(repository_id=number, branch=branch)).key
            for number, branch in ((repository, None), (repository, "mine"), (repository + 1, None))
        ]
        orders = [pod_ledger.begin(runner, key, key) for key in keys[:2]]
        assert [order.git for order in orders] == [
            GitSource(repository, "https://host/x", branch, "hush") for branch in ("main", "mine")
        ]
        with pytest.raises(OperationFailedError):
            pod_ledger.begin(runner, keys[2], SHIM)

    def test_it_says_until_when(
        self, pod_ledger: CatalogPodLedger, catalog: Catalog, runner: RunnerProcess, organization: str
    ) -> None:
        """A time limit begins with the work, however long the pod waited; without one there is no deadline."""
        limited, free = (
            add_pod(catalog, organization, runner.runner_id, spec=PodSpec(timeout_minutes=minutes)).key
            for minutes in (30, None)
        )
        rewrite_pod(catalog, limited, created_at=NOON)
        deadline = pod_ledger.begin(runner, limited, SHIM).deadline_at
        assert deadline is not None
        assert abs(deadline - datetime.now(UTC) - timedelta(minutes=30)) < LATER
        assert pod_ledger.begin(runner, free, SHIM).deadline_at is None


class TestEnd:
    @pytest.mark.parametrize(
        ("result", "expected", "error"),
        [
            (DONE, "completed", None),
            (PodResult(exit_code=3), "failed", "the agent exited with code 3"),
            (PodResult(exit_code=0, error="pod timed out after 5 minutes"), "failed", "pod timed out after 5 minutes"),
            (PodResult(), "failed", "the agent ended without an exit code"),
        ],
    )
    def test_it_is_what_the_agent_left(
        self,
        pod_ledger: CatalogPodLedger,
        catalog: Catalog,
        runner: RunnerProcess,
        running: PodRef,
        result: PodResult,
        expected: str,
        error: str | None,
    ) -> None:
        """A pod is completed by exit code 0 and failed by anything else; it frees its place, and says so again."""
        assert pod_ledger.ended(runner, running.key, SHIM, result) == expected
        row = pod_row(catalog, running.key)
        assert (row.status, row.exit_code, row.error) == (expected, result.exit_code, error)
        assert (row.secrets, row.lease_until) == (None, None)
        assert row.finished_at is not None
        assert pod_ledger.finish_pod(running, PodResult(error="another end")) == expected
        assert pod_row(catalog, running.key).error == error
        assert runner_of(catalog, running.organization_id, runner.runner_id).current_pods == 0

    def test_its_time_lies_within_its_life(
        self, pod_ledger: CatalogPodLedger, catalog: Catalog, runner: RunnerProcess, running: PodRef
    ) -> None:
        """A runner whose clock is slow does not end a pod before its start."""
        pod_ledger.ended(runner, running.key, SHIM, PodResult(exit_code=0, ended_at=NOON))
        row = pod_row(catalog, running.key)
        assert row.finished_at == row.started_at

    def test_one_that_was_over_at_once_has_run(
        self, pod_ledger: CatalogPodLedger, catalog: Catalog, runner: RunnerProcess, pod: PodRef
    ) -> None:
        """An agent that ends before its runner could say that it runs has started all the same."""
        pod_ledger.begin(runner, pod.key, SHIM)
        pod_ledger.ended(runner, pod.key, SHIM, DONE)
        assert pod_row(catalog, pod.key).started_at is not None

    def test_terminated_is_final(
        self, pod_ledger: CatalogPodLedger, catalog: Catalog, runner: RunnerProcess, running: PodRef
    ) -> None:
        """Whatever comes after a termination, the pod stays terminated; a second one is refused."""
        terminate(catalog, running)
        with pytest.raises(RefusedError, match=r"^Pod already terminated$"):
            terminate(catalog, running)
        with pytest.raises(OperationOverError):
            pod_ledger.started(runner, running.key, SHIM)
        assert pod_ledger.ended(runner, running.key, SHIM, DONE) == "terminated"
        pod_ledger.terminate_pod(running)
        row = pod_row(catalog, running.key)
        assert (row.status, row.exit_code, row.error) == ("terminated", None, None)

    @pytest.mark.parametrize(
        ("spec", "end", "removed"),
        [
            (PodSpec(), "terminated", True),
            (PodSpec(), "completed", False),
            (PodSpec(auto_close=True), "completed", True),
            (PodSpec(auto_close=True, auto_close_delay_seconds=600), "completed", False),
        ],
    )
    def test_the_runner_is_told(
        self,
        pod_ledger: CatalogPodLedger,
        catalog: Catalog,
        runner: RunnerProcess,
        organization: str,
        spec: PodSpec,
        end: str,
        removed: bool,
    ) -> None:
        """A runner that still has an ended pod hears so with its beat, and whether the sandbox is to go."""
        ref = add_pod(catalog, organization, runner.runner_id, spec=spec)
        pod_ledger.begin(runner, ref.key, SHIM)
        assert pod_ledger.beat(runner, [ref.key]).end == frozenset()
        if end == "terminated":
            terminate(catalog, ref)
        else:
            pod_ledger.finish_pod(ref, DONE)
        said = pod_ledger.beat(runner, [ref.key])
        assert (said.end, said.remove) == ({ref.key}, {ref.key} if removed else frozenset())

    @pytest.mark.parametrize(("retention", "removed"), [(LATER, False), (NOW, True)])
    def test_what_an_agent_left_stays_for_a_while(
        self,
        catalog: Catalog,
        sealer: Sealer,
        runner: RunnerProcess,
        pod: PodRef,
        retention: timedelta,
        removed: bool,
    ) -> None:
        """The sandbox of a pod that ended by itself is to go once its retention is over."""
        ledger = CatalogPodLedger(catalog, sealer, LEASE, retention=retention)
        ledger.begin(runner, pod.key, SHIM)
        ledger.ended(runner, pod.key, SHIM, DONE)
        assert ledger.beat(runner, [pod.key]).remove == ({pod.key} if removed else frozenset())

    def test_what_an_older_runner_left_goes(
        self, pod_ledger: CatalogPodLedger, catalog: Catalog, running: PodRef
    ) -> None:
        """A host that has a new runner's token is told to end the older one's pods, and what it is to remove of them, as
        that one would be; another organization's runner learns nothing."""
        successor = add_runner(catalog, running.organization_id)
        stranger = add_runner(catalog, add_organization(catalog))
        said = pod_ledger.beat(successor, [running.key])
        assert (said.end, said.remove) == ({running.key}, frozenset())
        terminate(catalog, running)
        assert pod_ledger.beat(successor, [running.key]).remove == {running.key}
        assert pod_ledger.beat(stranger, [running.key]).remove == frozenset()


class TestLease:
    def test_a_beat_renews_what_it_lists(
        self, pod_ledger: CatalogPodLedger, catalog: Catalog, runner: RunnerProcess, running: PodRef
    ) -> None:
        """A pod goes on as long as its runner says that it is there; nobody else is failed for it."""
        other = add_pod(catalog, running.organization_id, runner.runner_id)
        pod_ledger.begin(runner, other.key, "another-shim")
        for key in (running.key, other.key):
            rewrite_pod(catalog, key, lease_until=datetime.now(UTC) - LATER)
        pod_ledger.beat(runner, [running.key])
        assert pod_ledger.lapse_pods() == [other]
        assert (status(catalog, running), status(catalog, other)) == ("running", "failed")
        assert pod_row(catalog, other.key).error == NOT_BACK
        assert pod_ledger.lapse_pods() == []
        assert pod_ledger.beat(runner, [other.key]).remove == {other.key}

    def test_waiting_needs_no_lease(
        self, pod_ledger: CatalogPodLedger, catalog: Catalog, runner: RunnerProcess, pod: PodRef
    ) -> None:
        """A pod waits for its runner, or on its host for a place, however long it takes, unless that runner was disabled."""
        assert pod_ledger.beat(runner, [pod.key]).end == frozenset()
        assert pod_ledger.news(runner, {pod.key: 1}).end == frozenset()
        go_away(catalog, runner.runner_id)
        assert pod_ledger.lapse_pods() == []
        with catalog.transaction() as tx:
            runners.disable(tx, runner.runner_id)
        assert pod_ledger.lapse_pods() == [pod]
        assert pod_row(catalog, pod.key).error == RUNNER_DISABLED


class TestWorkflow:
    def test_a_pod_is_one_runs(self, pod_ledger: CatalogPodLedger, pod: PodRef) -> None:
        """The first run that asks has the pod; given back, it is another's, and ended, nobody's."""
        claims = [pod_ledger.claim_pod(pod, run) for run in ("run-1", "run-2", "run-1")]
        assert claims == [PodSpec(), None, PodSpec()]
        assert [pod_ledger.release_pod(pod, run) for run in ("run-2", "run-1")] == [False, True]
        assert pod_ledger.claim_pod(pod, "run-2") == PodSpec()
        pod_ledger.finish_pod(pod, DONE)
        assert pod_ledger.claim_pod(pod, "run-2") is None

    def test_the_dispatcher_sees_open_ones(
        self, pod_ledger: CatalogPodLedger, catalog: Catalog, runner: RunnerProcess, pod: PodRef
    ) -> None:
        """Open pods that had time to get going are compared with their workflows, the oldest first."""
        older = add_pod(catalog, pod.organization_id, runner.runner_id)
        rewrite_pod(catalog, older.key, created_at=NOON)
        pod_ledger.claim_pod(older, "run-1")
        assert pod_ledger.open_pods(NOW) == [PodBrief(older, "run-1"), PodBrief(pod, None)]
        assert [brief.ref for brief in pod_ledger.open_pods(LATER)] == [older]
        terminate(catalog, older)
        assert [brief.ref for brief in pod_ledger.open_pods(NOW)] == [pod]

    def test_an_end_is_known_until_the_workflow_has_heard_of_it(
        self, pod_ledger: CatalogPodLedger, catalog: Catalog, pod: PodRef
    ) -> None:
        """A pod that was ended behind its workflow's back is remembered as such until that has said its last word."""
        pod_ledger.claim_pod(pod, "run-1")
        assert pod_ledger.unsettled_pods(NOW) == []
        terminate(catalog, pod)
        assert pod_ledger.unsettled_pods(LATER) == []
        assert pod_ledger.unsettled_pods(NOW) == [PodBrief(pod, "run-1")]
        assert pod_ledger.finish_pod(pod, PodResult(error="cancelled")) == "terminated"
        assert pod_ledger.unsettled_pods(NOW) == []


def test_an_agent_is_deployed_by_its_pod(
    pod_ledger: CatalogPodLedger, catalog: Catalog, runner: RunnerProcess, organization: str
) -> None:
    """Once a pod runs from an image of an agent's builds, that agent is deployed; the time of the first stays."""
    with catalog.transaction() as tx:
        agent, idle = (agents.ensure(tx, organization, name) for name in ("agent", "idle"))
        new = NewBuild(organization, Api.CLOUD_BUILDS, machine_spec(), created_by="a-key", agent=agent)
        build = builds.insert(tx, new)
        attempts.begin(tx, build.id, "worker", LEASE)
        image = images.insert_ami(tx, attempts.publish(tx, build.id, 1), ami(), built("x", 1), simulated=True)
    times = []
    for _ in range(2):
        ref = add_pod(catalog, organization, runner.runner_id, image_id=image.id)
        assert pod_ledger.begin(runner, ref.key, SHIM).image == ImageSource(image.reference, image.account)
        with catalog.read() as session:
            times.append(session.get_one(Agent, agent.id).deployed_at)
        pod_ledger.started(runner, ref.key, SHIM)
    with catalog.read() as session:
        kept = session.get_one(Agent, agent.id).deployed_at
        assert session.get_one(Agent, idle.id).deployed_at is None
    assert times == [None, kept]
    assert kept is not None
