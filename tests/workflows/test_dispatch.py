"""The dispatcher: what the catalog orders and Temporal does not know yet."""

import asyncio
from datetime import timedelta

import pytest
from temporalio.client import Client, WorkflowExecutionStatus
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.service import RPCError

from kiln.catalog import images
from kiln.errors import UnavailableError
from kiln.models import BuildStatus, HouseTerms
from kiln.naming import KEEP_HOUSE_WORKFLOW_ID
from support.harness import Harness
from support.rows import make_older, request_cancel
from workflows.dispatch import API_PATIENCE, Dispatcher

HOUSE = HouseTerms(pause_seconds=3600, rounds_a_sweep=1000, round=1)


@pytest.fixture
def dispatcher(kiln: Harness) -> Dispatcher:
    return Dispatcher(kiln.ledger, kiln.client, HOUSE)


def order(kiln: Harness) -> str:
    """A row that the API had its time to start, and did not."""
    build = kiln.order()
    make_older(kiln.catalog, build, API_PATIENCE + timedelta(seconds=1))
    return build


async def is_known(kiln: Harness, build: str) -> bool:
    try:
        await kiln.handle(build).describe()
    except RPCError:
        return False
    return True


async def test_a_build_that_was_left_behind_is_started(kiln: Harness, dispatcher: Dispatcher) -> None:
    """A row whose workflow the API could not start is built all the same."""
    build = order(kiln)
    await dispatcher.round()
    async with kiln.workers():
        assert (await kiln.end(build)).status is BuildStatus.SUCCEEDED


async def test_a_fresh_build_is_left_to_the_api(kiln: Harness, dispatcher: Dispatcher) -> None:
    """The API has a moment to start what it has just written."""
    build = kiln.order()
    await dispatcher.round()
    assert not await is_known(kiln, build)


async def test_a_build_that_runs_is_not_started_again(kiln: Harness, dispatcher: Dispatcher) -> None:
    """Round after round, a build that no run has claimed yet has one workflow."""
    build = order(kiln)
    await dispatcher.round()
    first = (await kiln.handle(build).describe()).run_id
    await dispatcher.round()
    assert (await kiln.handle(build).describe()).run_id == first


async def test_a_closed_build_is_not_started(kiln: Harness, dispatcher: Dispatcher) -> None:
    """A build that was cancelled before anybody brought it to Temporal never gets there."""
    build = order(kiln)
    request_cancel(kiln.catalog, build)
    await dispatcher.round()
    assert not await is_known(kiln, build)


async def test_a_cancel_is_brought(kiln: Harness, dispatcher: Dispatcher) -> None:
    """A cancellation that only the row knows reaches the workflow."""
    async with kiln.control():
        build = await kiln.submit()
        await kiln.reaches(build, "waiting")
        make_older(kiln.catalog, build, API_PATIENCE + timedelta(seconds=1))
        request_cancel(kiln.catalog, build)
        await dispatcher.round()
        await kiln.is_cancelled(build)
    assert kiln.row(build).status == "cancelled"


async def test_a_cancel_of_a_workflow_that_is_gone_harms_nobody(kiln: Harness, dispatcher: Dispatcher) -> None:
    """A build without a workflow does not keep the others from theirs."""
    lost, other = order(kiln), order(kiln)
    kiln.ledger.claim(lost, "a run of long ago")
    request_cancel(kiln.catalog, lost)
    await dispatcher.round()
    assert await is_known(kiln, other)


async def test_a_deletion_that_hangs_is_started(kiln: Harness, dispatcher: Dispatcher) -> None:
    """An image whose deletion was begun in the catalog only goes all the same."""
    async with kiln.workers():
        build = await kiln.submit()
        await kiln.end(build)
        image = kiln.published(build)
        kiln.begin_deletion(image, ago=API_PATIENCE + timedelta(seconds=1))
        await dispatcher.round()
        await kiln.until(lambda: is_deleted(kiln, build))
    assert kiln.cloud.image_ids == set()


async def is_deleted(kiln: Harness, build: str) -> bool:
    image = kiln.image_of(build)
    return image is not None and image.status == images.DELETED


async def test_house_keeping_is_started(kiln: Harness, dispatcher: Dispatcher) -> None:
    """Where the house-keeping workflow does not run, the dispatcher starts it."""
    await dispatcher.round()
    description = await kiln.client.get_workflow_handle(KEEP_HOUSE_WORKFLOW_ID).describe()
    assert description.status is WorkflowExecutionStatus.RUNNING


async def test_a_temporal_that_is_away_is_said_to_be_so(kiln: Harness) -> None:
    """A round without Temporal fails in Kiln's words."""
    nowhere = await Client.connect("127.0.0.1:1", lazy=True, data_converter=pydantic_data_converter)
    with pytest.raises(UnavailableError, match="Temporal"):
        await Dispatcher(kiln.ledger, nowhere, HOUSE).round()


async def test_it_goes_on_after_a_failure(kiln: Harness, caplog: pytest.LogCaptureFixture) -> None:
    """A dispatcher without Temporal says so, and keeps trying."""
    nowhere = await Client.connect("127.0.0.1:1", lazy=True, data_converter=pydantic_data_converter)
    task = asyncio.create_task(Dispatcher(kiln.ledger, nowhere, HOUSE).run())
    await kiln.until(lambda: has_said(caplog, "trying again", times=2))
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def has_said(caplog: pytest.LogCaptureFixture, text: str, times: int) -> bool:
    return sum(text in record.getMessage() for record in caplog.records) >= times
