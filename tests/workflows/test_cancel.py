"""Cancellation, wherever a build stands and whichever way it comes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kiln.catalog.builds import shown_status
from kiln.models import BuildStatus
from support.fakes import hangs
from support.harness import Harness
from support.rows import request_cancel
from workflows.build_image import STATUS_ATTRIBUTE

# Nothing cached: every task replays the history, and every one ends in an eviction.
CACHES = pytest.mark.parametrize("cached", [100, 0], ids=["cached", "evicted"])


async def cancel(kiln: Harness, build: str) -> None:
    """What the Temporal UI and CLI do."""
    await kiln.handle(build).cancel()


@asynccontextmanager
async def building(kiln: Harness, cached: int = 100) -> AsyncIterator[str]:
    """A build whose tool runs until it is interrupted."""
    kiln.tools.script = hangs
    async with kiln.control(cached_workflows=cached), kiln.builder():
        build = await kiln.submit()
        await kiln.reaches(build, "building")
        yield build


@CACHES
async def test_in_the_queue_the_tool_never_starts(kiln: Harness, cached: int) -> None:
    """A build that is cancelled while it waits for a builder ends without one."""
    async with kiln.control(cached_workflows=cached):
        build = await kiln.submit()
        await kiln.reaches(build, "waiting")
        await cancel(kiln, build)
        await kiln.is_cancelled(build)
        async with kiln.builder():
            pending = (await kiln.handle(build).describe()).raw_description.pending_activities
    assert (kiln.row(build).status, list(pending), kiln.tools.started) == ("cancelled", [], [])


@CACHES
async def test_while_building_the_tool_is_stopped(kiln: Harness, cached: int) -> None:
    """Packer is interrupted, what it made goes, and the build and its run end cancelled."""
    async with building(kiln, cached) as build:
        await cancel(kiln, build)
        await kiln.is_cancelled(build)
        found = (await kiln.handle(build).describe()).typed_search_attributes
    assert kiln.tools.runs[1].interrupted.is_set()
    assert (kiln.row(build).status, found[STATUS_ATTRIBUTE]) == ("cancelled", "cancelled")
    assert kiln.cloud.resource_ids == set()


async def test_before_any_worker_was_there(kiln: Harness) -> None:
    """A workflow that is cancelled before its first task closes its row all the same."""
    build = await kiln.submit()
    await cancel(kiln, build)
    async with kiln.workers():
        await kiln.is_cancelled(build)
    assert (kiln.row(build).status, kiln.tools.started) == ("cancelled", [])


async def test_it_shows_in_the_catalog(kiln: Harness) -> None:
    """A cancel that came through Temporal reads as one that came through the API."""
    async with building(kiln) as build:
        kiln.gate.hold("clean-up")
        await cancel(kiln, build)
        await kiln.gate.is_reached()
        assert shown_status(kiln.row(build)) is BuildStatus.CANCELLING
        kiln.gate.open()
        await kiln.is_cancelled(build)


async def test_the_end_waits_for_the_cleanup(kiln: Harness) -> None:
    """A build is `cancelled` only when nothing of it is left."""
    async with building(kiln) as build:
        kiln.cloud.cling(passes=2)
        kiln.gate.hold("clean-up")
        await cancel(kiln, build)
        await kiln.reaches(build, "cleaning_up")
        assert (kiln.row(build).status, kiln.cloud.resource_ids != set()) == ("building", True)
        await kiln.gate.is_reached()
        assert (kiln.row(build).status, kiln.cloud.resource_ids) == ("building", set())
        kiln.gate.open()
        await kiln.is_cancelled(build)
    assert kiln.row(build).status == "cancelled"


@CACHES
async def test_a_second_cancel_does_not_stop_the_cleanup(kiln: Harness, cached: int) -> None:
    """Whoever cancels again during the cleanup changes nothing."""
    async with building(kiln, cached) as build:
        kiln.gate.hold("clean-up")
        await cancel(kiln, build)
        await kiln.gate.is_reached()
        await cancel(kiln, build)
        await cancel(kiln, build)
        kiln.gate.open()
        await kiln.is_cancelled(build)
    assert (kiln.row(build).status, kiln.cloud.resource_ids) == ("cancelled", set())


@CACHES
async def test_after_the_publication_nothing_changes(kiln: Harness, cached: int) -> None:
    """A build that is published has succeeded, though its workflow is cancelled during the cleanup."""
    async with kiln.control(cached_workflows=cached), kiln.builder():
        kiln.gate.hold("clean-up")
        build = await kiln.submit()
        await kiln.gate.is_reached()
        await cancel(kiln, build)
        kiln.gate.open()
        end = await kiln.end(build)
    assert (end.status, kiln.row(build).status) == (BuildStatus.SUCCEEDED, "succeeded")
    assert len(kiln.cloud.image_ids) == 1


async def test_after_the_end_nothing_changes(kiln: Harness) -> None:
    """A row that is closed cannot be cancelled."""
    async with kiln.workers():
        await kiln.end(build := await kiln.submit())
        request_cancel(kiln.catalog, build)
        assert (await kiln.end(build)).status is BuildStatus.SUCCEEDED
    assert kiln.row(build).status == "succeeded"


class TestInTheRowOnly:
    """Temporal was away when the cancel came: the row alone asks for it."""

    async def test_the_claim_honours_it(self, kiln: Harness) -> None:
        """A run that claims a build whose cancellation was asked for builds nothing."""
        build = kiln.order()
        await kiln.start(build)
        await self.is_claimed(kiln, build)
        request_cancel(kiln.catalog, build)
        async with kiln.workers():
            end = await kiln.end(build)
        assert (end.status, kiln.row(build).status) == (BuildStatus.CANCELLED, "cancelled")
        assert kiln.tools.started == []

    async def is_claimed(self, kiln: Harness, build: str) -> None:
        """The workflow's own run has the build, and knows no more of it."""
        run_id = (await kiln.handle(build).describe()).run_id
        assert kiln.ledger.claim(build, run_id or "").mine

    async def test_a_waiting_builder_honours_it(self, kiln: Harness) -> None:
        """A builder that takes up a build whose cancellation was asked for starts no tool."""
        async with kiln.control():
            build = await kiln.submit()
            await kiln.reaches(build, "waiting")
            request_cancel(kiln.catalog, build)
            async with kiln.builder():
                end = await kiln.end(build)
        assert (end.status, kiln.row(build).status) == (BuildStatus.CANCELLED, "cancelled")
        assert kiln.tools.started == []

    async def test_a_building_builder_honours_it(self, kiln: Harness) -> None:
        """A builder whose build's cancellation is asked for stops its tool."""
        async with building(kiln) as build:
            request_cancel(kiln.catalog, build)
            end = await kiln.end(build)
        assert kiln.tools.runs[1].interrupted.is_set()
        assert (end.status, kiln.row(build).status) == (BuildStatus.CANCELLED, "cancelled")

    async def test_the_publication_honours_it(self, kiln: Harness) -> None:
        """A build whose cancellation was asked for just before its publication has no image."""
        async with kiln.workers():
            kiln.cloud.fail("image", times=3)
            build = await kiln.submit()
            await kiln.until(lambda: has_tried_to_publish(kiln))
            request_cancel(kiln.catalog, build)
            end = await kiln.end(build)
        assert (end.status, kiln.row(build).status) == (BuildStatus.CANCELLED, "cancelled")
        assert kiln.cloud.image_ids == set()


async def has_tried_to_publish(kiln: Harness) -> bool:
    return kiln.cloud.calls["image"] >= 1
