"""What goes on when the coroutine that asked for it is cancelled."""

import asyncio

import pytest

from activities.calls import to_its_end


async def test_a_cleanup_that_is_cancelled_is_finished_first() -> None:
    """And then the cancellation is passed on."""
    begun, may_end, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def clean_up() -> None:
        begun.set()
        await may_end.wait()
        done.set()

    task = asyncio.create_task(to_its_end(clean_up()))
    await begun.wait()
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done.is_set()


async def test_what_a_cleanup_raises_is_raised() -> None:
    """And what it returns, returned."""

    async def fails() -> int:
        raise LookupError

    async def counts() -> int:
        return 3

    assert await to_its_end(counts()) == 3
    with pytest.raises(LookupError):
        await to_its_end(fails())
