"""What the API left to do in the registry, and the dispatcher does: the registry ends as the catalog says."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from sqlalchemy import select
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.testing import WorkflowEnvironment

from kiln.catalog import errands, tags
from kiln.catalog.tables import RegistryErrand
from kiln.errors import UnavailableError
from kiln.models import HouseTerms, Target
from kiln.naming import staging_repository
from support.container_harness import ContainerHarness
from support.container_rows import begin, begin_publication, finish_publication, known_tag, target
from support.harness import copied_catalog
from support.oci_images import Made, digest, image, index
from support.troubled_registry import RegistrySite, registry_site
from workflows.dispatch import API_PATIENCE, Dispatcher, run_errands

HOUSE = HouseTerms(pause_seconds=3600, rounds_a_sweep=1000, round=1)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistrySite]:
    with registry_site(tmp_path_factory.mktemp("registry")) as site:
        yield site


@pytest_asyncio.fixture
async def kiln(migrated_file: Path, tmp_path: Path, site: RegistrySite) -> AsyncIterator[ContainerHarness]:
    """A Kiln without Temporal, which errands do not need."""
    nowhere = await Client.connect("127.0.0.1:1", lazy=True, data_converter=pydantic_data_converter)
    kiln = ContainerHarness(nowhere, copied_catalog(migrated_file, tmp_path), tmp_path, site, skips_time=False)
    yield kiln
    kiln.close()


def tagged_as(kiln: ContainerHarness, name: str) -> Target:
    """Another tag of the test's repository."""
    return kiln.target.model_copy(update={"tag": name})


def publish(kiln: ContainerHarness, made: Made, to: Target | None = None) -> Made:
    """An image in the registry and in the catalog."""
    to = to or kiln.target
    kiln.pusher.push(to.repository, made, to.tag)
    commit(kiln, made, to)
    return made


def commit(kiln: ContainerHarness, made: Made, to: Target) -> None:
    """What a build writes of its publication, of which the registry has not heard yet; its image is staged."""
    build = kiln.order(to=to)
    kiln.pusher.push(staging_repository(build), made)
    facts = kiln.there.facts(staging_repository(build), made.digest)
    assert facts is not None
    begin(kiln.catalog, build)
    begin_publication(kiln.catalog, build, to, facts)
    finish_publication(kiln.catalog, build)


def delete(kiln: ContainerHarness, to: Target | None = None) -> None:
    """What the API writes when somebody deletes a tag."""
    to = to or kiln.target
    with kiln.catalog.transaction() as tx:
        row = known_tag(kiln.catalog, to).tag
        tags.remove(tx, row)
        errands.add(tx, to.repository, to.tag, row.digest or "")


def rename(kiln: ContainerHarness, to: Target) -> None:
    """What the API writes when somebody renames the test's tag, which the registry has under both names by then."""
    row, old = known_tag(kiln.catalog, kiln.target).tag, kiln.target
    with kiln.catalog.transaction() as tx:
        errands.add(tx, to.repository, to.tag, row.digest or "", old.repository)
    kiln.there.copy(old.repository, row.digest or "", to.repository)
    kiln.there.tag(to.repository, row.digest or "", to.tag)
    with kiln.catalog.transaction() as tx:
        tags.retag(tx, row, to.owner_type, to.owner, kiln.organization, to.name, to.tag)
        errands.add(tx, old.repository, old.tag, row.digest or "")


async def dispatch(kiln: ContainerHarness) -> None:
    """The dispatcher's part of a round, when the API has had its time."""
    make_older(kiln)
    await asyncio.to_thread(run_errands, kiln.ledger, kiln.registry)


def make_older(kiln: ContainerHarness) -> None:
    with kiln.catalog.transaction() as tx:
        for row in tx.scalars(select(RegistryErrand)):
            row.created_at -= API_PATIENCE + timedelta(seconds=1)


def waiting(kiln: ContainerHarness) -> int:
    return len(kiln.ledger.errands(timedelta(0)))


def has(kiln: ContainerHarness, made: Made, to: Target | None = None) -> bool:
    """Whether the repository of a tag has the manifest."""
    return kiln.there.manifest((to or kiln.target).repository, made.digest) is not None


