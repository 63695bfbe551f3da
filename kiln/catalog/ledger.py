"""The catalog behind `kiln.ports.Ledger`: each method is one transaction."""

from collections.abc import Collection
from datetime import datetime, timedelta

from sqlalchemy.orm import Session

from kiln.catalog import attempts, builds, idempotency, images
from kiln.catalog.session import Catalog
from kiln.catalog.tables import Build
from kiln.models import (
    BuildEnd,
    BuildKind,
    BuildRef,
    BuildStatus,
    BuiltImage,
    Claim,
    ErrorCode,
    Failure,
    ImageRef,
    MachineBuildSpec,
)
from kiln.ports import Ami, BuildBrief, DoomedImage, Footprint, Held, LivingImage, Order
from kiln.sealing import Sealer


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
            spec=MachineBuildSpec.model_validate(row.spec),
            secrets=self._sealer.open(row.secrets),
            known_ids=frozenset(row.known_ids),
            deadline_at=row.deadline_at,
            predecessor_lost=predecessor_lost,
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


def _brief(row: Build) -> BuildBrief:
    ref = BuildRef(
        build_id=row.id, organization_id=row.organization_id, kind=BuildKind(row.kind), platform=row.platform
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
