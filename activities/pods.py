"""What a runner's Temporal worker does: one activity a pod, which waits for the keeper's word on it."""

import asyncio

from temporalio import activity

from activities.heartbeat import staying_alive
from activities.pod_keeper import PodKeeper
from kiln.models import PodRef, PodResult


class PodActivities:
    """On the queue of one runner."""

    def __init__(self, keeper: PodKeeper) -> None:
        self._keeper = keeper

    @activity.defn(name="run-pod")
    async def run(self, ref: PodRef) -> PodResult:
        """How the pod's agent ended. Only a cancel that somebody asked for ends it; it is seen through then. Any other
        end of an attempt leaves the agent to the next one."""
        async with staying_alive(lambda: {"phase": self._keeper.phase(ref.key)}):
            try:
                return await self._keeper.run(ref)
            except asyncio.CancelledError:
                if _is_asked_for():
                    await self._keeper.run(ref, ending=True)
                raise


def _is_asked_for() -> bool:
    why = activity.cancellation_details()
    return why is not None and why.cancel_requested
