"""What a runner's tasks have in common: calls that are repeated until Kiln answers, and work beside other work."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from kiln.errors import UnavailableError

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0

T = TypeVar("T")


class Pauses:
    """Pauses between attempts, each longer than the one before."""

    def __init__(self) -> None:
        self._next = FIRST_PAUSE_SECONDS

    async def wait(self) -> None:
        await asyncio.sleep(self._next)
        self._next = min(2 * self._next, LONGEST_PAUSE_SECONDS)


async def persist(call: Callable[[], Awaitable[T]]) -> T:
    """The answer to a call that may be repeated, for as long as it takes to get one."""
    pauses = Pauses()
    while True:
        try:
            return await call()
        except UnavailableError:
            await pauses.wait()


@asynccontextmanager
async def beside(*works: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Has works done beside the block, and cancels them at its end. An error of one of them ends the block, as its own
    error."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
            yield
            for task in tasks:
                task.cancel()
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def race(work: Coroutine[Any, Any, T], stop: asyncio.Event) -> T | None:
    """What the work returns, or raises; None if `stop` comes first: the work is cancelled then, and over."""
    task = asyncio.create_task(work)
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        stopped.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)
