"""Lists of builds, page by page."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kiln.catalog import builds
from kiln.catalog.builds import BuildFilter, BuildWithImage
from kiln.catalog.ledger import CatalogLedger
from kiln.catalog.session import Catalog
from kiln.models import Api, BuildEnd, BuildStatus
from support.rows import LEASE, add_build, add_organization, ami, built, request_cancel, rewrite

NOON = datetime(2026, 3, 25, 12, 0, tzinfo=UTC)


def page(
    catalog: Catalog, wanted: BuildFilter, limit: int = 50, after: tuple[datetime, str] | None = None
) -> list[BuildWithImage]:
    with catalog.read() as session:
        return builds.page(session, wanted, limit, after)


def ids(found: list[BuildWithImage]) -> list[str]:
    return [each.build.id for each in found]


def cursor(found: list[BuildWithImage]) -> tuple[datetime, str]:
    return found[-1].build.created_at, found[-1].build.id


def add_at(catalog: Catalog, organization: str, moment: datetime) -> str:
    build = add_build(catalog, organization)
    rewrite(catalog, build, created_at=moment)
    return build


def test_the_newest_comes_first(catalog: Catalog, organization: str) -> None:
    """Builds are listed by their creation, backwards."""
    made = [add_at(catalog, organization, NOON + timedelta(seconds=second)) for second in (2, 0, 1)]
    assert ids(page(catalog, BuildFilter(organization))) == [made[0], made[2], made[1]]


def test_another_organizations_builds_are_not_listed(catalog: Catalog, organization: str) -> None:
    """An organization sees its own builds only."""
    mine = add_build(catalog, organization)
    add_build(catalog, add_organization(catalog))
    assert ids(page(catalog, BuildFilter(organization))) == [mine]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    offsets=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    limit=st.integers(1, 5),
    inserts=st.lists(st.integers(0, 2), max_size=6),
)
def test_pages_hold_every_build_once(catalog: Catalog, offsets: list[int], limit: int, inserts: list[int]) -> None:
    """Whatever is inserted between the pages, each build that was there is listed once; equal times do not matter."""
    organization = add_organization(catalog)
    there = {add_at(catalog, organization, NOON + timedelta(microseconds=offset)) for offset in offsets}
    seen: list[str] = []
    after = None
    while found := page(catalog, BuildFilter(organization), limit, after):
        seen += ids(found)
        after = cursor(found)
        for _ in range(inserts.pop() if inserts else 0):
            add_build(catalog, organization)
    assert len(seen) == len(set(seen))
    assert set(seen) == there


def test_a_page_stops_at_its_limit(catalog: Catalog, organization: str) -> None:
    """No page is longer than was asked."""
    for _ in range(3):
        add_build(catalog, organization)
    assert len(page(catalog, BuildFilter(organization), limit=2)) == 2


def test_a_cursor_means_the_same_in_every_zone(catalog: Catalog, organization: str) -> None:
    """A cursor's time is an instant: the zone in which it comes back does not matter."""
    older, newer = (add_at(catalog, organization, NOON + timedelta(minutes=minute)) for minute in (0, 1))
    elsewhere = (NOON + timedelta(minutes=1)).astimezone(datetime.fromisoformat("2026-03-25T12:00:00+05:30").tzinfo)
    assert ids(page(catalog, BuildFilter(organization), after=(elsewhere, newer))) == [older]


@pytest.mark.parametrize("wanted", [{"kinds": ["machine"]}, {"apis": ["machine-images"]}])
def test_a_build_is_found_by_what_it_is(catalog: Catalog, organization: str, wanted: dict[str, list[str]]) -> None:
    """A page narrowed to a build's own kind or contract holds it."""
    build = add_build(catalog, organization)
    assert ids(page(catalog, BuildFilter(organization, **wanted))) == [build]


@pytest.mark.parametrize("wanted", [{"kinds": ["container", "transfer"]}, {"apis": ["cloud-builds"]}, {"apis": []}])
def test_a_build_is_not_found_by_what_it_is_not(
    catalog: Catalog, organization: str, wanted: dict[str, list[str]]
) -> None:
    """A page narrowed to other kinds or contracts does not hold it; narrowed to none, it holds nothing."""
    add_build(catalog, organization)
    assert page(catalog, BuildFilter(organization, **wanted)) == []


def test_an_image_finds_its_build(ledger: CatalogLedger, catalog: Catalog, organization: str) -> None:
    """A page narrowed to an AMI's id holds the build that made it, with the image."""
    build, other = add_build(catalog, organization), add_build(catalog, organization)
    ledger.begin(build, "worker", LEASE)
    image = ami()
    ledger.publish(built(image.image_id, 1), build, image, simulated=True)
    found = page(catalog, BuildFilter(organization, images=[image.image_id]))
    assert other not in ids(found)
    assert [each.image.reference for each in found if each.image] == [image.image_id]


