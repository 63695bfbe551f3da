"""Calls that change something, made from a coroutine that may be cancelled."""

import asyncio
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# One try of a call to EC2 is over by then.
PATIENCE = timedelta(seconds=10)


async def seen_through(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What the call answers. A thread cannot be cancelled: a cancellation is passed on once the call has ended, lest
    the call takes effect when something else has been done already; but it does not wait for one that EC2 holds up.

    Raises what the call raises.
    """
    thread = asyncio.ensure_future(asyncio.to_thread(call, *args, **kwargs))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        await asyncio.wait({thread}, timeout=PATIENCE.total_seconds())
        raise


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns that cleans up: a cancellation is passed on once that is done. Raises what it raises."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
