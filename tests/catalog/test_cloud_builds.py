"""The list of cloud builds: forwards, backwards, in every order; and the build that a repeated POST made before."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kiln.catalog import builds, cloud_builds
from kiln.catalog.cloud_builds import CloudFilter, CloudPage, SortBy, UnknownCursorError
from kiln.catalog.session import Catalog
from kiln.models import Api, BuildStatus, ErrorCode, SourceNotes
from support.container_rows import HOST, add_cloud_build, add_container, context_facts, image_facts, register, target
from support.plans import plan, statements
from support.rows import add_build, add_organization, rewrite

NOON = datetime(2026, 3, 25, 12, 0, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
ORDERS: tuple[SortBy, ...] = ("created_at", "agent_name", "build_status", "build_end_time")
# The columns of a build, and how cloud-builds calls its status.
STATES: tuple[tuple[dict[str, Any], str], ...] = (
    ({"status": "awaiting_context"}, "queued"),
    ({"status": "queued"}, "queued"),
    ({"status": "building"}, "running"),
    ({"status": "building", "cancel_requested_at": NOON}, "cancelling"),
    ({"status": "succeeded", "completed_at": NOON}, "success"),
    ({"status": "failed", "completed_at": NOON + MINUTE, "error_code": "tool_failed"}, "failed"),
    ({"status": "failed", "completed_at": NOON, "error_code": "internal"}, "error"),
    ({"status": "timed_out", "completed_at": NOON - MINUTE}, "timed_out"),
    ({"status": "cancelled", "completed_at": NOON, "cancel_requested_at": NOON}, "cancelled"),
)


def page(
    catalog: Catalog,
    wanted: CloudFilter,
    limit: int = 100,
    *,
    sort_by: SortBy = "created_at",
    descending: bool = True,
    **cursor: str | None,
) -> CloudPage:
    with catalog.read() as session:
        return cloud_builds.page(session, wanted, limit, sort_by, descending, **cursor)


def ids(found: CloudPage) -> list[str]:
    return [row.build.id for row in found.rows]


def add_several(catalog: Catalog, organization: str) -> list[str]:
    """Builds in every state, of two agents, some made at the same moment."""
    made = []
    for number, (values, _) in enumerate(STATES):
        build = add_cloud_build(catalog, organization, "ab"[number % 2])
        rewrite(catalog, build, created_at=NOON + MINUTE * (number // 2), **values)
        made.append(build)
    return made


class TestWalk:
    @pytest.mark.parametrize("descending", [True, False])
    @pytest.mark.parametrize("sort_by", ORDERS)
    def test_pages_forwards_and_backwards_hold_the_same(
        self, catalog: Catalog, organization: str, sort_by: SortBy, *, descending: bool
    ) -> None:
        """Whatever the order, walking on shows every build once, and walking back the same pages from their ends."""
        made = add_several(catalog, organization)
        wanted = CloudFilter(organization)
        whole = ids(page(catalog, wanted, sort_by=sort_by, descending=descending))
        forwards: list[str] = []
        while len(forwards) < len(made):
            cursor = {"starting_after": forwards[-1]} if forwards else {}
            found = page(catalog, wanted, 2, sort_by=sort_by, descending=descending, **cursor)
            forwards += ids(found)
            assert found.has_more == (len(forwards) < len(made))
        backwards = whole[-1:]
        while len(backwards) < len(made):
            found = page(catalog, wanted, 2, sort_by=sort_by, descending=descending, ending_before=backwards[0])
            backwards = ids(found) + backwards
            assert found.has_more == (len(backwards) < len(made))
        assert forwards == backwards == whole
        assert set(whole) == set(made)

    @settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(offsets=st.lists(st.integers(0, 2), min_size=1, max_size=8), limit=st.integers(1, 3))
    def test_builds_that_arrive_make_no_gap(self, catalog: Catalog, offsets: list[int], limit: int) -> None:
        """Between the pages new builds come: each that was there is listed once."""
        organization = add_organization(catalog)
        there = set()
        for offset in offsets:
            build = add_cloud_build(catalog, organization)
            rewrite(catalog, build, created_at=NOON + timedelta(microseconds=offset))
            there.add(build)
        seen: list[str] = []
        while found := ids(page(catalog, CloudFilter(organization), limit, starting_after=seen[-1] if seen else None)):
            seen += found
            add_cloud_build(catalog, organization)
        assert sorted(seen) == sorted(there)

    def test_nothing_comes_before_the_first(self, catalog: Catalog, organization: str) -> None:
        """The page before the first item, and the one after the last, are empty."""
        build = add_cloud_build(catalog, organization)
        for cursor in ({"ending_before": build}, {"starting_after": build}):
            found = page(catalog, CloudFilter(organization), **cursor)
            assert (found.rows, found.has_more, found.total) == ([], False, 1)


class TestOrder:
    def test_by_creation(self, catalog: Catalog, organization: str) -> None:
        """The newest comes first, or last."""
        made = [add_cloud_build(catalog, organization) for _ in range(3)]
        assert ids(page(catalog, CloudFilter(organization), descending=False)) == made
        assert ids(page(catalog, CloudFilter(organization))) == made[::-1]

    def test_by_agent(self, catalog: Catalog, organization: str) -> None:
        """Agents' names are in the order of the alphabet."""
        add_several(catalog, organization)
        found = page(catalog, CloudFilter(organization), sort_by="agent_name", descending=False)
        names = [row.build.agent_name for row in found.rows]
        assert names == ["a"] * 5 + ["b"] * 4

    def test_by_status(self, catalog: Catalog, organization: str) -> None:
        """Statuses are in the order of the contract's own words."""
        words = dict(zip(add_several(catalog, organization), (word for _, word in STATES), strict=True))
        found = page(catalog, CloudFilter(organization), sort_by="build_status", descending=False)
        shown = [words[build] for build in ids(found)]
        assert shown == sorted(words.values())

    def test_by_end(self, catalog: Catalog, organization: str) -> None:
        """A build that has not ended counts as the last to end."""
        add_several(catalog, organization)
        found = page(catalog, CloudFilter(organization), sort_by="build_end_time", descending=False)
        ends = [row.build.completed_at for row in found.rows]
        assert ends == [NOON - MINUTE, NOON, NOON, NOON, NOON + MINUTE, None, None, None, None]


