"""A pod's life: its agent starts once and ends once, whatever becomes of workflow, worker and runner meanwhile."""

import pytest
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import ResetWorkflowExecutionRequest
from temporalio.client import WorkflowExecutionStatus

from kiln.models import MAX_PROMPT_BYTES, PodPhase, PodRef, PodResult, PodStatus
from support import pod_rows
from support.pod_harness import DONE, PodHarness
from workflows.start import KIND_ATTRIBUTE


@pytest.fixture
def kiln(pod_kiln: PodHarness) -> PodHarness:
    return pod_kiln


class TestEnds:
    async def test_an_agent_that_is_done_completes_its_pod(self, kiln: PodHarness) -> None:
        """Exit code 0 completes pod, workflow and log, and the pod is no run's any more."""
        async with kiln.workers():
            pod = await kiln.runs()
            await kiln.is_in(pod, PodPhase.AT_RUNNER)
            kiln.host.end(pod, DONE)
            assert await kiln.ends(pod) is PodStatus.COMPLETED
        row = kiln.pod_row(pod)
        assert (row.status, row.run_id, kiln.log_end(pod), kiln.log(pod.pod_id)) == ("completed", None, "completed", [])

    @pytest.mark.parametrize(
        ("result", "error"),
        [
            (PodResult(exit_code=3), "the agent exited with code 3"),
            (PodResult(error="pod timed out after 5 minutes"), "pod timed out after 5 minutes"),
        ],
    )
    async def test_an_agent_that_fails_fails_its_pod(self, kiln: PodHarness, result: PodResult, error: str) -> None:
        """Pod and workflow say why, and the log ends as failed."""
        async with kiln.workers():
            pod = await kiln.runs()
            kiln.host.end(pod, result)
            assert await kiln.fails(pod) == error
        row = kiln.pod_row(pod)
        assert (row.status, row.error, kiln.log_end(pod)) == ("failed", error, "failed")

    async def test_another_runs_pod_is_left_alone(self, kiln: PodHarness) -> None:
        """A workflow that another run came before does nothing."""
        kiln.pod_ledger.claim_pod(pod := kiln.order_pod(), "another run")
        async with kiln.workers():
            await kiln.begin(pod)
            assert await kiln.ends(pod) is None
        assert (kiln.pod_row(pod).status, kiln.pod_row(pod).run_id) == ("creating", "another run")
        assert (kiln.host.begun, kiln.log_end(pod)) == ([], None)


class TestCancel:
    async def test_one_that_waits_for_a_place_is_terminated(self, kiln: PodHarness) -> None:
        """A pod that no runner has taken up yet ends at once, and never runs."""
        async with kiln.control():
            pod = await kiln.begin()
            await kiln.is_in(pod, PodPhase.AT_RUNNER)
            await kiln.pod(pod).cancel()
            await kiln.ends_cancelled(pod)
        row = kiln.pod_row(pod)
        assert (row.status, row.run_id, kiln.log_end(pod)) == ("terminated", None, "terminated")
        assert (kiln.host.begun, kiln.log(pod.pod_id)) == ([], [])

    async def test_the_agent_of_one_that_runs_is_ended(self, kiln: PodHarness) -> None:
        """An operator's cancel writes `terminated`, and ends the agent; how that one ended does not count."""
        async with kiln.workers():
            pod = await kiln.runs()
            await kiln.pod(pod).cancel()
            await kiln.ends_cancelled(pod)
        row = kiln.pod_row(pod)
        assert (row.status, row.exit_code, row.error, kiln.log_end(pod)) == ("terminated", None, None, "terminated")
        assert kiln.host.left_alone[pod.key] == 0

    async def test_the_apis_terminate_ends_it_too(self, kiln: PodHarness) -> None:
        """A pod whose row says `terminated` already ends as one that was cancelled."""
        async with kiln.workers():
            pod = await kiln.runs()
            pod_rows.terminate(kiln.catalog, pod)
            await kiln.pod(pod).cancel()
            await kiln.ends_cancelled(pod)
        assert (kiln.pod_row(pod).status, kiln.log_end(pod)) == ("terminated", "terminated")

    async def test_a_cancel_with_the_claim_starts_no_agent(self, kiln: PodHarness) -> None:
        """A pod that is cancelled while it is claimed never gets to its runner."""
        kiln.gate.hold("claim-pod")
        async with kiln.workers():
            pod = await kiln.begin()
            await kiln.gate.is_reached()
            await kiln.pod(pod).cancel()
            kiln.gate.open()
            await kiln.ends_cancelled(pod)
        assert (kiln.pod_row(pod).status, kiln.log_end(pod), kiln.host.begun) == ("terminated", "terminated", [])

    async def test_a_cancel_after_the_end_changes_nothing(self, kiln: PodHarness) -> None:
        """A pod whose end is being written down is completed, though somebody cancels it then."""
        kiln.gate.hold("record-pod-end")
        async with kiln.workers():
            pod = await kiln.runs()
            kiln.host.end(pod, DONE)
            await kiln.gate.is_reached()
            await kiln.pod(pod).cancel()
            kiln.gate.open()
            assert await kiln.ends(pod) is PodStatus.COMPLETED
        assert kiln.pod_row(pod).status == "completed"


