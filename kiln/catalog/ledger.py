"""The catalog behind `kiln.ports.Ledger`: each method is one transaction."""

from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import Final

from pydantic import TypeAdapter
from sqlalchemy.orm import Session

from kiln.catalog import attempts, builds, contexts, errands, idempotency, images, nonces, pod_images, tags
from kiln.catalog.session import Catalog
from kiln.catalog.tables import Build, Organization
from kiln.models import (
    BuildEnd,
    BuildKind,
    BuildRef,
    BuildSpec,
    BuildStatus,
    BuiltImage,
    Claim,
    ErrorCode,
    Failure,
    ImageRef,
    Target,
)
from kiln.naming import context_key
from kiln.ports import (
    Ami,
    BuildBrief,
    ContainerFootprint,
    ContextFacts,
    ContextOrder,
    DoomedImage,
    Errand,
    Footprint,
    Held,
    ImageFacts,
    LivingImage,
    Order,
    Publication,
)
from kiln.sealing import Sealer

SPEC: Final[TypeAdapter[BuildSpec]] = TypeAdapter(BuildSpec)
ERRANDS_AT_ONCE: Final = 100


class CatalogLedger:
    """`kiln.ports.Ledger` on a catalog. `claim_terms` are the settings that a workflow may know."""

    def __init__(self, catalog: Catalog, sealer: Sealer, claim_terms: Claim) -> None:
        self._catalog = catalog
        self._sealer = sealer
        self._terms = claim_terms
        self.installation = catalog.installation()

    def claim(self, build_id: str, run_id: str) -> Claim:
        with self._catalog.transaction() as tx:
            row = attempts.claim(tx, build_id, run_id)
            if row is None:
                return self._terms.model_copy(update={"mine": False})
            return self._terms.model_copy(update={"mine": True, "cancelled": row.cancel_requested_at is not None})

    def begin(self, build_id: str, holder: str, lease: timedelta) -> Order | Held:
        with self._catalog.transaction() as tx:
            predecessor = attempts.holder_of(tx, build_id)
            row = attempts.begin(tx, build_id, holder, lease)
            return row if isinstance(row, Held) else self._order(row, predecessor_lost=predecessor is not None)

    def _order(self, row: Build, *, predecessor_lost: bool) -> Order:
        return Order(
            build_id=row.id,
            attempt=row.attempt,
            spec=SPEC.validate_python(row.spec),
            secrets=self._sealer.open(row.secrets),
            known_ids=frozenset(row.known_ids),
            deadline_at=row.deadline_at,
            predecessor_lost=predecessor_lost,
            organization_id=row.organization_id,
            platform=row.platform,
            context_sha256=row.context_sha256,
        )

    def renew(self, build_id: str, attempt: int, lease: timedelta) -> None:
        with self._catalog.transaction() as tx:
            attempts.renew(tx, build_id, attempt, lease)

    def release(self, build_id: str, attempt: int) -> None:
        with self._catalog.transaction() as tx:
            attempts.release(tx, build_id, attempt)

    def prepare(self, build_id: str, attempt: int, account: str) -> None:
        with self._catalog.transaction() as tx:
            attempts.prepare(tx, build_id, attempt, account)

    def tool_started(self, build_id: str, attempt: int, limit: timedelta) -> datetime:
        with self._catalog.transaction() as tx:
            return attempts.tool_started(tx, build_id, attempt, limit)

    def note_ids(self, build_id: str, ids: Collection[str]) -> None:
        with self._catalog.transaction() as tx:
            attempts.note_ids(tx, build_id, ids)

    def publish(self, image: BuiltImage, build_id: str, ami: Ami, *, simulated: bool) -> BuildEnd:
        with self._catalog.transaction() as tx:
            known = images.of_build(tx, build_id)
            if known is None:
                build = attempts.publish(tx, build_id, image.attempt)
                known = images.insert_ami(tx, build, ami, image, simulated=simulated)
            return BuildEnd(status=BuildStatus.SUCCEEDED, image=images.view(known))

    def begin_publication(self, image: BuiltImage, build_id: str, facts: ImageFacts, host: str) -> Publication:
        with self._catalog.transaction() as tx:
            build = attempts.begin_publication(tx, build_id, image.attempt)
            known = images.of_build(tx, build_id)
            target = _target_of(build)
            if known is None:
                known = images.insert_container(tx, build, facts, image, host)
                tags.publish(tx, build, known, target)
            return Publication(target.repository, target.tag, facts.digest)

    def finish_publication(self, build_id: str) -> BuildEnd:
        with self._catalog.transaction() as tx:
            return _end_of(tx, attempts.finish_publication(tx, build_id))

    def tagged(self, repository: str, tag: str) -> str | None:
        owner, _, name = repository.partition("/")
        with self._catalog.read() as session:
            found = tags.find(session, owner, name, tag)
            return found.tag.digest if found else None

    def needed(self, repository: str, digest: str) -> list[str]:
        with self._catalog.read() as session:
            return tags.needed(session, repository, digest)

    def in_use(self, digest: str) -> bool:
        with self._catalog.read() as session:
            return pod_images.in_use(session, digest)

    def may_pull(self, organization_id: str, repositories: Collection[str]) -> set[str]:
        with self._catalog.read() as session:
            organization = session.get(Organization, organization_id)
            slug = organization.slug if organization else ""
            return tags.readable(session, organization_id, slug, repositories)

    def withheld(self, organization_id: str, digests: Collection[str]) -> set[str]:
        with self._catalog.read() as session:
            built = images.built(session, digests)
        readable = self.may_pull(organization_id, {repository for places in built.values() for repository in places})
        return {digest for digest, places in built.items() if readable.isdisjoint(places)}

    def context(self, build_id: str) -> ContextOrder | None:
        with self._catalog.read() as session:
            row, build = contexts.of(session, build_id), builds.get(session, build_id)
        if row is None or build is None or row.upload_until is None:
            return None
        return ContextOrder(
            key=context_key(build_id),
            dockerfile=row.dockerfile,
            started=row.started,
            wanted=row.open,
            seconds_left=(row.upload_until - datetime.now(UTC)).total_seconds(),
            patience_seconds=round((row.upload_until - build.created_at).total_seconds()),
        )

    def start_context(self, build_id: str, facts: ContextFacts) -> bool:
        with self._catalog.transaction() as tx:
            return contexts.start(tx, build_id, facts)

    def over(self, build_ids: Collection[str]) -> set[str]:
        with self._catalog.read() as session:
            return contexts.over(session, build_ids)

    def errands(self, older_than: timedelta) -> list[Errand]:
        with self._catalog.read() as session:
            rows = errands.waiting(session, older_than, ERRANDS_AT_ONCE)
            return [Errand(row.id, row.repository, row.tag, row.digest, row.source_repository) for row in rows]

    def errand_done(self, errand_id: str) -> None:
        with self._catalog.transaction() as tx:
            errands.done(tx, errand_id)

    def fence_container(self, build_id: str) -> ContainerFootprint:
        with self._catalog.transaction() as tx:
            remaining = attempts.fence(tx, build_id)
            row = attempts.row_of(tx, build_id)
            image = images.of_build(tx, build_id)
            publication = None
            if image is not None and row.status != BuildStatus.SUCCEEDED and image.digest is not None:
                target = _target_of(row)
                publication = Publication(target.repository, target.tag, image.digest)
            return ContainerFootprint(
                build_id=row.id,
                attempt=row.attempt if row.account else 0,
                remaining_lease=remaining,
                orderly=image is not None and row.attempt <= 1,
                publication=publication,
            )

    def note_cancel(self, build_id: str) -> None:
        with self._catalog.transaction() as tx:
            builds.request_cancel(tx, build_id)

    def fence(self, build_id: str) -> Footprint:
        with self._catalog.transaction() as tx:
            remaining = attempts.fence(tx, build_id)
            row = attempts.row_of(tx, build_id)
            published = images.of_build(tx, build_id)
            return Footprint(
                build_id=row.id,
                attempt=row.attempt,
                region=row.region or "",
                account=row.account,
                known_ids=frozenset(row.known_ids),
                published=published.reference if published else None,
                remaining_lease=remaining,
                orderly=published is not None and row.attempt <= 1,
            )

    def finish(self, build_id: str, end: BuildEnd) -> BuildEnd:
        with self._catalog.transaction() as tx:
            return _end_of(tx, attempts.finish(tx, build_id, end))

    def build_of(self, build_id: str) -> BuildBrief | None:
        with self._catalog.read() as session:
            row = builds.get(session, build_id)
            return _brief(row) if row else None

    def open_builds(self, older_than: timedelta) -> list[BuildBrief]:
        with self._catalog.read() as session:
            return [_brief(row) for row in attempts.open_builds(session, older_than)]

    def requeue_lapsed(self) -> int:
        with self._catalog.transaction() as tx:
            return attempts.requeue_lapsed(tx)

    def doomed(self, image_id: str) -> DoomedImage | None:
        with self._catalog.read() as session:
            row = images.get(session, image_id)
            if row is None or row.status != images.DELETING:
                return None
            return DoomedImage(row.reference, row.region, row.account, tuple(row.snapshot_ids))

    def finish_deletion(self, image_id: str, kept: Collection[str]) -> None:
        with self._catalog.transaction() as tx:
            images.finish_deletion(tx, image_id, kept)

    def stuck_deletions(self, older_than: timedelta) -> list[ImageRef]:
        with self._catalog.read() as session:
            rows = images.stuck_deletions(session, older_than)
            return [ImageRef(image_id=row.id, organization_id=row.organization_id) for row in rows]

    def living_images(self) -> list[LivingImage]:
        with self._catalog.read() as session:
            return [
                LivingImage(row.id, row.reference, row.region, row.account, row.simulated)
                for row in images.living(session)
            ]

    def mark_gone(self, image_ids: Collection[str], reason: str) -> None:
        with self._catalog.transaction() as tx:
            images.mark_gone(tx, image_ids, reason)

    def tidy(self) -> None:
        with self._catalog.transaction() as tx:
            idempotency.forget_old(tx)
            nonces.forget_old(tx)


def _target_of(row: Build) -> Target:
    return Target.model_validate(row.spec["target"])


def _brief(row: Build) -> BuildBrief:
    ref = BuildRef(
        build_id=row.id,
        organization_id=row.organization_id,
        kind=BuildKind(row.kind),
        platform=row.platform,
        awaits_context=row.upload_until is not None,
        installs_agent=builds.installs_agent(row),
    )
    return BuildBrief(
        ref=ref,
        status=BuildStatus(row.status),
        run_id=row.run_id,
        cancel_requested=row.cancel_requested_at is not None,
        created_at=row.created_at,
        completed_at=row.completed_at,
    )


def _end_of(tx: Session, row: Build) -> BuildEnd:
    image = images.of_build(tx, row.id)
    error = None
    if row.error_code is not None:
        error = Failure(code=ErrorCode(row.error_code), message=row.error_message or "")
    return BuildEnd(status=BuildStatus(row.status), error=error, image=images.view(image) if image else None)