class TestFilter:
    def test_only_what_came_through_cloud_builds(self, catalog: Catalog, organization: str) -> None:
        """Other contracts' builds and other organizations' are not listed, and no cursor either."""
        mine = add_cloud_build(catalog, organization)
        other = add_organization(catalog)
        strangers = [add_build(catalog, organization), add_container(catalog, organization)]
        strangers.append(add_cloud_build(catalog, other))
        found = page(catalog, CloudFilter(organization))
        assert (ids(found), found.total) == ([mine], 1)
        for stranger in (*strangers, "no-such-id"):
            with pytest.raises(UnknownCursorError):
                page(catalog, CloudFilter(organization), starting_after=stranger)

    @pytest.mark.parametrize("wanted", [{"agent_name": "a"}, {"source_commit": "c1"}, {"working_tree_hash": "t1"}])
    def test_by_what_the_client_said(self, catalog: Catalog, organization: str, wanted: dict[str, str]) -> None:
        """Each filter narrows the page, and the total with it; the page's limit does not."""
        notes = SourceNotes(source_commit="c1", working_tree_hash="t1")
        made = [add_cloud_build(catalog, organization, "a", source=notes) for _ in range(2)]
        other = add_cloud_build(catalog, organization, "b")
        found = page(catalog, CloudFilter(organization, **wanted), 1)
        assert (ids(found), found.has_more, found.total) == ([made[1]], True, 2)
        assert ids(page(catalog, CloudFilter(organization, **wanted), starting_after=other)) == made[::-1]

    def test_a_registration_has_its_image(self, catalog: Catalog, organization: str) -> None:
        """A build that has an image is listed with it."""
        facts = image_facts()
        register(catalog, organization, target(), facts)
        image = page(catalog, CloudFilter(organization)).rows[0].image
        assert image is not None
        assert (image.kind, image.digest) == ("container", facts.digest)


