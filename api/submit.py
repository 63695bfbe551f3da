"""Taking an order: one transaction with everything that must hold together, then the workflow's start."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import Any

from starlette.concurrency import run_in_threadpool

from api.deps import Parts
from api.machine_work import start_machine_work
from api.patience import promptly
from api.pod_work import start_pod_work
from kiln.catalog import builds, idempotency
from kiln.catalog.builds import NewBuild
from kiln.catalog.session import AlreadyThereError, Transaction
from kiln.catalog.tables import Build, IdempotencyKey
from kiln.errors import IdempotencyKeyReusedError, UnavailableError
from kiln.models import BuildKind, BuildRef, BuildStatus, OperationRef, PodRef
from kiln.naming import operation_workflow_id
from workflows.start import start_build

log = logging.getLogger("kiln.api")


@dataclass(frozen=True)
class Posted:
    """A POST, as it came. Under `idempotency_key`, a repeated one with the same raw `body` is answered as the first."""

    organization_id: str
    status_code: int
    body: bytes
    idempotency_key: str | None = None


@dataclass(frozen=True)
class TakenOn:
    """What a transaction took on: new builds, operations of machines and pods, and the answer to them."""

    builds: list[Build]
    response: dict[str, Any]
    operations: Sequence[OperationRef] = ()
    pods: Sequence[PodRef] = ()

    @property
    def first_id(self) -> str | None:
        """What stands for all of it; None where there is nothing new."""
        machine_work = (operation_workflow_id(ref.machine_id, ref.number) for ref in self.operations)
        agents = (ref.pod_id for ref in self.pods)
        return next(chain((build.id for build in self.builds), machine_work, agents), None)


@dataclass(frozen=True)
class Submission:
    """A build to take on. `idempotency_key` and `body` (the raw request) make a repeated POST answer as the first."""

    new: NewBuild
    status_code: int
    body: bytes
    idempotency_key: str | None = None


@dataclass(frozen=True)
class Ordered:
    """What a transaction took on: the build, and whether it is new (one found again is not started again)."""

    build: Build
    fresh: bool = True


async def order(parts: Parts, insert: Callable[[Transaction], Ordered]) -> Build:
    """Inserts a build with whatever must hold together, in one transaction, and starts its workflow if it is open.

    `insert` may run twice: another transaction may make the same row at the same moment. Raises what `insert` raises,
    UnavailableError (of the catalog).
    """
    ordered = await run_in_threadpool(_insert_once, parts, insert)
    if ordered.fresh and BuildStatus(ordered.build.status).is_open:
        await _start(parts, ordered.build)
    return ordered.build


def _insert_once(parts: Parts, insert: Callable[[Transaction], Ordered]) -> Ordered:
    try:
        with parts.catalog.transaction() as tx:
            return insert(tx)
    except AlreadyThereError:
        with parts.catalog.transaction() as tx:
            return insert(tx)


async def _start(parts: Parts, build: Build) -> None:
    try:
        await promptly(start_build(parts.temporal, ref_of(build)))
    except UnavailableError:
        log.warning("Temporal does not answer; build %s waits for the dispatcher", build.id)


async def submit(parts: Parts, submission: Submission, answer: Callable[[Build], dict[str, Any]]) -> dict[str, Any]:
    """The answer to the submission, its own or the one given before under its idempotency key. Raises as `answer_once`."""

    def insert(tx: Transaction) -> TakenOn:
        build = builds.insert(tx, submission.new)
        return TakenOn([build], answer(build))

    posted = Posted(submission.new.organization_id, submission.status_code, submission.body, submission.idempotency_key)
    return await answer_once(parts, posted, insert)


async def answer_once(parts: Parts, posted: Posted, insert: Callable[[Transaction], TakenOn]) -> dict[str, Any]:
    """The answer of `insert`, or the one given before under the same idempotency key.

    The rows are the order: if Temporal cannot be reached, the dispatcher starts the work later. `insert` may run
    twice. Raises what it raises, IdempotencyKeyReusedError, UnavailableError (of the catalog).
    """
    taken_on = await run_in_threadpool(_commit, parts, posted, insert)
    await asyncio.gather(
        *(_start(parts, build) for build in taken_on.builds),
        *(start_machine_work(parts, ref) for ref in taken_on.operations),
        *(start_pod_work(parts, ref) for ref in taken_on.pods),
    )
    return taken_on.response


def ref_of(build: Build) -> BuildRef:
    """The workflow's input."""
    return BuildRef(
        build_id=build.id,
        organization_id=build.organization_id,
        kind=BuildKind(build.kind),
        platform=build.platform,
        awaits_context=build.upload_until is not None,
        installs_agent=builds.installs_agent(build),
    )


def _commit(parts: Parts, posted: Posted, insert: Callable[[Transaction], TakenOn]) -> TakenOn:
    try:
        with parts.catalog.transaction() as tx:
            return _insert(tx, parts, posted, insert)
    except AlreadyThereError:  # the same idempotency key, at the same moment: its answer is there now
        with parts.catalog.transaction() as tx:
            return _insert(tx, parts, posted, insert)


def _insert(tx: Transaction, parts: Parts, posted: Posted, insert: Callable[[Transaction], TakenOn]) -> TakenOn:
    digest = parts.sealer.digest(posted.body)
    if posted.idempotency_key is None:
        return insert(tx)
    known = idempotency.find(tx, posted.organization_id, posted.idempotency_key)
    if known is not None:
        return TakenOn([], _same(known, digest))
    taken_on = insert(tx)
    if taken_on.first_id is not None:
        idempotency.remember(tx, _remembered(posted, posted.idempotency_key, digest, taken_on.first_id, taken_on))
    return taken_on


def _same(known: IdempotencyKey, digest: str) -> dict[str, Any]:
    if known.body_digest != digest:
        raise IdempotencyKeyReusedError("Idempotency-Key: the key came before with another body")
    return known.response


def _remembered(posted: Posted, key: str, digest: str, first_id: str, taken_on: TakenOn) -> IdempotencyKey:
    return IdempotencyKey(
        organization_id=posted.organization_id,
        key=key,
        body_digest=digest,
        build_id=first_id,
        status_code=posted.status_code,
        response=taken_on.response,
        created_at=datetime.now(UTC),
    )
