"""The activity that bakes an AMI with Packer."""

from temporalio import activity

from activities.attempt import see_through
from activities.packer_attempt import PackerAttempt, PackerParts
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
        return await see_through(PackerAttempt(self._parts, build))
