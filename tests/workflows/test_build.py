"""A build's way to its end, where nobody interferes."""

import asyncio
from datetime import timedelta

import pytest
from temporalio.client import WorkflowExecutionStatus
from temporalio.testing import WorkflowEnvironment

from kiln.models import BuildEnd, BuilderReport, BuildStatus
from support.fakes import PackerRun, Script, bakes, fails, hangs
from support.harness import Harness
from support.rows import REGION
from workflows.build_image import IMAGE_ATTRIBUTE, STATUS_ATTRIBUTE, BuildImageWorkflow

ERROR = "Build 'amazon-ebs.agent' errored after 3 seconds: Script exited with non-zero exit status: 1."
NO_ROOM = "Error launching source instance: InsufficientInstanceCapacity: there is no room, try again"


async def makes_a_broken_image(run: PackerRun) -> int:
    run.reports(run.makes_image(state="failed"))
    return 0


async def makes_a_late_image(run: PackerRun) -> int:
    run.reports(run.makes_image(state="pending"))
    return 0


async def makes_no_image(run: PackerRun) -> int:
    run.reports("ami-0123456789abcdef0")
    return 0


async def names_no_image(run: PackerRun) -> int:
    run.says("==> Builds finished but no artifacts were created.")
    return 0


async def breaks(run: PackerRun) -> int:
    """A run that uncovers a fault of Kiln's own."""
    raise RuntimeError(f"/var/lib/kiln/{run.build_id}: broken")


class TestSuccess:
    async def test_it_ends_with_an_image(self, kiln: Harness) -> None:
        """A build that Packer bakes succeeds, and its workflow returns the image."""
        async with kiln.workers():
            end = await kiln.end(await kiln.submit())
        assert end.status is BuildStatus.SUCCEEDED
        assert end.image is not None
        assert ({end.image.reference}, end.image.region) == (kiln.cloud.image_ids, REGION)

    async def test_it_is_recorded(self, kiln: Harness) -> None:
        """The catalog has the end, the image, and the cleanup."""
        async with kiln.workers():
            end = await kiln.end(build := await kiln.submit())
        row, image = kiln.row(build), kiln.image_of(build)
        assert (row.status, row.cleaned_at is not None) == ("succeeded", True)
        assert image is not None
        assert end.image is not None
        assert image.reference == end.image.reference

    async def test_only_the_image_is_left(self, kiln: Harness) -> None:
        """The temporary security group is gone, the AMI is spared."""
        async with kiln.workers():
            await kiln.end(await kiln.submit())
        assert (len(kiln.cloud.image_ids), kiln.cloud.resource_ids) == (1, set())

    async def test_its_log_is_kept(self, kiln: Harness) -> None:
        """What Packer printed can be read as people read it."""
        async with kiln.workers():
            await kiln.end(build := await kiln.submit())
        assert "==> amazon-ebs.agent: Launching a source AWS instance..." in kiln.log(build)

    async def test_operators_find_it(self, kiln: Harness) -> None:
        """The search attributes name the end and the image."""
        async with kiln.workers():
            end = await kiln.end(build := await kiln.submit())
            found = (await kiln.handle(build).describe()).typed_search_attributes
        assert end.image is not None
        assert (found[STATUS_ATTRIBUTE], found[IMAGE_ATTRIBUTE]) == ("succeeded", end.image.reference)

    async def test_nothing_in_memory_is_needed(self, kiln: Harness) -> None:
        """With no workflow cached each step replays the history, and the build succeeds all the same."""
        async with kiln.control(cached_workflows=0), kiln.builder():
            end = await kiln.end(await kiln.submit())
        assert end.status is BuildStatus.SUCCEEDED

    async def test_an_image_that_is_late_is_waited_for(self, kiln: Harness) -> None:
        """EC2 may show a finished AMI as pending for a while."""
        kiln.tools.script = makes_a_late_image
        async with kiln.workers():
            build = await kiln.submit()
            await kiln.until(lambda: has_looked_twice(kiln))
            kiln.cloud.change_image(*kiln.cloud.image_ids, state="available")
            end = await kiln.end(build)
        assert end.status is BuildStatus.SUCCEEDED

    async def test_an_hour_without_ec2_costs_no_image(self, kiln: Harness, environment: WorkflowEnvironment) -> None:
        """A finished AMI is published when EC2 answers again, however long that takes."""
        kiln.cloud.fail("image", times=370)
        async with kiln.workers():
            build = await kiln.submit()
            await kiln.until(lambda: has_looked_twice(kiln))
            began = await environment.get_current_time()
            end = await kiln.end(build)
            took = await environment.get_current_time() - began
        assert (end.status, took > timedelta(hours=1)) == (BuildStatus.SUCCEEDED, True)

    async def test_a_tag_that_is_missing_is_made_good(self, kiln: Harness) -> None:
        """An AMI that Packer had no time to tag carries Kiln's tags once it is published."""

        async def leaves_it_untagged(run: PackerRun) -> int:
            run.reports(run.cloud.add_image(run.build_id, run.attempt, tagged=False))
            return 0

        kiln.tools.script = leaves_it_untagged
        async with kiln.workers():
            await kiln.end(build := await kiln.submit())
        (resource,) = kiln.cloud.tagged_resources(REGION, kiln.cloud.installation)
        assert resource.build_id == build


