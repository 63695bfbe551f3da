"""`POST /pods`: all that a new pod depends on, looked up in the transaction that writes it."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from starlette.concurrency import run_in_threadpool

from api.deps import Parts
from api.errors import RETRY_AFTER_SECONDS
from api.pod_errors import CUSTOM_COMMAND_NOT_ALLOWED, NO_AVAILABLE_RUNNER, PodError
from api.pod_requests import CreatePod
from api.pod_views import pod_body
from api.submit import TakenOn
from kiln.catalog import pod_images, pods, repositories, runners
from kiln.catalog.keys import Identity
from kiln.catalog.pod_images import Runs
from kiln.catalog.pods import KnownPod, NewPod
from kiln.catalog.runners import KnownRunner
from kiln.catalog.session import Transaction
from kiln.errors import InvalidRequestError, KilnError, NotFoundError
from kiln.models import PodStatus, RunnerStatus, SandboxType, container_limits
from kiln.ports.pods import GitSource


class PodCreation:
    """A pod to write, as its organization asked for it."""

    def __init__(self, parts: Parts, identity: Identity, wanted: CreatePod) -> None:
        self._parts = parts
        self._identity = identity
        self._wanted = wanted
        self._host = parts.settings.registry_host
        self._secrets = pods.seal_secrets(parts.sealer, wanted.secrets)

    async def check_branch(self) -> None:
        """Asks the repository itself, which no transaction may wait for. Raises InvalidRequestError if it has no such branch."""
        source = await run_in_threadpool(self._source)
        if source is not None and await self._parts.remotes.lacks_branch(source):
            raise InvalidRequestError("branch", f"branch {source.branch} is not in the repository")

    def _source(self) -> GitSource | None:
        """The branch that was named, if all else is as it must be: what is not, `insert` says."""
        number, branch = self._wanted.repository_id, self._wanted.branch
        if number is None or branch is None:
            return None
        with suppress(KilnError, PodError), self._parts.catalog.read() as session:
            self._runner(session)
            row = repositories.find(session, self._identity.organization_id, number)
            sealed = row.sealed_credential if row is not None else None
            credential = "" if sealed is None else self._parts.sealer.open_text(sealed)
            return None if row is None else GitSource(row.id, row.url, branch, credential)
        return None

    def insert(self, tx: Transaction) -> TakenOn:
        """Writes the pod. Raises NotFoundError, InvalidRequestError; PodError if the runner is away or runs no such command."""
        runner = self._runner(tx)
        self._check_agent(runner)
        self._check_limits(runner)
        self._check_repository(tx)
        row = pods.insert(tx, self._new(runner, self._image_id(tx)))
        return TakenOn([], {"pod": pod_body(KnownPod(row, PodStatus.CREATING))}, pods=[pods.pod_ref(row)])

    def _new(self, runner: KnownRunner, image_id: str | None) -> NewPod:
        return NewPod(
            organization_id=self._identity.organization_id,
            runner_id=runner.runner.id,
            spec=self._wanted.spec(),
            created_by=self._identity.key_id,
            initial_prompt=self._wanted.initial_prompt,
            secrets=self._secrets,
            image_id=image_id,
        )

    def _runner(self, tx: Transaction) -> KnownRunner:
        """One that is full is as good: the pod waits."""
        known = known_runner(tx, self._identity, self._wanted.runner_id)
        if known.status is RunnerStatus.OFFLINE:
            message = f"runner_id: runner {known.runner.name} is offline"
            raise PodError(503, NO_AVAILABLE_RUNNER, message, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})
        return known

    def _check_agent(self, known: KnownRunner) -> None:
        runner, wanted = known.runner, self._wanted
        agent = wanted.spec().agent_type
        if wanted.custom_agent_command is not None:
            if not runner.allows_custom_commands:
                message = f"custom_agent_command: runner {runner.name} runs no custom commands"
                raise PodError(403, CUSTOM_COMMAND_NOT_ALLOWED, message)
        elif not self._in_container and agent.value not in runner.available_agents:
            has = ", ".join(runner.available_agents) or "none"
            raise InvalidRequestError("agent_type_id", f"runner {runner.name} has no {agent.value}, only: {has}")

    def _check_limits(self, known: KnownRunner) -> None:
        wanted: Mapping[str, Any] = self._wanted.limits.model_dump(exclude_none=True) if self._wanted.limits else {}
        enforced = container_limits(known.runner.limits) if self._in_container else known.runner.limits
        for name in wanted:
            if name not in enforced:
                raise InvalidRequestError(f"limits.{name}", f"runner {known.runner.name} cannot enforce it")

    @property
    def _in_container(self) -> bool:
        """The agent is then the image's, and the limits are the engine's."""
        return self._wanted.spec().sandbox_type is SandboxType.CONTAINER

    def _check_repository(self, tx: Transaction) -> None:
        number = self._wanted.repository_id
        if number is not None and repositories.find(tx, self._identity.organization_id, number, lock=True) is None:
            raise NotFoundError("repository_id: no repository of this organization has this id")

    def _image_id(self, tx: Transaction) -> str | None:
        if self._wanted.image is None:
            return None
        who = Runs(self._identity.organization_id, self._identity.organization_slug, self._host)
        image = pod_images.find(tx, who, self._wanted.image)
        if image is None:
            raise NotFoundError("image: there is no such image that this organization may run")
        return image.id


def known_runner(session: Transaction, identity: Identity, id_or_name: str) -> KnownRunner:
    """An organization's runner that was not disabled. Raises NotFoundError."""
    # PostgreSQL does not compare with a text that holds NUL.
    known = None if "\0" in id_or_name else runners.find(session, identity.organization_id, id_or_name)
    if known is None or known.runner.disabled_at is not None:
        raise NotFoundError("no runner of this organization has this id or name")
    return known
