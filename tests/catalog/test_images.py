"""Finished images: listed, deleted, and gone behind Kiln's back."""

from datetime import UTC, datetime, timedelta

import pytest

from kiln.catalog import images
from kiln.catalog.images import ImageFilter
from kiln.catalog.ledger import CatalogLedger
from kiln.catalog.session import Catalog
from kiln.catalog.tables import Image
from kiln.models import Api, ImageRef
from support.rows import ACCOUNT, LEASE, REGION, add_build, add_organization, ami, built, new_ami_id

DAY = timedelta(days=1)


@pytest.fixture
def image(ledger: CatalogLedger, catalog: Catalog, organization: str) -> Image:
    """A published image."""
    return publish(ledger, catalog, organization)


def publish(ledger: CatalogLedger, catalog: Catalog, organization: str, provider: str = "codex") -> Image:
    build = add_build(catalog, organization, provider=provider)
    ledger.begin(build, "worker", LEASE)
    made = ami(new_ami_id(), snapshot_ids=("snap-1", "snap-2"))
    ledger.publish(built(made.image_id, 1), build, made, simulated=True)
    with catalog.read() as session:
        row = images.of_build(session, build)
    assert row is not None
    return row


def listing(
    catalog: Catalog, organization: str, *, deleting_since: timedelta = timedelta(0), **wanted: str
) -> set[str]:
    """The AMI ids that a listing shows."""
    since = datetime.now(UTC) - deleting_since
    with catalog.read() as session:
        rows = images.listing(session, ImageFilter(organization, Api.MACHINE_IMAGES, **wanted), since)
    return {row.reference for row in rows}


def begin_deletion(catalog: Catalog, image: Image) -> bool:
    with catalog.transaction() as tx:
        return images.begin_deletion(tx, image.id)


def row_of(catalog: Catalog, image: Image) -> Image:
    with catalog.read() as session:
        row = images.get(session, image.id)
    assert row is not None
    return row


class TestListing:
    def test_it_shows_what_exists(self, catalog: Catalog, organization: str, image: Image) -> None:
        """A published image is listed."""
        assert listing(catalog, organization) == {image.reference}

    def test_it_shows_nobody_elses(self, ledger: CatalogLedger, catalog: Catalog, organization: str) -> None:
        """Another organization's image is not listed."""
        publish(ledger, catalog, add_organization(catalog))
        assert listing(catalog, organization) == set()

    def test_it_is_narrowed_by_provider(self, ledger: CatalogLedger, catalog: Catalog, organization: str) -> None:
        """Only images with that agent are listed."""
        gemini = publish(ledger, catalog, organization, provider="gemini")
        publish(ledger, catalog, organization, provider="codex")
        assert listing(catalog, organization, provider="gemini") == {gemini.reference}

    def test_it_is_narrowed_by_region(self, catalog: Catalog, organization: str, image: Image) -> None:
        """Only images of that region are listed."""
        assert listing(catalog, organization, region=REGION) == {image.reference}
        assert listing(catalog, organization, region="eu-west-1") == set()

    def test_the_newest_comes_first(self, ledger: CatalogLedger, catalog: Catalog, organization: str) -> None:
        """Images are listed by their publication, backwards."""
        made = [publish(ledger, catalog, organization).reference for _ in range(3)]
        with catalog.read() as session:
            rows = images.listing(session, ImageFilter(organization, Api.MACHINE_IMAGES), datetime.now(UTC))
        assert [row.reference for row in rows] == made[::-1]

    def test_an_image_that_is_being_deleted_is_shown_for_a_while(
        self, catalog: Catalog, organization: str, image: Image
    ) -> None:
        """A deletion that began a moment ago is still seen; one that takes long is not."""
        begin_deletion(catalog, image)
        assert listing(catalog, organization, deleting_since=DAY) == {image.reference}
        assert listing(catalog, organization) == set()


