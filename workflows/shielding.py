"""Steps that are seen through, whatever cancellation arrives meanwhile."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def shielded(step: Awaitable[T]) -> T:
    """The step's own end; a cancellation that arrives before it is for the caller to look for afterwards."""
    task = asyncio.ensure_future(step)
    while True:
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.done():  # the step's own end counts, though the cancel came with it
                return task.result()
