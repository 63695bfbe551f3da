"""A pod's log on its way from the runner's host to Kiln."""

import asyncio
from collections.abc import Sequence

from activities.pod_tasks import persist
from kiln.errors import NotFoundError
from kiln.ports.pods import RunnerApi, SpooledLine
from kiln.ports.sandboxes import Journal

PATIENCE_SECONDS = 20.0
# After a call, lines gather so long, so that an agent that prints without end does not make calls without end.
GATHERING_SECONDS = 0.025
MANY_LINES = 200


class LogShipping:
    """Sends a journal's lines, in their order, one call at a time. What an earlier process sent may come again, which
    harms nothing: a line has its number for ever."""

    def __init__(self, api: RunnerApi, key: str, journal: Journal) -> None:
        self._api = api
        self._key = key
        self._journal = journal
        self._sent = journal.acknowledged()

    async def follow(self) -> None:
        """Sends lines as they come, until it is cancelled."""
        while True:
            sent = await self._send()
            if not sent:
                await self._journal.arrived(self._sent, PATIENCE_SECONDS)
            elif sent < MANY_LINES:
                await asyncio.sleep(GATHERING_SECONDS)

    async def drain(self) -> None:
        """Returns once all that is there is with Kiln."""
        while await self._send():
            pass

    async def _send(self) -> int:
        """Sends what comes next; how many lines that was."""
        lines = await self._journal.lines(self._sent)
        if lines:
            kept = await persist(lambda: self._keep(lines))
            self._sent = min(kept, lines[-1].number)
            await self._journal.acknowledge(self._sent)
        return len(lines)

    async def _keep(self, lines: Sequence[SpooledLine]) -> int:
        try:
            return await self._api.log(self._key, lines)
        except NotFoundError:
            # The pod is no more: nobody will read its log.
            return lines[-1].number
