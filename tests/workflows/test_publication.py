"""The publication of a container image, between the catalog's commit and the registry's tag."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kiln.catalog.builds import shown_status
from kiln.models import BuildStatus
from kiln.naming import staging_repository
from support.container_harness import ContainerHarness
from support.container_tools import ContainerRun, makes
from support.histories import SECRET
from support.oci_images import image
from support.rows import request_cancel
from support.troubled_registry import Hold, RegistrySite


@pytest.fixture
def kiln(container_kiln: ContainerHarness) -> ContainerHarness:
    return container_kiln


@asynccontextmanager
async def publishing(kiln: ContainerHarness) -> AsyncIterator[tuple[str, Hold]]:
    """A build whose publication is committed, and of which the registry has not heard yet."""
    async with kiln.workers():
        build = kiln.order(secret=SECRET)
        hold = kiln.registry.hold("copy", staging_repository(build))
        await kiln.start(build)
        try:
            await hold.is_reached()
            assert kiln.row(build).publishing_at is not None
            yield build, hold
        finally:
            hold.open()


def is_published(kiln: ContainerHarness, build: str) -> None:
    """The build has succeeded, catalog and registry agree on its tag, and nothing else is left."""
    assert (kiln.row(build).status, kiln.row(build).error_code, kiln.row(build).secrets) == ("succeeded", None, None)
    assert kiln.tagged() == kiln.pulled() == kiln.tools.runs[-1].image.digest
    assert kiln.leftovers(build) == []


def is_not_published(kiln: ContainerHarness, build: str) -> None:
    """Neither catalog nor registry knows of a tag or an image, and nothing is left."""
    assert (kiln.image_of(build), kiln.tagged(), kiln.pulled(), kiln.leftovers(build)) == (None, None, None, [])


class TestVerification:
    async def test_a_digest_that_nobody_pushed(self, kiln: ContainerHarness) -> None:
        """What the tool reported and the registry does not have is no image, after some looks."""

        async def only_reports(run: ContainerRun) -> int:
            run.reports()
            return 0

        kiln.tools.script = only_reports
        async with kiln.workers():
            error = await kiln.failure(build := await kiln.submit())
        digest = kiln.tools.runs[0].image.digest
        assert (error.type, error.message) == (
            "verification_failed",
            f"{digest} is not in the registry, though its builder reported it",
        )
        assert kiln.registry.calls["facts"] == 4
        is_not_published(kiln, build)

    async def test_another_platform_than_was_asked_for(self, kiln: ContainerHarness) -> None:
        """A Dockerfile that makes an image of another platform fails its build."""

        async def makes_another(run: ContainerRun) -> int:
            run.image = image("for another machine", "linux/arm64")
            return await makes(run)

        kiln.tools.script = makes_another
        async with kiln.workers():
            error = await kiln.failure(build := await kiln.submit())
        assert (error.type, kiln.row(build).error_code) == ("verification_failed", "verification_failed")
        assert error.message.endswith("is for linux/arm64, and linux/amd64 was asked for")
        is_not_published(kiln, build)


class TestCancel:
    @pytest.mark.parametrize("way", ["row", "workflow"])
    async def test_after_the_commit_it_changes_nothing(self, kiln: ContainerHarness, way: str) -> None:
        """The build succeeds, and does not read as being cancelled before."""
        async with publishing(kiln) as (build, hold):
            if way == "row":
                request_cancel(kiln.catalog, build)
            else:
                await kiln.handle(build).cancel()
            assert shown_status(kiln.row(build)) is BuildStatus.BUILDING
            hold.open()
            assert (await kiln.end(build)).status is BuildStatus.SUCCEEDED
        is_published(kiln, build)

    async def test_before_the_commit_it_holds(self, kiln: ContainerHarness) -> None:
        """A build that is cancelled while its image is looked at is cancelled, and has none."""
        async with kiln.workers():
            build = kiln.order()
            hold = kiln.registry.hold("facts", staging_repository(build))
            await kiln.start(build)
            await hold.is_reached()
            request_cancel(kiln.catalog, build)
            hold.open()
            assert (await kiln.end(build)).status is BuildStatus.CANCELLED
        assert kiln.row(build).status == "cancelled"
        is_not_published(kiln, build)


class TestCrash:
    @pytest.mark.parametrize("call", ["copy", "tag"])
    async def test_the_next_try_carries_on(self, kiln: ContainerHarness, call: str) -> None:
        """A publication that is cut short after its commit is taken up where it was."""
        async with kiln.workers():
            kiln.registry.fail(call, times=2)
            end = await kiln.end(build := await kiln.submit())
        assert end.status is BuildStatus.SUCCEEDED
        assert kiln.registry.calls[call] == 3
        is_published(kiln, build)

    async def test_an_image_that_goes_meanwhile_is_copied_again(self, kiln: ContainerHarness) -> None:
        """Somebody deletes the same manifest, because no tag needed it before: the publication brings it back."""

        def delete() -> None:
            kiln.there.delete(kiln.target.repository, kiln.tools.runs[0].image.digest)

        kiln.registry.after("copy", delete)
        async with kiln.workers():
            end = await kiln.end(build := await kiln.submit())
        assert (end.status, kiln.registry.calls["copy"]) == (BuildStatus.SUCCEEDED, 2)
        assert kiln.finished["publish-container"] == 1
        is_published(kiln, build)

    async def test_a_terminated_workflow_has_succeeded(self, kiln: ContainerHarness) -> None:
        """What was committed is finished by the house-keeping, and recorded as what it is."""
        async with kiln.workers():
            kiln.registry.fail("tag")
            build = await kiln.submit(secret=SECRET)
            await kiln.until(lambda: has_tried(kiln, "tag"))
            assert (kiln.row(build).publishing_at is None, kiln.pulled()) == (False, None)
            await kiln.lose(build)
            await kiln.keep_house(1)
            assert kiln.row(build).completed_at is None
            kiln.registry.heal()
            await kiln.until(lambda: is_closed(kiln, build))
            await kiln.until(lambda: is_cleaned(kiln, build))
        is_published(kiln, build)

    async def test_a_terminated_and_cancelled_workflow_has_succeeded(self, kiln: ContainerHarness) -> None:
        """A cancel that came after the commit does not count for the house-keeping either."""
        async with publishing(kiln) as (build, hold):
            await kiln.handle(build).cancel()
            kiln.registry.fail("copy", times=1)
            await kiln.lose(build)
            request_cancel(kiln.catalog, build)
            hold.open()
            await kiln.keep_house()
        is_published(kiln, build)


async def has_tried(kiln: ContainerHarness, call: str) -> bool:
    return kiln.registry.calls[call] > 0


async def is_closed(kiln: ContainerHarness, build: str) -> bool:
    return kiln.row(build).completed_at is not None


async def is_cleaned(kiln: ContainerHarness, build: str) -> bool:
    return kiln.row(build).cleaned_at is not None


class TestCleanup:
    async def test_a_half_written_tag_goes_too(self, kiln: ContainerHarness, site: RegistrySite) -> None:
        """A staged tag that the registry lists without a manifest does not hold up the build's end."""

        async def fails_after_a_push(run: ContainerRun) -> int:
            await run.pushes()
            site.half_write(staging_repository(build), "attempt-0")
            return 1

        kiln.tools.script = fails_after_a_push
        build = kiln.order()
        async with kiln.workers():
            await kiln.start(build)
            assert (await kiln.failure(build)).type == "tool_failed"
        is_not_published(kiln, build)


