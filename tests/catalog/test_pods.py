"""Pods: how they come about, what is shown of them, and what they are prompted."""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event

from kiln.catalog import pods
from kiln.catalog.pod_ledger import CatalogPodLedger
from kiln.catalog.session import Catalog
from kiln.errors import NotFoundError, RefusedError, UnavailableError
from kiln.models import PodLimits, PodRef, PodResult, PodSpec, PodStatus, SandboxType
from kiln.ports.pods import News, RunnerProcess
from support.pod_rows import (
    add_pod,
    add_runner,
    go_away,
    pod_of,
    pod_row,
    prompt,
    prompts_of,
    rewrite_pod,
    terminate,
)
from support.rows import add_organization

NOW = timedelta(0)
LATER = timedelta(minutes=1)
NOON = datetime(2026, 3, 25, 12, 0, tzinfo=UTC)
DONE = PodResult(exit_code=0)
SHIM = "a-shim"
STATUSES = ["creating", "running", "completed", "failed", "terminated", "orphaned"]


@pytest.fixture
def runner(catalog: Catalog, organization: str) -> RunnerProcess:
    return add_runner(catalog, organization)


@pytest.fixture
def pod(catalog: Catalog, organization: str, runner: RunnerProcess) -> PodRef:
    return add_pod(catalog, organization, runner.runner_id, initial_prompt="hello")


@pytest.fixture
def running(pod_ledger: CatalogPodLedger, runner: RunnerProcess, pod: PodRef) -> PodRef:
    pod_ledger.begin(runner, pod.key, SHIM)
    pod_ledger.started(runner, pod.key, SHIM)
    return pod


def page(
    catalog: Catalog, organization: str, statuses: Collection[str] | None = None, limit: int = 20, offset: int = 0
) -> tuple[list[str], int]:
    with catalog.read() as session:
        found, total = pods.page(session, organization, statuses, limit, offset)
    return [known.pod.key for known in found], total


def status(catalog: Catalog, ref: PodRef) -> str:
    return pod_of(catalog, ref.organization_id, ref.key).status.value


class TestOne:
    def test_it_is_kept_as_it_was_asked_for(self, catalog: Catalog, organization: str, runner: RunnerProcess) -> None:
        """A pod has a key of its own, and its row is the whole order."""
        spec = PodSpec(branch="main", sandbox_type=SandboxType.WORKTREE, limits=PodLimits(memory_mb=512))
        ref = add_pod(catalog, organization, runner.runner_id, spec=spec, initial_prompt="go")
        assert re.fullmatch(r"pod-[a-z0-9]{12}", ref.key)
        known = pod_of(catalog, organization, ref.key)
        assert (known.status, known.pod.initial_prompt) == (PodStatus.CREATING, "go")
        assert PodSpec.model_validate(known.pod.spec) == spec

    def test_it_is_its_organizations(self, catalog: Catalog, pod: PodRef) -> None:
        """Another organization's pod is an unknown one, whatever is to be done with it."""
        other = add_organization(catalog)
        with catalog.read() as session:
            assert pods.find(session, other, pod.key) is None
        stranger = pod.model_copy(update={"organization_id": other})
        with pytest.raises(NotFoundError):
            terminate(catalog, stranger)
        with pytest.raises(NotFoundError):
            prompt(catalog, stranger, "hello")
        assert page(catalog, other) == ([], 0)


class TestPage:
    @pytest.fixture
    def made(self, catalog: Catalog, organization: str, runner: RunnerProcess) -> dict[str, str]:
        """One pod of each status, the newest last."""
        away = add_runner(catalog, organization)
        go_away(catalog, away.runner_id)
        keys = {}
        for number, name in enumerate(STATUSES):
            at = away if name == "orphaned" else runner
            keys[name] = add_pod(catalog, organization, at.runner_id).key
            stored = "running" if name == "orphaned" else name
            rewrite_pod(catalog, keys[name], status=stored, created_at=NOON + timedelta(seconds=number))
        return keys

    @pytest.mark.parametrize(
        "wanted",
        [None, ["running"], ["orphaned"], ["failed", "creating", "unknown"], ["orphaned", "running"], ["unknown"], []],
    )
    def test_what_reads_so_is_listed(
        self, catalog: Catalog, organization: str, made: dict[str, str], wanted: list[str] | None
    ) -> None:
        """A page holds what shows one of the statuses, newest first; a running pod whose runner is away is `orphaned`."""
        expected = [made[name] for name in reversed(STATUSES) if wanted is None or name in wanted]
        assert page(catalog, organization, wanted) == (expected, len(expected))
        assert {name: pod_of(catalog, organization, key).status.value for name, key in made.items()} == {
            name: name for name in STATUSES
        }

    @pytest.mark.usefixtures("made")
    @pytest.mark.parametrize("wanted", [None, STATUSES[:4]])
    def test_pages_follow_each_other(self, catalog: Catalog, organization: str, wanted: list[str] | None) -> None:
        """Whatever the pages' size, one after the other they hold every pod once, and each says how many there are."""
        whole, total = page(catalog, organization, wanted)
        pieces = [page(catalog, organization, wanted, 2, offset) for offset in range(0, total + 2, 2)]
        assert [key for keys, _ in pieces for key in keys] == whole
        assert {said for _, said in pieces} == {total}

    def test_equal_times_are_in_one_order(self, catalog: Catalog, organization: str, made: dict[str, str]) -> None:
        """Pods of the same moment are listed once each too."""
        for key in made.values():
            rewrite_pod(catalog, key, created_at=NOON)
        for wanted in (None, STATUSES):
            seen = [page(catalog, organization, wanted, 1, offset)[0][0] for offset in range(len(STATUSES))]
            assert sorted(seen) == sorted(made.values())


