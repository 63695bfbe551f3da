"""The activity that bakes an AMI with Packer."""

import asyncio

from temporalio import activity

from activities.heartbeat import beating
from activities.packer_attempt import PackerAttempt, PackerParts
from kiln.errors import AttemptLostError, WorkerStoppingError
from kiln.models import BuildRef, BuiltImage


class PackerActivities:
    """Runs on the builders' queue."""

    def __init__(self, parts: PackerParts) -> None:
        self._parts = parts

    @activity.defn(name="packer-build")
    async def build(self, build: BuildRef) -> BuiltImage:
        """The AMI of this build: the one that Packer makes now, or one that a lost attempt had finished.

        Raises ToolFailedError, BuildTimedOutError, CapacityError, BuildCancelledError, BuildOverError, AttemptLostError,
        WorkerStoppingError.
        """
        attempt = PackerAttempt(self._parts, build)
        try:
            async with beating(attempt.heartbeat_details):
                return await attempt.run()
        except asyncio.CancelledError:
            raise_unless_users_cancel()
            raise


def raise_unless_users_cancel() -> None:
    """A worker that stops, or an operator who pauses or resets the activity, does not cancel the build."""
    why = activity.cancellation_details()
    if why is None or why.cancel_requested:
        return
    if why.worker_shutdown:
        raise WorkerStoppingError("the worker is shutting down; another one takes the build up")
    raise AttemptLostError("Temporal took this attempt away")
