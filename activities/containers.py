"""The activities that make container images: a build from a Dockerfile or the agents' template, and a transfer."""

from temporalio import activity

from activities.agent_attempt import AgentAttempt, AgentParts
from activities.attempt import see_through
from activities.container_attempt import ContainerAttempt, ContainerParts, TransferAttempt, TransferParts
from kiln.models import BuildRef, BuiltImage


class ContainerActivities:
    """Runs on the queues of the builders' platforms."""

    def __init__(self, parts: ContainerParts, agents: AgentParts) -> None:
        self._parts = parts
        self._agents = agents

    @activity.defn(name="container-build")
    async def build(self, build: BuildRef) -> BuiltImage:
        """The image of this build under its staging name: what BuildKit or Packer makes now, or a lost attempt had
        pushed.

        Raises ToolFailedError, SourceUnavailableError, ContextMissingError, ContextInvalidError, BuildTimedOutError,
        BuildCancelledError, BuildOverError, AttemptLostError, WorkerStoppingError.
        """
        if build.installs_agent:
            return await see_through(AgentAttempt(self._agents, build))
        return await see_through(ContainerAttempt(self._parts, build))


class TransferActivities:
    """Runs on the transfer queue."""

    def __init__(self, parts: TransferParts) -> None:
        self._parts = parts

    @activity.defn(name="transfer-image")
    async def transfer(self, build: BuildRef) -> BuiltImage:
        """The source under the build's staging name, all its platforms. Raises as `ContainerActivities.build`."""
        return await see_through(TransferAttempt(self._parts, build))
