"""Ends the agents that a stopped runner has left alive: nothing outlives `kiln up`."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from kiln.adapters.shims import HostShim, HostShims

POLL_SECONDS = 0.05


def living_agents(pods: Path) -> list[HostShim]:
    """The agents that run below a runner's directory of pods."""
    with suppress(OSError):
        shims = HostShims(pods)
        found = [shims.find(key) for key in shims.keys()]  # noqa: SIM118  no mapping
        return [shim for shim in found if shim is not None and shim.is_alive()]
    return []


def end_agents(agents: list[HostShim], limit: timedelta, hurried: Callable[[], bool]) -> None:
    """Tells each to end, and returns once all have, or after `limit`, or once `hurried` says so: what is left then is
    killed by its shim when its grace is over."""
    with suppress(TimeoutError):
        asyncio.run(_end(agents, limit, hurried))


async def _end(agents: list[HostShim], limit: timedelta, hurried: Callable[[], bool]) -> None:
    async with asyncio.timeout(limit.total_seconds()):
        await asyncio.gather(*(agent.terminate() for agent in agents))
        while not hurried() and any(agent.is_alive() for agent in agents):
            await asyncio.sleep(POLL_SECONDS)
