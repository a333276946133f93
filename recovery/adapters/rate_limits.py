"""
Rate limits counted in Redis, in a moving window of a minute, so that several API processes share them.
"""

import time
from collections.abc import Mapping
from typing import Self

from limits import RateLimitItemPerMinute
from limits.errors import StorageError
from limits.storage import RedisStorage, Storage
from limits.strategies import MovingWindowRateLimiter

from recovery.adapters.redis_url import RedisUrl
from recovery.errors import StoreUnavailableError


class RateLimits:
    """Counts requests by kind and by whom. `per_minute` holds what each kind allows."""

    def __init__(self, storage: Storage, per_minute: Mapping[str, int]) -> None:
        self._limiter = MovingWindowRateLimiter(storage)
        self.per_minute = dict(per_minute)

    @classmethod
    def on_redis(cls, url: RedisUrl, prefix: str, per_minute: Mapping[str, int]) -> Self:
        """Counted beside the fleet's state, through connections of its own."""
        pool = url.client().connection_pool
        return cls(RedisStorage("redis://", connection_pool=pool, key_prefix=f"{prefix}:limit", wrap_exceptions=True), per_minute)

    def take(self, kind: str, who: str) -> float | None:
        """Return None when the request may go on, else the seconds until one may; raise `StoreUnavailableError`."""
        item = RateLimitItemPerMinute(self.per_minute[kind])
        try:
            if self._limiter.hit(item, kind, who):
                return None
            return max(1.0, self._limiter.get_window_stats(item, kind, who).reset_time - time.time())
        except StorageError as error:
            raise StoreUnavailableError(f"cannot count requests: Redis does not answer ({error.storage_error})") from None
