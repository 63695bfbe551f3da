"""A container engine's API, as far as a pod needs it (https://docs.docker.com/reference/api/engine/).

Spoken to directly rather than by the `docker` command: what a container is given (variables, files, a registry's password)
stands on no command line and in no file, and an attached terminal is no process that a signal to the pod's tree would end.
Each call has a connection of its own. Standard library only: a pod's wrapper uses it too.
"""

import http.client
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode, urlsplit

DEFAULT_HOST = "unix:///var/run/docker.sock"
CALL_SECONDS = 60.0
ERROR_CHARS = 500
HEADER_BYTES = 64 * 1024
UPGRADED = 101


class EngineError(OSError):
    """What the engine answered; `status` is HTTP's, None if it did not answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class MissingError(EngineError):
    """The engine has no such thing."""


class EngineApi:
    """The engine at a DOCKER_HOST: `unix://PATH` or `tcp://HOST:PORT`. Blocks; raises EngineError."""

    def __init__(self, host: str) -> None:
        self._host = host

    def call(
        self,
        method: str,
        path: str,
        query: Mapping[str, object] | None = None,
        body: object = None,
        *,
        seconds: float | None = CALL_SECONDS,
    ) -> Any:
        """The answer's JSON, or its bytes if it is none. A body that is bytes is a tar archive."""
        with self.stream(method, path, query, body, seconds=seconds) as answer:
            content = answer.read()
        return _parsed(answer, content)

    @contextmanager
    def stream(  # noqa: PLR0913  what a request has
        self,
        method: str,
        path: str,
        query: Mapping[str, object] | None = None,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        *,
        seconds: float | None = CALL_SECONDS,
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer, to be read piece by piece, each within so many seconds."""
        connection = _Connection(self._host, seconds)
        content = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
        kind = {"Content-Type": "application/x-tar" if isinstance(body, bytes) else "application/json"}
        try:
            connection.request(method, _target(path, query), content, {**kind, **(headers or {})})
            answer = connection.getresponse()
            if answer.status >= http.client.BAD_REQUEST:
                kind_of_error = MissingError if answer.status == http.client.NOT_FOUND else EngineError
                raise kind_of_error(_complaint(answer), answer.status)
            yield answer
        except (OSError, http.client.HTTPException) as error:
            raise error if isinstance(error, EngineError) else EngineError(_reason(error)) from error
        finally:
            connection.close()

    def exists(self, container: str, path: str) -> bool:
        """Whether a container has a file or directory of this name."""
        try:
            self.call("HEAD", f"/containers/{container}/archive", {"path": path})
        except MissingError:
            return False
        return True

    def attach(self, container: str) -> socket.socket:
        """A container's terminal: what is received it printed, what is sent it reads."""
        target = _target(f"/containers/{container}/attach", {"stream": 1, "stdin": 1, "stdout": 1, "stderr": 1})
        request = f"POST {target} HTTP/1.1\r\nHost: engine\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
        try:
            connection = _connected(self._host, CALL_SECONDS)
            connection.sendall(request.encode())
            status = _upgrade(connection)
        except OSError as error:
            raise EngineError(_reason(error)) from error
        if status != UPGRADED:
            connection.close()
            raise EngineError("the container's terminal cannot be had", status)
        connection.settimeout(None)
        return connection


class _Connection(http.client.HTTPConnection):
    def __init__(self, host: str, seconds: float | None) -> None:
        super().__init__("engine", timeout=seconds)
        self._address = host

    def connect(self) -> None:
        self.sock = _connected(self._address, self.timeout)


def _connected(host: str, seconds: float | None) -> socket.socket:
    """Raises OSError."""
    parts = urlsplit(host)
    if parts.scheme == "tcp" and parts.hostname and parts.port:
        return socket.create_connection((parts.hostname, parts.port), timeout=seconds)
    if parts.scheme != "unix":
        raise OSError("a pod's engine is named unix://PATH or tcp://HOST:PORT")
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(seconds)
    try:
        connection.connect(parts.path)
    except OSError:
        connection.close()
        raise
    return connection


def _upgrade(connection: socket.socket) -> int | None:
    """The status of an answer, of which no byte beyond the header is taken: that is the terminal's already."""
    header = b""
    while not header.endswith(b"\r\n\r\n") and len(header) < HEADER_BYTES:
        byte = connection.recv(1)
        if not byte:
            return None
        header += byte
    return int(header.split(b" ", 2)[1])


def _target(path: str, query: Mapping[str, object] | None) -> str:
    # Without a version: the oldest that new engines know is newer than the newest of old ones.
    return f"{path}?{urlencode(query)}" if query else path


def _parsed(answer: http.client.HTTPResponse, content: bytes) -> Any:
    return json.loads(content) if answer.getheader("Content-Type", "").startswith("application/json") else content


def _complaint(answer: http.client.HTTPResponse) -> str:
    content = answer.read()
    try:
        message = str(json.loads(content)["message"])
    except (ValueError, KeyError, TypeError):
        message = f"the container engine answered {answer.status}"
    return " ".join(message.split())[:ERROR_CHARS]


def _reason(error: Exception) -> str:
    problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"the container engine does not answer: {problem}"


def engine_host(setting: str) -> str:
    """The engine's address: the setting, DOCKER_HOST, or Docker's own place."""
    return setting or os.environ.get("DOCKER_HOST") or DEFAULT_HOST
