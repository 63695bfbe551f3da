"""The activities that make container images: a Dockerfile build, and a transfer."""

import asyncio

from temporalio import activity

from activities.container_attempt import ContainerAttempt, ContainerParts, TransferAttempt, TransferParts
from activities.heartbeat import beating
from activities.packer import raise_unless_users_cancel
from kiln.models import BuildRef, BuiltImage


class ContainerActivities:
    """Runs on the queues of the builders' platforms."""

    def __init__(self, parts: ContainerParts) -> None:
        self._parts = parts

    @activity.defn(name="container-build")
    async def build(self, build: BuildRef) -> BuiltImage:
        """The image of this build under its staging name: what BuildKit makes now, or a lost attempt had pushed.

        Raises ToolFailedError, SourceUnavailableError, ContextMissingError, ContextInvalidError, BuildTimedOutError,
        BuildCancelledError, BuildOverError, AttemptLostError, WorkerStoppingError.
        """
        attempt = ContainerAttempt(self._parts, build)
        try:
            async with beating(attempt.heartbeat_details):
                return await attempt.run()
        except asyncio.CancelledError:
            raise_unless_users_cancel()
            raise


class TransferActivities:
    """Runs on the transfer queue."""

    def __init__(self, parts: TransferParts) -> None:
        self._parts = parts

    @activity.defn(name="transfer-image")
    async def transfer(self, build: BuildRef) -> BuiltImage:
        """The source under the build's staging name, all its platforms. Raises as `ContainerActivities.build`."""
        attempt = TransferAttempt(self._parts, build)
        try:
            async with beating(attempt.heartbeat_details):
                return await attempt.run()
        except asyncio.CancelledError:
            raise_unless_users_cancel()
            raise
