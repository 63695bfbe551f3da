"""One attempt to make an agent's container image: Packer runs the agents' template in a slot's engine, and pushes."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from activities.agent_output import AgentOutput
from activities.calls import to_its_end
from activities.container_attempt import RegistryAttempt, RegistryParts
from activities.heartbeat import Lease
from kiln.errors import KilnError, SourceUnavailableError, ToolFailedError, ToolMissingError
from kiln.models import BuildRef, BuiltImage
from kiln.naming import staging_repository, staging_tag
from kiln.ports import AgentKit, Engine, EnginePool, LogWriting, Order, PublicRegistries, ToolLine
from kiln.redact import Redactor
from kiln.references import parse_reference, repository_at


@dataclass(frozen=True, kw_only=True)
class AgentParts(RegistryParts):
    """What an agent's image is made with."""

    engines: EnginePool
    public: PublicRegistries
    kit: AgentKit


class AgentAttempt(RegistryAttempt[AgentParts]):
    """Whatever ends it, its container and its images go from the engine."""

    tool_name = "Packer"

    def __init__(self, parts: AgentParts, build: BuildRef) -> None:
        super().__init__(parts, build)
        self._output = AgentOutput()

    async def _make(self, order: Order, lease: Lease, log: LogWriting) -> BuiltImage:
        self._phase = "waiting for a builder slot"
        async with self._parts.engines.lease(order.container.target.repository) as engine:
            await self._check_base_image(order, engine)
            folder = await asyncio.to_thread(self._parts.kit.folder, order)
            try:
                job = await asyncio.to_thread(self._parts.kit.prepare, order, folder, engine)
                self._output = AgentOutput(folder=str(job.cwd))
                self._parts.engines.expect(engine, self._parts.kit.traces(order))
                await self._run(order, job, lease, log, Redactor(order.secrets.values()))
                return await self._pushed(order)
            except ToolMissingError as error:
                raise ToolFailedError("this builder installs no agents: it has no Packer") from error
            finally:
                # A build's row may say that it is cancelled before Temporal does.
                await to_its_end(self._tidy(order, folder, engine))

    async def _check_base_image(self, order: Order, engine: Engine) -> None:
        """Asked again: whose the image is, or what the registry's name means, may have changed since the order."""
        reference = order.agent.base_image
        repository = repository_at(self._parts.registry.host, reference)
        if repository is None:
            problem = await asyncio.to_thread(self._parts.public.problem, parse_reference(reference).host)
            if problem is not None:
                raise SourceUnavailableError(problem)
        elif not await self._all_public(order, {repository}):
            self._parts.engines.keep_private(engine)

    async def _pushed(self, order: Order) -> BuiltImage:
        """What stands under the attempt's tag: Packer names an image by the engine's id, which is no manifest's."""
        repository, tag = staging_repository(order.build_id), staging_tag(order.attempt)
        staged = await asyncio.to_thread(self._parts.registry.manifest, repository, tag)
        if staged is None:
            raise ToolFailedError("Packer ended well, but pushed no image")
        return self._built(order, staged.digest, adopted=False)

    async def _tidy(self, order: Order, folder: Path, engine: Engine) -> None:
        await asyncio.to_thread(self._parts.kit.discard, folder)
        await self._parts.engines.clear(engine, self._parts.kit.traces(order))

    async def _take(self, order: Order, line: ToolLine, log: LogWriting) -> None:  # noqa: ARG002
        for text in self._output.feed(line.text):
            await self._write(log, line.stream, text)

    def _failure(self) -> KilnError:
        return self._output.failure_of_image()
