"""Runs the API by uvicorn: `python -m api`."""

import logging
import sys

import uvicorn

from api.app import create_app
from kiln.errors import KilnError
from kiln.sealing import Sealer
from kiln.settings import load_settings

# Live log streams end at once; nothing else takes long.
GRACEFUL_SHUTDOWN_SECONDS = 5


def main() -> int:
    """Exit 1 with one line on standard error when something that the API needs is missing."""
    try:
        settings = load_settings()
        Sealer(settings.secret_key)
        app = create_app(settings)
    except KilnError as error:
        print(f"kiln api: {error}", file=sys.stderr)  # noqa: T201
        return 1
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    config = uvicorn.Config(
        app,
        host=settings.api_host,
        port=settings.api_port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_SECONDS,
    )
    server = uvicorn.Server(config)
    server.run()
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
