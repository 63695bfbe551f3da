"""An image of a stopped machine: EC2 makes it, whatever becomes of those who asked for it, and the machine keeps its
instance."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest

from kiln.adapters.ec2_errors import CloudRefusedError
from kiln.errors import ConflictError
from kiln.models import BuildEnd, BuildStatus
from kiln.naming import ATTEMPT_TAG, BUILD_TAG
from support.machine_harness import MachineHarness


async def ordered(kiln: MachineHarness) -> str:
    """The build of an image of a new machine, brought to Temporal."""
    build = kiln.order_image(kiln.machine())
    await kiln.start(build)
    return build


@asynccontextmanager
async def pending(kiln: MachineHarness) -> AsyncIterator[tuple[str, str]]:
    """A build whose AMI EC2 is making, and the AMI, at the end of the worker that had it begun."""
    kiln.machines.image_state = "pending"
    async with kiln.control():
        async with kiln.machinist("worker-1"):
            build = await ordered(kiln)
            await kiln.reaches(build, "building")
            (made,) = kiln.cloud.image_ids
        yield build, made


def reference(end: BuildEnd) -> str:
    assert end.image is not None
    return end.image.reference


class TestSuccess:
    async def test_an_image_of_a_machine(self, machine_kiln: MachineHarness) -> None:
        """A stopped machine's disks become an AMI that carries the build's name and tags; the machine is off again."""
        kiln = machine_kiln
        build = kiln.order_image(machine := kiln.machine())
        assert kiln.status_of(machine) == "installing"
        async with kiln.workers():
            await kiln.start(build)
            end = await kiln.end(build)
        image = kiln.cloud.image("us-east-1", reference(end))
        assert image is not None
        assert (image.name, image.tags[BUILD_TAG], image.tags[ATTEMPT_TAG]) == (f"kiln-machine-{build}-1", build, "1")
        assert (end.status, kiln.status_of(machine), kiln.row(build).status) == ("succeeded", "off", "succeeded")

    async def test_operators_see_what_ec2_makes(self, machine_kiln: MachineHarness) -> None:
        """While EC2 makes the AMI, Temporal names it and the machine's instance, and so does the log."""
        kiln = machine_kiln
        kiln.machines.image_state = "pending"
        async with kiln.workers():
            build = await ordered(kiln)
            await kiln.reaches(build, "building")
            (made,) = kiln.cloud.image_ids
            details = await kiln.details(build)
            kiln.cloud.change_image(made, state="available")
            await kiln.end(build)
        said = f"EC2 is making {made} of {next(iter(kiln.machines.alive))}"
        assert said in details
        assert kiln.log(build)[:2] == [said, f"{made} is available: 8 GiB in 1 snapshots"]


class TestFailure:
    @pytest.mark.parametrize(
        ("state", "problem"), [("running", "is running, not stopped"), ("gone", "is no more")], ids=["running", "gone"]
    )
    async def test_a_machine_without_a_still_disk(self, machine_kiln: MachineHarness, state: str, problem: str) -> None:
        """A machine that somebody started, or terminated, behind Kiln's back has no image made of it."""
        kiln = machine_kiln
        build = kiln.order_image(machine := kiln.machine())
        if state == "gone":
            kiln.machines.forget(kiln.instance_of(machine))
        else:
            kiln.machines.change(kiln.instance_of(machine), state=state)
        async with kiln.workers():
            await kiln.start(build)
            error = await kiln.failure(build)
        assert (error.type, error.message.endswith(problem)) == ("source_unavailable", True)
        assert (kiln.machines.calls["create_image"], kiln.log(build)[0]) == (0, error.message)

    async def test_ec2_fails(self, machine_kiln: MachineHarness) -> None:
        """An AMI that EC2 cannot make fails the build with EC2's reason, and goes."""
        kiln = machine_kiln
        kiln.machines.image_state = "pending"
        async with kiln.workers():
            build = await ordered(kiln)
            await kiln.reaches(build, "building")
            (made,) = kiln.cloud.image_ids
            kiln.cloud.change_image(made, state="failed", state_reason="Client.InternalError: no room")
            error = await kiln.failure(build)
        assert (error.type, error.message) == ("tool_failed", f"{made} is failed: Client.InternalError: no room")
        assert (kiln.cloud.image_ids, len(kiln.machines.alive)) == (set(), 1)
        assert error.message in kiln.log(build)

    async def test_ec2_refuses(self, machine_kiln: MachineHarness) -> None:
        """What EC2 refuses is the build's error, not a fault of Kiln's."""
        kiln = machine_kiln
        kiln.machines.fail("create_image", CloudRefusedError("too many AMIs", code="AMIQuotaExceeded"))
        async with kiln.workers():
            error = await kiln.failure(await ordered(kiln))
        assert (error.type, error.message) == ("tool_failed", "EC2 refused to make the image: too many AMIs")

    async def test_it_takes_too_long(self, machine_kiln: MachineHarness) -> None:
        """An AMI that EC2 does not finish in the build's time is given up, and goes."""
        kiln = machine_kiln
        kiln.limit = timedelta(milliseconds=300)
        kiln.machines.image_state = "pending"
        async with kiln.workers():
            error = await kiln.failure(build := await ordered(kiln))
        assert (error.type, kiln.row(build).status, kiln.cloud.image_ids) == ("timed_out", "timed_out", set())


