"""How long a request waits for Temporal: the catalog's row holds whatever Temporal is asked to do."""

import asyncio
from collections.abc import Awaitable
from datetime import timedelta

from kiln.errors import UnavailableError

# A little more than the calls' own time-out, which does not bound a lazy client's first connection.
TEMPORAL_PATIENCE = timedelta(seconds=1.5)


async def promptly(call: Awaitable[None]) -> None:
    """Raises UnavailableError unless the call to Temporal ends in time."""
    try:
        await asyncio.wait_for(call, TEMPORAL_PATIENCE.total_seconds())
    except TimeoutError:
        raise UnavailableError("Temporal does not answer") from None
