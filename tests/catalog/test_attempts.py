"""How attempts take a build, hold it, and lose it."""

from datetime import timedelta

import pytest

from kiln.catalog.ledger import CatalogLedger
from kiln.catalog.session import Catalog
from kiln.errors import AttemptLostError, BuildCancelledError, BuildNotFoundError, BuildOverError
from kiln.models import BuildEnd, BuildStatus
from kiln.ports import Held, Order
from kiln.sealing import Sealer
from support.rows import ACCOUNT, LEASE, NO_LEASE, add_build, build_row, request_cancel

UNKNOWN = "5e1f4c4e-0000-4000-8000-000000000000"
CANCELLED = BuildEnd(status=BuildStatus.CANCELLED)


@pytest.fixture
def build(catalog: Catalog, organization: str) -> str:
    """A queued build's id."""
    return add_build(catalog, organization)


def begin(ledger: CatalogLedger, build: str, lease: timedelta = LEASE) -> Order:
    order = ledger.begin(build, "worker", lease)
    assert isinstance(order, Order)
    return order


def status_of(catalog: Catalog, build: str) -> str:
    return build_row(catalog, build).status


class TestBegin:
    def test_the_first_attempt_is_number_one(self, ledger: CatalogLedger, build: str) -> None:
        """Attempts count from 1, in the catalog."""
        assert begin(ledger, build).attempt == 1

    def test_an_order_says_what_to_build(
        self, ledger: CatalogLedger, catalog: Catalog, organization: str, sealer: Sealer
    ) -> None:
        """The builder gets the specification, with the secrets in clear."""
        build = add_build(catalog, organization, secrets=sealer.seal({"token": "s3cr3t-value"}), provider="gemini")
        order = begin(ledger, build)
        assert (order.spec.provider, order.secrets) == ("gemini", {"token": "s3cr3t-value"})

    def test_a_build_waits_until_its_tool_starts(self, ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
        """An attempt that has begun still reads `queued`."""
        begin(ledger, build)
        assert status_of(catalog, build) == "queued"

    def test_a_held_build_says_for_how_long(self, ledger: CatalogLedger, build: str) -> None:
        """While a lease runs nobody else begins, and learns how long to wait."""
        begin(ledger, build)
        held = ledger.begin(build, "another", LEASE)
        assert isinstance(held, Held)
        assert LEASE - timedelta(seconds=20) < held.remaining <= LEASE

    def test_a_lease_that_is_over_lets_the_next_begin(self, ledger: CatalogLedger, build: str) -> None:
        """The successor of a lost attempt has the next number."""
        begin(ledger, build, NO_LEASE)
        assert begin(ledger, build).attempt == 2

    def test_a_successor_that_waits_is_queued_again(self, ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
        """What a lost attempt was building waits again."""
        begin(ledger, build, NO_LEASE)
        ledger.tool_started(build, 1, LEASE)
        begin(ledger, build)
        assert status_of(catalog, build) == "queued"

    def test_a_successor_knows_what_was_named(self, ledger: CatalogLedger, build: str) -> None:
        """The ids that a lost attempt's tool named reach the next one."""
        begin(ledger, build, NO_LEASE)
        ledger.note_ids(build, ["i-0123456789abcdef0"])
        assert begin(ledger, build).known_ids == {"i-0123456789abcdef0"}

    def test_a_successor_makes_an_image_of_its_own(self, ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
        """The AMI that a lost attempt was making is no longer the one that this build is making."""
        begin(ledger, build, NO_LEASE)
        ledger.note_ids(build, ["ami-0123456789abcdef0"])
        begin(ledger, build)
        assert build_row(catalog, build).pending_image is None

    def test_a_released_build_can_begin_at_once(self, ledger: CatalogLedger, build: str) -> None:
        """An attempt that gives its build up makes nobody wait."""
        begin(ledger, build)
        ledger.release(build, 1)
        assert begin(ledger, build).attempt == 2

    def test_a_successor_knows_whether_its_predecessor_was_lost(self, ledger: CatalogLedger, build: str) -> None:
        """Who let the lease run out was lost; who gave the build up, and the first attempt's nobody, were not."""
        lost = [begin(ledger, build, NO_LEASE).predecessor_lost, begin(ledger, build).predecessor_lost]
        ledger.release(build, 2)
        assert [*lost, begin(ledger, build).predecessor_lost] == [False, True, False]

    def test_a_cancel_refuses_it(self, ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
        """No attempt begins on a build whose cancellation was asked for."""
        ledger.claim(build, "run-1")
        request_cancel(catalog, build)
        with pytest.raises(BuildCancelledError):
            ledger.begin(build, "worker", LEASE)

    def test_a_closed_build_refuses_it(self, ledger: CatalogLedger, build: str) -> None:
        """No attempt begins on a build that is over."""
        ledger.finish(build, CANCELLED)
        with pytest.raises(BuildOverError):
            ledger.begin(build, "worker", LEASE)

    def test_a_fence_refuses_it(self, ledger: CatalogLedger, build: str) -> None:
        """No attempt begins once the cleanup has."""
        ledger.fence(build)
        with pytest.raises(BuildOverError):
            ledger.begin(build, "worker", LEASE)

    def test_an_unknown_build_refuses_it(self, ledger: CatalogLedger) -> None:
        """A build that is not in the catalog cannot begin."""
        with pytest.raises(BuildNotFoundError):
            ledger.begin(UNKNOWN, "worker", LEASE)


class TestRenew:
    def test_it_holds_the_build_for_longer(self, ledger: CatalogLedger, build: str) -> None:
        """The lease counts from the renewal."""
        begin(ledger, build, timedelta(seconds=10))
        ledger.renew(build, 1, timedelta(seconds=100))
        held = ledger.begin(build, "another", LEASE)
        assert isinstance(held, Held)
        assert held.remaining > timedelta(seconds=50)

    def test_a_lease_that_is_over_cannot_be_renewed(self, ledger: CatalogLedger, build: str) -> None:
        """Nobody may hold again what he held too briefly: another may have looked meanwhile."""
        begin(ledger, build, NO_LEASE)
        with pytest.raises(AttemptLostError):
            ledger.renew(build, 1, LEASE)

    def test_a_successor_takes_the_build_for_good(self, ledger: CatalogLedger, build: str) -> None:
        """Once another attempt has begun, the earlier one has lost."""
        begin(ledger, build, NO_LEASE)
        begin(ledger, build)
        with pytest.raises(AttemptLostError):
            ledger.renew(build, 1, LEASE)

    def test_a_released_build_cannot_be_renewed(self, ledger: CatalogLedger, build: str) -> None:
        """Who gave the build up does not hold it any more."""
        begin(ledger, build)
        ledger.release(build, 1)
        with pytest.raises(AttemptLostError):
            ledger.renew(build, 1, LEASE)

    def test_a_cancel_ends_it(self, ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
        """The holder learns of a cancellation with its next renewal."""
        ledger.claim(build, "run-1")
        begin(ledger, build)
        request_cancel(catalog, build)
        with pytest.raises(BuildCancelledError):
            ledger.renew(build, 1, LEASE)

    def test_a_fence_ends_it(self, ledger: CatalogLedger, build: str) -> None:
        """The cleanup takes the build away from its holder."""
        begin(ledger, build)
        ledger.fence(build)
        with pytest.raises(BuildOverError):
            ledger.renew(build, 1, LEASE)

    def test_a_closed_build_ends_it(self, ledger: CatalogLedger, build: str) -> None:
        """A build that was closed meanwhile is not held."""
        begin(ledger, build)
        ledger.finish(build, CANCELLED)
        with pytest.raises(BuildOverError):
            ledger.renew(build, 1, LEASE)

    def test_an_unknown_build_is_said_to_be_so(self, ledger: CatalogLedger) -> None:
        """A build that is not in the catalog is not merely lost."""
        with pytest.raises(BuildNotFoundError):
            ledger.renew(UNKNOWN, 1, LEASE)


class TestRelease:
    def test_it_gives_up_its_own_attempt_only(self, ledger: CatalogLedger, build: str) -> None:
        """A lost attempt that comes back cannot give its successor's build away."""
        begin(ledger, build, NO_LEASE)
        begin(ledger, build)
        ledger.release(build, 1)
        assert isinstance(ledger.begin(build, "another", LEASE), Held)


class TestPrepare:
    def test_it_notes_the_account(self, ledger: CatalogLedger, build: str) -> None:
        """The cleanup knows in which account to look."""
        begin(ledger, build)
        ledger.prepare(build, 1, ACCOUNT)
        assert ledger.fence(build).account == ACCOUNT

    def test_a_lost_attempt_may_not_make_anything(self, ledger: CatalogLedger, build: str) -> None:
        """An attempt with a successor is refused before it makes anything."""
        begin(ledger, build, NO_LEASE)
        begin(ledger, build)
        with pytest.raises(AttemptLostError):
            ledger.prepare(build, 1, ACCOUNT)

    def test_a_fenced_build_may_not_make_anything(self, ledger: CatalogLedger, build: str) -> None:
        """Nothing is made once the cleanup has begun to look."""
        begin(ledger, build)
        ledger.fence(build)
        with pytest.raises(AttemptLostError):
            ledger.prepare(build, 1, ACCOUNT)


class TestToolStarted:
    def test_the_build_is_building(self, ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
        """A build is `building` from the moment at which its tool runs."""
        begin(ledger, build)
        ledger.tool_started(build, 1, LEASE)
        row = build_row(catalog, build)
        assert (row.status, row.started_at is not None) == ("building", True)

    def test_the_deadline_counts_from_the_start(self, ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
        """The first attempt's start and the time limit make the deadline."""
        begin(ledger, build)
        deadline = ledger.tool_started(build, 1, timedelta(minutes=30))
        started_at = build_row(catalog, build).started_at
        assert started_at is not None
        assert deadline == started_at + timedelta(minutes=30)

    def test_the_first_attempt_fixes_the_deadline_of_all(self, ledger: CatalogLedger, build: str) -> None:
        """A later attempt gets no time of its own."""
        begin(ledger, build, NO_LEASE)
        deadline = ledger.tool_started(build, 1, timedelta(minutes=30))
        assert begin(ledger, build).deadline_at == deadline
        assert ledger.tool_started(build, 2, timedelta(hours=5)) == deadline

    def test_the_first_attempt_fixes_the_start(self, ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
        """`started_at` is when the first attempt's tool started."""
        begin(ledger, build, NO_LEASE)
        ledger.tool_started(build, 1, LEASE)
        started_at = build_row(catalog, build).started_at
        begin(ledger, build)
        ledger.tool_started(build, 2, LEASE)
        assert build_row(catalog, build).started_at == started_at

    def test_a_lost_attempt_changes_nothing(self, ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
        """An attempt with a successor does not write `building`."""
        begin(ledger, build, NO_LEASE)
        begin(ledger, build)
        with pytest.raises(AttemptLostError):
            ledger.tool_started(build, 1, LEASE)
        assert status_of(catalog, build) == "queued"


class TestRequeue:
    def test_a_lapsed_build_is_queued_again(self, ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
        """A build whose worker fell silent waits for another one, and reads so."""
        begin(ledger, build, NO_LEASE)
        ledger.tool_started(build, 1, LEASE)
        assert ledger.requeue_lapsed() == 1
        assert status_of(catalog, build) == "queued"

    def test_a_held_build_is_left_alone(self, ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
        """A build whose lease runs keeps building."""
        begin(ledger, build)
        ledger.tool_started(build, 1, LEASE)
        assert ledger.requeue_lapsed() == 0
        assert status_of(catalog, build) == "building"


class TestNoteIds:
    def test_ids_add_up(self, ledger: CatalogLedger, build: str) -> None:
        """Every id that a tool named is remembered, once."""
        ledger.note_ids(build, ["i-1", "vol-1"])
        ledger.note_ids(build, ["i-1", "sg-1"])
        assert ledger.fence(build).known_ids == {"i-1", "vol-1", "sg-1"}

    def test_an_ami_is_the_one_being_made(self, ledger: CatalogLedger, catalog: Catalog, build: str) -> None:
        """The AMI that the tool names is the build's pending image."""
        ledger.note_ids(build, ["ami-0123456789abcdef0"])
        assert build_row(catalog, build).pending_image == "ami-0123456789abcdef0"

    def test_an_unknown_build_is_passed_over(self, ledger: CatalogLedger) -> None:
        """A row that is no more keeps no attempt from ending."""
        ledger.note_ids(UNKNOWN, ["i-1"])
        assert ledger.build_of(UNKNOWN) is None