class TestCancel:
    async def test_while_ec2_makes_it(self, machine_kiln: MachineHarness) -> None:
        """A cancelled snapshot takes its AMI away and leaves the machine as it was, which it never noted as its own."""
        kiln = machine_kiln
        kiln.machines.image_state = "pending"
        build = kiln.order_image(machine := kiln.machine())
        async with kiln.workers():
            await kiln.start(build)
            await kiln.reaches(build, "building")
            (made,) = kiln.cloud.image_ids
            await kiln.handle(build).cancel()
            await kiln.is_cancelled(build)
        row = kiln.row(build)
        assert (row.status, row.known_ids, kiln.cloud.image_ids) == ("cancelled", [made], set())
        assert (kiln.machines.state(kiln.instance_of(machine)), kiln.status_of(machine)) == ("stopped", "off")

    async def test_before_a_worker_has_it(self, machine_kiln: MachineHarness) -> None:
        """A snapshot that is cancelled while it waits asks nothing of EC2."""
        kiln = machine_kiln
        async with kiln.control():
            build = await ordered(kiln)
            await kiln.reaches(build, "waiting")
            await kiln.handle(build).cancel()
            await kiln.is_cancelled(build)
        assert (kiln.row(build).status, kiln.machines.calls["create_image"]) == ("cancelled", 0)


class TestOneImage:
    @pytest.mark.parametrize(
        ("error", "attempts"),
        [(ConflictError("an AMI has the name already"), 1), (None, 2)],
        ids=["asked again within the call", "asked again by the next attempt"],
    )
    async def test_a_lost_reply_doubles_nothing(
        self, machine_kiln: MachineHarness, error: ConflictError | None, attempts: int
    ) -> None:
        """An AMI whose beginning nobody heard of is known by its name, and adopted."""
        kiln = machine_kiln
        kiln.machines.lose_reply("create_image", error)
        async with kiln.workers():
            end = await kiln.end(build := await ordered(kiln))
        assert (end.status, kiln.cloud.image_ids) == (BuildStatus.SUCCEEDED, {reference(end)})
        assert (kiln.row(build).attempt, kiln.machines.calls["create_image"]) == (attempts, 1)

    async def test_a_worker_that_stops_leaves_it_to_the_next(self, machine_kiln: MachineHarness) -> None:
        """An AMI that a stopped worker had begun is waited for and adopted by the next attempt."""
        kiln = machine_kiln
        async with pending(kiln) as (build, made), kiln.machinist("worker-2"):
            kiln.cloud.change_image(made, state="available")
            end = await kiln.end(build)
        assert (reference(end), kiln.row(build).attempt, kiln.machines.calls["create_image"]) == (made, 2, 1)
        assert f"adopting {made} (kiln-machine-{build}-1), which an earlier attempt began" in kiln.log(build)

    async def test_an_adopted_ones_snapshots_are_tagged(self, machine_kiln: MachineHarness) -> None:
        """A simulated EC2 tags no snapshots: Kiln does, whichever attempt saw the AMI finished."""
        kiln = machine_kiln
        async with pending(kiln) as (build, made), kiln.machinist("worker-2"):
            kiln.cloud.change_image(made, state="available", snapshot_ids=("snap-1", "snap-2"))
            await kiln.end(build)
        assert [kiln.cloud.tagged[each][BUILD_TAG] for each in ("snap-1", "snap-2")] == [build, build]

    async def test_one_that_failed_meanwhile_is_made_anew(self, machine_kiln: MachineHarness) -> None:
        """Where EC2 gave a lost attempt's AMI up, the next attempt has another one made, and the first goes."""
        kiln = machine_kiln
        async with pending(kiln) as (build, made):
            kiln.cloud.change_image(made, state="failed")
            kiln.machines.image_state = "available"
            async with kiln.machinist("worker-2"):
                end = await kiln.end(build)
        assert reference(end) != made
        assert kiln.cloud.image_ids == {reference(end)}
