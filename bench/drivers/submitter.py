"""Submits builds through the API, over one kept connection for each of those at once."""

import asyncio
import json
import time
from datetime import UTC, datetime

from temporalio.client import Client

from bench.children import Answer, Order, serve
from bench.drivers.load import run_load
from bench.http_client import Connection
from kiln.naming import CONTROL_QUEUE

PATH = "/api/v1/images/build"
BODY = json.dumps({"provider": "claude-code"}).encode()
ACCEPTED = 202
# Whatever Temporal has not been told of after so long without progress is left to the workers' dispatcher.
START_PATIENCE_SECONDS = 2.0
POLL_SECONDS = 0.1


class Submitter:
    def __init__(self, port: int, key: str, temporal: Client) -> None:
        self._port = port
        self._key = key
        self._temporal = temporal

    async def submit(self, at_once: int, count: int) -> Answer:
        """The load's `latencies`, the number of workflows that it `started`, and the `seconds` until the last of them.

        An answer alone is no start: the API may give it while Temporal has not been told yet. Connections are made
        before anything is measured, and anew, since the API closes idle ones.
        """
        connections = [await Connection.open(self._port, self._key) for _ in range(at_once)]

        async def submit(turn: int) -> None:
            await connections[turn].post(PATH, BODY, ACCEPTED)

        began = time.time()
        answer = await run_load(submit, at_once, count)
        for connection in connections:
            await connection.close()
        started, last_start = await self._started(began, count)
        return {**answer, "started": started, "seconds": max(answer["seconds"], last_start - began)}

    async def _started(self, began: float, count: int) -> tuple[int, float]:
        """How many workflows have been started since, and when the last one was (s since the epoch)."""
        since = datetime.fromtimestamp(began, UTC).isoformat()
        query = f"TaskQueue = '{CONTROL_QUEUE}' AND StartTime >= '{since}'"
        seen, deadline = 0, time.monotonic() + START_PATIENCE_SECONDS
        while seen < count and time.monotonic() < deadline:
            now = (await self._temporal.count_workflows(query)).count
            if now > seen:
                seen, deadline = now, time.monotonic() + START_PATIENCE_SECONDS
            await asyncio.sleep(POLL_SECONDS if seen < count else 0)
        async for newest in self._temporal.list_workflows(query, limit=1):
            return seen, newest.start_time.timestamp()
        return seen, began


async def make(setup: Order) -> Submitter:
    """`setup`: the API's `port`, a `key`, and the `temporal_port`."""
    return Submitter(setup["port"], setup["key"], await Client.connect(f"127.0.0.1:{setup['temporal_port']}"))


if __name__ == "__main__":
    serve(make)
