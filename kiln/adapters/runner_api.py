"""Kiln's API as runners call it over HTTP: `kiln.ports.pods.RunnerApi`. No body stands in an error's text."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import quote, urlsplit

import httpx

from kiln.errors import (
    KilnError,
    NotFoundError,
    OperationFailedError,
    OperationOverError,
    RefusedError,
    UnavailableError,
)
from kiln.models import PodResult
from kiln.pod_orders import read_order
from kiln.ports.pods import HostReport, Instructions, KnownToKiln, News, PodOrder, SpooledLine
from kiln.settings import LOOPBACK_HOSTS

CALLS: Final = "/api/v1/runner"
TIMEOUT: Final = httpx.Timeout(15.0, connect=5.0)
# News are waited for 20 s.
NEWS_TIMEOUT: Final = httpx.Timeout(15.0, connect=5.0, read=35.0)

# The API closes a connection that was idle for 5 s: one that it is about to close is not used again.
IDLE_SECONDS: Final = 3.0

# Both bound what one call carries, of which the API takes 1 MiB and 4000 keys.
LOG_LINES: Final = 1000
LOG_BYTES: Final = 900 * 1000
KEYS_A_CALL: Final = 2000
ERROR_LENGTH: Final = 4000
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND: Final = timedelta(microseconds=1)

_ERRORS: Final[Mapping[str, type[KilnError]]] = {
    "RESOURCE_NOT_FOUND": NotFoundError,
    "POD_OVER": OperationOverError,
    "POD_FAILED": OperationFailedError,
}
_REFUSALS: Final = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
_BRIEFLY_AWAY: Final = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)


class HttpRunnerApi:
    """Calls one API as one process (`incarnation`) of the runner that the token is of. To be closed by `aclose`.

    Beside the port's errors, any call may raise KilnError for what the API calls malformed.
    """

    def __init__(self, base_url: str, token: str, incarnation: str) -> None:
        self._url = base_url.rstrip("/")
        self._incarnation = incarnation
        # What runs on this host is not reached through a proxy.
        self._trust_env = urlsplit(self._url).hostname not in LOOPBACK_HOSTS
        self._tls = httpx.create_ssl_context(trust_env=self._trust_env)
        # Whatever else is under way, a beat finds a connection: pods live by it.
        self._beats = self._client(token, 2, TIMEOUT)
        self._waits = self._client(token, 4, NEWS_TIMEOUT)
        self._work = self._client(token, 16, TIMEOUT)

    def _client(self, token: str, connections: int, timeout: httpx.Timeout) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=f"{self._url}{CALLS}/",
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
            timeout=timeout,
            limits=httpx.Limits(max_connections=connections, keepalive_expiry=IDLE_SECONDS),
            verify=self._tls,
            trust_env=self._trust_env,
        )

    async def aclose(self) -> None:
        """Ends every call that waits."""
        for client in (self._beats, self._waits, self._work):
            await client.aclose()

    async def register(self, report: HostReport) -> KnownToKiln:
        said = {
            "name": report.name,
            "max_concurrent_pods": report.max_concurrent_pods,
            "allows_custom_commands": report.allows_custom_commands,
            "available_agents": list(report.available_agents),
            "limits": list(report.limits),
            "host_info": dict(report.host_info),
            "runner_name": report.runner_name,
        }
        answer = await self._object(self._beats, "register", said)
        with _understanding():
            return KnownToKiln(**{name: answer[name] for name in KnownToKiln.__dataclass_fields__})

    async def beat(self, pods: Sequence[str]) -> Instructions:
        end, remove = set[str](), set[str]()
        for start in range(0, max(len(pods), 1), KEYS_A_CALL):
            answer = await self._object(self._beats, "beat", {"pods": list(pods[start : start + KEYS_A_CALL])})
            with _understanding():
                end.update(answer["end"])
                remove.update(answer["remove"])
        return Instructions(frozenset(end), frozenset(remove))

    async def begin(self, key: str, shim: str) -> PodOrder:
        answer = await self._call(self._work, _of_pod(key, "begin"), {"shim": shim})
        with _understanding():
            return read_order(answer.content)

    async def started(self, key: str, shim: str) -> None:
        await self._call(self._work, _of_pod(key, "started"), {"shim": shim})

    async def news(self, after: Mapping[str, int]) -> News:
        answer = await self._object(self._waits, "news", {"pods": dict(after)})
        with _understanding():
            prompts = {key: [(number, text) for number, text in each] for key, each in answer["prompts"].items()}
            return News(frozenset(answer["end"]), prompts)

    async def log(self, key: str, lines: Sequence[SpooledLine]) -> int:
        kept = 0
        for batch in _batches(lines):
            said = b'{"incarnation":%b,"lines":[%b]}' % (_json(self._incarnation), b",".join(batch))
            answer = await self._send(self._work, _of_pod(key, "log"), said)
            with _understanding():
                kept = int(answer.json()["kept"])
        return kept

    async def ended(self, key: str, shim: str, result: PodResult) -> None:
        error = None if result.error is None else result.error.replace("\0", "�")[:ERROR_LENGTH]
        said = {**result.model_dump(mode="json"), "error": error}
        await self._call(self._work, _of_pod(key, "ended"), {"shim": shim, "result": said})

    async def _object(self, client: httpx.AsyncClient, path: str, said: Mapping[str, Any]) -> dict[str, Any]:
        answer = await self._call(client, path, said)
        with _understanding():
            return dict(answer.json())

    async def _call(self, client: httpx.AsyncClient, path: str, said: Mapping[str, Any]) -> httpx.Response:
        return await self._send(client, path, _json({"incarnation": self._incarnation, **said}))

    async def _send(self, client: httpx.AsyncClient, path: str, body: bytes) -> httpx.Response:
        try:
            answer = await client.post(path, content=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            problem = f"Kiln's API does not answer at {self._url} (KILN_API_URL): {type(error).__name__}"
            raise UnavailableError(problem) from None
        if not answer.is_success:
            raise self._error(answer)
        return answer

    def _error(self, answer: httpx.Response) -> KilnError:
        """What is not in the API's own words comes from something between, and means nothing."""
        told = _told(answer)
        if told is None:
            return UnavailableError(f"Kiln's API does not answer at {self._url} (KILN_API_URL): {answer.status_code}")
        code, message = told
        if answer.status_code in _REFUSALS:
            return RefusedError(message)
        if answer.is_server_error or answer.status_code in _BRIEFLY_AWAY:
            return UnavailableError(message)
        return _ERRORS.get(code, KilnError)(message)


def _told(answer: httpx.Response) -> tuple[str, str] | None:
    """Code and sentence of an error; None if it is not the API's."""
    try:
        body = answer.json()
        return str(body["code"]), str(body["error"])
    except (ValueError, LookupError, TypeError):
        return None


@contextmanager
def _understanding() -> Iterator[None]:
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UnavailableError("Kiln's API answers otherwise than this runner understands") from None


def _of_pod(key: str, call: str) -> str:
    return f"pods/{quote(key, safe='')}/{call}"


def _batches(lines: Sequence[SpooledLine]) -> Iterator[list[bytes]]:
    """Lines as JSON, in groups of what one call may carry."""
    batch: list[bytes] = []
    size = 0
    for line in lines:
        moment = max(0, (line.time - EPOCH) // MICROSECOND)
        row = _json([line.number, moment, line.stream, line.text])
        if batch and (len(batch) >= LOG_LINES or size + len(row) > LOG_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += len(row) + 1
    if batch:
        yield batch


def _json(value: object) -> bytes:
    """Half a surrogate pair is no text; it shows as a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
