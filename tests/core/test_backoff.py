"""The wait before a restart."""

import math

from hypothesis import given
from hypothesis import strategies as st

from recovery.core.backoff import delay_s
from recovery.core.fleet import Policy


def test_the_specifications_row():
    assert [delay_s(attempt, Policy(), 0.0) for attempt in range(8)] == [5, 10, 20, 40, 80, 160, 160, 160]


def test_chance_adds_up_to_a_tenth_and_the_cap_stays():
    assert math.isclose(delay_s(0, Policy(), 0.5), 5.25)
    assert math.isclose(delay_s(1, Policy(), 0.999999), 11, rel_tol=1e-5)
    assert delay_s(5, Policy(), 0.9) == 160
    assert delay_s(0, Policy(restart_jitter=0), 0.9) == 5


def test_no_delay_stays_none():
    assert delay_s(9, Policy(restart_delay=0), 0.9) == 0


@given(st.integers(0, 10**9), st.floats(0, 3599), st.floats(0, 1), st.floats(0, 0.999))
def test_it_never_falls_with_attempts_never_passes_the_cap_and_never_overflows(attempt, base, jitter, u):
    policy = Policy(restart_delay=base, restart_jitter=jitter, max_restart_delay=max(base, 160))
    delay = delay_s(attempt, policy, u)

    assert 0 <= delay <= policy.max_restart_delay
    assert delay >= min(policy.restart_delay, policy.max_restart_delay)
    assert delay_s(attempt + 1, policy, u) >= delay
