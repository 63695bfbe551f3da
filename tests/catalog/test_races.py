"""Two at the same moment: one wins, and the other learns it."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import TypeVar

import pytest

from kiln.catalog import attempts, builds, images
from kiln.catalog.ledger import CatalogLedger
from kiln.catalog.session import Catalog
from kiln.errors import BuildCancelledError, BuildOverError
from kiln.models import BuildEnd, BuildStatus, ErrorCode, Failure
from kiln.ports import Order
from support.parallel import Pending, in_parallel
from support.rows import LEASE, add_build, ami, build_row, built, new_ami_id, request_cancel

T = TypeVar("T")
AT_ONCE = 6
ROUNDS = 8


@pytest.fixture
def build(ledger: CatalogLedger, catalog: Catalog, organization: str) -> str:
    """A build that its first attempt is building."""
    return building(ledger, catalog, organization)


def building(ledger: CatalogLedger, catalog: Catalog, organization: str) -> str:
    build = add_build(catalog, organization)
    ledger.claim(build, "run-1")
    ledger.begin(build, "worker", LEASE)
    ledger.tool_started(build, 1, LEASE)
    return build


def publish(ledger: CatalogLedger, build: str, image_id: str) -> BuildEnd:
    return ledger.publish(built(image_id, 1), build, ami(image_id), simulated=True)


def good(outcomes: Sequence[T | Exception]) -> list[T]:
    return [outcome for outcome in outcomes if not isinstance(outcome, Exception)]


def test_one_of_many_runs_claims_a_build(ledger: CatalogLedger, catalog: Catalog, organization: str) -> None:
    """However many runs ask at once, one has the build."""
    build = add_build(catalog, organization)
    claims = in_parallel([partial(ledger.claim, build, f"run-{number}") for number in range(AT_ONCE)])
    assert sum(claim.mine for claim in good(claims)) == 1


def test_one_of_many_workers_begins(ledger: CatalogLedger, catalog: Catalog, organization: str) -> None:
    """However many workers take a build up at once, one attempt begins and the others wait."""
    build = add_build(catalog, organization)
    orders = good(in_parallel([partial(ledger.begin, build, f"worker-{n}", LEASE) for n in range(AT_ONCE)]))
    assert (len(orders), sum(isinstance(order, Order) for order in orders)) == (AT_ONCE, 1)
    assert build_row(catalog, build).attempt == 1


def test_publish_and_cancel_at_once(ledger: CatalogLedger, catalog: Catalog, organization: str) -> None:
    """A build that is published and cancelled at the same moment is one or the other, never both or neither."""
    for _ in range(ROUNDS):
        build = building(ledger, catalog, organization)
        calls: list[Callable[[], object]] = [
            partial(publish, ledger, build, new_ami_id()),
            partial(request_cancel, catalog, build),
        ]
        published, cancelled = in_parallel(calls)
        assert cancelled is None
        row = build_row(catalog, build)
        if isinstance(published, BuildEnd):
            assert (row.status, row.cancel_requested_at) == ("succeeded", None)
        else:
            assert isinstance(published, BuildCancelledError)
            assert (row.status, row.cancel_requested_at is None) == ("building", False)


def test_a_cancel_waits_for_the_publication(ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
    """A cancel that comes while the publication commits finds the build closed."""
    with catalog.transaction() as tx:
        attempts.publish(tx, build, 1)
        cancel = Pending(partial(request_cancel, catalog, build))
        assert cancel.is_waiting()
    cancel.result()
    row = build_row(catalog, build)
    assert (row.status, row.cancel_requested_at) == ("succeeded", None)


def test_a_publication_waits_for_the_cancel(ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
    """A publication that comes while a cancel commits is refused."""
    with catalog.transaction() as tx:
        builds.request_cancel(tx, build)
        publication = Pending(partial(publish, ledger, build, new_ami_id()))
        assert publication.is_waiting()
    with pytest.raises(BuildCancelledError):
        publication.result()


def test_a_fence_waits_for_the_publication(ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
    """A cleanup that begins while the publication commits spares the image."""
    image = ami()
    with catalog.transaction() as tx:
        row = attempts.publish(tx, build, 1)
        images.insert_ami(tx, row, image, built(image.image_id, 1), simulated=True)
        fence = Pending(partial(ledger.fence, build))
        assert fence.is_waiting()
    assert fence.result().published == image.image_id


def test_a_publication_waits_for_the_fence(ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
    """A publication that comes while the cleanup begins is refused."""
    with catalog.transaction() as tx:
        attempts.fence(tx, build)
        publication = Pending(partial(publish, ledger, build, new_ami_id()))
        assert publication.is_waiting()
    with pytest.raises(BuildOverError):
        publication.result()


def test_a_fence_waits_for_the_renewal(ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
    """A cleanup that begins while a lease is renewed waits the renewed lease out, not the old one."""
    with catalog.transaction() as tx:
        attempts.renew(tx, build, 1, timedelta(hours=1))
        fence = Pending(partial(ledger.fence, build))
        assert fence.is_waiting()
    assert fence.result().remaining_lease > timedelta(minutes=50)


def test_a_fence_waits_for_what_is_noted(ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
    """A cleanup that begins while ids are noted knows them."""
    with catalog.transaction() as tx:
        attempts.note_ids(tx, build, ["i-0123456789abcdef0"])
        tx.flush()
        fence = Pending(partial(ledger.fence, build))
        assert fence.is_waiting()
    assert fence.result().known_ids == {"i-0123456789abcdef0"}


def test_the_first_of_two_ends_stands(ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
    """The workflow and the house-keeping may close a build at once: both say the same end."""
    lost = Failure(code=ErrorCode.WORKFLOW_TERMINATED, message="terminated")
    ends = [BuildEnd(status=BuildStatus.FAILED, error=lost), BuildEnd(status=BuildStatus.CANCELLED)]
    said = good(in_parallel([partial(ledger.finish, build, end) for end in ends * 3]))
    assert len(said) == len(ends) * 3
    assert {end.status.value for end in said} == {build_row(catalog, build).status}


def test_one_of_two_deletions_begins(ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
    """Whoever deletes an image at the same moment as another is told that it is not his to delete."""
    image_id = new_ami_id()
    publish(ledger, build, image_id)
    with catalog.read() as session:
        row = images.of_build(session, build)
    assert row is not None

    def begin_deletion(image: str) -> bool:
        with catalog.transaction() as tx:
            return images.begin_deletion(tx, image)

    began = in_parallel([partial(begin_deletion, row.id)] * AT_ONCE)
    assert sorted(good(began)) == [False] * (AT_ONCE - 1) + [True]


def test_ids_that_two_note_at_once_add_up(ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
    """No id is lost when two transactions note some at the same moment."""
    in_parallel([partial(ledger.note_ids, build, [f"vol-{number}"]) for number in range(AT_ONCE)])
    assert ledger.fence(build).known_ids == {f"vol-{number}" for number in range(AT_ONCE)}
