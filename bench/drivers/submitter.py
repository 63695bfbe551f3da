"""Submits builds through the API, over one kept connection for each of those at once."""

import json

from bench.children import Answer, Order, serve
from bench.drivers.load import run_load
from bench.http_client import Connection

PATH = "/api/v1/images/build"
BODY = json.dumps({"provider": "claude-code"}).encode()
ACCEPTED = 202


class Submitter:
    def __init__(self, port: int, key: str) -> None:
        self._port = port
        self._key = key

    async def submit(self, at_once: int, count: int) -> Answer:
        """The load. Its connections are new, since the API closes idle ones, and made before anything is measured."""
        connections = [await Connection.open(self._port, self._key) for _ in range(at_once)]

        async def submit(turn: int) -> None:
            await connections[turn].post(PATH, BODY, ACCEPTED)

        answer = await run_load(submit, at_once, count)
        for connection in connections:
            await connection.close()
        return answer


async def make(setup: Order) -> Submitter:
    """`setup`: the API's `port`, and a `key`."""
    return Submitter(setup["port"], setup["key"])


if __name__ == "__main__":
    serve(make)
