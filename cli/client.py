"""Kiln's HTTP API as the command line calls it."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
from httpx_sse import ServerSentEvent, SSEError, connect_sse

from cli.places import api_key_file, api_url
from kiln.errors import KilnError
from kiln.settings import LOOPBACK_HOSTS, Settings

BUILDS = "/api/v1/builds"
MACHINE_BUILD = "/api/v1/images/build"
# A live log is never silent for longer than 15 s.
TIMEOUT = httpx.Timeout(10.0, read=45.0)
RECONNECT_TRIES = 30
RECONNECT_SECONDS = 1.0


class ApiCallError(KilnError):
    """The API did not answer, or refused; the message is the API's own."""


@dataclass(frozen=True)
class LogEvent:
    """One event of a build's log: `line`, `gap` or `end`, with its data as the contract has it."""

    name: str
    number: int | None
    data: dict[str, Any]


class KilnClient:
    """Calls one API with one key. Every method raises ApiCallError."""

    def __init__(self, url: str, key: str) -> None:
        self._url = url.rstrip("/")
        # What runs on this host is not reached through a proxy.
        self._http = httpx.Client(
            base_url=self._url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=TIMEOUT,
            trust_env=urlsplit(self._url).hostname not in LOOPBACK_HOSTS,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def submit(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Starts a machine build and returns the accepted build."""
        return self._call("POST", MACHINE_BUILD, body=body)

    def builds(self, filters: Mapping[str, str | int]) -> dict[str, Any]:
        """One page of builds, newest first: `{"builds": […], "next_cursor": …}`."""
        return self._call("GET", BUILDS, params=filters)

    def build(self, build_id: str) -> dict[str, Any]:
        return self._call("GET", f"{BUILDS}/{build_id}")

    def cancel(self, build_id: str) -> dict[str, Any]:
        return self._call("POST", f"{BUILDS}/{build_id}/cancel")

    def log_text(self, build_id: str) -> str:
        """The log so far."""
        return self._send("GET", f"{BUILDS}/{build_id}/logs", headers={"Accept": "text/plain"}).text

    def follow(self, build_id: str, after: int = 0) -> Iterator[LogEvent]:
        """The log's events after a line, until the build's end. A lost connection is taken up where it broke."""
        tries = 0
        while tries <= RECONNECT_TRIES:
            try:
                for event in self._events(build_id, after):
                    tries, after = 0, event.number or after
                    yield event
                    if event.name == "end":
                        return
            except (httpx.TransportError, SSEError):
                pass
            tries += 1
            time.sleep(RECONNECT_SECONDS)
        raise self._unreachable()

    def _events(self, build_id: str, after: int) -> Iterator[LogEvent]:
        headers = {"Last-Event-ID": str(after)} if after else {}
        with connect_sse(self._http, "GET", f"{BUILDS}/{build_id}/logs", headers=headers) as source:
            if source.response.status_code >= httpx.codes.BAD_REQUEST:
                source.response.read()
                raise _refusal(source.response)
            yield from map(_event, source.iter_sse())

    def _call(
        self, method: str, path: str, *, body: Mapping[str, Any] | None = None, params: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        answer: dict[str, Any] = self._send(method, path, json=body, params=params).json()
        return answer

    def _send(self, method: str, path: str, **request: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **request)
        except (httpx.TransportError, httpx.InvalidURL):
            raise self._unreachable() from None
        if response.is_error:
            raise _refusal(response)
        return response

    def _unreachable(self) -> ApiCallError:
        return ApiCallError(f"the API does not answer at {self._url} (KILN_URL): kiln up starts it")


def client_of(settings: Settings) -> KilnClient:
    """A client of KILN_URL, else of this host's own API, with KILN_API_KEY, else the home's key. Raises ApiCallError."""
    key = os.environ.get("KILN_API_KEY") or _kept_key(settings)
    return KilnClient(os.environ.get("KILN_URL") or api_url(settings), key)


def _kept_key(settings: Settings) -> str:
    file = api_key_file(settings)
    try:
        return file.read_text().strip()
    except OSError:
        raise ApiCallError(f"no API key: set KILN_API_KEY, or KILN_HOME to where kiln up runs ({file})") from None


def _event(event: ServerSentEvent) -> LogEvent:
    return LogEvent(event.event, int(event.id) if event.id else None, json.loads(event.data))


def _refusal(response: httpx.Response) -> ApiCallError:
    """The API's own sentence, or what stands in its place when something else answered."""
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"{response.request.url} answered {response.status_code} {response.reason_phrase}"
    return ApiCallError(message)
