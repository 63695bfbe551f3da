"""Publishing a container image: committed first, carried out by the registry second, and never undone between."""

from datetime import timedelta
from functools import partial

import pytest

from kiln.catalog import attempts, builds, errands, images, tags
from kiln.catalog.builds import BuildFilter, shown_status
from kiln.catalog.ledger import CatalogLedger
from kiln.catalog.session import Catalog
from kiln.catalog.tables import Image
from kiln.errors import AttemptLostError, BuildCancelledError, BuildOverError
from kiln.models import Api, BuildEnd, BuildStatus, ErrorCode, Failure
from kiln.sealing import Sealer
from support.container_rows import (
    HOST,
    add_container,
    begin,
    begin_publication,
    finish_publication,
    image_facts,
    known_tag,
    new_container,
    published,
    tag_row,
    target,
)
from support.parallel import Pending, in_parallel
from support.rows import LEASE, build_row, request_cancel, rewrite

FACTS = image_facts("sha256:" + "a" * 64, "linux/arm64", "linux/amd64")
LOST = Failure(code=ErrorCode.WORKFLOW_TERMINATED, message="terminated")


@pytest.fixture
def build(catalog: Catalog, organization: str, sealer: Sealer) -> str:
    """A build that its first attempt is building."""
    build = add_container(catalog, organization, secrets=sealer.seal({"TOKEN": "s3cr3t-value"}))
    begin(catalog, build)
    return build


def commit(catalog: Catalog, build: str, attempt: int = 1) -> None:
    """The publication's first half, of the row alone."""
    with catalog.transaction() as tx:
        attempts.begin_publication(tx, build, attempt)


def finish(catalog: Catalog, build: str, end: BuildEnd) -> None:
    with catalog.transaction() as tx:
        attempts.finish(tx, build, end)


def test_the_image_and_its_tag_are_committed_together(catalog: Catalog, build: str) -> None:
    """From then on the tag points there, and the build is still open until the registry has it."""
    image = begin_publication(catalog, build, target(), FACTS)
    row = build_row(catalog, build)
    assert (row.status, row.publishing_at is None, row.completed_at) == ("building", False, None)
    assert known_tag(catalog, target()).tag.image_id == image.id
    assert (image.repository, image.platforms) == ("acme/app", ["linux/arm64", "linux/amd64"])


def test_its_view_names_the_digest(catalog: Catalog, build: str) -> None:
    """`kiln.md` shows a container image by a reference that cannot move; of several platforms, the build's own."""
    view = images.view(begin_publication(catalog, build, target(), FACTS))
    assert (view.kind, view.reference, view.digest) == ("container", f"{HOST}/acme/app@{FACTS.digest}", FACTS.digest)
    assert (view.region, view.platform, view.size_bytes) == (None, "linux/amd64", 4096)


def test_the_longest_names_have_room(catalog: Catalog, organization: str) -> None:
    """A repository may have 255 characters and a tag 128, and the image's reference names host and digest as well."""
    to = target("n" * (255 - len("acme/")), "t" * 128)
    image = published(catalog, organization, to)
    assert image.reference == f"{HOST}/{to.repository}@{image.digest}"
    assert known_tag(catalog, to).tag.image_id == image.id


def test_the_second_half_ends_the_build(catalog: Catalog, build: str) -> None:
    """It has succeeded, without its secrets; repeating it changes nothing."""
    begin_publication(catalog, build, target(), FACTS)
    finish_publication(catalog, build)
    row = build_row(catalog, build)
    assert (row.status, row.secrets, row.completed_at is None) == ("succeeded", None, False)
    finish_publication(catalog, build)
    assert build_row(catalog, build).completed_at == row.completed_at


def test_the_second_half_needs_the_first(catalog: Catalog, build: str) -> None:
    """A build that never committed an image does not succeed."""
    with pytest.raises(BuildOverError):
        finish_publication(catalog, build)
    assert build_row(catalog, build).status == "building"


