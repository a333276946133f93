"""
Which replica takes a request, how a new one is warmed up, and how many retries a fleet can bear.
"""

from collections.abc import Iterable
from typing import Protocol, TypeVar

FLOOR = 0.1
"""Share of its full load that a replica may take in its first instant."""


class Candidate(Protocol):
    """What the choice needs to know of a replica."""

    busy: int
    """Requests in flight."""
    used: int
    """Requests ever sent: breaks ties, so that idle replicas take turns."""
    warm_from: float
    """When it began to serve, on the caller's clock."""


C = TypeVar("C", bound=Candidate)


def weight(age_s: float, slow_start_s: float) -> float:
    """Share of full load, from `FLOOR` up to 1, that a replica takes `age_s` after it began to serve."""
    if age_s >= slow_start_s:
        return 1.0
    return FLOOR + (1.0 - FLOOR) * max(0.0, age_s) / slow_start_s


def choose(candidates: Iterable[C], now: float, slow_start_s: float) -> C | None:
    """
    Return the least busy candidate, None when there is none.

    A new replica counts its requests more heavily for `slow_start_s`: its caches are cold, and a fleet that
    throws all its load on the one that has just come back kills it again.
    """
    best: C | None = None
    best_score = 0.0
    for candidate in candidates:
        score = float(candidate.busy + 1)
        if now - candidate.warm_from < slow_start_s:
            score /= weight(now - candidate.warm_from, slow_start_s)
        if best is None or score < best_score or (score == best_score and candidate.used < best.used):
            best, best_score = candidate, score
    return best


class RetryBudget:
    """
    Retries a fleet may send: a share of its traffic, and never fewer than `floor_per_s`.

    A bucket of tokens. It does not refuse: it says how long to wait, so that a retry above the budget is late
    and not lost. `burst` covers what one crash throws back at once.
    """

    __slots__ = ("_at", "_tokens", "burst", "floor_per_s", "ratio")

    def __init__(self, ratio: float, floor_per_s: float, burst: float, now: float) -> None:
        self.ratio, self.floor_per_s, self.burst = ratio, floor_per_s, burst
        self._tokens, self._at = burst, now

    def request(self) -> None:
        """Count one first attempt: it earns `ratio` of a retry."""
        if self._tokens < self.burst:
            self._tokens = min(self.burst, self._tokens + self.ratio)

    def retry(self, now: float) -> float:
        """Take one retry and return the seconds it has to wait (0 within the budget)."""
        self._tokens = min(self.burst, self._tokens + (now - self._at) * self.floor_per_s)
        self._at = now
        self._tokens -= 1.0
        return 0.0 if self._tokens >= 0 else -self._tokens / self.floor_per_s
