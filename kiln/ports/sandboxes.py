"""What a runner's host keeps of a pod beside its shim: the sandbox in which the agent works, and the pod's log on its way."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from kiln.models import PodResult
from kiln.ports.pods import PodOrder, ShimOrder, SpooledLine

# Takes one line of Kiln's own for the pod's log.
Say = Callable[[str], Awaitable[None]]


class Sandboxes(Protocol):
    """The sandboxes of this host: `tempdir`, `worktree`, `container`. Each call may be repeated, by another process too."""

    async def prepare(self, order: PodOrder, say: Say) -> ShimOrder:
        """Makes a pod's sandbox, and says how its agent is started in it. What an interrupted call has left is made anew.

        Raises OperationFailedError with a sentence for the pod's users.
        """
        ...

    async def stop(self, key: str) -> None:
        """Ends what of the agent runs outside of its shim's tree, asking first (SIGTERM, grace, SIGKILL): a container.
        Returns at once for a pod that has none."""
        ...

    async def conclude(self, key: str, say: Say) -> None:
        """After the agent's end: nothing of it runs any more, and work that it did not push is on a branch of the
        repository, and told of. A fault is told of too, never raised."""
        ...

    async def remove(self, key: str) -> None:
        """Removes the sandbox of a pod whose agent has ended, and the pod's directory as the last thing. Concludes it
        first. Raises OSError if something resists; the next round tries again."""
        ...


class Journal(Protocol):
    """A pod's log as its runner has it: what was said before the agent started, the agent's output, what was said after
    its end, numbered from 1 without a gap, the same for each process that reads it."""

    async def say(self, text: str) -> None:
        """Adds a line of Kiln's own, before the agent's start or after its end."""
        ...

    async def lines(self, after: int) -> Sequence[SpooledLine]:
        """What comes next, at most some hundred lines."""
        ...

    async def arrived(self, after: int, seconds: float) -> bool:
        """Waits so long for a line numbered above `after`, or for the agent's end; whether there is such a line."""
        ...

    async def acknowledge(self, number: int) -> None:
        """Lets go of the lines up to this one. Where reading begins after a restart: `acknowledged`."""
        ...

    def acknowledged(self) -> int:
        """Lines up to this one were acknowledged, perhaps more."""
        ...


class PodPlaces(Protocol):
    """The pods' directories on this host."""

    def keys(self) -> frozenset[str]:
        """Pods that have a directory here."""
        ...

    def nonce(self, key: str) -> str:
        """The name of the only shim that the pod may ever have here: made with the pod's directory, once for all."""
        ...

    def journal(self, key: str) -> Journal:
        """The pod's journal. Raises FileNotFoundError if it has no directory here."""
        ...

    def done(self, key: str) -> PodResult | None:
        """How the pod's agent ended, once Kiln was told of it; None before that, and without a directory."""
        ...

    def note_done(self, key: str, result: PodResult) -> None:
        """Kiln was told: another process need not tell it again. Nothing happens without a directory."""
        ...