class TestAgent:
    @pytest.mark.long
    async def test_silence_ends_an_attempt_and_no_agent(self, kiln: PodHarness) -> None:
        """After a missed heartbeat the next attempt finds the agent at work; a pod that was cancelled ends then."""
        async with kiln.workers():
            kept, cancelled = await kiln.runs(), await kiln.runs()
            kiln.host.is_mute = True
            await kiln.pod(cancelled).cancel()
            await kiln.ends_cancelled(cancelled)
            await kiln.until(lambda: has_attempts(kiln, kept, 2))
            kiln.host.is_mute = False
            kiln.host.end(kept, DONE)
            assert await kiln.ends(kept) is PodStatus.COMPLETED
        assert kiln.host.begun == [kept.key, cancelled.key]
        assert (kiln.pod_row(cancelled).status, kiln.log_end(cancelled)) == ("terminated", "terminated")

    async def test_a_worker_that_is_replaced_keeps_its_agent(self, kiln: PodHarness) -> None:
        """A runner's orderly restart ends no agent and fails no pod."""
        async with kiln.control():
            async with kiln.runner():
                pod = await kiln.runs()
            async with kiln.runner():
                await kiln.until(lambda: has_attempts(kiln, pod, 2))
                kiln.host.end(pod, DONE)
                assert await kiln.ends(pod) is PodStatus.COMPLETED
        assert (kiln.host.begun, kiln.host.left_alone[pod.key]) == ([pod.key], 1)

    async def test_a_terminated_workflow_is_followed_by_another(self, kiln: PodHarness) -> None:
        """An operator who terminates the workflow ends no agent: the next run of it finds the agent at work."""
        async with kiln.workers():
            pod = await kiln.runs()
            await kiln.pod(pod).terminate()
            kiln.make_older(pod)
            assert (await kiln.look_after()).released == 1
            await kiln.dispatch()
            await kiln.until(lambda: has_left_alone(kiln, pod))
            await kiln.until(lambda: has_attempts(kiln, pod, 2))
            kiln.host.end(pod, DONE)
            assert await kiln.ends(pod) is PodStatus.COMPLETED
        assert kiln.host.begun == [pod.key]

    async def test_a_reset_workflow_still_owns_its_pod(self, kiln: PodHarness) -> None:
        """A run that an operator resets to its beginning goes on with the same agent."""
        async with kiln.workers():
            pod = await kiln.runs()
            await reset(kiln, pod)
            await kiln.until(lambda: has_attempts(kiln, pod, 2))
            kiln.host.end(pod, DONE)
            assert await kiln.ends(pod) is PodStatus.COMPLETED
        assert kiln.host.begun == [pod.key]


