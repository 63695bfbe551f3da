"""The API for tests: real uvicorn on a free port, in a thread, so that a test can reach its parts as well as its wire."""

import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import uvloop

from api.app import open_parts
from api.deps import Parts
from api.server import ApiServer
from kiln.adapters.logs import LogStore
from kiln.catalog.session import Catalog
from kiln.sealing import Sealer
from kiln.settings import Settings

START_SECONDS = 30.0
STOP_SECONDS = 10.0
REQUEST_SECONDS = 30.0
POLL_SECONDS = 0.01


def plain_client(url: str, **headers: str) -> httpx.Client:
    """A client of a server that speaks no TLS: it reads no certificates, which would take longer than most tests."""
    return httpx.Client(base_url=url, headers=headers, timeout=REQUEST_SECONDS, verify=False)


def settings_for(home: Path, temporal_port: int, **changes: Any) -> Settings:
    """Settings that take nothing from this process's environment but what a test says."""
    values = {"home": home, "secret_key": Sealer.new_key(), "temporal_port": temporal_port, **changes}
    home.mkdir(parents=True, exist_ok=True)
    return Settings(**values)


class RunningApi:
    """A served API: `url`, its `settings` and `parts`, `catalog` and `logs` as tests write them, `http` without a key.

    Entering waits until it serves; leaving stops it as SIGTERM would. `stopped_in` is how long that took, in seconds.
    """

    parts: Parts
    stopped_in: float

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # Named outright: only for a TCP socket that says so is Nagle's algorithm switched off.
        self._listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._server: ApiServer | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="api")

    def __enter__(self) -> Self:
        self._thread.start()
        deadline = time.monotonic() + START_SECONDS
        while self._server is None or not self._server.started:
            if self._failure is not None:
                raise self._failure
            assert time.monotonic() < deadline, "the API does not start"
            time.sleep(POLL_SECONDS)
        self.catalog = Catalog(self.settings.catalog_dsn, pool_size=5)
        self.logs = LogStore(self.settings.logs_dsn)
        self.http = plain_client(self.url)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()
        self.logs.close()
        self.catalog.close()
        began = time.monotonic()
        self.stop()
        self._thread.join(STOP_SECONDS)
        self.stopped_in = time.monotonic() - began
        assert not self._thread.is_alive(), "the API does not stop"

    def stop(self) -> None:
        """Asks the server to stop, and does not wait for it."""
        if self._server is not None:
            self._server.should_exit = True

    def _run(self) -> None:
        try:
            uvloop.run(self._serve())
        except BaseException as error:  # noqa: BLE001  the test's thread raises it
            self._failure = error

    async def _serve(self) -> None:
        async with open_parts(self.settings) as self.parts:
            server = ApiServer(self.parts)
            self._server = server
            await server.serve([self._listener])
