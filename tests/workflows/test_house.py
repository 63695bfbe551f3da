"""House-keeping: what other workflows left behind."""

from datetime import timedelta
from typing import Any

import pytest
from temporalio.client import WorkflowContinuedAsNewError, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import CancelledError

from kiln.catalog import images
from kiln.models import BuildEnd, BuildStatus, HouseTerms
from kiln.naming import KEEP_HOUSE_WORKFLOW_ID
from support.fakes import hangs
from support.harness import Harness
from support.rows import make_older, request_cancel
from workflows import options
from workflows.keep_house import KeepHouseWorkflow
from workflows.start import start_house_keeping

# A build gets a few seconds to reach Temporal before anybody asks where it is.
LONG_AGO = timedelta(minutes=1)
# The server skips no time while a builder's activity waits.
EVERY_ROUND = HouseTerms(pause_seconds=0.2, rounds_a_sweep=1)


def house(kiln: Harness) -> WorkflowHandle[Any, Any]:
    return kiln.client.get_workflow_handle_for(KeepHouseWorkflow.run, KEEP_HOUSE_WORKFLOW_ID)


async def rounds(kiln: Harness, number: int = 2, terms: HouseTerms = EVERY_ROUND) -> None:
    """Lets so many whole rounds pass."""
    await start_house_keeping(kiln.client, terms)
    began = kiln.finished["observe-images"]
    await kiln.until(lambda: has_observed(kiln, began + number))


async def has_observed(kiln: Harness, times: int) -> bool:
    return kiln.finished["observe-images"] >= times


async def is_closed(kiln: Harness, build: str) -> bool:
    return kiln.row(build).completed_at is not None


async def terminated(kiln: Harness, phase: str = "building") -> str:
    """A build whose workflow somebody terminates in this phase."""
    kiln.tools.script = hangs
    build = await kiln.submit()
    await kiln.reaches(build, phase)
    make_older(kiln.catalog, build, LONG_AGO)
    await kiln.handle(build).terminate()
    return build


class TestLostBuilds:
    async def test_a_terminated_workflow_is_a_failure(self, kiln: Harness) -> None:
        """A build whose workflow was terminated is closed, and says why."""
        async with kiln.workers():
            build = await terminated(kiln)
            await start_house_keeping(kiln.client, EVERY_ROUND)
            await kiln.until(lambda: is_closed(kiln, build))
        row = kiln.row(build)
        assert (row.status, row.error_code) == ("failed", "workflow_terminated")

    async def test_its_tool_is_stopped_and_nothing_is_left(self, kiln: Harness) -> None:
        """The builder that still works on it loses it, and what it made goes."""
        async with kiln.workers():
            build = await terminated(kiln)
            await start_house_keeping(kiln.client, EVERY_ROUND)
            await kiln.until(lambda: is_closed(kiln, build))
        assert kiln.tools.runs[1].ended
        assert kiln.cloud.resource_ids == set()

    async def test_a_cancelled_one_ends_cancelled(self, kiln: Harness) -> None:
        """A build whose cancellation had been asked for ends as its user wanted."""
        async with kiln.control():
            build = await terminated(kiln, "waiting")
            request_cancel(kiln.catalog, build)
            await rounds(kiln)
        assert (kiln.row(build).status, kiln.row(build).error_code) == ("cancelled", None)

    async def test_a_forgotten_workflow_is_a_failure(self, kiln: Harness) -> None:
        """A build whose run Temporal no longer knows is closed."""
        async with kiln.control():
            build = kiln.order()
            kiln.ledger.claim(build, "a run of long ago")
            make_older(kiln.catalog, build, LONG_AGO)
            await rounds(kiln)
        assert kiln.row(build).error_code == "workflow_terminated"

    async def test_a_build_that_waits_for_dispatch_is_left_alone(self, kiln: Harness) -> None:
        """A row that was never brought to Temporal is the dispatcher's."""
        async with kiln.control():
            build = kiln.order()
            make_older(kiln.catalog, build, LONG_AGO)
            await rounds(kiln)
        assert kiln.row(build).status == "queued"

    async def test_a_build_that_runs_is_left_alone(self, kiln: Harness) -> None:
        """A build whose workflow runs is nobody else's."""
        async with kiln.control():
            build = await kiln.submit()
            await kiln.reaches(build, "waiting")
            make_older(kiln.catalog, build, LONG_AGO)
            await rounds(kiln)
        assert kiln.row(build).status == "queued"

    async def test_a_cleanup_that_fails_is_repeated(self, kiln: Harness) -> None:
        """A lost build stays open until a round has cleaned up after it."""
        async with kiln.control():
            async with kiln.builder():
                build = await terminated(kiln)
                await kiln.until(lambda: has_let_go(kiln, build))
            kiln.cloud.fail("remove_leftovers", times=2)
            await start_house_keeping(kiln.client, EVERY_ROUND)
            await kiln.until(lambda: is_closed(kiln, build))
        assert kiln.cloud.calls["remove_leftovers"] == 3
        assert kiln.row(build).error_code == "workflow_terminated"