class TestOrphans:
    def test_it_comes_back_with_its_runner(
        self, pod_ledger: CatalogPodLedger, catalog: Catalog, runner: RunnerProcess, running: PodRef
    ) -> None:
        """A running pod is orphaned while its runner is away, and nothing else of it changes."""
        before = pod_row(catalog, running.key).updated_at
        go_away(catalog, runner.runner_id)
        assert status(catalog, running) == "orphaned"
        pod_ledger.beat(runner, [running.key])
        assert status(catalog, running) == "running"
        assert pod_row(catalog, running.key).updated_at == before

    def test_one_that_waits_goes_on_waiting(self, catalog: Catalog, runner: RunnerProcess, pod: PodRef) -> None:
        """A pod that does not run yet is no orphan."""
        go_away(catalog, runner.runner_id)
        assert status(catalog, pod) == "creating"

    def test_it_can_be_terminated_and_not_prompted(
        self, catalog: Catalog, runner: RunnerProcess, running: PodRef
    ) -> None:
        """Nobody is there to hand an orphan a prompt, but its end is noted."""
        go_away(catalog, runner.runner_id)
        with pytest.raises(UnavailableError):
            prompt(catalog, running, "hello?")
        terminate(catalog, running)
        assert status(catalog, running) == "terminated"


@contextmanager
def statements_of(catalog: Catalog, statements: list[str]) -> Iterator[None]:
    """What is asked of the database while the block lasts."""

    def note(_connection: Any, _cursor: Any, statement: str, *_: object) -> None:
        statements.append(statement)

    event.listen(catalog.engine, "before_cursor_execute", note)
    yield
    event.remove(catalog.engine, "before_cursor_execute", note)


class TestPrompts:
    def test_they_are_numbered(
        self, pod_ledger: CatalogPodLedger, catalog: Catalog, runner: RunnerProcess, pod: PodRef
    ) -> None:
        """The initial prompt is the first; what comes before the start goes with it, what comes after is asked for."""
        assert prompt(catalog, pod, "also this") == 2
        assert pod_ledger.begin(runner, pod.key, SHIM).prompts == ["hello", "also this"]
        pod_ledger.started(runner, pod.key, SHIM)
        assert pod_ledger.add_prompt(pod, "and that") == 3
        assert pod_ledger.news(runner, {pod.key: 2}) == News(prompts={pod.key: [(3, "and that")]})
        assert pod_ledger.news(runner, {pod.key: 3}) == News()

    def test_what_was_had_is_noted(
        self, pod_ledger: CatalogPodLedger, catalog: Catalog, runner: RunnerProcess, running: PodRef
    ) -> None:
        """Who asks for what comes after a prompt has had that prompt."""
        prompt(catalog, running, "more")
        pod_ledger.news(runner, {running.key: 1})
        first, second = prompts_of(catalog, running)
        assert first.taken_at is not None
        assert second.taken_at is None
        pod_ledger.news(runner, {running.key: 1})
        assert prompts_of(catalog, running)[0].taken_at == first.taken_at

    def test_a_runner_asks_for_all_of_its_pods_at_once(
        self, pod_ledger: CatalogPodLedger, catalog: Catalog, runner: RunnerProcess, organization: str
    ) -> None:
        """However many pods are asked about, it takes as many statements; each is told what comes after its own number."""
        refs = [add_pod(catalog, organization, runner.runner_id, initial_prompt="hello") for _ in range(5)]
        for ref in refs:
            prompt(catalog, ref, "more")
        terminate(catalog, refs[0])
        after = {ref.key: number for number, ref in enumerate(refs)} | {refs[4].key: 0}
        statements: list[str] = []
        pod_ledger.news(runner, after)
        with statements_of(catalog, statements):
            said = pod_ledger.news(runner, after)
        assert said.end == {refs[0].key}
        assert said.prompts == {refs[1].key: [(2, "more")], refs[4].key: [(1, "hello"), (2, "more")]}
        assert sum("SELECT" in each for each in statements) == 3
        assert not any("UPDATE" in each for each in statements)
        assert [row.taken_at is None for row in prompts_of(catalog, refs[2])] == [False, False]

    def test_an_ended_pod_takes_none(
        self, pod_ledger: CatalogPodLedger, catalog: Catalog, runner: RunnerProcess, pod: PodRef
    ) -> None:
        """Nobody prompts an agent that is no more, and nobody waits for its prompts."""
        terminate(catalog, pod)
        with pytest.raises(RefusedError):
            prompt(catalog, pod, "hello?")
        assert pod_ledger.news(runner, {pod.key: 0}) == News(end={pod.key})
        assert len(prompts_of(catalog, pod)) == 1
