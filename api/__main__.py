"""Runs the API by uvicorn: `python -m api`."""

import logging
import socket
import sys

import uvloop

from api.app import open_parts
from api.server import ApiServer, listen
from kiln.errors import KilnError
from kiln.settings import Settings, load_settings


def main() -> int:
    """Exit 1 with one line on standard error when something that the API needs is missing."""
    try:
        settings = load_settings()
        logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
        with listen(settings) as listener:
            uvloop.run(serve(settings, listener))
    except KilnError as error:
        print(f"kiln api: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


async def serve(settings: Settings, listener: socket.socket) -> None:
    """Serves until the process is asked to stop."""
    async with open_parts(settings) as parts:
        await ApiServer(parts).serve([listener])


if __name__ == "__main__":
    sys.exit(main())
