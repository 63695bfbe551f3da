"""Rate limits, by the `limits` package: a moving window, so that no minute's edge lets twice as much through."""

import math
import time
from dataclasses import dataclass

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from api.errors import ApiError
from kiln.settings import SettingsError


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
    """The limit of KILN_MACHINE_BUILD_RATE; the empty text is none. Raises SettingsError for one that cannot be read."""
    try:
        item = parse(text) if text else None
    except ValueError:
        raise SettingsError("KILN_MACHINE_BUILD_RATE: must be a rate, such as 150/minute") from None
    return RateLimit(item, MovingWindowRateLimiter(MemoryStorage()))
