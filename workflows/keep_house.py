"""One long-lived workflow an installation: it looks after builds that lost their workflow, images, and leftovers."""

import asyncio
from collections.abc import Awaitable

from temporalio import workflow
from temporalio.exceptions import ActivityError, is_cancelled_exception

with workflow.unsafe.imports_passed_through():
    from activities.house import HouseActivities
    from activities.machine_house import MachineHouse
    from activities.pod_house import PodHouse
    from activities.record import RecordActivities
    from kiln.models import BuildEnd, BuildStatus, EndRequest, ErrorCode, Failure, HouseTerms, LostBuild
    from workflows import options
    from workflows.build_image import LINES

TERMINATED = BuildEnd(
    status=BuildStatus.FAILED,
    error=Failure(code=ErrorCode.WORKFLOW_TERMINATED, message="the build's workflow was terminated from outside"),
)


@workflow.defn(name="keep-house")
class KeepHouseWorkflow:
    """A failed round is repeated by the next. It continues as new before its history grows."""

    def __init__(self) -> None:
        self._faults: list[str] = []

    @workflow.run
    async def run(self, terms: HouseTerms) -> None:
        for number in range(terms.round, terms.round + options.ROUNDS_A_RUN):
            await self._round(sweeps=number % terms.rounds_a_sweep == 0)
            await asyncio.sleep(terms.pause_seconds)
        next_round = (terms.round + options.ROUNDS_A_RUN) % terms.rounds_a_sweep
        workflow.continue_as_new(terms.model_copy(update={"round": next_round}))

    async def _round(self, *, sweeps: bool) -> None:
        self._faults.clear()
        await self._attempt(self._look_after_lost_builds())
        await self._attempt(workflow.execute_activity_method(HouseActivities.observe_images, **options.house()))
        looks_after_machines = workflow.patched("machines")
        if looks_after_machines:
            await self._look_after_machines()
        if workflow.patched("pods"):
            await self._attempt(workflow.execute_activity_method(PodHouse.look_after, **options.house()))
        if sweeps:
            await self._attempt(workflow.execute_activity_method(HouseActivities.sweep, **options.house()))
        if sweeps and looks_after_machines:
            await self._attempt(workflow.execute_activity_method(MachineHouse.sweep, **options.house()))
        outcome = f"failed: {'; '.join(self._faults)}" if self._faults else "went well"
        workflow.set_current_details(f"the last round, until {workflow.now():%H:%M:%SZ}, {outcome}")

    async def _look_after_lost_builds(self) -> None:
        report = await workflow.execute_activity_method(HouseActivities.find_lost_builds, **options.house())
        await asyncio.gather(*(self._attempt(self._close(lost)) for lost in report.lost))

    async def _look_after_machines(self) -> None:
        await self._attempt(workflow.execute_activity_method(MachineHouse.observe, **options.house()))
        await self._attempt(workflow.execute_activity_method(MachineHouse.find_lost_operations, **options.house()))
        await self._attempt(workflow.execute_activity_method(MachineHouse.end_retired, **options.house()))

    async def _close(self, lost: LostBuild) -> None:
        """What the workflow would have done at its end."""
        await workflow.execute_activity_method(LINES[lost.build.kind].clean_up, lost.build, **options.house())
        end = BuildEnd(status=BuildStatus.CANCELLED) if lost.cancelled else TERMINATED
        await workflow.execute_activity_method(
            RecordActivities.record_end, EndRequest(build=lost.build, end=end), **options.record()
        )

    async def _attempt(self, step: Awaitable[object]) -> None:
        try:
            await step
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            self._faults.append(str(error.cause))
            workflow.logger.warning("house-keeping failed; the next round repeats it: %s", error.cause)
