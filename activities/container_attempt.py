"""One attempt to make a container image: BuildKit from a Dockerfile, or skopeo from somebody else's registry.

Both push under a staging name of the attempt's own, so that no dead attempt can move a user's tag; publishing does that.
"""

import asyncio
import re
from abc import abstractmethod
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from activities.buildkit_output import BuildkitOutput
from activities.calls import to_its_end
from activities.heartbeat import Lease
from activities.skopeo_output import failure as transfer_failure
from activities.tool_attempt import ToolAttempt, ToolParts, how_it_ended
from kiln.errors import (
    AttemptLostError,
    BuildError,
    ContextInvalidError,
    KilnError,
    SourceUnavailableError,
    ToolFailedError,
)
from kiln.models import BuildRef, BuiltImage
from kiln.naming import context_key, staging_repository, staging_tag
from kiln.ports import (
    ContainerKit,
    Contexts,
    Engine,
    EnginePool,
    LogWriting,
    Order,
    PublicRegistries,
    Registry,
    ToolExit,
    ToolJob,
    ToolLine,
    TransferKit,
)
from kiln.redact import Redactor

CONTEXT_FILE = "context.tar.gz"
LAST_LINES = 50
# Go names the resolver that it asked, which is this host's own.
RESOLVER = re.compile(r"(?<=lookup )(\S+) on \S+:53")


@dataclass(frozen=True, kw_only=True)
class RegistryParts(ToolParts):
    """What every attempt works with that pushes to the registry."""

    registry: Registry


@dataclass(frozen=True, kw_only=True)
class ContainerParts(RegistryParts):
    """What a Dockerfile build works with."""

    engines: EnginePool
    contexts: Contexts
    kit: ContainerKit


@dataclass(frozen=True, kw_only=True)
class TransferParts(RegistryParts):
    """What a transfer works with."""

    public: PublicRegistries
    kit: TransferKit


R = TypeVar("R", bound=RegistryParts)


class RegistryAttempt(ToolAttempt[R]):
    """An attempt whose tool pushes to the staging repository."""

    async def _adopt(self, order: Order, log: LogWriting) -> BuiltImage | None:
        """The image that an earlier attempt pushed whole: its tag comes last."""
        repository = staging_repository(order.build_id)
        for attempt in range(1, order.attempt):
            staged = await asyncio.to_thread(self._parts.registry.manifest, repository, staging_tag(attempt))
            if staged is not None:
                await log.write("kiln", f"adopting {staged.digest}, which attempt {attempt} pushed")
                return self._built(order, staged.digest, adopted=True)
        return None

    async def _run(self, order: Order, job: ToolJob, lease: Lease, log: LogWriting, redactor: Redactor) -> None:
        """Returns if the tool ended well. Raises what ended it otherwise. `redactor` masks what the tool prints."""
        # The registry's host stands for the account: cleaning up need not look where nothing was ever pushed.
        await asyncio.to_thread(self._parts.ledger.prepare, order.build_id, order.attempt, self._parts.registry.host)
        starting = self._parts.tools.start(job.argv, job.env, job.cwd, redactor, lease.remaining, stdin=job.stdin)
        ended = await self._carry_out(order, starting, lease, log)
        await self._finish(log)
        if isinstance(ended, BuildError):
            raise ended
        if ended.code == 0:
            return
        await self._refuse(ended, log, Redactor(order.secrets.values()).text(_shown(job)))

    async def _finish(self, log: LogWriting) -> None:
        """The tool is gone; whatever it left half said goes to the log now."""

    async def _refuse(self, ended: ToolExit, log: LogWriting, command: str) -> None:
        if ended.reason != "exited":
            raise AttemptLostError(f"{self.tool_name} was ended from outside ({ended.reason})")
        await log.write("kiln", f"{command}: {how_it_ended(ended)}")
        failure = self._failure()
        raise type(failure)(RESOLVER.sub(r"\1", str(failure)))

    @abstractmethod
    def _failure(self) -> KilnError:
        """What the tool's output ends in; an error that is not the build's own is worth another attempt."""

    async def _all_public(self, order: Order, repositories: set[str]) -> bool:
        """Whether anybody may read these repositories of Kiln's registry.

        Raises SourceUnavailableError if one of them is not for the build's organization.
        """
        readable = await asyncio.to_thread(self._parts.ledger.may_pull, order.organization_id, repositories)
        if repositories - readable:
            foreign = f"{self._parts.registry.host}/{min(repositories - readable)}"
            raise SourceUnavailableError(f"{foreign}: no such image, or not yours to use")
        return await asyncio.to_thread(self._parts.ledger.may_pull, "", repositories) == repositories

    def _built(self, order: Order, digest: str, *, adopted: bool) -> BuiltImage:
        host = self._parts.registry.host
        return BuiltImage(image_id=digest, region="", account=host, attempt=order.attempt, adopted=adopted)

    def _reported(self, order: Order, digest: str | None) -> BuiltImage:
        if digest is None:
            raise ToolFailedError(f"{self.tool_name} ended well, but named no digest")
        return self._built(order, digest, adopted=False)