def test_beginning_again_is_harmless(catalog: Catalog, build: str) -> None:
    """A publication that is repeated finds itself, before and after its end."""
    commit(catalog, build)
    begun_at = build_row(catalog, build).publishing_at
    commit(catalog, build)
    finish_publication(catalog, build)
    commit(catalog, build)
    row = build_row(catalog, build)
    assert (row.status, row.publishing_at) == ("succeeded", begun_at)


def test_another_attempt_publishes_nothing(catalog: Catalog, build: str) -> None:
    """Neither before nor after the attempt that holds the build."""
    with pytest.raises(AttemptLostError):
        commit(catalog, build, attempt=2)
    commit(catalog, build)
    with pytest.raises(BuildOverError):
        commit(catalog, build, attempt=2)


def test_a_cancel_after_it_changes_nothing(catalog: Catalog, build: str) -> None:
    """What is public stays so, and the build does not read as being cancelled."""
    commit(catalog, build)
    request_cancel(catalog, build)
    row = build_row(catalog, build)
    assert (row.cancel_requested_at, shown_status(row)) == (None, BuildStatus.BUILDING)


def test_a_cancel_before_it_forbids_it(catalog: Catalog, build: str) -> None:
    """A build that is being cancelled publishes nothing, and its tag points nowhere."""
    request_cancel(catalog, build)
    with pytest.raises(BuildCancelledError):
        begin_publication(catalog, build, target(), FACTS)
    assert known_tag(catalog, target()).tag.digest is None


def test_a_cleanup_before_it_forbids_it(catalog: Catalog, build: str) -> None:
    """Once the build was taken away from its attempt, nothing may be published."""
    with catalog.transaction() as tx:
        attempts.fence(tx, build)
    with pytest.raises(BuildOverError):
        commit(catalog, build)


def test_one_of_cancel_and_publication_wins(catalog: Catalog, organization: str) -> None:
    """At the same moment, one of the two holds, never both or neither."""
    for number in range(6):
        to = target(tag=f"v{number}")
        build = add_container(catalog, organization, to)
        begin(catalog, build)
        outcome, _ = in_parallel(
            [partial(begin_publication, catalog, build, to, image_facts()), partial(request_cancel, catalog, build)]
        )
        row = build_row(catalog, build)
        assert (row.publishing_at is None) == isinstance(outcome, BuildCancelledError)
        assert (row.publishing_at is None) == (row.cancel_requested_at is not None)


def test_a_cancel_waits_for_the_commit(catalog: Catalog, build: str) -> None:
    """A cancel that comes while the publication commits finds it done."""
    with catalog.transaction() as tx:
        attempts.begin_publication(tx, build, 1)
        cancel = Pending(partial(request_cancel, catalog, build))
        assert cancel.is_waiting()
    cancel.result()
    assert build_row(catalog, build).cancel_requested_at is None


@pytest.mark.parametrize("status", [BuildStatus.FAILED, BuildStatus.CANCELLED, BuildStatus.TIMED_OUT])
def test_whatever_ends_it_it_has_succeeded(catalog: Catalog, build: str, status: BuildStatus) -> None:
    """A workflow that was lost after the commit does not take back what is public."""
    commit(catalog, build)
    finish(catalog, build, BuildEnd(status=status, error=LOST))
    row = build_row(catalog, build)
    assert (row.status, row.error_code, row.error_message) == ("succeeded", None, None)


def test_no_attempt_begins_after_it(catalog: Catalog, build: str) -> None:
    """What is being published is not built again, though its lease is over; it stays `building`."""
    commit(catalog, build)
    rewrite(catalog, build, lease_until=build_row(catalog, build).created_at)
    with pytest.raises(BuildOverError), catalog.transaction() as tx:
        attempts.begin(tx, build, "worker", LEASE)
    with catalog.transaction() as tx:
        assert attempts.requeue_lapsed(tx) == 0


