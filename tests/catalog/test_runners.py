"""Runners and the repositories that they check out: who they are, whether they are there, and who may speak for them."""

import re
from datetime import timedelta

import pytest

from kiln.catalog import repositories, runners
from kiln.catalog.pod_ledger import CatalogPodLedger
from kiln.catalog.pod_tables import Repository, Runner
from kiln.catalog.runners import PRESENCE_LIMIT
from kiln.catalog.session import Catalog
from kiln.catalog.tables import Organization
from kiln.errors import InvalidRequestError, NotFoundError, RefusedError
from kiln.models import PodSpec
from kiln.ports.pods import News, RunnerProcess
from support.pod_rows import (
    add_pod,
    add_runner,
    create_runner,
    go_away,
    register,
    rewrite_pod,
    runner_of,
    terminate,
)
from support.rows import add_organization, dump

SECOND = timedelta(seconds=1)
URL = "https://git.example.com/team/tool.git"


def identify(catalog: Catalog, token: str) -> Runner | None:
    with catalog.read() as session:
        return runners.identify(session, token)


def disable(catalog: Catalog, runner_id: str) -> bool:
    with catalog.transaction() as tx:
        return runners.disable(tx, runner_id)


def names(catalog: Catalog, organization: str) -> list[str]:
    with catalog.read() as session:
        return [known.runner.name for known in runners.of_organization(session, organization)]


class TestToken:
    def test_it_is_shown_once(self, catalog: Catalog, organization: str) -> None:
        """A token opens its runner, and stands nowhere in the catalog."""
        row, token = create_runner(catalog, organization)
        assert re.fullmatch(r"krt_[0-9a-f]{80}", token)
        known = identify(catalog, token)
        assert known is not None
        assert (known.id, known.organization_id) == (row.id, organization)
        with catalog.read() as session:
            assert token not in dump(session)

    def test_a_disabled_one_opens_nothing(self, catalog: Catalog, organization: str) -> None:
        """A token that was disabled is as good as an unknown one; disabling it again changes nothing."""
        row, token = create_runner(catalog, organization)
        assert [disable(catalog, row.id), disable(catalog, row.id), disable(catalog, "unknown")] == [True, True, False]
        assert identify(catalog, token) is None
        with pytest.raises(RefusedError):
            register(catalog, row.id)

    def test_a_name_is_one_runners(self, catalog: Catalog, organization: str) -> None:
        """Within an organization, a name says which runner is meant."""
        create_runner(catalog, organization, "desk")
        with pytest.raises(InvalidRequestError, match="name"):
            create_runner(catalog, organization, "desk")
        assert create_runner(catalog, add_organization(catalog), "desk")[0].name == "desk"


class TestStatus:
    def test_it_is_there_once_it_has_registered(self, catalog: Catalog, organization: str) -> None:
        """A runner is offline until a process registers, which says what the host is."""
        row, _ = create_runner(catalog, organization, "desk")
        assert runner_of(catalog, organization, row.id).status == "offline"
        register(catalog, row.id, max_concurrent_pods=3)
        known = runner_of(catalog, organization, row.id)
        assert (known.status, known.current_pods) == ("online", 0)
        assert (known.runner.name, known.runner.max_concurrent_pods) == ("desk", 3)
        assert known.runner.host_info == {"name": "host-1", "os": "linux"}

    @pytest.mark.parametrize(
        ("silence", "shown"), [(PRESENCE_LIMIT - 5 * SECOND, "online"), (PRESENCE_LIMIT + SECOND, "offline")]
    )
    def test_it_is_gone_when_it_is_silent(
        self, catalog: Catalog, organization: str, silence: timedelta, shown: str
    ) -> None:
        """A runner that was not seen for 20 seconds is offline."""
        runner = add_runner(catalog, organization).runner_id
        go_away(catalog, runner, silence)
        assert runner_of(catalog, organization, runner).status == shown

    def test_it_is_busy_with_no_place_left(self, catalog: Catalog, organization: str) -> None:
        """Open pods take places; what waits for one has none, and what has ended gives its own back."""
        runner = add_runner(catalog, organization, max_concurrent_pods=2).runner_id
        shown = []
        made = []
        for _ in range(3):
            made.append(add_pod(catalog, organization, runner))
            known = runner_of(catalog, organization, runner)
            shown.append((known.status, known.current_pods))
        assert shown == [("online", 1), ("busy", 2), ("busy", 2)]
        for ref in made[1:]:
            terminate(catalog, ref)
        assert runner_of(catalog, organization, runner).status == "online"

    def test_a_disabled_one_is_offline_and_off_the_list(self, catalog: Catalog, organization: str) -> None:
        """A runner whose token was disabled is found for its old pods' sake, and listed no more."""
        kept, shut = (add_runner(catalog, organization).runner_id for _ in range(2))
        disable(catalog, shut)
        assert runner_of(catalog, organization, shut).status == "offline"
        assert names(catalog, organization) == [runner_of(catalog, organization, kept).runner.name]


def test_it_is_found_by_id_or_name(catalog: Catalog, organization: str) -> None:
    """An id wins over another runner's name, and another organization finds neither."""
    row, _ = create_runner(catalog, organization, "desk")
    create_runner(catalog, organization, row.id)
    assert [runner_of(catalog, organization, each).runner.id for each in (row.id, "desk")] == [row.id] * 2
    with catalog.read() as session:
        assert runners.find(session, add_organization(catalog), "desk") is None
        assert len(runners.listing(session)) == 2


