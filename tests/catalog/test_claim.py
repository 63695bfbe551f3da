"""Which workflow run has a build."""

from kiln.catalog.ledger import CatalogLedger
from kiln.catalog.session import Catalog
from kiln.models import BuildEnd, BuildStatus
from support.rows import LEASE, add_build, build_row, request_cancel


def test_the_first_run_that_asks_gets_the_build(ledger: CatalogLedger, catalog: Catalog, organization: str) -> None:
    """A queued build is claimed by the run that asks first, and its row says so."""
    build = add_build(catalog, organization)
    assert ledger.claim(build, "run-1").mine
    assert build_row(catalog, build).run_id == "run-1"


def test_a_claim_carries_the_terms_of_the_settings(ledger: CatalogLedger, catalog: Catalog, organization: str) -> None:
    """The workflow learns heartbeat time-out and attempts from its claim."""
    claim = ledger.claim(add_build(catalog, organization), "run-1")
    assert (claim.heartbeat_timeout_seconds, claim.max_attempts) == (7, 5)


def test_a_second_run_loses(ledger: CatalogLedger, catalog: Catalog, organization: str) -> None:
    """A build that one run has is not given to another."""
    build = add_build(catalog, organization)
    ledger.claim(build, "run-1")
    assert not ledger.claim(build, "run-2").mine
    assert build_row(catalog, build).run_id == "run-1"


def test_the_same_run_may_claim_again(ledger: CatalogLedger, catalog: Catalog, organization: str) -> None:
    """A repeated claim of the original run holds, though the build has begun: that is what a reset does."""
    build = add_build(catalog, organization)
    ledger.claim(build, "run-1")
    ledger.begin(build, "worker", LEASE)
    ledger.tool_started(build, 1, LEASE)
    assert ledger.claim(build, "run-1").mine


def test_a_closed_build_is_nobodys(ledger: CatalogLedger, catalog: Catalog, organization: str) -> None:
    """Not even the run that had the build claims it after its end."""
    build = add_build(catalog, organization)
    ledger.claim(build, "run-1")
    ledger.finish(build, BuildEnd(status=BuildStatus.CANCELLED))
    assert not ledger.claim(build, "run-1").mine


def test_an_unknown_build_is_nobodys(ledger: CatalogLedger) -> None:
    """A run whose build the catalog does not have loses."""
    assert not ledger.claim("5e1f4c4e-0000-4000-8000-000000000000", "run-1").mine


def test_a_claim_says_that_the_cancellation_was_asked_for(
    ledger: CatalogLedger, catalog: Catalog, organization: str
) -> None:
    """A run whose build was cancelled while Temporal was away learns it here."""
    build = add_build(catalog, organization)
    ledger.claim(build, "run-1")
    request_cancel(catalog, build)
    assert ledger.claim(build, "run-1").cancelled