class TestFailure:
    async def test_packers_own_words_say_why(self, kiln: Harness) -> None:
        """The error is Packer's last error line, and the run is Failed with its code for a type."""
        kiln.tools.script = fails(ERROR)
        async with kiln.workers():
            error = await kiln.failure(build := await kiln.submit())
            description = await kiln.handle(build).describe()
        assert (error.type, error.message) == ("tool_failed", ERROR)
        assert description.status is WorkflowExecutionStatus.FAILED

    async def test_it_is_recorded(self, kiln: Harness) -> None:
        """The catalog has the code and the message."""
        kiln.tools.script = fails(ERROR)
        async with kiln.workers():
            await kiln.failure(build := await kiln.submit())
        row = kiln.row(build)
        assert (row.status, row.error_code, row.error_message) == ("failed", "tool_failed", ERROR)

    async def test_a_tool_that_failed_is_not_tried_again(self, kiln: Harness) -> None:
        """A script that fails once would fail again."""
        kiln.tools.script = fails(ERROR)
        async with kiln.workers():
            await kiln.failure(await kiln.submit())
        assert kiln.tools.started == [1]

    async def test_nothing_is_left(self, kiln: Harness) -> None:
        """A failed build's AMI and security group are gone."""

        async def fails_late(run: PackerRun) -> int:
            run.makes_image()
            run.complains(ERROR)
            return 1

        kiln.tools.script = fails_late
        async with kiln.workers():
            await kiln.failure(await kiln.submit())
        assert (kiln.cloud.image_ids, kiln.cloud.resource_ids) == (set(), set())

    async def test_the_log_names_the_command(self, kiln: Harness) -> None:
        """Whoever reads the log sees what was run, and how it ended."""
        kiln.tools.script = fails(ERROR, code=3)
        async with kiln.workers():
            await kiln.failure(build := await kiln.submit())
        assert "packer build template.pkr.hcl: exit code 3" in kiln.log(build)

    async def test_a_run_without_an_image_is_a_failure(self, kiln: Harness) -> None:
        """A Packer that ends well and names no AMI has failed."""
        kiln.tools.script = names_no_image
        async with kiln.workers():
            error = await kiln.failure(await kiln.submit())
        assert error.type == "tool_failed"

    @pytest.mark.parametrize("script", [makes_a_broken_image, makes_no_image])
    async def test_a_broken_image_fails_the_verification(self, kiln: Harness, script: Script) -> None:
        """What EC2 does not call available, or does not know, is not published."""
        kiln.tools.script = script
        async with kiln.workers():
            error = await kiln.failure(build := await kiln.submit())
        assert (error.type, kiln.row(build).error_code) == ("verification_failed", "verification_failed")
        assert kiln.cloud.image_ids == set()

    async def test_an_internal_error_shows_no_internals(self, kiln: Harness) -> None:
        """What went wrong inside Kiln is for its operators: no path reaches the build's error."""
        kiln.tools.script = breaks
        async with kiln.workers():
            error = await kiln.failure(build := await kiln.submit())
        message = kiln.row(build).error_message or ""
        assert (error.type, kiln.row(build).error_code) == ("internal", "internal")
        assert message == error.message
        assert "/" not in message
        assert "broken" not in message