async def has_let_go(kiln: Harness, build: str) -> bool:
    """Whether the builder has noticed that Temporal no longer knows its activity."""
    return kiln.row(build).lease_until is None


class TestImages:
    async def test_an_image_that_is_gone_is_marked(self, kiln: Harness) -> None:
        """An AMI that somebody deregistered behind Kiln's back is recorded as gone, with the reason."""
        async with kiln.workers():
            await kiln.end(build := await kiln.submit())
            kiln.cloud.drop_image(*kiln.cloud.image_ids)
            await rounds(kiln)
        image = kiln.image_of(build)
        assert image is not None
        assert (image.status, "simulated EC2" in (image.gone_reason or "")) == ("gone", True)

    async def test_an_image_that_is_there_stays(self, kiln: Harness) -> None:
        """An AMI that EC2 has is available."""
        async with kiln.workers():
            await kiln.end(build := await kiln.submit())
            await rounds(kiln)
        image = kiln.image_of(build)
        assert image is not None
        assert image.status == images.AVAILABLE

    async def test_an_ec2_that_does_not_answer_proves_nothing(self, kiln: Harness) -> None:
        """While EC2 is away, the last answer holds."""
        async with kiln.workers():
            await kiln.end(build := await kiln.submit())
            kiln.cloud.drop_image(*kiln.cloud.image_ids)
            kiln.cloud.fail("own_images", times=4)
            await start_house_keeping(kiln.client, EVERY_ROUND)
            await kiln.until(lambda: has_asked(kiln, 4))
            image = kiln.image_of(build)
        assert image is not None
        assert image.status == images.AVAILABLE

    async def test_another_account_proves_nothing(self, kiln: Harness) -> None:
        """An AMI of another account than the credentials' is not looked for."""
        async with kiln.workers():
            await kiln.end(build := await kiln.submit())
            kiln.cloud.drop_image(*kiln.cloud.image_ids)
            kiln.cloud.account_id = "999999999999"
            await rounds(kiln)
        image = kiln.image_of(build)
        assert image is not None
        assert image.status == images.AVAILABLE


async def has_asked(kiln: Harness, times: int) -> bool:
    return kiln.cloud.calls["own_images"] >= times