def test_a_status_filter_calls_it_building(catalog: Catalog, organization: str, build: str) -> None:
    """Kiln's own list agrees with the build's own page, whatever was asked for before."""
    commit(catalog, build)
    rewrite(catalog, build, cancel_requested_at=build_row(catalog, build).created_at)
    with catalog.read() as session:
        wanted = BuildFilter(organization, statuses=["building"])
        assert [each.build.id for each in builds.page(session, wanted, 50, None)] == [build]


class TestMachineImages:
    """Container images are no AMIs: what looks after AMIs does not see them."""

    @pytest.fixture
    def image(self, catalog: Catalog, organization: str) -> Image:
        return published(catalog, organization, target())

    def test_they_are_not_listed(self, catalog: Catalog, organization: str, image: Image) -> None:
        """Neither by a listing nor by their reference."""
        with catalog.read() as session:
            wanted = images.ImageFilter(organization, Api.CONTAINER_IMAGES)
            assert images.listing(session, wanted, build_row(catalog, image.build_id).created_at) == []
            assert images.find(session, organization, Api.CONTAINER_IMAGES, image.reference) is None

    def test_they_are_not_looked_for_in_ec2(self, ledger: CatalogLedger, catalog: Catalog, image: Image) -> None:
        """An account without them proves nothing."""
        rewrite_image(catalog, image)
        assert ledger.living_images() == []
        assert ledger.stuck_deletions(timedelta(0)) == []


def rewrite_image(catalog: Catalog, image: Image) -> None:
    """Leaves a container image as if its deletion had begun."""
    with catalog.transaction() as tx:
        row = tx.get_one(Image, image.id)
        row.status, row.deleting_at = images.DELETING, row.created_at


def test_the_same_digest_may_be_built_twice(catalog: Catalog, organization: str) -> None:
    """A rebuild that changes nothing has an image of its own, under the same reference."""
    first = published(catalog, organization, target(), FACTS.digest)
    second = published(catalog, organization, target(), FACTS.digest)
    assert (first.id == second.id, first.reference == second.reference) == (False, True)


def test_a_failed_build_leaves_what_the_tag_points_at(catalog: Catalog, organization: str) -> None:
    """The tag shows the failed build, and still points at the image before it."""
    image = published(catalog, organization, target())
    failed = add_container(catalog, organization)
    finish(catalog, failed, BuildEnd(status=BuildStatus.FAILED))
    row = known_tag(catalog, target())
    assert (row.build.id, row.build.status, row.tag.image_id) == (failed, "failed", image.id)


def test_a_transaction_that_fails_leaves_no_tag(catalog: Catalog, organization: str) -> None:
    """A build and its tag are written together, or not at all."""

    class RefusedError(Exception):
        pass

    def submit() -> None:
        with catalog.transaction() as tx:
            tags.claim(tx, builds.insert(tx, new_container(organization, target())), target())
            raise RefusedError

    with pytest.raises(RefusedError):
        submit()
    assert tag_row(catalog, target()) is None


class TestErrands:
    def test_one_waits_until_it_is_done(self, catalog: Catalog) -> None:
        """What the registry is to do is kept; the oldest comes first, and no more than asked for."""
        with catalog.transaction() as tx:
            made = [errands.add(tx, "acme/app", f"v{number}", FACTS.digest).id for number in range(3)]
        with catalog.read() as session:
            assert [row.id for row in errands.waiting(session, timedelta(0), 2)] == made[:2]
            assert errands.waiting(session, timedelta(hours=1), 2) == []
        for _ in range(2):
            with catalog.transaction() as tx:
                errands.done(tx, made[0])
        with catalog.read() as session:
            assert [row.id for row in errands.waiting(session, timedelta(0), 10)] == made[1:]

    def test_one_that_tags_names_its_source(self, catalog: Catalog) -> None:
        """A tag that moves to another repository brings its manifest from the first."""
        with catalog.transaction() as tx:
            errands.add(tx, "acme/tool", "v1", FACTS.digest, source_repository="acme/app")
            errands.add(tx, "acme/app", "v1", FACTS.digest)
        with catalog.read() as session:
            sources = [row.source_repository for row in errands.waiting(session, timedelta(0), 10)]
        assert sources == ["acme/app", None]
