"""What is done to a machine: launched from an image, started, stopped. Killed at any step, it is taken up again."""

import asyncio

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError, is_cancelled_exception

with workflow.unsafe.imports_passed_through():
    from activities.machines import MachineActivities
    from kiln.models import (
        ErrorCode,
        LaunchedInstance,
        OperationClaimRequest,
        OperationFailure,
        OperationRef,
        SourceState,
    )
    from workflows import options
    from workflows.shielding import shielded

CANCELLED = "it was cancelled"
# Errors whose text is written for a machine's users.
TELLING = ("OperationFailedError", "CloudRefusedError", ErrorCode.CAPACITY.value)


@workflow.defn(name="rebuild-machine")
class RebuildMachineWorkflow:
    """Gives a machine a new instance from its image; the old one ends only when the new one runs and is the machine's."""

    @workflow.run
    async def run(self, ref: OperationRef) -> None:
        if not await _claimed(ref):
            return
        error: BaseException | None = None
        try:
            _refuse_if_cancelled()
            await self._source_is_there(ref)
            launched = await self._launch(ref)
            _refuse_if_cancelled()
            await self._adopt(launched)
        except (Exception, asyncio.CancelledError) as caught:  # noqa: BLE001  whatever it was, the operation is ended
            error = caught
            await shielded(_abandon(ref, error))
        workflow.set_current_details("ending instances that the machine no longer has")
        await shielded(workflow.execute_activity_method(MachineActivities.end_retired, ref, **options.ending()))
        _close(error)

    async def _source_is_there(self, ref: OperationRef) -> None:
        """A machine that is created from software waits here for its image."""
        pause = options.SOURCE_FIRST_PAUSE
        while True:
            answer = await workflow.execute_activity_method(
                MachineActivities.find_source, ref, **options.machine_record()
            )
            if answer.state is SourceState.READY:
                return
            if answer.state is SourceState.FAILED:
                raise ApplicationError(answer.message, type=TELLING[0], non_retryable=True)
            workflow.set_current_details(f"waiting: {answer.message}")
            await asyncio.sleep(pause.total_seconds())
            pause = min(pause * 2, options.SOURCE_LONGEST_PAUSE)

    async def _launch(self, ref: OperationRef) -> LaunchedInstance:
        workflow.set_current_details("launching an instance")
        return await workflow.execute_activity_method(MachineActivities.launch, ref, **options.machine())

    async def _adopt(self, launched: LaunchedInstance) -> None:
        workflow.set_current_details(f"waiting until {launched.instance_id} runs")
        await workflow.execute_activity_method(MachineActivities.adopt, launched, **options.machine())


@workflow.defn(name="power-machine")
class PowerMachineWorkflow:
    """Starts or stops a machine's instance."""

    @workflow.run
    async def run(self, ref: OperationRef) -> None:
        if not await _claimed(ref):
            return
        try:
            _refuse_if_cancelled()
            await workflow.execute_activity_method(MachineActivities.power, ref, **options.machine())
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  whatever it was, the operation is ended
            await shielded(_abandon(ref, error))
            _close(error)


async def _claimed(ref: OperationRef) -> bool:
    workflow.set_current_details(f"{ref.operation} of machine {ref.machine_id}")
    request = OperationClaimRequest(operation=ref, run_id=workflow.info().original_execution_run_id)
    return await shielded(
        workflow.execute_activity_method(MachineActivities.claim, request, **options.machine_record())
    )


def _refuse_if_cancelled() -> None:
    """After a step that is seen through whatever comes: a cancel that came with it is looked for here."""
    if workflow.cancellation_reason() is not None:
        raise asyncio.CancelledError


async def _abandon(ref: OperationRef, error: BaseException) -> None:
    failure = OperationFailure(operation=ref, message=reason_of(error))
    await workflow.execute_activity_method(MachineActivities.abandon, failure, **options.machine_record())


def _close(error: BaseException | None) -> None:
    """Ends the run with the colour that operators expect."""
    if error is None:
        workflow.set_current_details("done")
        return
    if _is_cancel(error):
        raise asyncio.CancelledError
    raise ApplicationError(reason_of(error), non_retryable=True) from error


def _is_cancel(error: BaseException) -> bool:
    """Whatever a cancelled operation ends in (a lost worker's time-out, say), it ends because of its cancellation."""
    return is_cancelled_exception(error) or workflow.cancellation_reason() is not None


def reason_of(error: BaseException) -> str:
    """Why an operation failed, in a sentence for its machine's users."""
    if _is_cancel(error):
        return CANCELLED
    cause = error.cause if isinstance(error, ActivityError) and error.cause is not None else error
    if isinstance(cause, ApplicationError) and cause.type in TELLING:
        return cause.message
    return "it failed through a fault of Kiln's own; its operators find the cause in the workflow's history"