async def test_a_round_of_the_dispatcher_does_them(environment: WorkflowEnvironment, kiln: ContainerHarness) -> None:
    """Every worker that serves the control queue carries out what waits in the catalog."""
    publish(kiln, image("one"))
    delete(kiln)
    make_older(kiln)
    await Dispatcher(kiln.ledger, environment.client, HOUSE, kiln.registry).round()
    assert (kiln.pulled(), waiting(kiln)) == (None, 0)


class TestDeletion:
    async def test_tag_and_manifest_go(self, kiln: ContainerHarness) -> None:
        """A tag that the catalog no longer has is gone from the registry, with the image that it alone needed."""
        made = publish(kiln, image("one"))
        delete(kiln)
        await dispatch(kiln)
        assert (kiln.pulled(), has(kiln, made), waiting(kiln)) == (None, False, 0)

    async def test_a_fresh_one_is_left_to_the_api(self, kiln: ContainerHarness) -> None:
        """The API has a moment to do it by itself."""
        made = publish(kiln, image("one"))
        delete(kiln)
        run_errands(kiln.ledger, kiln.registry)
        assert (kiln.pulled(), waiting(kiln)) == (made.digest, 1)

    async def test_a_shared_manifest_stays(self, kiln: ContainerHarness) -> None:
        """Where two tags point at one manifest, only the tag goes, and with the second one the manifest."""
        made, other = image("shared"), tagged_as(kiln, "v2")
        publish(kiln, made)
        publish(kiln, made, other)
        delete(kiln)
        await dispatch(kiln)
        assert (kiln.pulled(), kiln.pulled(other)) == (None, made.digest)
        delete(kiln, other)
        await dispatch(kiln)
        assert (kiln.pulled(other), has(kiln, made), waiting(kiln)) == (None, False, 0)

    async def test_all_platforms_go(self, kiln: ContainerHarness) -> None:
        """An image of several platforms takes the manifests of these with it, less those that another one has."""
        both = image("amd64"), image("arm", "linux/arm64")
        whole, other = publish(kiln, index(*both)), tagged_as(kiln, "v2")
        publish(kiln, index(both[0], image("armv7", "linux/arm/v7")), other)
        delete(kiln)
        await dispatch(kiln)
        assert [has(kiln, each) for each in (whole, *both)] == [False, True, False]
        assert (kiln.pulled(other) == kiln.tagged(other), kiln.kept_aside(), waiting(kiln)) == (True, [], 0)

    async def test_a_part_of_another_image_stays(self, kiln: ContainerHarness) -> None:
        """Where an image of several platforms has the deleted one among them, it keeps it."""
        part, other = publish(kiln, image("amd64")), tagged_as(kiln, "v2")
        whole = publish(kiln, index(part, image("arm", "linux/arm64")), other)
        delete(kiln)
        await dispatch(kiln)
        assert (kiln.pulled(), has(kiln, part), kiln.pulled(other)) == (None, True, whole.digest)
        assert waiting(kiln) == 0

    async def test_a_tag_that_was_built_anew_stays(self, kiln: ContainerHarness) -> None:
        """A deletion that comes late does not take away what a later build published, though it is the same image."""
        made = publish(kiln, image("same"))
        delete(kiln)
        publish(kiln, made)
        await dispatch(kiln)
        assert (kiln.pulled(), kiln.tagged(), waiting(kiln)) == (made.digest, made.digest, 0)


class TestRename:
    async def test_the_old_name_goes(self, kiln: ContainerHarness) -> None:
        """After a rename into another repository the image is there, and no longer where it was."""
        made, to = publish(kiln, image("one")), target(f"{kiln.target.name}-renamed", "v2")
        rename(kiln, to)
        await dispatch(kiln)
        assert (kiln.pulled(), has(kiln, made), kiln.pulled(to), waiting(kiln)) == (None, False, made.digest, 0)

    async def test_within_a_repository_the_manifest_stays(self, kiln: ContainerHarness) -> None:
        """Another tag of the same repository keeps the image."""
        made, to = publish(kiln, image("one")), tagged_as(kiln, "v2")
        rename(kiln, to)
        await dispatch(kiln)
        assert (kiln.pulled(), kiln.pulled(to), waiting(kiln)) == (None, made.digest, 0)

    async def test_one_that_was_never_written_is_undone(self, kiln: ContainerHarness) -> None:
        """An API that died after the copy leaves no name that the catalog does not have."""
        made, to = publish(kiln, image("one")), target(f"{kiln.target.name}-renamed")
        with kiln.catalog.transaction() as tx:
            errands.add(tx, to.repository, to.tag, made.digest, kiln.target.repository)
        kiln.there.copy(kiln.target.repository, made.digest, to.repository)
        kiln.there.tag(to.repository, made.digest, to.tag)
        await dispatch(kiln)
        assert (kiln.pulled(), kiln.pulled(to), has(kiln, made, to), waiting(kiln)) == (made.digest, None, False, 0)