class TestSweep:
    async def swept(self, kiln: Harness) -> set[str]:
        """What is left after a sweep."""
        async with kiln.control():
            await rounds(kiln, number=2)
        return kiln.cloud.resource_ids | kiln.cloud.image_ids

    def closed(self, kiln: Harness, status: BuildStatus) -> str:
        build = kiln.order()
        kiln.ledger.finish(build, BuildEnd(status=status))
        return build

    async def test_what_a_closed_build_left_goes(self, kiln: Harness) -> None:
        """A resource that carries the tag of a build that is over is removed."""
        build = self.closed(kiln, BuildStatus.FAILED)
        kiln.cloud.add("instance", "i-left", build)
        kiln.cloud.add_image(build, 1)
        assert await self.swept(kiln) == set()

    async def test_a_succeeded_builds_image_stays(self, kiln: Harness) -> None:
        """An AMI is its users', its build's other resources are not."""
        build = self.closed(kiln, BuildStatus.SUCCEEDED)
        kiln.cloud.add("volume", "vol-left", build)
        image = kiln.cloud.add_image(build, 1)
        assert await self.swept(kiln) == {image}

    async def test_an_open_builds_resources_stay(self, kiln: Harness) -> None:
        """Nothing is taken from a build that goes on."""
        kiln.cloud.add("instance", "i-busy", kiln.order())
        assert await self.swept(kiln) == {"i-busy"}

    async def test_what_nobody_knows_stays(self, kiln: Harness) -> None:
        """A build that the catalog does not have keeps what carries its tag."""
        kiln.cloud.add("instance", "i-unknown", "5e1f4c4e-0000-4000-8000-000000000000")
        assert await self.swept(kiln) == {"i-unknown"}

    async def test_it_comes_once_in_so_many_rounds(self, kiln: Harness) -> None:
        """Sweeping is dear: most rounds do without."""
        async with kiln.control():
            await rounds(kiln, 4, HouseTerms(pause_seconds=0.1, rounds_a_sweep=100))
        assert kiln.cloud.calls["tagged_resources"] == 1


class TestLongLife:
    async def test_it_continues_as_new(self, kiln: Harness) -> None:
        """A run that has gone round often enough is followed by the next, and its history stays small."""
        async with kiln.control():
            await start_house_keeping(kiln.client, HouseTerms(pause_seconds=10, rounds_a_sweep=1000))
            first = kiln.client.get_workflow_handle(
                KEEP_HOUSE_WORKFLOW_ID, run_id=(await house(kiln).describe()).run_id
            )
            async with kiln.skipping():
                with pytest.raises(WorkflowContinuedAsNewError):
                    await first.result(follow_runs=False)
            assert kiln.finished["observe-images"] >= options.ROUNDS_A_RUN
            assert (await first.describe()).history_length < 10_000

    async def test_it_is_started_once(self, kiln: Harness) -> None:
        """However many workers start it, one run goes round."""
        await start_house_keeping(kiln.client, EVERY_ROUND)
        run_id = (await house(kiln).describe()).run_id
        await start_house_keeping(kiln.client, EVERY_ROUND)
        assert (await house(kiln).describe()).run_id == run_id

    async def test_operators_see_what_went_wrong(self, kiln: Harness) -> None:
        """A round that failed says why, and the next one comes."""
        async with kiln.workers():
            await kiln.end(await kiln.submit())
            kiln.cloud.fail("own_images", times=2)
            await start_house_keeping(kiln.client, HouseTerms(pause_seconds=600, rounds_a_sweep=1))
            await kiln.until(lambda: says(kiln, "failed: CloudUnavailableError: own_images: EC2 does not answer"))
            async with kiln.skipping():
                await kiln.until(lambda: says(kiln, "went well"))

    async def test_it_can_be_cancelled(self, kiln: Harness) -> None:
        """A cancel ends it, though it comes in the midst of a round."""
        async with kiln.control():
            kiln.gate.hold("observe-images")
            await start_house_keeping(kiln.client, EVERY_ROUND)
            await kiln.gate.is_reached()
            await house(kiln).cancel()
            kiln.gate.open()
            with pytest.raises(WorkflowFailureError) as caught:
                async with kiln.skipping():
                    await house(kiln).result()
        assert isinstance(caught.value.cause, CancelledError)


async def says(kiln: Harness, text: str) -> bool:
    return text in await kiln.details_of(house(kiln))
