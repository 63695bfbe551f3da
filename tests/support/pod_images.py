"""Images for agents in containers, made of busybox, and containers' pods as a runner keeps them."""

import asyncio
import gzip
import io
import json
import tarfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from kiln.adapters.registry_manifests import OCI_MANIFEST
from kiln.adapters.sandbox_container import ContainerSandboxes
from kiln.adapters.sandboxes import SandboxTerms
from kiln.adapters.shims import HostShim, HostShims
from kiln.models import AgentType, PodSpec, SandboxType
from kiln.ports.pods import ImageSource, PodOrder
from support.oci_images import OCI_CONFIG, OCI_LAYER, Made, descriptor, digest

BUSYBOX = Path("/bin/busybox")
APPLETS = (
    "sh",
    "cat",
    "dd",
    "echo",
    "env",
    "grep",
    "head",
    "id",
    "ls",
    "od",
    "pwd",
    "seq",
    "sleep",
    "stty",
    "tail",
    "wc",
)
GRACE_SECONDS = 1.0


def busybox_image(*applets: str, files: dict[str, str] | None = None, **config: Any) -> Made:
    """An image of one layer with busybox under these names (all that agents here need, without)."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        tar.add(BUSYBOX, "bin/busybox")
        for name in applets or APPLETS:
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
        for name, text in (files or {}).items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    layer = gzip.compress(raw.getvalue(), 1, mtime=0)
    rootfs = {"type": "layers", "diff_ids": [digest(raw.getvalue())]}
    said = json.dumps({"os": "linux", "architecture": "amd64", "config": config, "rootfs": rootfs}).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(OCI_CONFIG, said),
        "layers": [descriptor(OCI_LAYER, layer)],
    }
    return Made(json.dumps(manifest).encode(), OCI_MANIFEST, blobs=(said, layer))


def pod_order(image: ImageSource, *argv: str, **more: Any) -> PodOrder:
    """An order for a command of the pod's own. `limits` and other fields of the spec are taken too."""
    fields = {name: more.pop(name) for name in list(more) if name in PodSpec.model_fields}
    spec = PodSpec(
        agent_type=AgentType.CLAUDE_CODE, sandbox_type=SandboxType.CONTAINER, custom_command=argv[0], **fields
    )
    key = f"pod-{uuid4().hex[:12]}"
    given = {"prompts": [], "environment": {}} | more
    return PodOrder(str(uuid4()), key, 1, spec, custom_args=argv[1:], image=image, **given)


class ContainerPods:
    """Pods in containers of one engine, each with a shim of its own."""

    def __init__(self, root: Path, engine: str, image: ImageSource, **terms: Any) -> None:
        self.root = root
        self.image = image
        given = {"memory_mb": 256, "processes": 64, "cpus": 1.0, "grace_seconds": GRACE_SECONDS, "lease_seconds": 60.0}
        self.terms = SandboxTerms(root=root, uids=range(0), engine=engine, **{**given, **terms})
        self.sandboxes = ContainerSandboxes(self.terms)
        self.shims = HostShims(root / "pods")
        self.said: list[str] = []

    async def say(self, text: str) -> None:
        self.said.append(text)

    async def start(self, *argv: str, **more: Any) -> HostShim:
        """The shim of a pod's agent that has been started."""
        return await self.begin(pod_order(more.pop("image", self.image), *argv, **more))

    async def sh(self, script: str, **more: Any) -> HostShim:
        return await self.start("sh", "-c", script, **more)

    async def begin(self, order: PodOrder) -> HostShim:
        prepared = await self.sandboxes.prepare(order, self.say)
        return await self.shims.start(order.key, replace(prepared, shim="nonce"))

    async def close(self) -> None:
        """Ends and removes all pods."""
        for key in self.shims.keys():  # noqa: SIM118  no dictionary
            if shim := self.shims.find(key):
                await shim.terminate()
                await shim.wait()
            with suppress(OSError):
                await self.sandboxes.remove(key)


@asynccontextmanager
async def cuttable(engine: Path, relay: Path) -> AsyncIterator[Callable[[], None]]:
    """A socket that leads to an engine's, until what is yielded is called."""
    writers: list[asyncio.StreamWriter] = []

    async def lead(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_unix_connection(engine)
        writers.extend([writer, to_writer])
        await asyncio.gather(_copy(reader, to_writer), _copy(to_reader, writer))

    def cut() -> None:
        server.close()
        for writer in writers:
            writer.transport.abort()

    server = await asyncio.start_unix_server(lead, relay)
    try:
        yield cut
    finally:
        cut()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(64 * 1024):
            writer.write(data)
            await writer.drain()
        writer.close()
