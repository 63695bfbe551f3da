"""Lists an organization's images with requests signed as `organization-images.md` says, each beside a bare one."""

import hashlib
import hmac
import json
import time
import uuid
from collections.abc import Awaitable

from bench.children import Answer, Order, serve
from bench.figures import MeasurementError
from bench.http_client import Connection

PATH = "/organization-management/v1/images"
BARE_PATH = "/healthz"


class Signer:
    def __init__(self, port: int, key: str, secret: str) -> None:
        self._port = port
        self._key = key
        self._secret = secret

    async def read(self, query: str, pairs: int, expected: int) -> Answer:
        """How long each signed read took (`signed`, in seconds), and each `bare` one beside it.

        Each is first as often as the other, over one kept connection. Raises MeasurementError unless `expected` match.
        """
        connection = await Connection.open(self._port)
        signed: list[float] = []
        bare: list[float] = []
        for number in range(pairs):
            for is_signed in (True, False) if number % 2 else (False, True):
                if is_signed:
                    signed.append(await self._read(connection, query, expected))
                else:
                    bare.append((await _timed(connection.get(BARE_PATH)))[0])
        await connection.close()
        return {"signed": signed, "bare": bare}

    async def _read(self, connection: Connection, query: str, expected: int) -> float:
        authorization = self._authorization()
        seconds, body = await _timed(connection.get(f"{PATH}?{query}", authorization))
        count = json.loads(body)["count"]
        if count != expected:
            raise MeasurementError(f"{query}: {count} images match instead of {expected}")
        return seconds

    def _authorization(self) -> str:
        nonce, timestamp = str(uuid.uuid4()), str(int(time.time() * 1000))
        message = f"{self._key}GET{PATH}{timestamp}{nonce}".encode()
        signature = hmac.new(self._secret.encode(), message, hashlib.sha256).hexdigest()
        return f"HMAC {self._key}:{signature}:{nonce}:{timestamp}"


async def _timed(call: Awaitable[bytes]) -> tuple[float, bytes]:
    began = time.perf_counter()
    body = await call
    return time.perf_counter() - began, body


async def make(setup: Order) -> Signer:
    """`setup`: the API's `port`, an HMAC `key` and its `secret`."""
    return Signer(setup["port"], setup["key"], setup["secret"])


if __name__ == "__main__":
    serve(make)
