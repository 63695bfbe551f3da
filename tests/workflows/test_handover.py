"""Attempts that are lost, and the ones that take the build up after them."""

from kiln.models import BuildEnd, BuildStatus
from support.fakes import PackerRun, bakes, hangs
from support.frozen import FreezableBuilder
from support.harness import Harness
from support.rows import REGION


async def bakes_and_hangs(run: PackerRun) -> int:
    """A run that has made its AMI when its worker goes."""
    run.makes_image()
    return await hangs(run)


async def leaves_its_image_pending(run: PackerRun) -> int:
    run.makes_image(state="pending")
    return await hangs(run)


async def leaves_its_image_untagged(run: PackerRun) -> int:
    run.cloud.add_image(run.build_id, run.attempt, tagged=False)
    return await hangs(run)


def reference(end: BuildEnd) -> str:
    assert end.image is not None
    return end.image.reference


async def lose_the_first_attempt(kiln: Harness) -> str:
    """A build whose first worker was stopped while its tool ran."""
    async with kiln.builder("worker-1"):
        build = await kiln.submit()
        await kiln.reaches(build, "building")
    return build


class TestAWorkerThatStops:
    async def test_another_takes_the_build_up(self, kiln: Harness) -> None:
        """A worker's orderly end is no cancel: the build goes on elsewhere, as its next attempt."""
        kiln.tools.scripts = {1: hangs, 2: bakes}
        async with kiln.control():
            build = await lose_the_first_attempt(kiln)
            async with kiln.builder("worker-2"):
                end = await kiln.end(build)
        assert (end.status, kiln.row(build).attempt) == (BuildStatus.SUCCEEDED, 2)
        assert (len(kiln.cloud.image_ids), kiln.cloud.resource_ids) == (1, set())

    async def test_it_stops_its_tool(self, kiln: Harness) -> None:
        """The tool of a worker that stops is interrupted, not left."""
        kiln.tools.script = hangs
        async with kiln.control():
            await lose_the_first_attempt(kiln)
        assert kiln.tools.runs[1].interrupted.is_set()

    async def test_the_log_says_so(self, kiln: Harness) -> None:
        """A line of Kiln's own marks where another attempt begins."""
        kiln.tools.scripts = {1: hangs, 2: bakes}
        async with kiln.control():
            build = await lose_the_first_attempt(kiln)
            async with kiln.builder("worker-2"):
                await kiln.end(build)
        assert "attempt 2 takes the build up: attempt 1 ended without an image" in kiln.log(build)


class TestAdoption:
    async def test_a_finished_image_is_not_baked_again(self, kiln: Harness) -> None:
        """The second attempt takes the AMI that the first had finished."""
        kiln.tools.scripts = {1: bakes_and_hangs}
        async with kiln.control():
            build = await lose_the_first_attempt(kiln)
            (made,) = kiln.cloud.image_ids
            async with kiln.builder("worker-2"):
                end = await kiln.end(build)
        assert (reference(end), kiln.tools.started) == (made, [1])

    async def test_a_pending_image_is_waited_for(self, kiln: Harness) -> None:
        """An AMI that EC2 is still making is adopted when it is finished."""
        kiln.tools.scripts = {1: leaves_its_image_pending}
        async with kiln.control():
            build = await lose_the_first_attempt(kiln)
            (made,) = kiln.cloud.image_ids
            async with kiln.builder("worker-2"):
                await kiln.until(lambda: has_looked_twice(kiln))
                kiln.cloud.change_image(made, state="available")
                end = await kiln.end(build)
        assert (reference(end), kiln.tools.started) == (made, [1])

    async def test_an_untagged_image_gets_its_tags(self, kiln: Harness) -> None:
        """An AMI that is known by its name alone carries its tags before it is published."""
        kiln.tools.scripts = {1: leaves_its_image_untagged}
        async with kiln.control():
            build = await lose_the_first_attempt(kiln)
            async with kiln.builder("worker-2"):
                await kiln.end(build)
        (resource,) = kiln.cloud.tagged_resources(REGION, kiln.cloud.installation)
        assert resource.build_id == build

    async def test_one_of_two_images_is_spared(self, kiln: Harness) -> None:
        """Where a lost attempt doubled the AMI, the older is published and the younger goes."""
        kiln.tools.scripts = {1: bakes_and_hangs}
        async with kiln.control():
            build = await lose_the_first_attempt(kiln)
            (older,) = kiln.cloud.image_ids
            kiln.cloud.add_image(build, 1)
            async with kiln.builder("worker-2"):
                end = await kiln.end(build)
        assert reference(end) == older
        assert kiln.cloud.image_ids == {older}

    async def test_an_instance_that_lives_is_ended_first(self, kiln: Harness) -> None:
        """What could still become a second AMI is gone before the next attempt bakes."""

        async def bakes_alone(run: PackerRun) -> int:
            assert not [each for each in run.cloud.resource_ids if each.startswith("i-")]
            return await bakes(run)

        kiln.tools.scripts = {1: hangs, 2: bakes_alone}
        async with kiln.control():
            build = await lose_the_first_attempt(kiln)
            async with kiln.builder("worker-2"):
                end = await kiln.end(build)
        assert end.status is BuildStatus.SUCCEEDED