class TestProcess:
    def test_a_beat_brings_it_back(self, pod_ledger: CatalogPodLedger, catalog: Catalog, organization: str) -> None:
        """A runner that was away is there again once it says so."""
        process = add_runner(catalog, organization)
        go_away(catalog, process.runner_id)
        pod_ledger.beat(process, [])
        assert runner_of(catalog, organization, process.runner_id).status == "online"

    def test_an_earlier_one_is_refused(self, pod_ledger: CatalogPodLedger, catalog: Catalog, organization: str) -> None:
        """Whatever an earlier process of a runner says counts no more once another has registered."""
        earlier = add_runner(catalog, organization)
        key = add_pod(catalog, organization, earlier.runner_id).key
        later = register(catalog, earlier.runner_id)
        for speak in (
            lambda: pod_ledger.beat(earlier, [key]),
            lambda: pod_ledger.begin(earlier, key, "shim"),
            lambda: pod_ledger.news(earlier, {key: 0}),
        ):
            with pytest.raises(RefusedError):
                speak()
        assert pod_ledger.begin(later, key, "shim").key == key

    def test_a_disabled_ones_is_refused(
        self, pod_ledger: CatalogPodLedger, catalog: Catalog, organization: str
    ) -> None:
        """A process whose runner's token was disabled meanwhile is refused too."""
        process = add_runner(catalog, organization)
        disable(catalog, process.runner_id)
        with pytest.raises(RefusedError):
            pod_ledger.beat(process, [])

    def test_it_has_its_own_pods_only(self, pod_ledger: CatalogPodLedger, catalog: Catalog, organization: str) -> None:
        """Another runner's pod is an unknown one: it cannot be begun or read, and whoever has it is to end it."""
        mine, other = (add_runner(catalog, organization) for _ in range(2))
        ref = add_pod(catalog, organization, other.runner_id)
        assert pod_ledger.locate(other, ref.key) == ref
        for process, key in ((mine, ref.key), (other, "pod-unknown")):
            with pytest.raises(NotFoundError):
                pod_ledger.begin(process, key, "shim")
            with pytest.raises(NotFoundError):
                pod_ledger.locate(process, key)
        said = pod_ledger.beat(mine, [ref.key, "pod-unknown"])
        assert (said.end, said.remove) == ({ref.key, "pod-unknown"}, frozenset())
        assert pod_ledger.news(mine, {ref.key: 0, "pod-unknown": 0}) == News(end={ref.key, "pod-unknown"})


class TestRepositories:
    @pytest.fixture
    def repository(self, catalog: Catalog, organization: str) -> int:
        return self.add(catalog, organization).id

    @staticmethod
    def add(catalog: Catalog, organization: str, url: str = URL, name: str = "tool") -> Repository:
        with catalog.transaction() as tx:
            return repositories.add(tx, tx.get_one(Organization, organization), name, url, "main")

    @staticmethod
    def remove(catalog: Catalog, repository_id: int) -> None:
        with catalog.transaction() as tx:
            repositories.remove(tx, repository_id)

    def test_it_is_its_organizations(self, catalog: Catalog, organization: str, repository: int) -> None:
        """A repository is found and listed as its organization's, and no number is too large to be asked for."""
        with catalog.read() as session:
            found = repositories.find(session, organization, repository)
            assert found is not None
            assert repositories.find(session, organization, 2**40) is None
            assert [(row.url, row.id) for row, _ in repositories.listing(session)] == [(URL, repository)]
        other = add_organization(catalog)
        with catalog.transaction() as tx:
            assert repositories.find(tx, other, repository, lock=True) is None

    @pytest.mark.parametrize(
        "url",
        ["https://token@git.example.com/x", "https://user:word@git.example.com/x", "ssh://me:word@host/x", "--x", ""],
    )
    def test_a_url_holds_no_credential(self, catalog: Catalog, organization: str, url: str) -> None:
        """What is shown of a repository is no secret, and what git is given is no option."""
        with pytest.raises(InvalidRequestError, match="url"):
            self.add(catalog, organization, url)

    @pytest.mark.parametrize("url", ["git@git.example.com:team/tool.git", "ssh://git@host/x", "/srv/git/tool.git"])
    def test_a_user_of_ssh_is_no_secret(self, catalog: Catalog, organization: str, url: str) -> None:
        """SSH's own ways to write a repository are taken, and a folder's."""
        assert self.add(catalog, organization, url).url == url

    def test_a_name_is_taken_once(self, catalog: Catalog, organization: str, repository: int) -> None:
        """Two repositories of an organization have two names."""
        with pytest.raises(InvalidRequestError, match="name"):
            self.add(catalog, organization)
        assert self.add(catalog, organization, name="another").id > repository

    def test_it_stays_while_a_pod_works_on_it(self, catalog: Catalog, organization: str, repository: int) -> None:
        """A repository is removed once no open pod needs it."""
        runner = add_runner(catalog, organization).runner_id
        ref = add_pod(catalog, organization, runner, spec=PodSpec(repository_id=repository))
        with pytest.raises(RefusedError, match=ref.key):
            self.remove(catalog, repository)
        rewrite_pod(catalog, ref.key, status="completed")
        self.remove(catalog, repository)
        with pytest.raises(NotFoundError):
            self.remove(catalog, repository)


def test_an_unknown_runner_is_refused(pod_ledger: CatalogPodLedger, catalog: Catalog) -> None:
    """Nobody speaks for a runner that is not there."""
    with pytest.raises(RefusedError):
        pod_ledger.beat(RunnerProcess("unknown", "unknown"), [])
