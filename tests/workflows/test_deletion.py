"""Deletions of finished images."""

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest_asyncio
from temporalio.testing import WorkflowEnvironment

from kiln.catalog import images
from kiln.models import ImageRef
from kiln.naming import delete_workflow_id
from support.harness import Harness
from support.rows import ACCOUNT
from workflows.start import start_deletion

HOUR = timedelta(hours=1)
TRIES_AN_HOUR = 130


@pytest_asyncio.fixture
async def image(kiln: Harness) -> AsyncIterator[ImageRef]:
    """An image that is being deleted; workers are there."""
    async with kiln.workers():
        build = await kiln.submit()
        await kiln.end(build)
        image = kiln.published(build)
        kiln.begin_deletion(image)
        yield image


async def delete(kiln: Harness, image: ImageRef) -> None:
    await start_deletion(kiln.client, image)
    async with kiln.skipping():
        await kiln.client.get_workflow_handle(delete_workflow_id(image.image_id)).result()


def status(kiln: Harness, image: ImageRef) -> str:
    with kiln.catalog.read() as session:
        row = images.get(session, image.image_id)
    assert row is not None
    return row.status


async def test_the_image_goes(kiln: Harness, image: ImageRef) -> None:
    """The AMI is deregistered, and its row says so."""
    await delete(kiln, image)
    assert (kiln.cloud.image_ids, status(kiln, image)) == (set(), "deleted")


async def test_what_takes_time_is_waited_for(kiln: Harness, image: ImageRef) -> None:
    """The end is recorded when EC2 shows nothing more."""
    kiln.cloud.cling(passes=1)
    await delete(kiln, image)
    assert (kiln.cloud.calls["delete_image"], status(kiln, image)) == (2, "deleted")


async def test_an_hour_without_ec2_is_waited_out(
    kiln: Harness, image: ImageRef, environment: WorkflowEnvironment
) -> None:
    """An EC2 that does not answer delays a deletion, and does not end it."""
    kiln.cloud.fail("delete_image", times=TRIES_AN_HOUR)
    began = await environment.get_current_time()
    await delete(kiln, image)
    assert await environment.get_current_time() - began > HOUR
    assert (kiln.cloud.image_ids, status(kiln, image)) == (set(), "deleted")


async def test_another_account_is_not_touched(kiln: Harness, image: ImageRef) -> None:
    """With credentials of another account nothing is deleted until the right ones are back."""
    kiln.cloud.account_id = "999999999999"
    asked = kiln.cloud.calls["account"]
    await start_deletion(kiln.client, image)
    await kiln.until(lambda: has_asked(kiln, asked + 2))
    assert (kiln.cloud.calls["delete_image"], status(kiln, image)) == (0, "deleting")
    kiln.cloud.account_id = ACCOUNT
    await delete(kiln, image)
    assert status(kiln, image) == "deleted"


async def has_asked(kiln: Harness, times: int) -> bool:
    return kiln.cloud.calls["account"] >= times


async def test_an_image_that_is_gone_already_needs_nothing(kiln: Harness, image: ImageRef) -> None:
    """A deletion that is started again after its end does not ask EC2."""
    await delete(kiln, image)
    asked = kiln.cloud.calls.total()
    await delete(kiln, image)
    assert kiln.cloud.calls.total() == asked


async def test_a_deletion_that_runs_is_not_doubled(kiln: Harness, image: ImageRef) -> None:
    """Starting it again while it runs joins the one that runs."""
    kiln.cloud.cling(passes=1)
    await start_deletion(kiln.client, image)
    await delete(kiln, image)
    assert kiln.cloud.calls["delete_image"] == 2


async def test_operators_see_what_it_does(kiln: Harness, image: ImageRef) -> None:
    """The Temporal UI says when the image is gone."""
    await delete(kiln, image)
    assert await kiln.details_of(kiln.client.get_workflow_handle(delete_workflow_id(image.image_id))) == "gone"
