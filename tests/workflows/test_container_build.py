"""A container build's life from its workflow's start to its record, and that of a transfer."""

import pytest

from kiln.models import BuildStatus
from support.container_harness import ContainerHarness
from support.container_rows import known_tag, published, target
from support.container_tools import ContainerRun, hangs, makes, pushes_and_hangs
from support.histories import SECRET
from support.oci_images import image, index
from support.rows import add_organization
from workflows.build_image import STATUS_ATTRIBUTE
from workflows.start import IMAGE_ATTRIBUTE, KIND_ATTRIBUTE


@pytest.fixture
def kiln(container_kiln: ContainerHarness) -> ContainerHarness:
    return container_kiln


async def end_of_transfer(kiln: ContainerHarness, build: str) -> None:
    async with kiln.control(), kiln.transferrer():
        await kiln.start(build)
        await kiln.end(build)


async def lose_the_first_attempt(kiln: ContainerHarness) -> str:
    """A build whose first worker was stopped while its tool ran."""
    async with kiln.builder("worker-1"):
        build = await kiln.submit()
        await kiln.until(lambda: is_making(kiln, build))
    return build


async def is_making(kiln: ContainerHarness, build: str) -> bool:
    """Whether the tool runs, and has done all that it does before it hangs."""
    return any("making" in line for line in kiln.log(build))


class TestSuccess:
    async def test_the_image_is_written_down(self, kiln: ContainerHarness) -> None:
        """The catalog has the image as the registry does, and the workflow returns it."""
        async with kiln.workers():
            end = await kiln.end(build := await kiln.submit())
        made, row = kiln.tools.runs[0].image, kiln.image_of(build)
        assert row is not None
        assert (row.kind, row.status, row.account) == ("container", "available", kiln.registry.host)
        assert (row.repository, row.digest, row.platforms) == (kiln.target.repository, made.digest, ["linux/amd64"])
        assert (row.reference, row.size_bytes) == (
            f"{kiln.registry.host}/{kiln.target.repository}@{made.digest}",
            made.size_bytes,
        )
        assert end.image is not None
        assert (end.status, end.image.reference) == (BuildStatus.SUCCEEDED, row.reference)

    async def test_its_tag_is_there(self, kiln: ContainerHarness) -> None:
        """The catalog's tag points at the image, and the registry gives that digest for it."""
        async with kiln.workers():
            await kiln.end(build := await kiln.submit())
        row, image = known_tag(kiln.catalog, kiln.target).tag, kiln.image_of(build)
        assert image is not None
        assert (row.build_id, row.image_id, row.pushed_at) == (build, image.id, image.created_at)
        assert kiln.pulled() == row.digest == kiln.tools.runs[0].image.digest

    async def test_nothing_else_is_left(self, kiln: ContainerHarness) -> None:
        """Neither staged manifest, context, run directory nor secret; the engine forgets the name."""
        async with kiln.workers():
            await kiln.end(build := await kiln.submit(secret=SECRET))
        assert kiln.tools.runs[0].secret == SECRET
        assert (kiln.leftovers(build), kiln.row(build).secrets) == ([], None)
        assert kiln.engines.forgotten == [f"{kiln.registry.host}/kiln-staging/{build}:attempt-1"]

    async def test_operators_find_it(self, kiln: ContainerHarness) -> None:
        """The search attributes say what kind of build it is, how it ended, and which image it made."""
        async with kiln.workers():
            end = await kiln.end(build := await kiln.submit())
            found = (await kiln.handle(build).describe()).typed_search_attributes
        assert (found[KIND_ATTRIBUTE], found[STATUS_ATTRIBUTE]) == ("container", "succeeded")
        assert end.image is not None
        assert found[IMAGE_ATTRIBUTE] == end.image.reference

    async def test_the_tool_gets_the_context(self, kiln: ContainerHarness) -> None:
        """The archive that was uploaded, byte by byte."""
        async with kiln.workers():
            build = kiln.order()
            uploaded = b"".join(kiln.store.read(f"contexts/{build}"))
            await kiln.start(build)
            await kiln.end(build)
        assert kiln.tools.runs[0].context == uploaded


class TestFailure:
    async def test_the_tag_stays_where_it_was(self, kiln: ContainerHarness) -> None:
        """A build that fails says why, moves nothing, and leaves nothing."""

        async def fails(run: ContainerRun) -> int:
            await run.pushes()
            run.complains("executor failed running [/bin/sh -c make]: exit code: 2")
            return 1

        before = published(kiln.catalog, kiln.organization, kiln.target).digest
        kiln.tools.script = fails
        async with kiln.workers():
            error = await kiln.failure(build := await kiln.submit())
        assert (error.type, kiln.row(build).error_code) == ("tool_failed", "tool_failed")
        assert "exit code: 2" in (kiln.row(build).error_message or "")
        assert (kiln.tagged(), kiln.pulled(), kiln.leftovers(build)) == (before, None, [])

    async def test_a_replaced_context_is_refused(self, kiln: ContainerHarness) -> None:
        """What is built from is what was checked, though somebody can still write to the object."""
        async with kiln.workers():
            build = kiln.order()
            kiln.put(build, b"another archive")
            await kiln.start(build)
            error = await kiln.failure(build)
        assert (error.type, kiln.tools.started) == ("context_invalid", [])

    async def test_a_strangers_image_is_refused(self, kiln: ContainerHarness) -> None:
        """A Dockerfile that begins with another organization's image fails, though the engine has its layers."""
        theirs = target(kiln.target.name, owner="stranger")
        published(kiln.catalog, add_organization(kiln.catalog), theirs)

        async def begins_with_it(run: ContainerRun) -> int:
            run.reads(f"{kiln.registry.host}/{theirs.repository}:v1")
            return await hangs(run)

        kiln.tools.script = begins_with_it
        async with kiln.workers():
            error = await kiln.failure(build := await kiln.submit())
        assert (error.type, kiln.leftovers(build)) == ("source_unavailable", [])
        assert "no such image, or not yours to use" in error.message


