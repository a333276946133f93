"""
What a vLLM server says of its traffic, and what that means over the last minute or two.

A server's counters and histograms only rise, from zero at each start, so the present is the difference of two looks.
The prober remembers a look about every minute and compares with the one before it: a window of one to two minutes. A
counter that fell belongs to a new run: the window begins anew. Replicas are added up before any percentile is taken,
for percentiles of percentiles mean nothing.
"""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from math import inf

from pydantic import Field

from recovery.core.instance import Value

WINDOW_S = 60.0
"""A remembered look is replaced after this long."""
QUANTILES = (0.5, 0.95, 0.99)
ERRORS = frozenset({"error", "abort"})
"""Finish reasons that are no answer: `error` is the engine's, `abort` a client that left or a drain that ended it."""

Buckets = dict[str, float]
"""Upper bound in seconds (as vLLM prints it, "+Inf" last) to the number of observations at or below it."""


class Traffic(Value):
    """One look at a server's metrics. Gauges are as they are, the rest counts since the server's start."""

    at: float = Field(description="Redis seconds")
    run: int
    running: float = 0.0
    waiting: float = 0.0
    kv_cache_usage: float | None = Field(None, description="0 to 1")
    ttft: Buckets = Field(default_factory=dict)
    e2e: Buckets = Field(default_factory=dict)
    finished: dict[str, float] = Field(default_factory=dict, description="requests by finish reason")


class Memory(Value):
    """What is kept per instance: the newest look, and the one its window begins at."""

    last: Traffic
    base: Traffic
    middle: Traffic


class Load(Value):
    """What a model serves: sums over its replicas, percentiles of the window."""

    at: float
    window_s: float
    running: float
    waiting: float
    kv_cache_usage: float | None = Field(description="of the fullest replica, 0 to 1")
    ttft_s: dict[str, float] = Field(description="time to first token by quantile, seconds; empty when nothing was served")
    e2e_s: dict[str, float] = Field(description="whole requests by quantile, seconds")
    finished: dict[str, float] = Field(description="requests finished in the window, by reason")

    @property
    def error_rate(self) -> float | None:
        """Share of the finished requests that got no answer; None when nothing finished."""
        total = sum(self.finished.values())
        return sum(count for reason, count in self.finished.items() if reason in ERRORS) / total if total else None


def remember(before: Memory | None, look: Traffic) -> Memory:
    """Return what to keep after a new look."""
    if before is None or before.last.run != look.run or _fell(before.last, look):
        return Memory(last=look, base=look, middle=look)
    if look.at - before.middle.at >= WINDOW_S:
        return Memory(last=look, base=before.middle, middle=look)
    return before.evolve(last=look)


def load_of(memories: Iterable[Memory], now: float, fresh_s: float = 180.0) -> Load | None:
    """Return what a model serves, from the memories of its replicas; None when none of them is fresh."""
    fresh = [each for each in memories if now - each.last.at <= fresh_s]
    if not fresh:
        return None
    usage = [each.last.kv_cache_usage for each in fresh if each.last.kv_cache_usage is not None]
    return Load(
        at=max(each.last.at for each in fresh),
        window_s=max(each.last.at - each.base.at for each in fresh),
        running=sum(each.last.running for each in fresh),
        waiting=sum(each.last.waiting for each in fresh),
        kv_cache_usage=max(usage, default=None),
        ttft_s=quantiles(added(risen(each.base.ttft, each.last.ttft) for each in fresh)),
        e2e_s=quantiles(added(risen(each.base.e2e, each.last.e2e) for each in fresh)),
        finished=added(risen(each.base.finished, each.last.finished) for each in fresh),
    )


def quantile(buckets: Mapping[str, float], share: float) -> float | None:
    """
    Return the value below which `share` of the observations lie; None without observations.

    Linear inside a bucket, as Prometheus does it; beyond the last finite bound it is that bound.
    """
    ordered = sorted((_bound(bound), count) for bound, count in buckets.items())
    if not ordered or ordered[-1][1] <= 0:
        return None
    wanted = share * ordered[-1][1]
    for (low, below), (high, upto) in pairwise([(0.0, 0.0), *ordered]):
        if upto >= wanted and upto > below:
            return low if high == inf else low + (high - low) * (wanted - below) / (upto - below)
    return ordered[-1][0]


def quantiles(buckets: Mapping[str, float]) -> dict[str, float]:
    """Return the `QUANTILES` of these observations by name, none without observations."""
    found = {f"{share:g}": quantile(buckets, share) for share in QUANTILES}
    return {share: value for share, value in found.items() if value is not None}


def risen(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Return by how much each count is more than it was."""
    return {name: max(0.0, value - before.get(name, 0.0)) for name, value in after.items()}


def added(many: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the sums by name."""
    total: dict[str, float] = {}
    for each in many:
        for name, value in each.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _fell(before: Traffic, after: Traffic) -> bool:
    pairs = ((before.ttft, after.ttft), (before.e2e, after.e2e), (before.finished, after.finished))
    return any(after_of.get(name, 0.0) < value for before_of, after_of in pairs for name, value in before_of.items())


def _bound(text: str) -> float:
    return inf if text == "+Inf" else float(text)
