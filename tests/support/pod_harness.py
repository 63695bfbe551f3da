"""The workflow of pods on a real Temporal server, catalog and log store; only the runner's host is a double."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from temporalio import activity
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError, CancelledError
from temporalio.service import RPCError
from temporalio.testing import ActivityEnvironment
from temporalio.worker import Worker

from activities.interceptor import ErrorInterceptor
from kiln.adapters.logs import LogStore
from kiln.catalog.pod_tables import Pod
from kiln.errors import UnavailableError
from kiln.models import HouseTerms, LostPods, PodPhase, PodRef, PodResult, PodStatus
from kiln.naming import KEEP_HOUSE_WORKFLOW_ID, pod_workflow_id, runner_queue
from kiln.ports.pods import PodLedger, RunnerProcess
from support import pod_rows
from support.harness import GRACEFUL, Harness
from workflows.dispatch import Dispatcher
from workflows.run_pod import RunPodWorkflow
from workflows.start import start_house_keeping, start_pod

BEAT_SECONDS = 0.1
# Long enough ago for the house-keeping to ask where a pod, or the end of one, is.
LONG_AGO = timedelta(minutes=2)
NO_ROUNDS = HouseTerms(pause_seconds=3600, rounds_a_sweep=1000, round=1)
SOME_ROUNDS = HouseTerms(pause_seconds=0.2, rounds_a_sweep=1000, round=1)
DONE = PodResult(exit_code=0)
STOPPED = PodResult(exit_code=143)

PodHandle = WorkflowHandle[RunPodWorkflow, PodStatus | None]


class HostDouble:
    """Stands for another process: a runner, whose agents live on whatever becomes of the activity's attempts, and end
    only when a cancel was asked for. What its runner's calls of the API would write, it writes in the catalog."""

    def __init__(self, ledger: PodLedger, process: RunnerProcess) -> None:
        self._ledger = ledger
        self._process = process
        self._agents: dict[str, asyncio.Future[PodResult]] = {}
        self.begun: list[str] = []
        self.attempts: Counter[str] = Counter()
        self.left_alone: Counter[str] = Counter()
        self.is_mute = False

    def end(self, ref: PodRef, result: PodResult) -> None:
        """The agent ends by itself."""
        self._agents[ref.key].set_result(result)

    def tell_end(self, ref: PodRef, result: PodResult) -> None:
        """The runner's word to the API that the agent is no more."""
        self._ledger.ended(self._process, ref.key, ref.key, result)

    @activity.defn(name="run-pod")
    async def run(self, ref: PodRef) -> PodResult:
        agent = self._agents.get(ref.key) or await self._begin(ref)
        self.attempts[ref.key] += 1
        beats = asyncio.create_task(self._beat())
        try:
            return await asyncio.shield(agent)
        except asyncio.CancelledError:
            why = activity.cancellation_details()
            if why is None or not why.cancel_requested:
                self.left_alone[ref.key] += 1
                raise
            return STOPPED
        finally:
            beats.cancel()

    async def _begin(self, ref: PodRef) -> asyncio.Future[PodResult]:
        agent = self._agents[ref.key] = asyncio.get_running_loop().create_future()
        self.begun.append(ref.key)
        await asyncio.to_thread(self._ledger.begin, self._process, ref.key, ref.key)
        await asyncio.to_thread(self._ledger.started, self._process, ref.key, ref.key)
        return agent

    async def _beat(self) -> None:
        while True:
            if not self.is_mute:
                activity.heartbeat()
            await asyncio.sleep(BEAT_SECONDS)


