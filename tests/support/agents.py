"""Scripts as agents: real child processes under real shims."""

import asyncio
import os
import signal
import sys
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Any

from kiln.adapters.shims import HostShim, HostShims
from kiln.ports.pods import ShimOrder, SpooledLine
from support.processes import MARK, marked
from support.tools import PATH, parent_of


class Agents:
    """Starts shell and Python scripts as agents of this host, under the test's mark."""

    def __init__(self, root: Path, mark: str, **options: Any) -> None:
        self.root = root
        self.mark = mark
        self.shims = HostShims(root / "pods", **options)

    def order(self, *argv: str, **more: Any) -> ShimOrder:
        environment = {"PATH": PATH, MARK: self.mark, **more.pop("environment", {})}
        return ShimOrder(
            **{"shim": "nonce", "cwd": self.root, "grace_seconds": 0.3} | more, argv=argv, environment=environment
        )

    async def start(self, *argv: str, **more: Any) -> HostShim:
        key = f"pod-{self.mark[:8]}{len(self.shims.keys()):04}"
        return await self.shims.start(key, self.order(*argv, **more))

    async def sh(self, script: str, **more: Any) -> HostShim:
        return await self.start("sh", "-c", script, **more)

    async def python(self, script: str, **more: Any) -> HostShim:
        return await self.start(sys.executable, "-c", textwrap.dedent(script), **more)

    async def close(self) -> None:
        """Ends what still runs."""
        for pid in marked(self.mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for key in self.shims.keys():  # noqa: SIM118  no dictionary
            if shim := self.shims.find(key):
                await shim.terminate()
                await asyncio.wait_for(shim.wait(), 10)


def all_lines(shim: HostShim, after: int = 0) -> list[SpooledLine]:
    """What waits in the spool, in as many calls as it takes."""
    found: list[SpooledLine] = []
    while more := shim.lines(after):
        found.extend(more)
        after = more[-1].number
    return found


def texts(shim: HostShim) -> list[str]:
    return [line.text for line in all_lines(shim)]


async def printed(shim: HostShim, text: str, seconds: float = 10) -> None:
    """Returns once the agent has printed this line."""
    async with asyncio.timeout(seconds):
        seen = 0
        while text not in texts(shim):
            await shim.arrived(seen, 1)
            seen = max((line.number for line in all_lines(shim)), default=0)


async def shim_pid(shim: HostShim) -> int:
    return parent_of((await shim.status())["agent"])
