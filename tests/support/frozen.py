"""A builder that can be frozen in the midst of its work, as SIGSTOP or a stalled host would."""

import asyncio
import threading
from types import TracebackType
from typing import Self

from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter

from support.harness import Harness

PATIENCE_SECONDS = 15.0


class FreezableBuilder:
    """A Packer worker on a thread and a loop of its own. While it is frozen nothing on that loop goes on."""

    def __init__(self, kiln: Harness) -> None:
        self._kiln = kiln
        self._serving = threading.Event()
        self._thawed = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="freezable", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._serving.wait(PATIENCE_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.thaw()
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(PATIENCE_SECONDS)
        self._loop.close()

    def freeze(self) -> None:
        self._loop.call_soon_threadsafe(self._thawed.wait, PATIENCE_SECONDS)

    def thaw(self) -> None:
        self._thawed.set()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        host = self._kiln.client.service_client.config.target_host
        client = await Client.connect(host, data_converter=pydantic_data_converter)
        async with self._kiln.builder_of(client, "frozen"):
            self._serving.set()
            await self._stopping.wait()
