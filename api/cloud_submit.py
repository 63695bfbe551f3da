"""Taking a cloud build in: its form, its archive or finished image, and its row; or nothing of them at all."""

import asyncio
import contextlib
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from api.cloud_requests import ARCHIVE, NAMES, CloudForm, CloudOrder
from api.deps import Parts
from api.errors import DetailError
from api.ids import UUID_TEXT
from api.multipart import Form
from api.submit import Ordered, order
from api.uploads import receive
from kiln.catalog import agents, builds, cloud_builds, tags
from kiln.catalog.builds import BuildWithImage, NewBuild
from kiln.catalog.keys import Identity
from kiln.catalog.session import Transaction
from kiln.catalog.tables import Agent, Build
from kiln.errors import (
    ContextInvalidError,
    ContextTooLargeError,
    InvalidRequestError,
    SourceUnavailableError,
    UnavailableError,
)
from kiln.models import Api, ContainerBuildSpec, RegistrationSpec
from kiln.naming import context_key
from kiln.ports import ContextFacts, ImageFacts
from kiln.references import Reference

DOCKERFILE = "Dockerfile"
RETRY_COUNT = "x-stainless-retry-count"
# For so long a repeated POST is taken for the same one.
RETRY_WINDOW = timedelta(minutes=1)


class CloudSubmission:
    """One POST. `take` leaves the build with its context, or neither."""

    def __init__(self, request: Request, parts: Parts, identity: Identity) -> None:
        self._parts, self._identity = parts, identity
        self._request = request
        self._form = CloudForm(identity)
        self._build_id = str(uuid.uuid4())
        self._upload_begun = False
        self._context: ContextFacts | None = None
        self._ordering: asyncio.Task[Build] | None = None

    async def take(self) -> BuildWithImage:
        """The build that was taken on, or that the same request made before.

        Raises InvalidRequestError, which names the part, DetailError 404 and 413, UnavailableError, ClientDisconnect.
        """
        try:
            await self._read_form()
            found = await self._order(self._form.order(archive=self._upload_begun))
        except BaseException:
            await asyncio.shield(asyncio.create_task(self._drop_context()))
            raise
        if found.build.id != self._build_id:
            await self._drop_context()
        return found

    async def _read_form(self) -> None:
        try:
            form = Form(self._request, NAMES, self._parts.settings.max_context_bytes)
            while (name := await form.next_part()) is not None:
                if name == ARCHIVE:
                    await self._receive(form)
                else:
                    self._form.add(name, await form.text())
        except ContextTooLargeError as error:
            raise DetailError(413, f"{ARCHIVE}: {error}") from None
        except ContextInvalidError as error:
            raise InvalidRequestError(ARCHIVE, str(error)) from None

    async def _receive(self, form: Form) -> None:
        """Stores the archive, unless what came before it speaks against that."""
        self._form.check_before_archive()
        self._parts.containers.require()
        if self._form.agent_id is not None:
            await run_in_threadpool(self._check_agent, self._form.agent_id)
        self._upload_begun = True
        self._context = await receive(self._parts, form.chunks(), context_key(self._build_id), DOCKERFILE)

    async def _order(self, wanted: CloudOrder) -> BuildWithImage:
        if wanted.reference is None:
            return await self._insert(self._build(wanted), wanted, None)
        facts = await run_in_threadpool(self._facts, wanted.reference)
        return await self._insert(self._registration(wanted, wanted.reference, facts), wanted, facts)

    def _build(self, wanted: CloudOrder) -> NewBuild:
        spec = ContainerBuildSpec(
            target=wanted.target,
            dockerfile=DOCKERFILE,
            build_args=wanted.build_args,
            secret_names=tuple(sorted(wanted.secret_args)),
            source=wanted.source,
        )
        platforms = (wanted.platform, *self._parts.settings.builder_platforms)
        secrets = self._parts.sealer.seal(wanted.secret_args)
        return self._new(spec, next(filter(None, platforms)), secrets)

    def _registration(self, wanted: CloudOrder, reference: Reference, facts: ImageFacts) -> NewBuild:
        found = f"{reference.host}/{reference.repository}@{facts.digest}"
        spec = RegistrationSpec(target=wanted.target, reference=found, source=wanted.source)
        return self._new(spec, next(iter(facts.platforms), self._parts.settings.builder_platforms[0]))

    def _new(
        self, spec: ContainerBuildSpec | RegistrationSpec, platform: str, secrets: bytes | None = None
    ) -> NewBuild:
        return NewBuild(
            id=self._build_id,
            organization_id=self._identity.organization_id,
            api=Api.CLOUD_BUILDS,
            spec=spec,
            created_by=self._identity.key_id,
            secrets=secrets,
            platform=platform,
            context=self._context,
        )

    async def _insert(self, new: NewBuild, wanted: CloudOrder, facts: ImageFacts | None) -> BuildWithImage:
        """One transaction for the agent, the build and its tag; nothing new where this POST only repeats another."""
        found: BuildWithImage | None = None

        def insert(tx: Transaction) -> Ordered:
            nonlocal found
            agent = self._agent(tx, wanted)
            twin = _twin(tx, new) if self._repeats else None
            found = twin or _write(tx, replace(new, agent=agent), wanted, facts)
            return Ordered(found.build, fresh=twin is None)

        # A transaction that runs cannot be stopped: whoever cancels this request waits for its end.
        self._ordering = asyncio.create_task(order(self._parts, insert))
        build = await asyncio.shield(self._ordering)
        return found or BuildWithImage(build, None)

    @property
    def _repeats(self) -> bool:
        """Whether the client says that it has sent this before."""
        count = self._request.headers.get(RETRY_COUNT, "")
        return count.isdecimal() and int(count) > 0

    def _agent(self, tx: Transaction, wanted: CloudOrder) -> Agent:
        if wanted.agent_name is not None:
            return agents.ensure(tx, self._identity.organization_id, wanted.agent_name)
        return self._known_agent(tx, wanted.agent_id or "", lock=True)

    def _check_agent(self, agent_id: str) -> None:
        with self._parts.catalog.read() as session:
            self._known_agent(session, agent_id)

    def _known_agent(self, session: Transaction, agent_id: str, *, lock: bool = False) -> Agent:
        """Raises DetailError 404."""
        agent = None
        if UUID_TEXT.fullmatch(agent_id):
            agent = agents.find(session, self._identity.organization_id, agent_id.lower(), lock=lock)
        if agent is None:
            raise DetailError(404, "agent_id: no agent of this account has this id")
        return agent

    def _facts(self, reference: Reference) -> ImageFacts:
        """What there is to register. Raises InvalidRequestError if there is nothing that this account may read."""
        containers = self._parts.containers
        if reference.host == containers.registry.host:
            facts = (
                containers.registry.facts(reference.repository, reference.target) if self._reads(reference) else None
            )
            if facts is None:
                raise InvalidRequestError("image_url", f"there is no image {reference} that this account may read")
            return facts
        problem = containers.public.problem(reference.host)
        if problem is not None:
            raise InvalidRequestError("image_url", problem)
        try:
            return containers.public.facts(str(reference))
        except SourceUnavailableError as error:
            raise InvalidRequestError("image_url", str(error)) from None

    def _reads(self, reference: Reference) -> bool:
        who = self._identity
        with self._parts.catalog.read() as session:
            return bool(tags.readable(session, who.organization_id, who.organization_slug, {reference.repository}))

    async def _drop_context(self) -> None:
        if self._ordering is not None:
            await asyncio.wait([self._ordering])
        if self._upload_begun:
            await run_in_threadpool(self._delete_context)

    def _delete_context(self) -> None:
        """The archive of a build that is not there. What cannot be deleted now, the sweep of old objects finds."""
        with contextlib.suppress(UnavailableError):
            # An order that failed may have been taken all the same: its answer is what was lost.
            if self._ordering is None or not self._is_ordered():
                self._parts.contexts.delete(context_key(self._build_id))

    def _is_ordered(self) -> bool:
        with self._parts.catalog.read() as session:
            return builds.get(session, self._build_id) is not None


def _twin(tx: Transaction, new: NewBuild) -> BuildWithImage | None:
    """The build that a first try of this POST made."""
    spec = new.spec
    if isinstance(spec, ContainerBuildSpec | RegistrationSpec):
        return cloud_builds.recent_twin(
            tx,
            new.organization_id,
            spec.target.repository,
            spec.target.tag,
            sha256=new.context.sha256 if new.context else None,
            reference=spec.reference if isinstance(spec, RegistrationSpec) else None,
            since=datetime.now(UTC) - RETRY_WINDOW,
        )
    return None


def _write(tx: Transaction, new: NewBuild, wanted: CloudOrder, facts: ImageFacts | None) -> BuildWithImage:
    if facts is not None and wanted.reference is not None:
        return builds.insert_finished(tx, new, facts, wanted.reference.host)
    build = builds.insert(tx, new)
    tags.claim(tx, build, wanted.target)
    return BuildWithImage(build, None)
