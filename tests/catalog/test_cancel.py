"""What a request for a build's cancellation does to its row."""

from kiln.catalog.builds import shown_status
from kiln.catalog.ledger import CatalogLedger
from kiln.catalog.session import Catalog
from kiln.models import BuildEnd, BuildStatus
from kiln.sealing import Sealer
from support.rows import LEASE, add_build, build_row, ref, request_cancel


def test_a_build_that_no_run_has_ends_at_once(
    ledger: CatalogLedger, catalog: Catalog, organization: str, sealer: Sealer
) -> None:
    """A cancel before dispatch closes the row, and wipes its secrets."""
    build = add_build(catalog, organization, secrets=sealer.seal({"token": "s3cr3t-value"}))
    request_cancel(catalog, build)
    row = build_row(catalog, build)
    assert (row.status, row.secrets) == ("cancelled", None)
    assert row.completed_at is not None


def test_a_run_that_comes_later_loses_its_claim(ledger: CatalogLedger, catalog: Catalog, organization: str) -> None:
    """A build that was cancelled before dispatch is never built."""
    build = add_build(catalog, organization)
    request_cancel(catalog, build)
    assert not ledger.claim(build, "run-1").mine


def test_a_claimed_build_is_asked_to_end(ledger: CatalogLedger, catalog: Catalog, organization: str) -> None:
    """The row of a build that a run has keeps its status and reads as cancelling."""
    build = add_build(catalog, organization)
    ledger.claim(build, "run-1")
    request_cancel(catalog, build)
    row = build_row(catalog, build)
    assert (row.status, shown_status(row)) == ("queued", BuildStatus.CANCELLING)


def test_asking_twice_changes_nothing(ledger: CatalogLedger, catalog: Catalog, organization: str) -> None:
    """The first request's time stands."""
    build = add_build(catalog, organization)
    ledger.claim(build, "run-1")
    request_cancel(catalog, build)
    asked_at = build_row(catalog, build).cancel_requested_at
    request_cancel(catalog, build)
    assert build_row(catalog, build).cancel_requested_at == asked_at


def test_a_closed_build_is_left_as_it_is(ledger: CatalogLedger, catalog: Catalog, organization: str) -> None:
    """A failed build cannot be cancelled."""
    build = add_build(catalog, organization)
    ledger.finish(build, BuildEnd(status=BuildStatus.FAILED))
    request_cancel(catalog, build)
    row = build_row(catalog, build)
    assert (row.status, row.cancel_requested_at) == ("failed", None)


def test_a_cancel_through_temporal_reads_the_same(ledger: CatalogLedger, catalog: Catalog, organization: str) -> None:
    """A cancellation that came to the workflow shows in the row."""
    build = add_build(catalog, organization)
    ledger.claim(build, "run-1")
    ledger.begin(build, "worker", LEASE)
    ledger.tool_started(build, 1, LEASE)
    ledger.note_cancel(build)
    assert shown_status(build_row(catalog, build)) is BuildStatus.CANCELLING


def test_a_brief_says_that_it_was_asked_for(ledger: CatalogLedger, catalog: Catalog, organization: str) -> None:
    """The dispatcher sees which cancellations to bring to Temporal."""
    build = add_build(catalog, organization)
    ledger.claim(build, "run-1")
    request_cancel(catalog, build)
    brief = ledger.build_of(build)
    assert brief is not None
    assert (brief.ref, brief.run_id, brief.cancel_requested) == (ref(organization, build), "run-1", True)
