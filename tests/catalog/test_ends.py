"""How builds end: published, fenced for the cleanup, and closed."""

from datetime import timedelta

import pytest

from kiln.catalog import images
from kiln.catalog.ledger import CatalogLedger
from kiln.catalog.session import Catalog
from kiln.errors import AttemptLostError, BuildCancelledError, BuildNotFoundError, BuildOverError
from kiln.models import BuildEnd, BuildStatus, ErrorCode, Failure
from kiln.sealing import Sealer
from support.rows import ACCOUNT, LEASE, NO_LEASE, add_build, ami, build_row, built, new_ami_id, request_cancel

CANCELLED = BuildEnd(status=BuildStatus.CANCELLED)
FAILED = BuildEnd(status=BuildStatus.FAILED, error=Failure(code=ErrorCode.TOOL_FAILED, message="no space left"))


@pytest.fixture
def build(ledger: CatalogLedger, catalog: Catalog, organization: str, sealer: Sealer) -> str:
    """A build with a secret that its first attempt is building."""
    build = add_build(catalog, organization, secrets=sealer.seal({"token": "s3cr3t-value"}))
    ledger.claim(build, "run-1")
    ledger.begin(build, "worker", LEASE)
    ledger.tool_started(build, 1, LEASE)
    return build


def publish(ledger: CatalogLedger, build: str, image_id: str = "", attempt: int = 1) -> BuildEnd:
    image = ami(image_id)
    return ledger.publish(built(image.image_id, attempt), build, image, simulated=True)


def has_image(catalog: Catalog, build: str) -> bool:
    with catalog.read() as session:
        return images.of_build(session, build) is not None


class TestPublish:
    def test_status_and_image_are_written_together(self, ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
        """A published build reads `succeeded` and has its image."""
        end = publish(ledger, build, "ami-0123456789abcdef0")
        assert build_row(catalog, build).status == "succeeded"
        assert end.image is not None
        assert (end.image.reference, end.image.simulated) == ("ami-0123456789abcdef0", True)

    def test_it_forgets_the_secrets(self, ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
        """A succeeded build needs its secrets no more."""
        publish(ledger, build)
        assert build_row(catalog, build).secrets is None

    def test_repeating_it_changes_nothing(self, ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
        """A repeated publication answers as the first, though it names another image."""
        first = publish(ledger, build)
        completed_at = build_row(catalog, build).completed_at
        assert publish(ledger, build) == first
        assert build_row(catalog, build).completed_at == completed_at

    def test_a_cancel_refuses_it(self, ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
        """A build whose cancellation was asked for is not published."""
        request_cancel(catalog, build)
        with pytest.raises(BuildCancelledError):
            publish(ledger, build)
        assert not has_image(catalog, build)

    def test_a_cancel_afterwards_changes_nothing(self, ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
        """A succeeded build stays so, and does not read as cancelling."""
        publish(ledger, build)
        request_cancel(catalog, build)
        row = build_row(catalog, build)
        assert (row.status, row.cancel_requested_at) == ("succeeded", None)

    def test_a_fence_refuses_it(self, ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
        """What the cleanup removes is not published afterwards."""
        ledger.fence(build)
        with pytest.raises(BuildOverError):
            publish(ledger, build)
        assert not has_image(catalog, build)

    def test_a_closed_build_refuses_it(self, ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
        """A build that is over gets no image."""
        ledger.finish(build, CANCELLED)
        with pytest.raises(BuildOverError):
            publish(ledger, build)
        assert not has_image(catalog, build)

    def test_a_lost_attempt_is_refused(self, ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
        """Only the latest attempt's image is published."""
        ledger.release(build, 1)
        ledger.begin(build, "another", LEASE)
        with pytest.raises(AttemptLostError):
            publish(ledger, build, attempt=1)
        assert not has_image(catalog, build)


class TestFence:
    def test_it_waits_out_what_the_holder_has_left(self, ledger: CatalogLedger, build: str) -> None:
        """The cleanup learns how long a lost attempt's tool may still live."""
        assert LEASE - timedelta(seconds=20) < ledger.fence(build).remaining_lease <= LEASE

    def test_a_released_build_leaves_nothing_to_wait_for(self, ledger: CatalogLedger, build: str) -> None:
        """After an orderly end the cleanup begins at once."""
        ledger.release(build, 1)
        assert ledger.fence(build).remaining_lease == timedelta(0)

    def test_a_lapsed_lease_leaves_nothing_to_wait_for(
        self, ledger: CatalogLedger, catalog: Catalog, organization: str
    ) -> None:
        """A lease that is over is not waited for."""
        build = add_build(catalog, organization)
        ledger.begin(build, "worker", NO_LEASE)
        assert ledger.fence(build).remaining_lease == timedelta(0)

    def test_it_names_what_is_published(self, ledger: CatalogLedger, build: str) -> None:
        """The cleanup spares the published AMI, and knows that the end was orderly."""
        image_id = new_ami_id()
        publish(ledger, build, image_id)
        footprint = ledger.fence(build)
        assert (footprint.published, footprint.orderly) == (image_id, True)

    def test_a_second_attempt_makes_an_end_disorderly(self, ledger: CatalogLedger, build: str) -> None:
        """Where an attempt was lost, the cleanup watches EC2 for a while."""
        ledger.release(build, 1)
        ledger.begin(build, "another", LEASE)
        publish(ledger, build, attempt=2)
        assert not ledger.fence(build).orderly

    def test_it_says_where_to_look(self, ledger: CatalogLedger, build: str) -> None:
        """Region, account and attempt are what the cleanup goes by."""
        ledger.prepare(build, 1, ACCOUNT)
        footprint = ledger.fence(build)
        assert (footprint.region, footprint.account, footprint.attempt) == ("us-east-1", ACCOUNT, 1)

    def test_an_attempt_that_made_nothing_has_no_account(self, ledger: CatalogLedger, build: str) -> None:
        """Without an account there is nothing to look for."""
        assert ledger.fence(build).account is None

    def test_an_unknown_build_is_said_to_be_so(self, ledger: CatalogLedger) -> None:
        """There is no footprint of a build that is not in the catalog."""
        with pytest.raises(BuildNotFoundError):
            ledger.fence("5e1f4c4e-0000-4000-8000-000000000000")


class TestFinish:
    def test_it_closes_the_build(self, ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
        """The row says how the build ended, and why."""
        assert ledger.finish(build, FAILED) == FAILED
        row = build_row(catalog, build)
        assert (row.status, row.error_code, row.error_message) == ("failed", "tool_failed", "no space left")
        assert row.completed_at is not None

    def test_the_first_end_stands(self, ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
        """A second end changes nothing, and is told the first."""
        ledger.finish(build, FAILED)
        assert ledger.finish(build, CANCELLED) == FAILED
        assert build_row(catalog, build).status == "failed"

    def test_a_published_build_stays_succeeded(self, ledger: CatalogLedger, build: str) -> None:
        """Whatever the workflow believes, a publication that committed is the end."""
        published = publish(ledger, build)
        assert ledger.finish(build, CANCELLED) == published

    def test_it_forgets_the_secrets(self, ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
        """No end keeps a secret."""
        ledger.finish(build, CANCELLED)
        assert build_row(catalog, build).secrets is None

    def test_it_notes_that_the_cleanup_is_done(self, ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
        """A succeeded build is cleaned up after as well."""
        publish(ledger, build)
        ledger.finish(build, BuildEnd(status=BuildStatus.SUCCEEDED))
        assert build_row(catalog, build).cleaned_at is not None