class TestFind:
    def test_an_organization_finds_its_image(self, catalog: Catalog, organization: str, image: Image) -> None:
        """An image is found by its AMI's id, within its organization."""
        with catalog.read() as session:
            found = images.find(session, organization, Api.MACHINE_IMAGES, image.reference)
            another = images.find(session, add_organization(catalog), Api.MACHINE_IMAGES, image.reference)
        assert (found and found.id, another) == (image.id, None)


class TestDeletion:
    def test_it_is_the_first_callers(self, catalog: Catalog, image: Image) -> None:
        """A second deletion does not begin."""
        assert [begin_deletion(catalog, image), begin_deletion(catalog, image)] == [True, False]

    def test_the_activity_learns_what_to_delete(self, ledger: CatalogLedger, catalog: Catalog, image: Image) -> None:
        """Reference, account and the snapshots that the catalog remembers."""
        begin_deletion(catalog, image)
        doomed = ledger.doomed(image.id)
        assert doomed is not None
        assert (doomed.reference, doomed.account) == (image.reference, ACCOUNT)
        assert doomed.snapshot_ids == ("snap-1", "snap-2")

    def test_an_available_image_is_not_doomed(self, ledger: CatalogLedger, image: Image) -> None:
        """Nothing is deleted before its row says so."""
        assert ledger.doomed(image.id) is None

    def test_its_end_is_recorded(
        self, ledger: CatalogLedger, catalog: Catalog, organization: str, image: Image
    ) -> None:
        """A deleted image is not listed, and its row names the snapshots that were kept."""
        begin_deletion(catalog, image)
        ledger.finish_deletion(image.id, ["snap-2"])
        row = row_of(catalog, image)
        assert (row.status, row.kept_snapshot_ids) == ("deleted", ["snap-2"])
        assert listing(catalog, organization, deleting_since=DAY) == set()

    def test_its_end_is_recorded_once(self, ledger: CatalogLedger, catalog: Catalog, image: Image) -> None:
        """A repeated end changes nothing."""
        begin_deletion(catalog, image)
        ledger.finish_deletion(image.id, ["snap-2"])
        gone_at = row_of(catalog, image).gone_at
        ledger.finish_deletion(image.id, [])
        row = row_of(catalog, image)
        assert (row.gone_at, row.kept_snapshot_ids) == (gone_at, ["snap-2"])

    def test_one_that_hangs_is_found(
        self, ledger: CatalogLedger, catalog: Catalog, organization: str, image: Image
    ) -> None:
        """A deletion that began a while ago is brought to Temporal again, until its end is recorded."""
        begin_deletion(catalog, image)
        assert ledger.stuck_deletions(DAY) == []
        assert ledger.stuck_deletions(timedelta(0)) == [ImageRef(image_id=image.id, organization_id=organization)]
        ledger.finish_deletion(image.id, [])
        assert ledger.stuck_deletions(timedelta(0)) == []


class TestGone:
    def test_it_is_recorded_with_the_reason(
        self, ledger: CatalogLedger, catalog: Catalog, organization: str, image: Image
    ) -> None:
        """An image that EC2 no longer has is not listed, and its row says why."""
        ledger.mark_gone([image.id], "deregistered elsewhere")
        row = row_of(catalog, image)
        assert (row.status, row.gone_reason) == ("gone", "deregistered elsewhere")
        assert listing(catalog, organization, deleting_since=DAY) == set()

    def test_a_deletion_under_way_is_left_to_its_end(
        self, ledger: CatalogLedger, catalog: Catalog, image: Image
    ) -> None:
        """An image that is being deleted is not `gone`: its snapshots may still be there."""
        begin_deletion(catalog, image)
        ledger.mark_gone([image.id], "deregistered elsewhere")
        assert row_of(catalog, image).status == "deleting"

    def test_only_available_images_are_believed_to_live(
        self, ledger: CatalogLedger, catalog: Catalog, organization: str, image: Image
    ) -> None:
        """What is deleted or gone is not looked for in EC2."""
        gone = publish(ledger, catalog, organization)
        ledger.mark_gone([gone.id], "deregistered elsewhere")
        assert [living.reference for living in ledger.living_images()] == [image.reference]