async def has_looked_twice(kiln: Harness) -> bool:
    return kiln.cloud.calls["images_of_build"] >= 2


class TestAWorkerThatFreezes:
    async def test_another_takes_the_build_up(self, kiln: Harness) -> None:
        """A worker that falls silent loses its build after the heartbeat time-out, and ends its tool when it wakes."""
        kiln.tools.scripts = {1: hangs, 2: bakes}
        async with kiln.control():
            with FreezableBuilder(kiln) as frozen:
                build = await kiln.submit()
                await kiln.reaches(build, "building")
                frozen.freeze()
                async with kiln.builder("worker-2"):
                    end = await kiln.end(build)
                frozen.thaw()
                await kiln.until(lambda: has_ended(kiln, 1))
        assert any(line.startswith("attempt 2 takes the build up: attempt 1 was lost") for line in kiln.log(build))
        assert (end.status, kiln.row(build).attempt) == (BuildStatus.SUCCEEDED, 2)
        assert kiln.cloud.image_ids == {reference(end)}

    async def test_a_cancel_does_not_wait_for_it(self, real_kiln: Harness) -> None:
        """A build that is cancelled while its worker is silent ends cancelled once the lease is over, and stays so."""
        kiln = real_kiln
        kiln.tools.script = hangs
        async with kiln.control():
            with FreezableBuilder(kiln) as frozen:
                build = await kiln.submit()
                await kiln.reaches(build, "building")
                frozen.freeze()
                await kiln.handle(build).cancel()
                await kiln.is_cancelled(build)
                assert (kiln.row(build).status, kiln.cloud.resource_ids) == ("cancelled", set())
                frozen.thaw()
                await kiln.until(lambda: has_ended(kiln, 1))
        assert (kiln.row(build).status, kiln.tools.started) == ("cancelled", [1])

    async def test_its_build_reads_queued_meanwhile(self, kiln: Harness) -> None:
        """A build whose worker fell silent is said to wait, once its lease is over."""
        kiln.tools.script = hangs
        async with kiln.control():
            with FreezableBuilder(kiln) as frozen:
                build = await kiln.submit()
                await kiln.reaches(build, "building")
                frozen.freeze()
                await kiln.until(lambda: is_requeued(kiln))
                assert kiln.row(build).status == "queued"
                frozen.thaw()
                await kiln.until(lambda: has_ended(kiln, 1))


async def has_ended(kiln: Harness, attempt: int) -> bool:
    return kiln.tools.runs[attempt].ended


async def is_requeued(kiln: Harness) -> bool:
    return kiln.ledger.requeue_lapsed() == 1
