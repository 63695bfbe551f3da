"""Starts the same workflow with the same input, without Kiln: what Temporal alone can do."""

import uuid

from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter

from bench.children import Answer, Order, serve
from bench.drivers.load import run_load
from kiln.models import BuildKind, BuildRef

WORKFLOW = "build-image"


class Starter:
    def __init__(self, client: Client) -> None:
        self._client = client
        self._queue = f"bench.{uuid.uuid4()}"
        self._organization = str(uuid.uuid4())

    async def start(self, at_once: int, count: int) -> Answer:
        """The load's `latencies`, the workflows `started`, and the `seconds` until the last of them."""
        return {**await run_load(self._start, at_once, count), "started": count}

    async def _start(self, _turn: int) -> None:
        build_id = str(uuid.uuid4())
        ref = BuildRef(build_id=build_id, organization_id=self._organization, kind=BuildKind.MACHINE)
        await self._client.start_workflow(WORKFLOW, ref, id=f"bare-{build_id}", task_queue=self._queue)


async def make(setup: Order) -> Starter:
    """`setup`: the Temporal server's `port`."""
    return Starter(await Client.connect(f"127.0.0.1:{setup['port']}", data_converter=pydantic_data_converter))


if __name__ == "__main__":
    serve(make)
