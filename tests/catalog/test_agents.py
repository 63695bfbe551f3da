"""Agents, and which of them were never deployed."""

from datetime import UTC, datetime, timedelta

from sqlalchemy import update

from kiln.catalog import agents, builds, cloud_builds
from kiln.catalog.agents import Undeployed
from kiln.catalog.session import AlreadyThereError, Catalog
from kiln.catalog.tables import Agent
from kiln.models import Api
from support.container_rows import add_agent, add_cloud_build, add_container, context_facts, new_container, target
from support.parallel import Pending, in_parallel
from support.rows import add_organization


def undeployed(catalog: Catalog, organization: str) -> list[Undeployed]:
    with catalog.read() as session:
        return agents.undeployed(session, organization)


def test_an_agent_is_made_once(catalog: Catalog, organization: str) -> None:
    """The same name is the same agent, within its organization."""
    first = add_agent(catalog, organization)
    assert add_agent(catalog, organization).id == first.id
    assert add_agent(catalog, organization, "other").id != first.id
    assert add_agent(catalog, add_organization(catalog)).id != first.id


def test_many_that_make_an_agent_at_once_make_one(catalog: Catalog, organization: str) -> None:
    """Whoever is too late is told so, and finds the agent at the next try."""

    def ensure() -> str:
        try:
            return add_agent(catalog, organization).id
        except AlreadyThereError:
            return add_agent(catalog, organization).id

    made = in_parallel([ensure] * 4)
    assert len(set(made)) == 1
    assert isinstance(made[0], str)


def test_an_agent_is_found_by_its_id(catalog: Catalog, organization: str) -> None:
    """Another organization's agent is as good as none."""
    agent = add_agent(catalog, organization)
    with catalog.read() as session:
        found = agents.find(session, organization, agent.id)
        assert found is not None
        assert found.name == "scout"
        assert agents.find(session, add_organization(catalog), agent.id) is None


def test_two_submissions_for_an_agent_follow_each_other(catalog: Catalog, organization: str) -> None:
    """A repeated POST that comes while the first one commits sees the build that the first one makes."""
    agent = add_agent(catalog, organization)
    since = datetime.now(UTC) - timedelta(minutes=1)

    def repeat() -> str | None:
        with catalog.transaction() as tx:
            agents.ensure(tx, organization, agent.name)
            found = cloud_builds.recent_twin(tx, organization, "acme/app", "v1", sha256="a" * 64, since=since)
            return found.build.id if found else None

    with catalog.transaction() as tx:
        row = agents.ensure(tx, organization, agent.name)
        repeated = Pending(repeat)
        assert repeated.is_waiting()
        new = new_container(organization, target(), Api.CLOUD_BUILDS, agent=row, context=context_facts())
        build = builds.insert(tx, new).id
    assert repeated.result() == build


class TestUndeployed:
    def test_the_one_with_the_newest_build_comes_first(self, catalog: Catalog, organization: str) -> None:
        """Each agent has its newest build, and how many it has."""
        add_cloud_build(catalog, organization, "a")
        b = add_cloud_build(catalog, organization, "b")
        a = add_cloud_build(catalog, organization, "a")
        found = [
            (each.agent_name, each.latest.build.id, each.total_builds) for each in undeployed(catalog, organization)
        ]
        assert found == [("a", a, 2), ("b", b, 1)]

    def test_a_deployed_agent_is_not_among_them(self, catalog: Catalog, organization: str) -> None:
        """Once a pod ran from one of its images, an agent is deployed."""
        add_cloud_build(catalog, organization, "a")
        add_cloud_build(catalog, organization, "b")
        with catalog.transaction() as tx:
            tx.execute(update(Agent).where(Agent.name == "a").values(deployed_at=datetime.now(UTC)))
        assert [each.agent_name for each in undeployed(catalog, organization)] == ["b"]

    def test_others_do_not_count(self, catalog: Catalog, organization: str) -> None:
        """An agent without builds, another organization's, and builds of no agent are not listed."""
        add_agent(catalog, organization, "idle")
        add_container(catalog, organization)
        add_cloud_build(catalog, add_organization(catalog))
        assert undeployed(catalog, organization) == []
