"""A cancel that reaches the workflow together with the end of a step: neither is lost."""

import pytest

from kiln.models import BuildStatus
from support.harness import Harness


async def cancel_as_it_ends(kiln: Harness, step: str, *, cancel_first: bool) -> str:
    """A build whose workflow learns of a step's end and of its cancellation in one task."""
    build = await kiln.submit()
    kiln.gate.hold(step)
    async with kiln.activities(), kiln.builder():
        async with kiln.workflows(cached=0):
            await kiln.gate.is_reached()
        if cancel_first:
            await kiln.handle(build).cancel()
        kiln.gate.open()
        await kiln.until(lambda: has_ended(kiln, build, step))
        if not cancel_first:
            await kiln.handle(build).cancel()
        async with kiln.workflows(cached=0):
            await kiln.until(lambda: is_closed(kiln, build))
    return build


async def has_ended(kiln: Harness, build: str, step: str) -> bool:
    """Whether the step's end is in the history."""
    events = (await kiln.handle(build).fetch_history()).events
    scheduled = [
        event.event_id for event in events if event.activity_task_scheduled_event_attributes.activity_type.name == step
    ]
    ended = {event.activity_task_completed_event_attributes.scheduled_event_id for event in events}
    return ended.issuperset(scheduled)


async def is_closed(kiln: Harness, build: str) -> bool:
    return (await kiln.handle(build).describe()).close_time is not None


@pytest.mark.parametrize("cancel_first", [True, False])
async def test_before_anything_is_built(kiln: Harness, *, cancel_first: bool) -> None:
    """A cancel that comes with the claim ends the build cancelled; its tool never starts."""
    build = await cancel_as_it_ends(kiln, "claim-build", cancel_first=cancel_first)
    assert (kiln.row(build).status, kiln.tools.started) == ("cancelled", [])


@pytest.mark.parametrize("cancel_first", [True, False])
@pytest.mark.parametrize("step", ["publish-image", "clean-up", "record-end"])
async def test_after_the_publication(kiln: Harness, step: str, *, cancel_first: bool) -> None:
    """A cancel that comes with a later step changes nothing: the build has succeeded, and the workflow says so."""
    build = await cancel_as_it_ends(kiln, step, cancel_first=cancel_first)
    assert kiln.row(build).status == "succeeded"
    assert (await kiln.end(build)).status is BuildStatus.SUCCEEDED