class TestStatus:
    """Filters by status, in the words that the contract shows."""

    @pytest.fixture
    def states(self, ledger: CatalogLedger, catalog: Catalog, organization: str) -> dict[str, str]:
        """One build in each state."""
        made = {name: add_build(catalog, organization) for name in ("queued", "building", "cancelling", "failed")}
        for name in ("building", "cancelling"):
            ledger.claim(made[name], "run-1")
            ledger.begin(made[name], "worker", LEASE)
            ledger.tool_started(made[name], 1, LEASE)
        request_cancel(catalog, made["cancelling"])
        ledger.finish(made["failed"], BuildEnd(status=BuildStatus.FAILED))
        return made

    @pytest.mark.parametrize(
        "wanted",
        [["queued"], ["building"], ["cancelling"], ["failed"], ["building", "cancelling"], ["queued", "failed"], []],
    )
    def test_what_reads_so_is_listed(
        self, catalog: Catalog, organization: str, states: dict[str, str], wanted: list[str]
    ) -> None:
        """An open build whose cancellation was asked for is `cancelling`, and nothing else."""
        found = page(catalog, BuildFilter(organization, statuses=wanted))
        assert set(ids(found)) == {states[name] for name in wanted}


def test_builds_are_counted_by_kind_and_status(ledger: CatalogLedger, catalog: Catalog, organization: str) -> None:
    """The metrics' figures are the rows."""
    add_build(catalog, organization)
    ledger.finish(add_build(catalog, organization), BuildEnd(status=BuildStatus.FAILED))
    with catalog.read() as session:
        assert builds.count_by_status(session) == {("machine", "queued"): 1, ("machine", "failed"): 1}


class TestFind:
    def test_an_organization_finds_its_build(self, catalog: Catalog, organization: str) -> None:
        """A build is found by its id, within its organization."""
        build = add_build(catalog, organization)
        with catalog.read() as session:
            found = builds.find(session, organization, build, Api.MACHINE_IMAGES)
        assert found is not None
        assert (found.build.id, found.image) == (build, None)

    def test_another_organization_does_not(self, catalog: Catalog, organization: str) -> None:
        """Another's build is as good as none."""
        build = add_build(catalog, organization)
        with catalog.read() as session:
            assert builds.find(session, add_organization(catalog), build) is None


class TestOpenBuilds:
    def test_old_enough_builds_are_compared(self, ledger: CatalogLedger, catalog: Catalog, organization: str) -> None:
        """Builds that had their time to start are returned, the oldest first; closed ones and new ones are not."""
        now = datetime.now(UTC)
        old = [add_at(catalog, organization, now - timedelta(minutes=minute)) for minute in (1, 2)]
        closed = add_at(catalog, organization, now - timedelta(minutes=3))
        ledger.finish(closed, BuildEnd(status=BuildStatus.FAILED))
        add_build(catalog, organization)
        briefs = ledger.open_builds(timedelta(seconds=30))
        assert [brief.ref.build_id for brief in briefs] == [old[1], old[0]]


class TestPendingImages:
    def test_a_building_builds_ami_is_pending(self, ledger: CatalogLedger, catalog: Catalog, organization: str) -> None:
        """The AMI that EC2 is making is known while its build is building."""
        build = add_build(catalog, organization)
        ledger.begin(build, "worker", LEASE)
        ledger.tool_started(build, 1, LEASE)
        ledger.note_ids(build, ["ami-0123456789abcdef0"])
        with catalog.read() as session:
            found = builds.building_image(session, organization, Api.MACHINE_IMAGES, "ami-0123456789abcdef0")
            listed = builds.pending_images(session, organization, Api.MACHINE_IMAGES)
        assert found is not None
        assert [row.id for row in listed] == [found.id] == [build]

    def test_a_closed_build_makes_none(self, ledger: CatalogLedger, catalog: Catalog, organization: str) -> None:
        """Nothing is pending once the build is over."""
        build = add_build(catalog, organization)
        ledger.begin(build, "worker", LEASE)
        ledger.tool_started(build, 1, LEASE)
        ledger.note_ids(build, ["ami-0123456789abcdef0"])
        ledger.finish(build, BuildEnd(status=BuildStatus.FAILED))
        with catalog.read() as session:
            assert builds.pending_images(session, organization, Api.MACHINE_IMAGES) == []
