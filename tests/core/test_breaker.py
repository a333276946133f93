"""When a breaker opens, lets one through, and closes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recovery.core.breaker import (
    CLOSED,
    Breaker,
    BreakerPolicy,
    BreakerState,
    abandoned,
    allows,
    counts_against,
    failed,
    passing,
    succeeded,
)

POLICY = BreakerPolicy(failures=3, open_s=1.0, max_open_s=4.0)


def after_failures(count: int, now: float = 0.0) -> Breaker:
    breaker = CLOSED
    for _ in range(count):
        breaker = failed(breaker, now, POLICY)
    return breaker


@pytest.mark.parametrize(
    ("status", "counts"),
    [(200, False), (400, False), (401, False), (404, False), (422, False), (429, False), (503, False), (500, True), (502, True)],
)
def test_only_the_replicas_own_faults_count(status: int, counts: bool) -> None:
    assert counts_against(status) is counts


def test_it_opens_at_so_many_failures_in_a_row() -> None:
    assert allows(after_failures(2), 0.0)
    assert not allows(after_failures(3), 0.0)
    assert allows(failed(succeeded(after_failures(2)), 0.0, POLICY), 0.0)


def test_after_its_pause_one_trial_passes_and_no_more() -> None:
    breaker = after_failures(3)
    assert not allows(breaker, 0.99)
    assert allows(breaker, 1.0)
    trial = passing(breaker)
    assert trial.state is BreakerState.HALF_OPEN
    assert not allows(trial, 100.0)
    assert succeeded(trial) == CLOSED
    assert allows(abandoned(trial), 1.0)


def test_each_failed_trial_doubles_the_pause_up_to_its_cap() -> None:
    breaker, now, pauses = after_failures(3), 0.0, []
    for _ in range(4):
        pauses.append(breaker.pause_s)
        now += breaker.pause_s
        breaker = failed(passing(breaker), now, POLICY)
    assert pauses == [1.0, 2.0, 4.0, 4.0]


def test_late_news_of_a_failure_does_not_prolong_the_pause() -> None:
    breaker = after_failures(3)
    assert allows(failed(breaker, 0.9, POLICY), 1.0)


@given(st.lists(st.sampled_from(["ok", "bad", "gone", "pass", "wait"]), max_size=60))
def test_whatever_happens_it_lets_a_request_through_again(steps: list[str]) -> None:
    breaker, now, trial = CLOSED, 0.0, False
    for step in steps:
        if step == "wait":
            now += POLICY.max_open_s
        elif step == "pass" and allows(breaker, now):
            breaker = passing(breaker)
        elif step == "ok":
            breaker = succeeded(breaker)
        elif step == "bad":
            breaker = failed(breaker, now, POLICY)
        elif step == "gone":
            breaker = abandoned(breaker)
        trial = breaker.state is BreakerState.HALF_OPEN
    if trial:  # its trial ends one way or another
        breaker = failed(breaker, now, POLICY)
    assert allows(breaker, now + POLICY.max_open_s)
