"""
A circuit breaker per replica, as values: what an outcome makes of it, and whether a request may pass.

It catches the replica that accepts connections, answers `/health` and fails requests. A client's fault
never opens it: see `counts_against`.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field


class BreakerState(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class BreakerPolicy(BaseModel):
    """When a breaker opens and for how long; durations in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    failures: int = Field(default=5, ge=1, description="failures in a row that open it")
    open_s: float = Field(default=1.0, gt=0, description="first pause; doubled after each failed trial")
    max_open_s: float = Field(default=30.0, gt=0, description="longest pause")


@dataclass(frozen=True, slots=True)
class Breaker:
    """One replica's breaker. `opened_at` is the caller's monotonic clock."""

    state: BreakerState = BreakerState.CLOSED
    failures: int = 0
    opened_at: float = 0.0
    pause_s: float = 0.0


CLOSED = Breaker()


def counts_against(status: int) -> bool:
    """
    True when an HTTP status is the replica's own fault.

    4xx is the client's (validation, unknown model, over-long prompt). vLLM's 503 on a completion means a full
    queue, not a fault (VLLM-FACTS, d).
    """
    return status >= 500 and status != 503


def allows(breaker: Breaker, now: float) -> bool:
    """True when a request may pass: closed, or open for its whole pause (then it passes as the one trial)."""
    if breaker.state is BreakerState.CLOSED:
        return True
    return breaker.state is BreakerState.OPEN and now - breaker.opened_at >= breaker.pause_s


def passing(breaker: Breaker) -> Breaker:
    """Return the breaker once a request has passed: an open one lets nothing more through until that trial's end."""
    return replace(breaker, state=BreakerState.HALF_OPEN) if breaker.state is BreakerState.OPEN else breaker


def succeeded(breaker: Breaker) -> Breaker:
    """Return the breaker after a success: closed, failures forgotten."""
    return breaker if breaker is CLOSED else CLOSED


def failed(breaker: Breaker, now: float, policy: BreakerPolicy) -> Breaker:
    """Return the breaker after a failure: open at `policy.failures` in a row, or at once after a failed trial."""
    failures = breaker.failures + 1
    if breaker.state is BreakerState.CLOSED and failures < policy.failures:
        return replace(breaker, failures=failures)
    if breaker.state is BreakerState.OPEN:
        return replace(breaker, failures=failures)  # late news of a request sent before it opened
    pause_s = policy.open_s if breaker.state is BreakerState.CLOSED else breaker.pause_s * 2
    return Breaker(BreakerState.OPEN, failures, now, min(pause_s, policy.max_open_s))


def abandoned(breaker: Breaker) -> Breaker:
    """Return the breaker when its trial ended without a verdict (the client left): the next request is the trial."""
    return replace(breaker, state=BreakerState.OPEN) if breaker.state is BreakerState.HALF_OPEN else breaker