class TestTwoAtOnce:
    @asynccontextmanager
    async def committed(self, kiln: ContainerHarness, held: str) -> AsyncIterator[tuple[list[str], list[Hold]]]:
        """Two builds of one tag, the second of which committed last, both before this call to the registry."""
        async with kiln.workers():
            builds, holds = [kiln.order(), kiln.order()], list[Hold]()
            for build in builds:
                holds.append(kiln.registry.hold(held, self.about(kiln, build, held)))
                await kiln.start(build)
                await holds[-1].is_reached()
            try:
                yield builds, holds
            finally:
                for hold in holds:
                    hold.open()

    def about(self, kiln: ContainerHarness, build: str, held: str) -> str:
        return staging_repository(build) if held == "copy" else kiln.target.tag

    @pytest.mark.parametrize("first", [0, 1])
    @pytest.mark.parametrize("held", ["copy", "tag"])
    async def test_registry_and_catalog_agree(self, kiln: ContainerHarness, held: str, first: int) -> None:
        """Whichever reaches the registry first, the tag ends where the catalog has it, and both have succeeded."""
        async with self.committed(kiln, held) as (builds, holds):
            holds[first].open()
            assert (await kiln.end(builds[first])).status is BuildStatus.SUCCEEDED
            holds[1 - first].open()
            assert (await kiln.end(builds[1 - first])).status is BuildStatus.SUCCEEDED
        assert kiln.tagged() == kiln.pulled() == kiln.tools.runs[1].image.digest
        assert [kiln.row(build).status for build in builds] == ["succeeded", "succeeded"]
        assert [kiln.leftovers(build) for build in builds] == [[], []]


class TestOutage:
    async def test_a_registry_that_is_away_only_delays(self, kiln: ContainerHarness, site: RegistrySite) -> None:
        """A build whose image is published while the registry is stopped succeeds once it is back."""
        async with publishing(kiln) as (build, hold):
            site.stop()
            hold.open()
            await kiln.until(lambda: has_called(kiln, "facts", 2))
            assert (kiln.row(build).status, kiln.row(build).completed_at) == ("building", None)
            site.start()
            assert (await kiln.end(build)).status is BuildStatus.SUCCEEDED
        is_published(kiln, build)


async def has_called(kiln: ContainerHarness, call: str, times: int) -> bool:
    return kiln.registry.calls[call] >= times