class TestTimeOut:
    @pytest.fixture(autouse=True)
    def limit(self, kiln: Harness) -> None:
        kiln.limit = timedelta(seconds=1)
        kiln.tools.script = hangs

    async def test_its_text_names_the_limit(self, kiln: Harness) -> None:
        """A build that takes too long says so in the contract's words."""
        async with kiln.workers():
            error = await kiln.failure(build := await kiln.submit())
        assert (error.type, error.message) == ("timed_out", "Packer build timed out after 1 seconds")
        assert kiln.row(build).status == "timed_out"

    async def test_the_tool_is_stopped(self, kiln: Harness) -> None:
        """Packer is interrupted, and what it made goes."""
        async with kiln.workers():
            await kiln.failure(await kiln.submit())
        assert kiln.tools.runs[1].interrupted.is_set()
        assert kiln.cloud.resource_ids == set()


class TestCapacity:
    async def test_it_is_tried_three_times(self, kiln: Harness) -> None:
        """An EC2 without room is asked again twice, and then the build has failed for want of capacity."""
        kiln.tools.script = fails(NO_ROOM)
        async with kiln.workers():
            error = await kiln.failure(await kiln.submit())
        assert (error.type, kiln.tools.started) == ("capacity", [1, 2, 3])

    async def test_room_that_comes_later_is_used(self, kiln: Harness) -> None:
        """A build that finds room at its second attempt succeeds."""
        kiln.tools.scripts = {1: fails(NO_ROOM), 2: bakes}
        async with kiln.workers():
            end = await kiln.end(await kiln.submit())
        assert (end.status, kiln.tools.started) == (BuildStatus.SUCCEEDED, [1, 2])


class TestClaim:
    async def test_a_build_of_another_run_is_left_alone(self, kiln: Harness) -> None:
        """A run that loses the claim builds nothing, and changes nothing."""
        build = kiln.order()
        kiln.ledger.claim(build, "another run")
        async with kiln.workers():
            await kiln.start(build)
            await kiln.end(build)
        assert (kiln.row(build).status, kiln.tools.started) == ("queued", [])

    async def test_a_closed_build_is_left_alone(self, kiln: Harness) -> None:
        """A build that is over is not built again."""
        build = kiln.order()
        kiln.ledger.finish(build, BuildEnd(status=BuildStatus.FAILED))
        async with kiln.workers():
            await kiln.start(build)
            await kiln.end(build)
        assert (kiln.row(build).status, kiln.tools.started) == ("failed", [])


