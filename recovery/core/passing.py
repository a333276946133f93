"""
What the front doors say of their work, added up: how many requests were held, retried, continued or refused, and how fast.

A door tells totals since it started, and its latencies as the buckets of the last minute or two. Doors are added up
before any percentile is taken.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import Field, ValidationError

from recovery.core.instance import Value
from recovery.core.summary import Buckets, added, quantiles, risen

KEY = "door:figures:"
"""Under a name that begins so, each door keeps what it says in Redis: `Passed` by model."""
WINDOW_S = 60.0
"""A remembered look is replaced after this long, so a window has one to two minutes."""


class Latencies(Value):
    """Cumulative buckets of one model at one door, counted from the door's start or of a window."""

    ttft: Buckets = Field(default_factory=dict)
    inter_token: Buckets = Field(default_factory=dict)
    e2e: Buckets = Field(default_factory=dict)

    def since(self, before: "Latencies") -> "Latencies":
        """Return what was observed after `before`."""
        pairs = {name: risen(getattr(before, name), getattr(self, name)) for name in Latencies.model_fields}
        return Latencies(**pairs)


class Passed(Value):
    """One model's requests at one door, since the door started."""

    codes: Mapping[str, float] = Field(default_factory=dict, description="requests that have ended, by status")
    holding: float = Field(0.0, description="requests that wait for a replica now")
    held: float = Field(0.0, description="requests that had to wait for a replica")
    retried: float = Field(0.0, description="attempts after the first")
    continued: float = Field(0.0, description="streams that went on at another replica")
    cut: float = Field(0.0, description="streams that ended with an error event")
    refused: float = Field(0.0, description="requests refused: no room, no replica in time, poison")
    fallback: float = Field(0.0, description="requests that another model answered")
    window: Latencies = Field(default_factory=Latencies, description="of the last minute or two")


class Passage(Value):
    """One model's requests at all doors."""

    doors: int
    requests: float
    errors: float = Field(description="of them, answered with a status of 500 or more")
    holding: float
    held: float
    retried: float
    continued: float
    cut: float
    refused: float
    fallback: float
    ttft_s: dict[str, float] = Field(description="time to the first event by quantile, seconds; empty when nothing was served")
    inter_token_s: dict[str, float] = Field(description="between the events of a stream by quantile, seconds")
    e2e_s: dict[str, float] = Field(description="whole requests by quantile, seconds")


COUNTS = ("holding", "held", "retried", "continued", "cut", "refused", "fallback")


class Windows:
    """A model's window at one door: what its latencies were a minute or two ago."""

    def __init__(self) -> None:
        self._looks: dict[str, tuple[float, Latencies, Latencies]] = {}

    def take(self, model: str, now: float, look: Latencies) -> Latencies:
        """Return what was observed in the window that ends now."""
        at, base, middle = self._looks.get(model) or (now, Latencies(), look)
        if now - at >= WINDOW_S:
            at, base, middle = now, middle, look
        self._looks[model] = (at, base, middle)
        return look.since(base)


def passages(kept: Iterable[Mapping[str, Any]]) -> dict[str, Passage]:
    """Return what all doors say together of each model they know; what another version wrote otherwise is passed over."""
    told: dict[str, list[Passed]] = {}
    for models in kept:
        for model, raw in models.items():
            try:
                told.setdefault(model, []).append(Passed.model_validate(raw))
            except ValidationError:
                continue
    return {model: passage for model, passed in told.items() if (passage := passage_of(passed)) is not None}


def passage_of(told: Iterable[Passed]) -> Passage | None:
    """Return what all doors say of one model together; None when none of them knows it."""
    doors = tuple(told)
    if not doors:
        return None
    codes = added(each.codes for each in doors)
    counts = {name: sum(getattr(each, name) for each in doors) for name in COUNTS}
    return Passage(
        doors=len(doors),
        requests=sum(codes.values()),
        errors=sum(count for code, count in codes.items() if code >= "500"),
        ttft_s=quantiles(added(each.window.ttft for each in doors)),
        inter_token_s=quantiles(added(each.window.inter_token for each in doors)),
        e2e_s=quantiles(added(each.window.e2e for each in doors)),
        **counts,
    )
