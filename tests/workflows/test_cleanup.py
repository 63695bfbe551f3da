"""The cleanup goes on until nothing is left, and only then is the end recorded."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

from temporalio.testing import WorkflowEnvironment

from support.fakes import fails, hangs
from support.harness import Harness
from support.rows import ACCOUNT

HOUR = timedelta(hours=1)
# A second, two, four, eight, sixteen, and then half a minute each: more than an hour.
TRIES_AN_HOUR = 130


@asynccontextmanager
async def cancelled(kiln: Harness) -> AsyncIterator[str]:
    """A build that was building and is about to be cleaned up after."""
    kiln.tools.script = hangs
    async with kiln.workers():
        build = await kiln.submit()
        await kiln.reaches(build, "building")
        await kiln.handle(build).cancel()
        yield build


async def test_it_passes_until_nothing_is_left(kiln: Harness) -> None:
    """Resources that take their time to go are waited for."""
    async with cancelled(kiln) as build:
        kiln.cloud.cling(passes=2)
        await kiln.is_cancelled(build)
    assert kiln.cloud.calls["remove_leftovers"] >= 3
    assert kiln.cloud.resource_ids == set()


async def test_the_log_names_what_went(kiln: Harness) -> None:
    """Whoever reads the log sees which resources the cleanup removed."""
    async with cancelled(kiln) as build:
        kiln.cloud.cling(passes=1)
        await kiln.is_cancelled(build)
    assert f"removed instance i-{build}-1" in kiln.log(build)


async def test_an_hour_without_ec2_is_waited_out(kiln: Harness, environment: WorkflowEnvironment) -> None:
    """An EC2 that does not answer for an hour delays the end, and does not prevent it."""
    async with cancelled(kiln) as build:
        kiln.cloud.fail("remove_leftovers", times=TRIES_AN_HOUR)
        began = await environment.get_current_time()
        await kiln.is_cancelled(build)
        took = await environment.get_current_time() - began
    assert took > HOUR
    assert (kiln.row(build).status, kiln.cloud.resource_ids) == ("cancelled", set())


async def test_nothing_is_recorded_before(kiln: Harness) -> None:
    """While the cleanup fails, the build stays open."""
    async with cancelled(kiln) as build:
        kiln.cloud.fail("remove_leftovers", times=3)
        await kiln.until(lambda: has_failed(kiln))
        assert kiln.row(build).status == "building"
        await kiln.is_cancelled(build)
    assert kiln.row(build).status == "cancelled"


async def has_failed(kiln: Harness) -> bool:
    return kiln.cloud.calls["remove_leftovers"] >= 1


async def test_another_account_is_not_touched(kiln: Harness) -> None:
    """With credentials of another account nothing is looked for, until the right ones are back."""
    async with cancelled(kiln) as build:
        kiln.cloud.account_id = "999999999999"
        await kiln.reaches(build, "cleaning_up")
        asked = kiln.cloud.calls["account"]
        await kiln.until(lambda: has_asked_again(kiln, asked))
        assert (kiln.cloud.calls["remove_leftovers"], kiln.row(build).status) == (0, "building")
        kiln.cloud.account_id = ACCOUNT
        await kiln.is_cancelled(build)
    assert kiln.cloud.resource_ids == set()


async def has_asked_again(kiln: Harness, asked: int) -> bool:
    return kiln.cloud.calls["account"] > asked


async def test_a_failed_build_is_cleaned_up_after_too(kiln: Harness) -> None:
    """A failure is recorded when nothing is left."""
    kiln.tools.script = fails("Script exited with non-zero exit status: 1.")
    kiln.cloud.fail("remove_leftovers", times=2)
    async with kiln.workers():
        await kiln.failure(build := await kiln.submit())
    assert (kiln.row(build).status, kiln.cloud.resource_ids) == ("failed", set())


async def test_a_build_that_made_nothing_needs_no_ec2(kiln: Harness) -> None:
    """A build that was cancelled in the queue ends while EC2 does not answer."""
    kiln.cloud.fail("account", times=100)
    async with kiln.control():
        build = await kiln.submit()
        await kiln.reaches(build, "waiting")
        await kiln.handle(build).cancel()
        await kiln.is_cancelled(build)
    assert (kiln.row(build).status, kiln.cloud.calls.total()) == ("cancelled", 0)