class TestStatus:
    """What the `status` query and the Temporal UI say, phase by phase."""

    async def test_waiting(self, kiln: Harness) -> None:
        """A build without a builder waits, `queued`."""
        async with kiln.control():
            build = await kiln.submit()
            await kiln.reaches(build, "waiting")
            assert (await kiln.status(build)).status is BuildStatus.QUEUED
            assert "waiting for a Packer builder" in await kiln.details(build)

    async def test_building(self, kiln: Harness) -> None:
        """A build whose tool runs says which attempt, and where."""
        kiln.tools.script = hangs
        async with kiln.control(), kiln.builder("worker-7"):
            build = await kiln.submit()
            await kiln.reaches(build, "building")
            view = await kiln.status(build)
            assert (view.status, view.attempt) == (BuildStatus.BUILDING, 1)
            assert "attempt 1, on worker-7" in await kiln.details(build)
            await kiln.handle(build).cancel()
            await kiln.is_cancelled(build)

    async def test_the_ami_that_is_being_made(self, kiln: Harness) -> None:
        """The catalog knows the AMI that EC2 is making, and does not take the one that it is made of for it."""

        async def names_two(run: PackerRun) -> int:
            run.says("    amazon-ebs.agent: Found Image ID: ami-0123456789abcdef0")
            await asyncio.sleep(0)
            run.makes_image(state="pending")
            return await hangs(run)

        kiln.tools.script = names_two
        async with kiln.workers():
            build = await kiln.submit()
            await kiln.until(lambda: is_making_an_image(kiln, build))
            row = kiln.row(build)
            assert {row.pending_image} == set(row.known_ids) == kiln.cloud.image_ids
            await kiln.handle(build).cancel()
            await kiln.is_cancelled(build)

    async def test_publishing(self, kiln: Harness) -> None:
        """A build whose image is being looked at names it."""
        async with kiln.workers():
            kiln.gate.hold("publish-image")
            build = await kiln.submit()
            await kiln.reaches(build, "publishing")
            assert next(iter(kiln.cloud.image_ids)) in await kiln.details(build)
            kiln.gate.open()
            await kiln.end(build)

    async def test_cleaning_up(self, kiln: Harness) -> None:
        """A build that is published reads `succeeded` while it cleans up."""
        async with kiln.workers():
            kiln.gate.hold("clean-up")
            build = await kiln.submit()
            await kiln.reaches(build, "cleaning_up")
            assert (await kiln.status(build)).status is BuildStatus.SUCCEEDED
            assert "removing what the build made and does not need" in await kiln.details(build)
            kiln.gate.open()
            await kiln.end(build)

    async def test_ended(self, kiln: Harness) -> None:
        """A build that is over has its image, and no progress."""
        async with kiln.workers():
            end = await kiln.end(build := await kiln.submit())
            view = await kiln.status(build)
            assert (view.status, view.image, view.progress) == (BuildStatus.SUCCEEDED, end.image, None)
            assert end.image is not None
            assert end.image.reference in await kiln.details(build)

    async def test_failed(self, kiln: Harness) -> None:
        """A build that failed has its error."""
        kiln.tools.script = fails(ERROR)
        async with kiln.workers():
            await kiln.failure(build := await kiln.submit())
            view = await kiln.status(build)
            assert view.error is not None
            assert (view.status, view.error.message) == (BuildStatus.FAILED, ERROR)
            assert ERROR in await kiln.details(build)


class TestSignals:
    async def test_a_late_report_changes_nothing(self, kiln: Harness) -> None:
        """A builder's report that comes after the build is ignored."""
        late = BuilderReport(phase="building", attempt=9, detail="late")
        async with kiln.workers():
            kiln.gate.hold("clean-up")
            build = await kiln.submit()
            await kiln.reaches(build, "cleaning_up")
            await kiln.handle(build).signal(BuildImageWorkflow.builder_report, late)
            view = await kiln.status(build)
            assert view.progress is not None
            assert (view.progress.phase, view.attempt) == ("cleaning_up", 1)
            kiln.gate.open()
            await kiln.end(build)

    async def test_a_lost_attempts_report_changes_nothing(self, kiln: Harness) -> None:
        """A report of an attempt that has a successor is ignored."""
        kiln.tools.scripts = {1: fails(NO_ROOM), 2: hangs}
        early = BuilderReport(phase="building", attempt=1, detail="early")
        async with kiln.workers():
            build = await kiln.submit()
            await kiln.until(lambda: is_at_attempt(kiln, build, 1))
            await kiln.until(lambda: is_at_attempt(kiln, build, 2))
            await kiln.handle(build).signal(BuildImageWorkflow.builder_report, early)
            assert (await kiln.status(build)).attempt == 2
            await kiln.handle(build).cancel()
            await kiln.is_cancelled(build)

    async def test_a_context_is_of_no_use(self, kiln: Harness) -> None:
        """`context_uploaded` is taken, and changes nothing for a machine image."""
        async with kiln.control():
            build = await kiln.submit()
            await kiln.handle(build).signal("context_uploaded")
            async with kiln.builder():
                end = await kiln.end(build)
        assert end.status is BuildStatus.SUCCEEDED


async def has_looked_twice(kiln: Harness) -> bool:
    return kiln.cloud.calls["image"] >= 2


async def is_making_an_image(kiln: Harness, build: str) -> bool:
    return bool(kiln.row(build).pending_image)


async def is_at_attempt(kiln: Harness, build: str, attempt: int) -> bool:
    return (await kiln.status(build)).attempt == attempt
