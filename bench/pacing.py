"""How often a measurement is repeated: often on a quiet machine, and still in bounded time on a busy one."""

import time
from collections.abc import Iterator

FEWEST = 3


def rounds(most: int, seconds: float) -> Iterator[int]:
    """Numbers from 0: `most` of them, or as many as begin within so many seconds, but at least three."""
    began = time.monotonic()
    for number in range(most):
        if number >= FEWEST and time.monotonic() - began > seconds:
            return
        yield number
