"""Rate limits, by the `limits` package: a moving window, so that no minute's edge lets twice as much through."""

import math
import time
from dataclasses import dataclass

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from api.errors import ApiError


@dataclass(frozen=True)
class RateLimit:
    """At most `item` (such as `150/minute`) for one caller; None is no limit."""

    item: RateLimitItem | None
    limiter: MovingWindowRateLimiter

    def check(self, caller: str) -> None:
        """Counts a request. Raises ApiError 429 with `Retry-After` in seconds."""
        if self.item is None or self.limiter.hit(self.item, caller):
            return
        reset = self.limiter.get_window_stats(self.item, caller).reset_time
        wait = max(1, math.ceil(reset - time.time()))
        headers = {"Retry-After": str(wait)}
        raise ApiError(429, "rate_limited", f"at most {self.item} requests are served", headers=headers)


def rate_limit(text: str) -> RateLimit:
    """A limit from its setting; the empty text is none. Raises ValueError for one that cannot be read."""
    return RateLimit(parse(text) if text else None, MovingWindowRateLimiter(MemoryStorage()))
