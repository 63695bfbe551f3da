"""Taking an order: one transaction with everything that must hold together, then the workflow's start."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from starlette.concurrency import run_in_threadpool

from api.deps import Parts
from api.patience import promptly
from kiln.catalog import builds, idempotency
from kiln.catalog.builds import NewBuild
from kiln.catalog.session import AlreadyThereError, Transaction
from kiln.catalog.tables import Build, IdempotencyKey
from kiln.errors import IdempotencyKeyReusedError, UnavailableError
from kiln.models import BuildKind, BuildRef
from workflows.start import start_build

log = logging.getLogger("kiln.api")


@dataclass(frozen=True)
class Submission:
    """A build to take on. `idempotency_key` and `body` (the raw request) make a repeated POST answer as the first."""

    new: NewBuild
    status_code: int
    body: bytes
    idempotency_key: str | None = None


async def submit(parts: Parts, submission: Submission, answer: Callable[[Build], dict[str, Any]]) -> dict[str, Any]:
    """The answer to the submission, its own or the one given before under its idempotency key.

    The row is the order: if Temporal cannot be reached, the dispatcher starts the build later. Raises
    IdempotencyKeyReusedError, UnavailableError (of the catalog).
    """
    build, response = await run_in_threadpool(_commit, parts, submission, answer)
    if build is not None:
        try:
            await promptly(start_build(parts.temporal, ref_of(build)))
        except UnavailableError:
            log.warning("Temporal does not answer; build %s waits for the dispatcher", build.id)
    return response


def ref_of(build: Build) -> BuildRef:
    """The workflow's input."""
    return BuildRef(
        build_id=build.id,
        organization_id=build.organization_id,
        kind=BuildKind(build.kind),
        platform=build.platform,
    )


def _commit(
    parts: Parts, submission: Submission, answer: Callable[[Build], dict[str, Any]]
) -> tuple[Build | None, dict[str, Any]]:
    try:
        with parts.catalog.transaction() as tx:
            return _insert(tx, parts, submission, answer)
    except AlreadyThereError:  # the same idempotency key, at the same moment: its answer is there now
        with parts.catalog.transaction() as tx:
            return _insert(tx, parts, submission, answer)


def _insert(
    tx: Transaction, parts: Parts, submission: Submission, answer: Callable[[Build], dict[str, Any]]
) -> tuple[Build | None, dict[str, Any]]:
    new, key = submission.new, submission.idempotency_key
    digest = parts.sealer.digest(submission.body)
    if key is not None:
        known = idempotency.find(tx, new.organization_id, key)
        if known is not None:
            return None, _same(known, digest)
    build = builds.insert(tx, new)
    response = answer(build)
    if key is not None:
        idempotency.remember(tx, _remembered(new.organization_id, key, digest, build, submission.status_code, response))
    return build, response


def _same(known: IdempotencyKey, digest: str) -> dict[str, Any]:
    if known.body_digest != digest:
        raise IdempotencyKeyReusedError("Idempotency-Key: the key came before with another body")
    return known.response


def _remembered(  # noqa: PLR0913, PLR0917  a row's columns
    organization_id: str, key: str, digest: str, build: Build, status_code: int, response: dict[str, Any]
) -> IdempotencyKey:
    return IdempotencyKey(
        organization_id=organization_id,
        key=key,
        body_digest=digest,
        build_id=build.id,
        status_code=status_code,
        response=response,
        created_at=datetime.now(UTC),
    )
