"""Runs of pods whose histories are recorded: `tests/workflows/record_histories.py`."""

from collections.abc import Awaitable, Callable

from temporalio.client import WorkflowHistory

from kiln.models import PodPhase, PodRef, PodResult
from kiln.naming import KEEP_HOUSE_WORKFLOW_ID
from support.pod_harness import DONE, PodHarness

PodScenario = Callable[[PodHarness], Awaitable[WorkflowHistory]]
LONG_GONE = "a run of long ago"


async def of_pod(kiln: PodHarness, pod: PodRef, run_id: str | None = None) -> WorkflowHistory:
    return await kiln.client.get_workflow_handle(pod.key, run_id=run_id).fetch_history()


async def success(kiln: PodHarness) -> WorkflowHistory:
    """Prompted before its claim, with a blank and while it runs; its runner's worker is replaced."""
    pod = await kiln.begin()
    for text in ("one", " ", "two"):
        await kiln.signal(pod, text)
    async with kiln.control():
        async with kiln.runner():
            await kiln.has_status(pod, "running")
        await kiln.signal(pod, "three")
        await kiln.until(lambda: has_prompts(kiln, pod, 3))
        async with kiln.runner():
            kiln.host.end(pod, DONE)
            await kiln.ends(pod)
        return await of_pod(kiln, pod)


async def failure(kiln: PodHarness) -> WorkflowHistory:
    async with kiln.workers():
        pod = await kiln.runs()
        kiln.host.end(pod, PodResult(error="pod timed out after 5 minutes"))
        await kiln.fails(pod)
        return await of_pod(kiln, pod)


async def not_mine(kiln: PodHarness) -> WorkflowHistory:
    """Another run has the pod."""
    kiln.pod_ledger.claim_pod(pod := kiln.order_pod(), LONG_GONE)
    async with kiln.workers():
        await kiln.begin(pod)
        await kiln.ends(pod)
        return await of_pod(kiln, pod)


async def cancel(kiln: PodHarness) -> WorkflowHistory:
    """Cancelled while the agent runs, and again while that is written down."""
    kiln.gate.hold("terminate-pod")
    async with kiln.workers():
        pod = await kiln.runs()
        await kiln.signal(pod, "one")
        await kiln.until(lambda: has_prompts(kiln, pod, 1))
        await kiln.pod(pod).cancel()
        await kiln.gate.is_reached()
        await kiln.pod(pod).cancel()
        kiln.gate.open()
        await kiln.ends_cancelled(pod)
        return await of_pod(kiln, pod)


async def cancel_at_claim(kiln: PodHarness) -> WorkflowHistory:
    kiln.gate.hold("claim-pod")
    async with kiln.workers():
        pod = await kiln.begin()
        await kiln.gate.is_reached()
        await kiln.pod(pod).cancel()
        kiln.gate.open()
        await kiln.ends_cancelled(pod)
        return await of_pod(kiln, pod)


async def cancel_in_the_queue(kiln: PodHarness) -> WorkflowHistory:
    async with kiln.control():
        pod = await kiln.begin()
        await kiln.is_in(pod, PodPhase.AT_RUNNER)
        await kiln.pod(pod).cancel()
        await kiln.ends_cancelled(pod)
        return await of_pod(kiln, pod)


async def continued(kiln: PodHarness) -> WorkflowHistory:
    """The first run of a pod that had many prompts."""
    async with kiln.workers():
        pod = await kiln.runs()
        first = (await kiln.pod(pod).describe()).run_id
        told = 0
        while (await kiln.pod(pod).describe()).run_id == first:
            await kiln.signal(pod, str(told := told + 1))
            await kiln.until(lambda number=told: has_prompts(kiln, pod, number))
        return await of_pod(kiln, pod, first)


async def keep_house(kiln: PodHarness) -> WorkflowHistory:
    """Rounds of which one fails a pod, gives one back to the dispatcher and settles one."""
    async with kiln.control():
        async with kiln.runner():
            lapsed, ended = await kiln.runs(), await kiln.runs()
            kiln.host.tell_end(ended, DONE)
            await kiln.pod(ended).terminate()
        kiln.pod_ledger.claim_pod(lost := kiln.order_pod(), LONG_GONE)
        for pod in (ended, lost):
            kiln.make_older(pod)
        kiln.run_out(lapsed)
        await kiln.keep_house(rounds=2)
        return await kiln.client.get_workflow_handle(KEEP_HOUSE_WORKFLOW_ID).fetch_history()


async def has_prompts(kiln: PodHarness, pod: PodRef, number: int) -> bool:
    return len(kiln.prompts(pod)) >= number


POD_SCENARIOS: dict[str, PodScenario] = {
    "pod_success": success,
    "pod_failure": failure,
    "pod_not_mine": not_mine,
    "pod_cancel": cancel,
    "pod_cancel_at_claim": cancel_at_claim,
    "pod_cancel_in_the_queue": cancel_in_the_queue,
    "pod_continued": continued,
    "keep_house_pods": keep_house,
}
