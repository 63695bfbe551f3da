"""The life of a pod: claim, an agent on its runner, record. Whatever dies meanwhile, the agent is the same one."""

import asyncio
from collections import deque
from collections.abc import Awaitable
from datetime import datetime

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError, is_cancelled_exception

with workflow.unsafe.imports_passed_through():
    from activities.pod_record import PodRecord
    from activities.pods import PodActivities
    from kiln.models import (
        MAX_PROMPT_BYTES,
        PodClaimRequest,
        PodEnd,
        PodPhase,
        PodProgress,
        PodPromptRequest,
        PodRef,
        PodResult,
        PodRun,
        PodStatus,
    )
    from workflows import options
    from workflows.operate_machine import CANCELLED, reason_of
    from workflows.shielding import shielded


@workflow.defn(name="run-pod")
class RunPodWorkflow:
    """The catalog is the truth and the runner writes there too; the workflow brings the pod to its runner, and its end to
    the catalog, whoever forgot to."""

    @workflow.init
    def __init__(self, pod: PodRun) -> None:
        self._ref = PodRef(**pod.model_dump(exclude={"prompts"}))
        self._phase = PodPhase.CLAIMING
        self._detail = "taking the pod over from the catalog"
        self._since: datetime | None = None
        self._status: PodStatus | None = None
        self._prompts = deque(pod.prompts)
        self._passing_on = False

    @workflow.run
    async def run(self, _pod: PodRun) -> PodStatus | None:
        ref = self._ref
        if not await shielded(self._claim(ref)):
            self._show(PodPhase.ENDED, "This run does nothing: the pod is closed already, or another run has it.")
            return None
        end = await self._end_of(ref)
        self._show(PodPhase.CLOSING, "closing the pod and its log")
        status = await shielded(workflow.execute_activity_method(PodRecord.record_end, end, **options.record()))
        return self._close(status, end.result)

    @workflow.query(name="status")
    def status(self) -> PodProgress:
        """The pod, less what only the catalog knows."""
        return PodProgress(
            key=self._ref.key,
            phase=self._phase,
            detail=self._detail,
            since=self._since,
            prompts=len(self._prompts),
            status=self._status,
        )

    @workflow.signal(name="prompt")
    def prompt(self, text: str) -> None:
        """A prompt for the agent, after those that came before. One that no agent can get is logged and dropped."""
        if refusal := self._refusal_of(text):
            workflow.logger.warning("a prompt was dropped: %s", refusal)
            return
        self._prompts.append(text)

    def _refusal_of(self, text: str) -> str | None:
        if self._phase in (PodPhase.CLOSING, PodPhase.ENDED):
            return "the pod has ended"
        if not text.strip():
            return "it is blank"
        return f"it is longer than {MAX_PROMPT_BYTES} bytes" if _length(text) > MAX_PROMPT_BYTES else None

    async def _claim(self, ref: PodRef) -> bool:
        # Continued as new, or reset by an operator, the workflow keeps its first run's id: it still owns its pod.
        request = PodClaimRequest(pod=ref, run_id=workflow.info().first_execution_run_id)
        return await workflow.execute_activity_method(PodRecord.claim, request, **options.record())

    async def _end_of(self, ref: PodRef) -> PodEnd:
        if workflow.cancellation_reason() is not None:
            return await shielded(self._give_up(ref))
        self._show(PodPhase.AT_RUNNER, "at its runner, or waiting for a place there")
        agent = workflow.start_activity_method(PodActivities.run, ref, **options.pod(ref))
        prompts = asyncio.ensure_future(self._pass_prompts_on(ref))
        try:
            await workflow.wait_condition(lambda: agent.done() or self._is_long())
            if not agent.done():
                # The runner's attempt finds its activity gone and leaves the agent alone; the next one joins it.
                workflow.continue_as_new(PodRun(**ref.model_dump(), prompts=tuple(self._prompts)))
        except asyncio.CancelledError:
            prompts.cancel()
            # First the row: whatever the runner says of the agent's end, the pod was terminated.
            await shielded(self._terminate(ref))
            agent.cancel()
        end = await shielded(_heard_of(ref, agent))
        prompts.cancel()
        return end

    async def _give_up(self, ref: PodRef) -> PodEnd:
        await self._terminate(ref)
        return PodEnd(pod=ref, result=PodResult(error=CANCELLED), told=False)

    async def _terminate(self, ref: PodRef) -> None:
        """What the API writes, for a cancel that did not come through it; a pod that has ended stays as it is."""
        self._show(PodPhase.CLOSING, "cancelled: the agent is to end")
        await workflow.execute_activity_method(PodRecord.terminate, ref, **options.record())

    async def _pass_prompts_on(self, ref: PodRef) -> None:
        """One after the other, as long as the pod lives. While its runner is away, they wait."""
        while True:
            await workflow.wait_condition(lambda: len(self._prompts) > 0 and not self._is_long())
            self._passing_on = True
            request = PodPromptRequest(pod=ref, text=self._prompts.popleft())
            try:
                await workflow.execute_activity_method(PodRecord.prompt, request, **options.record())
            except ActivityError as error:
                if is_cancelled_exception(error):
                    return
                workflow.logger.warning("a prompt was lost: %s", error.cause)
            self._passing_on = False

    def _is_long(self) -> bool:
        """Whether the history has grown long, of prompts: it begins anew between two of them, with what is left."""
        if self._passing_on or not workflow.info().is_continue_as_new_suggested():
            return False
        return sum(map(_length, self._prompts)) <= MAX_PROMPT_BYTES

    def _show(self, phase: PodPhase, detail: str) -> None:
        """Makes what the pod's workflow is doing readable in the Temporal UI and in the `status` query."""
        self._phase, self._detail, self._since = phase, detail, workflow.now()
        workflow.set_current_details(f"**{phase}** — {detail}")

    def _close(self, status: PodStatus, result: PodResult) -> PodStatus:
        """Ends the run with the colour that operators expect: failed pods red, terminated ones grey."""
        self._status = status
        failure = _why(result) if status is PodStatus.FAILED else None
        self._show(PodPhase.ENDED, failure or f"the pod is {status}")
        if self._prompts:
            workflow.logger.warning("%d prompts came too late", len(self._prompts))
        if failure is not None:
            raise ApplicationError(failure, non_retryable=True)
        if status is PodStatus.TERMINATED and workflow.cancellation_reason() is not None:
            raise asyncio.CancelledError
        return status


def _length(prompt: str) -> int:
    return len(prompt.encode(errors="surrogatepass"))


async def _heard_of(ref: PodRef, agent: Awaitable[PodResult]) -> PodEnd:
    """How the runner says that the agent ended, or why it did not say."""
    try:
        return PodEnd(pod=ref, result=await agent)
    except (ActivityError, asyncio.CancelledError) as error:
        return PodEnd(pod=ref, result=PodResult(error=reason_of(error)), told=False)


def _why(result: PodResult) -> str:
    if workflow.cancellation_reason() is not None:  # whoever closed the pod before wrote down why
        return "it had failed before it was cancelled: the pod's own error says why"
    return result.error or f"the agent exited with code {result.exit_code}"
