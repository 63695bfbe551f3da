"""`kiln.ports.Toolbox` on the process adapter: tools that end with their lease and with this worker."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from kiln.adapters.process import Command, ToolNotStartedError, ToolProcess, start_tool
from kiln.errors import ToolMissingError, UnavailableError
from kiln.redact import Redactor


class GuardedToolbox:
    """Starts tools under guards."""

    async def start(  # noqa: PLR0913  what a process needs
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        cwd: Path,
        redactor: Redactor,
        lease: timedelta,
        *,
        stdin: Path | None = None,
    ) -> ToolProcess:
        """Raises ToolMissingError if there is no such program, UnavailableError if it could not be started."""
        try:
            return await start_tool(Command(tuple(argv), env, cwd, stdin), redactor=redactor, lease=lease)
        except ToolNotStartedError as error:
            raise (ToolMissingError if error.missing else UnavailableError)(str(error)) from error
