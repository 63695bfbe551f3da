"""`kiln.ports.Toolbox` on the process adapter: tools that end with their lease and with this worker."""

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Self

from kiln.adapters.process import Command, Exit, Line, ToolProcess, start_tool, stop_tool
from kiln.redact import Redactor


class GuardedTool:
    """A running tool under its guard. Leaving the context ends it and all its descendants."""

    def __init__(self, process: ToolProcess) -> None:
        self._process = process

    async def __aenter__(self) -> Self:
        await self._process.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._process.__aexit__(*exc)

    async def renew(self, seconds: float) -> None:
        await self._process.renew(seconds)

    async def stop(self, grace: timedelta) -> Exit:
        return await stop_tool(self._process, grace)

    async def wait(self) -> Exit:
        return await self._process.wait()

    def lines(self) -> AsyncIterator[Line]:
        return self._process.lines()


class GuardedToolbox:
    """Starts tools under guards."""

    async def start(
        self, argv: Sequence[str], env: Mapping[str, str], cwd: Path, redactor: Redactor, lease: timedelta
    ) -> GuardedTool:
        """Raises ToolMissingError if there is no such program."""
        return GuardedTool(await start_tool(Command(tuple(argv), env, cwd), redactor=redactor, lease=lease))