class PodHarness(Harness):
    """What a test of pods works with. `host` is where the one runner's agents live."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.process = pod_rows.add_runner(self.catalog, self.organization)
        self.host = HostDouble(self.pod_ledger, self.process)
        self._ordered: list[PodRef] = []

    async def leave(self) -> None:
        """Ends what a test left running on a server that it shares with others."""
        for workflow_id in [*(each.key for each in self._ordered), KEEP_HOUSE_WORKFLOW_ID]:
            with contextlib.suppress(RPCError):
                await self.client.get_workflow_handle(workflow_id).terminate()

    # Pods

    def order_pod(self, **changes: Any) -> PodRef:
        """A pod's row, which nobody has brought to Temporal yet."""
        ref = pod_rows.add_pod(self.catalog, self.organization, self.process.runner_id, **changes)
        self._ordered.append(ref)
        return ref

    async def begin(self, ref: PodRef | None = None) -> PodRef:
        """A pod, and its workflow."""
        pod = ref or self.order_pod()

        async def has_started() -> bool:
            try:
                await start_pod(self.client, pod)
            except UnavailableError:  # this machine was busy for a second
                return False
            return True

        await self.until(has_started)
        return pod

    async def runs(self, ref: PodRef | None = None) -> PodRef:
        """A pod whose agent is at work."""
        pod = await self.begin(ref)
        await self.has_status(pod, "running")
        return pod

    def pod(self, ref: PodRef) -> PodHandle:
        return self.client.get_workflow_handle_for(RunPodWorkflow.run, pod_workflow_id(ref.key))

    def pod_row(self, ref: PodRef) -> Pod:
        return pod_rows.pod_row(self.catalog, ref.key)

    def prompts(self, ref: PodRef) -> list[str]:
        return [each.text for each in pod_rows.prompts_of(self.catalog, ref)]

    def log_end(self, ref: PodRef) -> str | None:
        """The status that a pod's log has ended with."""
        store = LogStore(self._log_url)
        head = store.heads([ref.pod_id]).get(ref.pod_id)
        store.close()
        return None if head is None else head.ended_status

    async def signal(self, ref: PodRef, text: str) -> None:
        await self.pod(ref).signal(RunPodWorkflow.prompt, text)

    async def has_status(self, ref: PodRef, status: str) -> None:
        """Returns once the catalog says so."""
        await self.until(lambda: self._has_status(ref, status))

    async def _has_status(self, ref: PodRef, status: str) -> bool:
        return self.pod_row(ref).status == status

    async def is_in(self, ref: PodRef, phase: PodPhase) -> None:
        """Returns once the workflow says that it is in this phase."""

        async def is_there() -> bool:
            return (await self.pod(ref).query(RunPodWorkflow.status)).phase is phase

        await self.until(is_there)

    async def ends(self, ref: PodRef) -> PodStatus | None:
        """What the workflow says at its end. Raises WorkflowFailureError."""
        async with self.skipping():
            return await self.pod(ref).result()

    async def fails(self, ref: PodRef) -> str:
        """What the workflow fails with."""
        error = await self._error_of(ref)
        assert isinstance(error, ApplicationError), error
        return error.message

    async def ends_cancelled(self, ref: PodRef) -> None:
        error = await self._error_of(ref)
        assert isinstance(error, CancelledError), error

    async def _error_of(self, ref: PodRef) -> BaseException | None:
        try:
            status = await self.ends(ref)
        except WorkflowFailureError as error:
            return error.cause
        raise AssertionError(f"it ended well: {status}")

    # House-keeping

    def make_older(self, ref: PodRef) -> None:
        then = datetime.now(UTC) - LONG_AGO
        pod_rows.rewrite_pod(self.catalog, ref.key, created_at=then, updated_at=then)

    def run_out(self, ref: PodRef) -> None:
        """The pod's lease is over."""
        pod_rows.rewrite_pod(self.catalog, ref.key, lease_until=datetime.now(UTC) - LONG_AGO)

    async def look_after(self) -> LostPods:
        """One pass of the house-keeping."""
        found: LostPods = await ActivityEnvironment().run(self.pod_house().look_after)
        return found

    async def keep_house(self, rounds: int) -> None:
        """Lets so many rounds pass."""
        await start_house_keeping(self.client, SOME_ROUNDS)

        async def have_passed() -> bool:
            return self.finished["look-after-pods"] >= rounds

        await self.until(have_passed)

    async def dispatch(self) -> None:
        """One round of the dispatcher."""
        await Dispatcher(self.ledger, self.client, NO_ROUNDS, pods=self.pod_ledger).round()

    # Workers

    @asynccontextmanager
    async def runner(self) -> AsyncIterator[None]:
        """The runner's worker. Leaving the block stops it as SIGTERM would; its agents live on."""
        worker = Worker(
            self.client,
            task_queue=runner_queue(self.process.runner_id),
            activities=[self.host.run],
            interceptors=[ErrorInterceptor()],
            graceful_shutdown_timeout=GRACEFUL,
            max_heartbeat_throttle_interval=timedelta(seconds=BEAT_SECONDS),
        )
        async with worker:
            yield

    @asynccontextmanager
    async def workers(self) -> AsyncIterator[None]:
        """All that pods need."""
        async with self.control(), self.runner():
            yield
