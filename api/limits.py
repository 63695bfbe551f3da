"""Rate limits, by the `limits` package: a moving window, so that no minute's edge lets twice as much through.

Counts are kept in this process, or in Redis where several API processes must count together (KILN_RATE_STORAGE). While
Redis does not answer, each process counts for itself: the API serves on, and a limit holds for each process alone.
"""

import logging
import math
import time
from dataclasses import dataclass
from typing import Final

from limits import RateLimitItem, parse
from limits.errors import ConfigurationError, StorageError
from limits.storage import MemoryStorage, Storage, storage_from_string
from limits.strategies import MovingWindowRateLimiter

from api.errors import ApiError
from kiln.settings import Settings, SettingsError

# A request waits no longer than this for Redis, and not at all for a while after it has failed.
STORAGE_TIMEOUT_SECONDS: Final = 0.5
STORAGE_REST_SECONDS: Final = 5.0
log = logging.getLogger("kiln.api")


class Counter:
    """Where requests are counted. Thread-safe; with Redis a call blocks, so it is not for the event loop."""

    def __init__(self, url: str = "") -> None:
        """`url` as the `limits` package knows it, such as redis://host:6379; "" counts in this process.

        Opens no connection. Raises SettingsError.
        """
        self._own = MovingWindowRateLimiter(MemoryStorage())
        self._shared = MovingWindowRateLimiter(_storage(url)) if url else None
        self._rests_until = 0.0

    def wait(self, item: RateLimitItem, *caller: str) -> float:
        """Counts a request; 0 if it is served, else the seconds until the next one is."""
        if self._shared is not None and time.monotonic() >= self._rests_until:
            try:
                return _count(self._shared, item, caller)
            except StorageError as error:
                self._rests_until = time.monotonic() + STORAGE_REST_SECONDS
                log.warning("KILN_RATE_STORAGE does not answer (%s); each process counts for itself", error)
        return _count(self._own, item, caller)


@dataclass(frozen=True)
class RateLimit:
    """At most `item` (such as `150/minute`) for one caller; None is no limit. `name` keeps one limit's counts apart from
    another's."""

    item: RateLimitItem | None
    counter: Counter
    name: str = ""

    def check(self, *caller: str) -> None:
        """Counts a request. Raises ApiError 429; `Retry-After` and `X-RateLimit-Reset` are whole seconds."""
        if self.item is None:
            return
        wait = self.counter.wait(self.item, self.name, *caller)
        if wait:
            raise ApiError(
                429,
                "rate_limited",
                _refusal(self.item),
                headers=_headers(self.item, wait),
            )


@dataclass(frozen=True)
class ContainerLimits:
    """How often one caller may do what, in container-images."""

    build: RateLimit
    listing: RateLimit
    delete: RateLimit
    patch: RateLimit


def rate_limit(text: str, setting: str = "KILN_MACHINE_BUILD_RATE", counter: Counter | None = None) -> RateLimit:
    """The limit that a setting says; the empty text is none. Raises SettingsError for one that cannot be read."""
    try:
        item = parse(text) if text else None
    except ValueError:
        raise SettingsError(f"{setting}: must be a rate, such as 150/minute") from None
    return RateLimit(item, counter or Counter(), setting)


def container_limits(settings: Settings) -> ContainerLimits:
    """The limits of container-images. Raises SettingsError, which names the setting."""
    counter = Counter(settings.rate_storage)
    return ContainerLimits(
        build=rate_limit(settings.container_build_rate, "KILN_CONTAINER_BUILD_RATE", counter),
        listing=rate_limit(settings.container_list_rate, "KILN_CONTAINER_LIST_RATE", counter),
        delete=rate_limit(settings.container_delete_rate, "KILN_CONTAINER_DELETE_RATE", counter),
        patch=rate_limit(settings.container_patch_rate, "KILN_CONTAINER_PATCH_RATE", counter),
    )


def pod_limit(settings: Settings) -> RateLimit:
    """The limit of new pods. Raises SettingsError, which names the setting."""
    return rate_limit(settings.pod_rate, "KILN_POD_RATE", Counter(settings.rate_storage))


def _storage(url: str) -> Storage:
    timeouts = {"socket_timeout": STORAGE_TIMEOUT_SECONDS, "socket_connect_timeout": STORAGE_TIMEOUT_SECONDS}
    options = timeouts if url.startswith("redis") else {}
    try:
        return storage_from_string(url, wrap_exceptions=True, **options)  # type: ignore[return-value]  # none is async
    except (ConfigurationError, ValueError) as error:
        raise SettingsError(f"KILN_RATE_STORAGE: {error}") from None


def _count(limiter: MovingWindowRateLimiter, item: RateLimitItem, caller: tuple[str, ...]) -> float:
    if limiter.hit(item, *caller):
        return 0.0
    free_at = limiter.get_window_stats(item, *caller).reset_time
    return max(1.0, free_at - time.time())


def _headers(item: RateLimitItem, wait: float) -> dict[str, str]:
    seconds = str(math.ceil(wait))
    return {
        "Retry-After": seconds,
        "X-RateLimit-Limit": str(item.amount),
        "X-RateLimit-Remaining": "0",
        "X-RateLimit-Reset": seconds,
    }


def _refusal(item: RateLimitItem) -> str:
    """`at most 150 requests in 1 minute are served`."""
    window = f"{item.multiples} {item.GRANULARITY.name}{'s' if item.multiples > 1 else ''}"
    return f"at most {item.amount} requests in {window} are served"