class TestCancel:
    async def test_while_building_nothing_is_left(self, kiln: ContainerHarness) -> None:
        """The tool is interrupted, what it pushed goes, and no tag appears."""
        kiln.tools.script = pushes_and_hangs
        async with kiln.workers():
            build = await kiln.submit(secret=SECRET)
            await kiln.until(lambda: is_making(kiln, build))
            await kiln.handle(build).cancel()
            await kiln.is_cancelled(build)
        assert kiln.tools.runs[0].interrupted.is_set()
        assert (kiln.row(build).status, kiln.row(build).secrets, kiln.leftovers(build)) == ("cancelled", None, [])
        assert (kiln.tagged(), kiln.pulled()) == (None, None)


class TestAnotherAttempt:
    async def test_it_adopts_what_was_pushed(self, kiln: ContainerHarness) -> None:
        """An image that a lost attempt had pushed whole is published; the tool does not run again."""
        kiln.tools.scripts = {1: pushes_and_hangs}
        async with kiln.control():
            build = await lose_the_first_attempt(kiln)
            async with kiln.builder("worker-2"):
                end = await kiln.end(build)
        made = kiln.tools.runs[0].image.digest
        assert (end.status, kiln.row(build).attempt, kiln.tools.started) == (BuildStatus.SUCCEEDED, 2, [1])
        assert (kiln.pulled(), kiln.leftovers(build)) == (made, [])
        assert f"adopting {made}, which attempt 1 pushed" in kiln.log(build)

    async def test_it_builds_what_was_not(self, kiln: ContainerHarness) -> None:
        """Where the lost attempt had pushed nothing, the tool runs again."""
        kiln.tools.scripts = {1: hangs, 2: makes}
        async with kiln.control():
            build = await lose_the_first_attempt(kiln)
            async with kiln.builder("worker-2"):
                await kiln.end(build)
        assert (kiln.row(build).attempt, kiln.tools.started) == (2, [1, 2])
        assert (kiln.pulled(), kiln.leftovers(build)) == (kiln.tools.runs[1].image.digest, [])


class TestTermination:
    async def test_it_is_cleaned_up_and_recorded(self, kiln: ContainerHarness) -> None:
        """A build whose workflow was terminated while its tool ran fails with nothing left, and says why."""
        kiln.tools.script = pushes_and_hangs
        async with kiln.workers():
            build = await kiln.submit(secret=SECRET)
            await kiln.until(lambda: is_making(kiln, build))
            await kiln.lose(build)
            await kiln.keep_house()
        row = kiln.row(build)
        assert (row.status, row.error_code, row.secrets) == ("failed", "workflow_terminated", None)
        assert kiln.tools.runs[0].ended
        assert (kiln.leftovers(build), kiln.tagged(), kiln.pulled()) == ([], None, None)


class TestTransfer:
    async def test_all_platforms_are_published(self, kiln: ContainerHarness) -> None:
        """The image is the source's index, whatever platforms it is for."""
        both = index(image("amd64"), image("arm", "linux/arm64"))

        async def copies(run: ContainerRun) -> int:
            run.image = both
            return await makes(run)

        kiln.tools.script = copies
        build = kiln.order_transfer()
        await end_of_transfer(kiln, build)
        row = kiln.image_of(build)
        assert row is not None
        assert (row.digest, row.platforms) == (both.digest, ["linux/amd64", "linux/arm64"])
        assert row.size_bytes == sum(child.size_bytes for child in both.children)
        assert kiln.pulled() == kiln.tagged() == both.digest
        assert (kiln.row(build).status, kiln.leftovers(build)) == ("succeeded", [])

    async def test_another_platform_than_the_builders_is_no_fault(self, kiln: ContainerHarness) -> None:
        """Nobody asked for a platform: what the source has is taken."""

        async def copies(run: ContainerRun) -> int:
            run.image = image("arm", "linux/arm64")
            return await makes(run)

        kiln.tools.script = copies
        build = kiln.order_transfer()
        await end_of_transfer(kiln, build)
        row = kiln.image_of(build)
        assert row is not None
        assert (row.platform, row.platforms) == ("linux/arm64", ["linux/arm64"])

    async def test_a_source_may_have_become_forbidden(self, kiln: ContainerHarness) -> None:
        """A registry that transfers may not come from is not asked, though the order was taken."""
        async with kiln.control(), kiln.transferrer():
            build = kiln.order_transfer(host="10.0.0.1:5000")
            await kiln.start(build)
            error = await kiln.failure(build)
        assert (error.type, kiln.tools.started, kiln.tagged()) == ("source_unavailable", [], None)
