"""So many calls, so many of them at once."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from bench.children import Answer


async def run_load(call: Callable[[int], Awaitable[None]], at_once: int, count: int) -> Answer:
    """`seconds` that all took together, and each call's own (`latencies`). `call` is told whose turn of `at_once` it is."""
    left = iter(range(count))
    latencies: list[float] = []

    async def take_turns(turn: int) -> None:
        for _ in left:
            began = time.perf_counter()
            await call(turn)
            latencies.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(take_turns(turn) for turn in range(at_once)))
    return {"seconds": time.perf_counter() - began, "latencies": latencies}