class TestPrompts:
    async def test_each_reaches_the_catalog_in_order(self, kiln: PodHarness) -> None:
        """What is signalled before the claim, while the pod waits and while it runs, comes after its first prompt."""
        pod = await kiln.begin(kiln.order_pod(initial_prompt="hello"))
        await kiln.signal(pod, "one")
        async with kiln.control():
            await kiln.signal(pod, "two")
            await kiln.until(lambda: has_prompts(kiln, pod, 3))
            async with kiln.runner():
                await kiln.has_status(pod, "running")
                await kiln.signal(pod, "three")
                await kiln.until(lambda: has_prompts(kiln, pod, 4))
        assert kiln.prompts(pod) == ["hello", "one", "two", "three"]

    @pytest.mark.parametrize("text", [" \n", "é" * (MAX_PROMPT_BYTES // 2) + "!"])
    async def test_one_that_is_no_prompt_is_dropped(self, kiln: PodHarness, text: str) -> None:
        """A blank or too long prompt is left out, and the next one comes."""
        async with kiln.control():
            pod = await kiln.begin()
            for each in (text, "é" * (MAX_PROMPT_BYTES // 2), "next"):
                await kiln.signal(pod, each)
            await kiln.until(lambda: has_prompts(kiln, pod, 2))
        assert [each[:4] for each in kiln.prompts(pod)] == ["éééé", "next"]

    async def test_one_for_a_pod_that_has_ended_is_dropped(self, kiln: PodHarness) -> None:
        """A prompt that comes between the agent's end and its workflow's harms nobody."""
        async with kiln.workers():
            pod = await kiln.runs()
            kiln.host.tell_end(pod, DONE)
            await kiln.signal(pod, "too late")
            await kiln.until(lambda: has_finished(kiln, "prompt-pod", 1))
            kiln.host.end(pod, DONE)
            assert await kiln.ends(pod) is PodStatus.COMPLETED
        assert kiln.prompts(pod) == []

    async def test_one_waits_for_a_runner_that_is_away(self, kiln: PodHarness) -> None:
        """While a running pod's runner is away its prompts wait, and the pod's end does not wait for them."""
        async with kiln.workers():
            pod, other = await kiln.runs(), await kiln.runs()
            pod_rows.go_away(kiln.catalog, kiln.process.runner_id)
            for each in (pod, other):
                await kiln.signal(each, "hello")
            kiln.host.end(other, DONE)
            assert await kiln.ends(other) is PodStatus.COMPLETED
            assert kiln.prompts(pod) == []
            pod_rows.register(kiln.catalog, kiln.process.runner_id, incarnation=kiln.process.incarnation)
            await kiln.until(lambda: has_prompts(kiln, pod, 1))
        assert (kiln.prompts(pod), kiln.prompts(other)) == (["hello"], [])

    async def test_a_long_history_begins_anew(self, kiln: PodHarness) -> None:
        """A pod with many prompts is continued as new: it loses none of them, and keeps its agent and itself."""
        async with kiln.workers():
            pod = await kiln.runs()
            first = (await kiln.pod(pod).describe()).run_id
            told = 0
            while (await kiln.pod(pod).describe()).run_id == first:
                await kiln.signal(pod, str(told := told + 1))
                assert told < 200, "its history is as long as the server likes"
            await kiln.until(lambda: has_prompts(kiln, pod, told))
            await kiln.until(lambda: has_attempts(kiln, pod, 2))
            description = await kiln.pod(pod).describe()
            assert description.typed_search_attributes[KIND_ATTRIBUTE] == "pod"
            await kiln.pod(pod).cancel()
            await kiln.ends_cancelled(pod)
        assert kiln.prompts(pod) == [str(number + 1) for number in range(told)]
        assert (kiln.host.begun, kiln.pod_row(pod).status) == ([pod.key], "terminated")


class TestDispatch:
    async def test_a_pod_that_was_left_behind_is_started(self, kiln: PodHarness) -> None:
        """A row whose workflow the API could not start runs all the same; a fresh one is the API's."""
        kiln.make_older(pod := kiln.order_pod())
        fresh = kiln.order_pod()
        async with kiln.workers():
            await kiln.dispatch()
            await kiln.has_status(pod, "running")
            run_id = kiln.pod_row(pod).run_id
            await kiln.dispatch()
            description = await kiln.pod(pod).describe()
        assert (description.run_id, description.status) == (run_id, WorkflowExecutionStatus.RUNNING)
        assert (kiln.host.begun, kiln.pod_row(fresh).run_id) == ([pod.key], None)


async def has_attempts(kiln: PodHarness, pod: PodRef, number: int) -> bool:
    return kiln.host.attempts[pod.key] >= number


async def has_left_alone(kiln: PodHarness, pod: PodRef) -> bool:
    return kiln.host.left_alone[pod.key] > 0


async def has_prompts(kiln: PodHarness, pod: PodRef, number: int) -> bool:
    return len(kiln.prompts(pod)) >= number


async def has_finished(kiln: PodHarness, activity_type: str, times: int) -> bool:
    return kiln.finished[activity_type] >= times


async def reset(kiln: PodHarness, pod: PodRef) -> None:
    """What an operator's `temporal workflow reset --type FirstWorkflowTask` does."""
    service = kiln.client.workflow_service
    execution = WorkflowExecution(workflow_id=pod.key, run_id=(await kiln.pod(pod).describe()).run_id)
    await service.reset_workflow_execution(
        ResetWorkflowExecutionRequest(
            namespace=kiln.client.namespace,
            workflow_execution=execution,
            reason="a test",
            workflow_task_finish_event_id=4,
            request_id=pod.pod_id,
        )
    )
