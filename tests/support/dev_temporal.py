"""A Temporal dev server for tests, its state in memory, seen through a client on a loop of its own."""

import asyncio
import sys
import threading
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.testing import WorkflowEnvironment

from workflows.start import SEARCH_ATTRIBUTES

T = TypeVar("T")
CALL_SECONDS = 60.0


class BackgroundLoop:
    """An event loop in a thread, for tests that are not asynchronous themselves."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="test-loop", daemon=True)
        self._thread.start()

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(CALL_SECONDS)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class DevTemporal:
    """A running server: its `port`, and a connected `client` whose coroutines `run` sees through."""

    def __init__(self, loop: BackgroundLoop, client: Client) -> None:
        self._loop = loop
        self.client = client
        self.port = int(client.service_client.config.target_host.rpartition(":")[2])

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self._loop.run(call)

    def workflow_ids(self) -> set[str]:
        """Every workflow that the server knows, closed ones too. Its list lags behind a little."""
        return self.run(self._workflow_ids())

    async def _workflow_ids(self) -> set[str]:
        return {execution.id async for execution in self.client.list_workflows()}


@contextmanager
def running_temporal(**dynamic_config: str) -> Iterator[DevTemporal]:
    """A dev server with Kiln's search attributes, on a free loopback port until the block's end. `dynamic_config` has the
    server's own names, with `__` for a dot."""
    loop = BackgroundLoop()
    try:
        environment = loop.run(_start(dynamic_config))
        try:
            yield DevTemporal(loop, environment.client)
        finally:
            loop.run(environment.shutdown())
    finally:
        loop.close()


async def _start(dynamic_config: Mapping[str, str]) -> WorkflowEnvironment:
    values = [f"{name.replace('__', '.')}={value}" for name, value in dynamic_config.items()]
    return await WorkflowEnvironment.start_local(
        dev_server_existing_path=str(Path(sys.executable).with_name("temporal")),
        dev_server_log_level="error",
        data_converter=pydantic_data_converter,
        search_attributes=SEARCH_ATTRIBUTES,
        dev_server_extra_args=[word for value in values for word in ("--dynamic-config-value", value)],
    )
