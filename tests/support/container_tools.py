"""Tools for container images that play scripts: a buildx, a Packer and a skopeo which really push. And an engine that
does nothing."""

# ruff: noqa: ARG002  a port's parameters that a fake has no use for

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from kiln.adapters.tool_output import Line
from kiln.ports import Engine, Traces
from kiln.redact import Redactor
from support.fakes import FakeTool
from support.harness import SECRET_NAME
from support.oci_images import Pusher, image

STEP = {"digest": "sha256:" + "5" * 64, "name": "[1/1] RUN make", "started": "2026-11-22T07:25:10Z"}


class ContainerRun:
    """What a script sees and does: it prints as its tool does, pushes, and may wait for SIGINT."""

    def __init__(
        self, pusher: Pusher, argv: Sequence[str], env: Mapping[str, str], stdin: Path | None, redactor: Redactor
    ) -> None:
        self._pusher = pusher
        self._options = dict(part.split("=", 1) for part in argv if part.startswith("--") and "=" in part)
        self._redactor = redactor
        self._is_transfer = "copy" in argv
        self.variables = _packer_variables(argv)
        reference = self._reference(argv)
        self._repository, _, self._tag = reference.partition("/")[2].rpartition(":")
        self.attempt = int(self._tag.rpartition("-")[2])
        self.secret = env.get(SECRET_NAME, "")
        self.context = stdin.read_bytes() if stdin is not None else b""
        self.image = image(f"{reference} at {datetime.now(UTC)}")
        self.interrupted = asyncio.Event()
        self.ended = False
        self.lines: asyncio.Queue[Line | None] = asyncio.Queue()

    def _reference(self, argv: Sequence[str]) -> str:
        if self._is_transfer:
            return argv[-1].removeprefix("docker://")
        return self.variables.get("kiln_container_reference") or self._options["--tag"]

    def says(self, text: str) -> None:
        """A step's output, a script's, or skopeo's."""
        if self._is_transfer:
            self._prints(text)
        elif self.variables:
            self._prints(f"0,,ui,message,    docker.published: {text}")
        else:
            data = base64.b64encode(f"{text}\n".encode()).decode()
            self._prints(json.dumps({"vertexes": [STEP], "logs": [{"vertex": STEP["digest"], "data": data}]}))

    def complains(self, text: str) -> None:
        self._prints(f"0,,ui,error,{text}" if self.variables else f"ERROR: failed to solve: {text}")

    def reads(self, reference: str) -> None:
        """BuildKit takes an image as its base."""
        step = {**STEP, "digest": "sha256:" + "6" * 64, "name": f"[1/1] FROM {reference}"}
        self._prints(json.dumps({"vertexes": [step]}))

    async def pushes(self) -> None:
        await asyncio.to_thread(self._pusher.push, self._repository, self.image, self._tag)

    def reports(self) -> None:
        """The tool's last act: the digest, in the file that it was told."""
        if self._is_transfer:
            Path(self._options["--digestfile"]).write_text(self.image.digest)
        elif not self.variables:
            said = {"containerimage.digest": self.image.digest}
            Path(self._options["--metadata-file"]).write_text(json.dumps(said))

    def _prints(self, text: str) -> None:
        self.lines.put_nowait(Line("stderr", self._redactor.text(text), datetime.now(UTC)))


def _packer_variables(argv: Sequence[str]) -> dict[str, str]:
    """What Packer is given; nothing of another tool's command line."""
    files = [part.removeprefix("-var-file=") for part in argv if part.startswith("-var-file=")]
    return json.loads(Path(files[0]).read_text()) if files else {}


Script = Callable[[ContainerRun], Awaitable[int]]


async def makes(run: ContainerRun) -> int:
    """A run that ends well."""
    run.says("making")
    await run.pushes()
    run.reports()
    return 0


async def hangs(run: ContainerRun) -> int:
    """A run that goes on until it is interrupted."""
    run.says("making")
    await run.interrupted.wait()
    return 1


async def pushes_and_hangs(run: ContainerRun) -> int:
    """A run that has pushed its image when it is interrupted."""
    await run.pushes()
    return await hangs(run)


class ContainerToolbox:
    """Tools that play scripts: the one of the attempt's number, or else `script`."""

    def __init__(self, pusher: Pusher) -> None:
        self._pusher = pusher
        self.script: Script = makes
        self.scripts: dict[int, Script] = {}
        self.runs: list[ContainerRun] = []

    @property
    def started(self) -> list[int]:
        return [run.attempt for run in self.runs]

    async def start(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        cwd: Path,
        redactor: Redactor,
        lease: timedelta,
        *,
        stdin: Path | None = None,
    ) -> FakeTool:
        run = ContainerRun(self._pusher, argv, env, stdin, redactor)
        self.runs.append(run)
        return FakeTool(run, self.scripts.get(run.attempt, self.script), lease)


class FakeEngines:
    """An engine that nobody talks to."""

    def __init__(self) -> None:
        self.forgotten: list[str] = []
        self.expected: list[Traces] = []
        self.cleared: list[Traces] = []

    @asynccontextmanager
    async def lease(self, affinity: str) -> AsyncIterator[Engine]:
        yield Engine("engine-1", "unix:///nowhere/docker.sock")

    def keep_private(self, engine: Engine) -> None:
        pass

    async def forget(self, engine: Engine, references: Collection[str]) -> None:
        self.forgotten += references

    def expect(self, engine: Engine, traces: Traces) -> None:
        self.expected.append(traces)

    async def clear(self, engine: Engine, traces: Traces) -> None:
        self.cleared.append(traces)