class ContainerAttempt(RegistryAttempt[ContainerParts]):
    """A Dockerfile build."""

    tool_name = "BuildKit"

    def __init__(self, parts: ContainerParts, build: BuildRef) -> None:
        super().__init__(parts, build)
        self._output = BuildkitOutput()
        self._allowed: set[str] = set()
        self._engine: Engine | None = None

    async def _make(self, order: Order, lease: Lease, log: LogWriting) -> BuiltImage:
        self._output = BuildkitOutput(Redactor(order.secrets.values()))
        self._phase = "waiting for a builder slot"
        async with self._parts.engines.lease(order.container.target.repository) as engine:
            self._engine = engine
            folder = await asyncio.to_thread(self._parts.kit.folder, order)
            try:
                context = await self._fetch_context(order, folder)
                job = await asyncio.to_thread(self._parts.kit.prepare, order, folder, context, engine)
                # Secrets are masked in what the parser gives out: masked JSON could not be read.
                await self._run(order, job, lease, log, Redactor())
                return self._reported(order, await asyncio.to_thread(self._parts.kit.digest, job))
            finally:
                await to_its_end(self._tidy(order, folder, engine))

    async def _fetch_context(self, order: Order, folder: Path) -> Path:
        self._phase = "fetching the build context"
        path = folder / CONTEXT_FILE
        found = await asyncio.to_thread(self._parts.contexts.fetch, context_key(order.build_id), path)
        if order.context_sha256 not in (None, found):
            raise ContextInvalidError("the build context is not the one that was checked: it was replaced after that")
        return path

    async def _tidy(self, order: Order, folder: Path, engine: Engine) -> None:
        await asyncio.to_thread(self._parts.kit.discard, folder)
        await self._parts.engines.forget(engine, [self._parts.kit.staging_reference(order)])

    async def _take(self, order: Order, line: ToolLine, log: LogWriting) -> None:
        lines = self._output.feed(line.stream, line.text)
        # Before anything is told of what they hold.
        await self._refuse_foreign_images(order)
        await self._refuse_foreign_digests(order)
        for stream, text in lines:
            await self._write(log, stream, text)
        self._phase = self._output.phase or self._phase

    async def _refuse_foreign_images(self, order: Order) -> None:
        """The registry refuses them too, but an engine that has an image's layers already may not ask it again."""
        prefix = f"{self._parts.registry.host}/"
        used = {
            _repository(source.removeprefix(prefix)) for source in self._output.sources if source.startswith(prefix)
        }
        fresh = used - self._allowed
        if not fresh:
            return
        if not await self._all_public(order, fresh) and self._engine is not None:
            self._parts.engines.keep_private(self._engine)
        self._allowed |= fresh

    async def _refuse_foreign_digests(self, order: Order) -> None:
        """An engine that has a digest's manifest takes it from there, by whatever name of whatever host it is asked."""
        fresh = self._output.digests - self._allowed
        if not fresh:
            return
        withheld = await asyncio.to_thread(self._parts.ledger.withheld, order.organization_id, fresh)
        if withheld:
            raise SourceUnavailableError(f"{min(withheld)}: no such image, or not yours to use")
        self._allowed |= fresh

    async def _finish(self, log: LogWriting) -> None:
        for stream, text in self._output.finish():
            await self._write(log, stream, text)

    def _failure(self) -> KilnError:
        return self._output.outage() or self._output.failure()


class TransferAttempt(RegistryAttempt[TransferParts]):
    """A copy of somebody else's public image."""

    tool_name = "skopeo"

    def __init__(self, parts: TransferParts, build: BuildRef) -> None:
        super().__init__(parts, build)
        self._lines: deque[str] = deque(maxlen=LAST_LINES)

    async def _make(self, order: Order, lease: Lease, log: LogWriting) -> BuiltImage:
        # Asked again: the name may have come to mean another address since the order was taken.
        host = order.transfer.reference.partition("/")[0]
        problem = await asyncio.to_thread(self._parts.public.problem, host)
        if problem is not None:
            raise SourceUnavailableError(problem)
        folder = await asyncio.to_thread(self._parts.kit.folder, order)
        try:
            job = await asyncio.to_thread(self._parts.kit.prepare, order, folder)
            await self._run(order, job, lease, log, Redactor(order.secrets.values()))
            return self._reported(order, await asyncio.to_thread(self._parts.kit.digest, job))
        finally:
            await asyncio.to_thread(self._parts.kit.discard, folder)

    async def _take(self, order: Order, line: ToolLine, log: LogWriting) -> None:  # noqa: ARG002
        self._lines.append(line.text)
        await self._write(log, line.stream, line.text)

    def _failure(self) -> KilnError:
        return transfer_failure(self._lines)


def _shown(job: ToolJob) -> str:
    """The command as it is logged: where this host keeps its runs is nobody's business."""
    program, *arguments = job.argv
    return " ".join([Path(program).name, *arguments]).replace(f"{job.cwd}/", "")


def _repository(path: str) -> str:
    """`acme/app` of `acme/app:v1` and `acme/app@sha256:…`."""
    return path.partition("@")[0].partition(":")[0]
