"""A runner's keeper on a real API: its own directory, real shims, and shell scripts as agents."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from activities.pod_keeper import PodKeeper
from activities.pod_run import Gate, Lease, PodParts
from kiln.adapters.pod_places import HostPlaces
from kiln.adapters.runner_api import HttpRunnerApi
from kiln.adapters.sandbox_files import make_passable
from kiln.adapters.sandboxes import HostSandboxes, SandboxTerms
from kiln.adapters.shims import HostShims
from kiln.catalog import pods
from kiln.catalog.pod_tables import Pod
from kiln.models import PodRef, PodResult, PodSpec
from kiln.ports.pods import HostReport, PodOrder, PodSecrets, ShimOrder
from kiln.ports.sandboxes import Say
from support.api_server import RunningApi
from support.logs import read_all
from support.pod_rows import add_pod, create_runner, pod_row
from support.processes import MARK
from support.rows import add_organization

BEAT_SECONDS = 0.1
LEASE_SECONDS = 300.0


class TalkingSandboxes(HostSandboxes):
    """Sandboxes that say what they do. `hold` makes `prepare` wait for ever; `failure` is what it raises. `removal` is
    what a removal waits for."""

    hold = False
    removal: asyncio.Event | None = None
    failure: Exception | None = None

    async def prepare(self, order: PodOrder, say: Say) -> ShimOrder:
        prepared = await super().prepare(order, say)
        await say("the sandbox is prepared")
        if self.hold:
            await asyncio.Event().wait()
        if self.failure:
            raise self.failure
        return prepared

    async def conclude(self, key: str, say: Say) -> None:
        await super().conclude(key, say)
        await say("the sandbox is concluded")

    async def remove(self, key: str) -> None:
        if self.removal is not None:
            await self.removal.wait()
        await super().remove(key)


def sandboxes_of(root: Path) -> TalkingSandboxes:
    terms = SandboxTerms(
        root=root,
        uids=range(200_000, 200_100),
        memory_mb=512,
        processes=128,
        cpus=1,
        grace_seconds=0.3,
        lease_seconds=LEASE_SECONDS,
        engine="",
    )
    return TalkingSandboxes(terms, None)


class Process:
    """What stands for a runner's process: a keeper that serves."""

    def __init__(self, keeper: PodKeeper, sandboxes: TalkingSandboxes) -> None:
        self.keeper = keeper
        self.sandboxes = sandboxes
        self.serving = asyncio.create_task(keeper.serve())

    async def run(self, ref: PodRef) -> PodResult:
        async with asyncio.timeout(20):
            return await self.keeper.run(ref)


class RunnerRig:
    """A host and a runner of an organization of its own."""

    def __init__(self, api: RunningApi, folder: Path, mark: str) -> None:
        self.api = api
        self.root = folder / "pods"
        self.mark = mark
        self.organization_id = add_organization(api.catalog)
        self.runner, self.token = create_runner(api.catalog, self.organization_id)
        make_passable(self.root)
        self.shims = HostShims(self.root)

    @asynccontextmanager
    async def process(self, *, places: int = 4, url: str = "") -> AsyncIterator[Process]:
        """Another process of the runner; at the block's end it stops as a killed one would, its agents alive."""
        incarnation = str(uuid.uuid4())
        http = HttpRunnerApi(url or self.api.url, self.token, incarnation)
        await http.register(HostReport("host", incarnation, places, True, (), (), {}))
        sandboxes = sandboxes_of(self.root.parent)
        parts = PodParts(
            api=http,
            shims=HostShims(self.root),
            sandboxes=sandboxes,
            places=HostPlaces(self.root, HostShims(self.root)),
            gate=Gate(places),
            lease=Lease(LEASE_SECONDS),
        )
        process = Process(PodKeeper(parts, BEAT_SECONDS), sandboxes)
        await asyncio.sleep(0)  # now it serves
        try:
            yield process
        finally:
            process.serving.cancel()
            await asyncio.wait({process.serving})
            await http.aclose()

    def pod(self, script: str = "", *, initial_prompt: str | None = None, **spec: Any) -> PodRef:
        """A new pod whose agent is a shell script."""
        secrets = pods.seal_secrets(self.api.parts.sealer, PodSecrets({MARK: self.mark}, ("-c", script)))
        return add_pod(
            self.api.catalog,
            self.organization_id,
            self.runner.id,
            spec=PodSpec(custom_command="sh", **spec),
            secrets=secrets,
            initial_prompt=initial_prompt,
        )

    def row(self, ref: PodRef) -> Pod:
        return pod_row(self.api.catalog, ref.key)

    def log(self, ref: PodRef) -> list[str]:
        """The texts that Kiln has; `?` for what is missing."""
        return [getattr(line, "text", "?") for line in read_all(self.api.logs, ref.pod_id)]

    async def printed(self, ref: PodRef, text: str) -> None:
        """Returns once Kiln has this line."""
        async with asyncio.timeout(20):
            while text not in self.log(ref):
                await asyncio.sleep(0.01)

    async def close(self) -> None:
        """Ends the agents that are left."""
        for key in self.shims.keys():  # noqa: SIM118  no dictionary
            if shim := self.shims.find(key):
                await shim.terminate()
                await asyncio.wait_for(shim.wait(), 10)


class Relay:
    """Passes connections on to a server, as long as it is open."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def shut(self) -> None:
        """As if nobody listened, also to those who are connected."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._open):
            writer.transport.abort()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        others_reader, others_writer = await asyncio.open_connection("127.0.0.1", self._target)
        for source, sink in ((reader, others_writer), (others_reader, writer)):
            self._open.add(sink)
            task = asyncio.create_task(self._pass_on(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        sink.close()
        self._open.discard(sink)