class TestNeededAgain:
    @pytest.mark.parametrize("call", ["copy", "delete", "tags"])
    async def test_a_manifest_is_put_back(self, kiln: ContainerHarness, call: str) -> None:
        """A build that publishes the same image while it is being deleted keeps it, whole and under its tag."""
        parts = image("amd64"), image("arm", "linux/arm64")
        made = publish(kiln, index(*parts))
        delete(kiln)
        kiln.registry.after(call, lambda: commit(kiln, made, kiln.target))
        await dispatch(kiln)
        assert (kiln.pulled(), kiln.tagged(), waiting(kiln)) == (made.digest, made.digest, 0)
        assert [has(kiln, part) for part in parts] == [True, True]
        blobs = [blob for part in parts for blob in part.blobs]
        assert [kiln.pusher.blob(kiln.target.repository, digest(blob)) for blob in blobs] == blobs
        assert kiln.kept_aside() == []

    async def test_a_tag_is_put_back(self, kiln: ContainerHarness) -> None:
        """A tag that is published anew while it is being taken away points at the new image."""
        old, new = publish(kiln, image("old")), image("new")
        publish(kiln, old, tagged_as(kiln, "v2"))
        delete(kiln)
        kiln.registry.before("untag", lambda: publish(kiln, new))
        await dispatch(kiln)
        assert (kiln.pulled(), kiln.tagged(), kiln.pulled(tagged_as(kiln, "v2"))) == (
            new.digest,
            new.digest,
            old.digest,
        )

    async def test_also_after_a_crash(self, kiln: ContainerHarness) -> None:
        """A dispatcher that dies right after the deletion leaves a copy, from which the next one puts it back."""
        made = publish(kiln, image("same"))
        delete(kiln)
        kiln.registry.after("delete", lambda: kiln.registry.fail("manifest"))
        await dispatch(kiln)
        assert (has(kiln, made), waiting(kiln)) == (False, 1)
        commit(kiln, made, kiln.target)
        kiln.registry.heal()
        await dispatch(kiln)
        assert (kiln.pulled(), waiting(kiln)) == (made.digest, 0)


class TestTrouble:
    async def test_a_registry_that_is_away_loses_no_errand(self, kiln: ContainerHarness) -> None:
        """A round without the registry says so, and what it could not do is done by a later one."""
        made = publish(kiln, image("one"))
        delete(kiln)
        for call in ("delete", "ping"):
            kiln.registry.fail(call, times=1)
        with pytest.raises(UnavailableError, match="ping"):
            await dispatch(kiln)
        assert (has(kiln, made), waiting(kiln)) == (True, 1)
        await dispatch(kiln)
        assert (has(kiln, made), kiln.pulled(), waiting(kiln)) == (False, None, 0)

    async def test_one_that_fails_holds_up_no_other(self, kiln: ContainerHarness) -> None:
        """What goes wrong with one errand is that one's, and it is tried again."""
        first, other = publish(kiln, image("first")), tagged_as(kiln, "v2")
        second = publish(kiln, image("second"), other)
        delete(kiln)
        delete(kiln, other)
        kiln.registry.fail("delete", times=1)
        await dispatch(kiln)
        assert (has(kiln, first), has(kiln, second), waiting(kiln)) == (True, False, 1)
        await dispatch(kiln)
        assert (has(kiln, first), waiting(kiln)) == (False, 0)

    async def test_a_damaged_image_goes(self, kiln: ContainerHarness, site: RegistrySite) -> None:
        """An image whose layers the registry has lost, so that no copy can be kept, is deleted all the same."""
        damaged = publish(kiln, image("damaged"))
        site.lose_blob(digest(damaged.blobs[1]))
        delete(kiln)
        await dispatch(kiln)
        assert (has(kiln, damaged), kiln.pulled(), waiting(kiln)) == (False, None, 0)
