"""uvicorn, as the API runs it: its port is taken first, and its live streams end as soon as it is asked to stop."""

import socket
from types import FrameType

import uvicorn

from api.app import create_app
from api.deps import Parts
from kiln.settings import Settings, SettingsError

# Live streams and waiting deletions end at once when the server stops; nothing else takes long.
GRACEFUL_SHUTDOWN_SECONDS = 2


class ApiServer(uvicorn.Server):
    """Serves the API over its parts until SIGTERM or SIGINT, or until `should_exit` is set."""

    def __init__(self, parts: Parts) -> None:
        config = uvicorn.Config(
            create_app(parts),
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_SECONDS,
        )
        super().__init__(config)
        self._closing = parts.closing

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  uvicorn's signature
        """Stops in order; uvicorn itself would raise the signal once more at the end, and so hide the exit code."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Uvicorn waits for every connection, so whatever lasts is told first."""
        self._closing.set()
        await super().shutdown(sockets)


def listen(settings: Settings) -> socket.socket:
    """The API's own socket. Raises SettingsError if its port cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.api_host, settings.api_port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        place = f"{settings.api_host}:{settings.api_port}"
        raise SettingsError(f"KILN_API_PORT, KILN_API_HOST: {place} cannot be had: {error.strerror}") from None
    return listener
