"""Tags of container images: listed by namespace, searched, and who may read them."""

import re

import pytest
from sqlalchemy import insert, text

from kiln.catalog import tags
from kiln.catalog.session import Catalog
from kiln.catalog.tables import Tag
from kiln.catalog.tags import TagFilter
from kiln.models import OwnerType
from support.container_rows import add_container, known_tag, public, published, target
from support.plans import plan, statements
from support.rows import add_organization

PLATFORM = {"owner": "platform", "owner_type": OwnerType.PLATFORM}


@pytest.fixture
def organization(catalog: Catalog) -> str:
    return add_organization(catalog, "acme")


def names(catalog: Catalog, wanted: TagFilter, offset: int = 0, limit: int = 50) -> list[str]:
    with catalog.read() as session:
        rows, _ = tags.page(session, wanted, offset, limit)
    return [f"{row.tag.name}:{row.tag.tag}" for row in rows]


def add_many(catalog: Catalog, organization: str) -> None:
    """So many tags of one owner that a database would rather not read them all."""
    published(catalog, organization, target(owner="other"))
    first = known_tag(catalog, target(owner="other")).tag
    columns = {column.name: getattr(first, column.name) for column in Tag.__table__.columns}
    rows = [{**columns, "id": str(number), "name": f"app-{number}"} for number in range(2000)]
    with catalog.transaction() as tx:
        tx.execute(insert(Tag), rows)
        tx.execute(text("ANALYZE tags"))


class TestPage:
    @pytest.fixture
    def acme(self, catalog: Catalog, organization: str) -> TagFilter:
        """Three tags in the personal namespace, the oldest first."""
        for name, tag in (("app", "v1"), ("tools/lint_er", "v1"), ("app", "Beta")):
            add_container(catalog, organization, target(name, tag))
        return TagFilter(organization, OwnerType.PERSONAL, "acme")

    def test_the_newest_comes_first(self, catalog: Catalog, organization: str, acme: TagFilter) -> None:
        """A tag's place is its newest build's."""
        assert names(catalog, acme) == ["app:Beta", "tools/lint_er:v1", "app:v1"]
        add_container(catalog, organization, target("app", "v1"))
        assert names(catalog, acme) == ["app:v1", "app:Beta", "tools/lint_er:v1"]

    def test_an_offset_and_a_limit_cut_it(self, catalog: Catalog, acme: TagFilter) -> None:
        """The count is of all that are there, not of the page."""
        with catalog.read() as session:
            rows, total = tags.page(session, acme, 1, 1)
        assert ([row.tag.name for row in rows], total) == (["tools/lint_er"], 3)

    def test_namespaces_are_apart(self, catalog: Catalog, organization: str, acme: TagFilter) -> None:
        """A team's, the platform's and another organization's images stand in lists of their own."""
        team = {"owner": f"team-{organization}", "owner_type": OwnerType.TEAM}
        add_container(catalog, organization, target("shared", **team))
        add_container(catalog, organization, target("base", **PLATFORM))
        add_container(catalog, add_organization(catalog, "other"), target("theirs", owner="other"))
        assert names(catalog, TagFilter(organization, OwnerType.TEAM, f"team-{organization}")) == ["shared:v1"]
        assert names(catalog, TagFilter(organization, OwnerType.PLATFORM, "platform")) == ["base:v1"]
        assert len(names(catalog, acme)) == 3

    @pytest.mark.parametrize(
        ("search", "found"),
        [
            ("LINT", ["tools/lint_er:v1"]),
            ("beta", ["app:Beta"]),
            ("acme/app:v", ["app:v1"]),
            ("t_e", ["tools/lint_er:v1"]),
            ("a%p", []),
            ("p_p", []),
            ("\\", []),
            ("/", ["app:Beta", "tools/lint_er:v1", "app:v1"]),
            ("", ["app:Beta", "tools/lint_er:v1", "app:v1"]),
        ],
    )
    def test_a_search_is_literal(self, catalog: Catalog, acme: TagFilter, search: str, found: list[str]) -> None:
        """A piece of name, tag or reference is looked for as it stands, whatever its case; no character is a wildcard."""
        wanted = TagFilter(acme.organization_id, acme.owner_type, acme.owner, search)
        with catalog.read() as session:
            assert tags.page(session, wanted, 0, 50)[1] == len(found)
        assert names(catalog, wanted) == found


class TestReading:
    @staticmethod
    def readable(catalog: Catalog, organization: str, *repositories: str) -> set[str]:
        with catalog.read() as session:
            return tags.readable(session, organization, "acme", repositories)

    def test_its_own_and_the_platforms(self, catalog: Catalog, organization: str) -> None:
        """An organization reads its two namespaces and the platform's."""
        own = {"acme/app", f"team-{organization}/app", "platform/base"}
        assert self.readable(catalog, organization, *own, "kiln-staging/x", "acme2/app", "team-x/app") == own

    def test_anothers_public_repository(self, catalog: Catalog, organization: str) -> None:
        """What another organization opened can be read; what it kept cannot."""
        other = add_organization(catalog, "other")
        published(catalog, other, public("open", owner="other"))
        published(catalog, other, target("kept", owner="other"))
        assert self.readable(catalog, organization, "other/open", "other/kept", "other/none") == {"other/open"}

    def test_one_private_tag_closes_a_repository(self, catalog: Catalog, organization: str) -> None:
        """A registry's token cannot tell tags apart."""
        other = add_organization(catalog, "other")
        published(catalog, other, public(owner="other"))
        published(catalog, other, target(tag="v2", owner="other"))
        assert self.readable(catalog, organization, "other/app") == set()

    def test_what_is_not_published_does_not_count(self, catalog: Catalog, organization: str) -> None:
        """A tag that points at nothing neither opens a repository nor closes it."""
        other = add_organization(catalog, "other")
        add_container(catalog, other, public("new", owner="other"))
        published(catalog, other, public("open", owner="other"))
        add_container(catalog, other, target("open", "next", owner="other"))
        assert self.readable(catalog, organization, "other/new", "other/open") == {"other/open"}


class TestCost:
    def test_a_page_is_a_range_of_an_index(self, catalog: Catalog, organization: str) -> None:
        """A namespace's tags are read in their order; nothing is sorted."""
        wanted = TagFilter(organization, OwnerType.PERSONAL, "acme")
        add_many(catalog, organization)
        with catalog.read() as session, statements(catalog) as sent:
            tags.page(session, wanted, 0, 50)
        steps = plan(catalog, *sent[-1])
        assert "ix_tags_page" in steps
        assert "Sort" not in steps
        assert "TEMP B-TREE" not in steps

    def test_what_is_readable_is_looked_up_by_name(self, catalog: Catalog, organization: str) -> None:
        """However many tags there are, those of the repositories asked for are read, in one query."""
        add_many(catalog, organization)
        with catalog.read() as session, statements(catalog) as sent:
            tags.readable(session, organization, "acme", ["other/a", "other/b", "acme/c"])
        queries = [each for each in sent if each[0].startswith("SELECT")]
        assert len(queries) == 1
        steps = plan(catalog, *queries[0])
        assert re.search(r"owner=\? AND name=\?|Index Cond: .*owner.*name", steps)