class TestCost:
    @pytest.mark.parametrize(
        ("wanted", "index"),
        [
            ({}, "ix_builds_api"),
            ({"agent_name": "scout"}, "ix_builds_agent"),
            ({"source_commit": "c1"}, "ix_builds_commit"),
            ({"working_tree_hash": "t1"}, "ix_builds_tree"),
        ],
    )
    @pytest.mark.parametrize("cursor", ["starting_after", "ending_before"])
    def test_a_page_is_a_range_of_an_index(
        self, catalog: Catalog, organization: str, cursor: str, wanted: dict[str, str], index: str
    ) -> None:
        """A page by creation begins at its cursor in an index and sorts nothing, however far back it is."""
        build = add_cloud_build(catalog, organization)
        with statements(catalog) as sent:
            page(catalog, CloudFilter(organization, **wanted), **{cursor: build})
        rows = next(each for each in sent if "LIMIT" in each[0])
        steps = plan(catalog, *rows)
        assert index in steps
        assert "created_at" in steps  # within the range's bounds, not among its filters
        assert "Sort" not in steps
        assert "TEMP B-TREE" not in steps


class TestTwin:
    @staticmethod
    def twin(catalog: Catalog, organization: str, **same: Any) -> str | None:
        with catalog.read() as session:
            values = {"since": datetime.now(UTC) - MINUTE, **same}
            found = cloud_builds.recent_twin(session, organization, "acme/app", "v1", **values)
        return found.build.id if found else None

    def test_the_same_archive(self, catalog: Catalog, organization: str) -> None:
        """The newest build of the same archive to the same tag is found."""
        add_cloud_build(catalog, organization, context=context_facts("b" * 64))
        add_cloud_build(catalog, organization)
        newest = add_cloud_build(catalog, organization)
        assert self.twin(catalog, organization, sha256="a" * 64) == newest

    def test_the_same_registered_image(self, catalog: Catalog, organization: str) -> None:
        """A registration is found by its reference."""
        facts = image_facts()
        build = register(catalog, organization, target(), facts)
        reference = f"{HOST}/acme/app@{facts.digest}"
        assert self.twin(catalog, organization, reference=reference) == build
        assert self.twin(catalog, organization, reference=f"{HOST}/acme/app@sha256:0") is None

    def test_nothing_else(self, catalog: Catalog, organization: str) -> None:
        """An older build, another tag's, another organization's and another contract's are no twins."""
        add_cloud_build(catalog, organization, to=target(tag="v2"))
        add_cloud_build(catalog, add_organization(catalog))
        add_container(catalog, organization, context=context_facts())
        old = add_cloud_build(catalog, organization)
        rewrite(catalog, old, created_at=datetime.now(UTC) - 2 * MINUTE)
        assert self.twin(catalog, organization, sha256="a" * 64) is None


def test_the_codes_of_kilns_own_faults_are_errors(catalog: Catalog, organization: str) -> None:
    """A terminated workflow is an `error` too; it sorts before what `failed`."""
    failed, lost = (add_cloud_build(catalog, organization) for _ in range(2))
    rewrite(catalog, failed, status=BuildStatus.FAILED.value, error_code=ErrorCode.TOOL_FAILED.value)
    rewrite(catalog, lost, status=BuildStatus.FAILED.value, error_code=ErrorCode.WORKFLOW_TERMINATED.value)
    assert ids(page(catalog, CloudFilter(organization), sort_by="build_status", descending=False)) == [lost, failed]


def test_a_build_is_found_through_several_contracts(catalog: Catalog, organization: str) -> None:
    """container-images resolves the ids of builds that cloud-builds made; machine-images does not."""
    build = add_cloud_build(catalog, organization)
    with catalog.read() as session:
        both = (Api.CONTAINER_IMAGES, Api.CLOUD_BUILDS)
        assert builds.find(session, organization, build, both) is not None
        assert builds.find(session, organization, build, Api.MACHINE_IMAGES) is None
