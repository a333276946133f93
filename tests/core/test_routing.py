"""The choice of a replica, slow start, and the retry budget."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from recovery.core.routing import RetryBudget, choose, weight


@dataclass
class Replica:
    busy: int = 0
    used: int = 0
    warm_from: float = -1000.0


def test_nobody_to_choose_from() -> None:
    assert choose([], 0.0, 10.0) is None


def test_the_least_busy_and_among_equals_the_least_used() -> None:
    a, b, c = Replica(busy=2), Replica(busy=1, used=9), Replica(busy=1, used=3)
    assert choose([a, b, c], 0.0, 10.0) is c


def test_idle_replicas_take_turns() -> None:
    replicas = [Replica(), Replica(), Replica()]
    for _ in range(30):
        chosen = choose(replicas, 0.0, 10.0)
        assert chosen is not None
        chosen.used += 1
    assert [r.used for r in replicas] == [10, 10, 10]


def test_a_new_replica_takes_its_share_gradually() -> None:
    shares = []
    for age in (0.0, 5.0, 10.0):
        old, new = Replica(), Replica(warm_from=100.0 - age)
        for _ in range(110):
            chosen = choose([old, new], 100.0, 10.0)
            assert chosen is not None
            chosen.busy += 1
        shares.append(new.busy)
    assert shares == sorted(shares) and shares[0] <= 11 and shares[2] == 55


def test_a_new_replica_alone_takes_everything() -> None:
    only = Replica(warm_from=0.0)
    assert choose([only], 0.0, 10.0) is only


@given(st.floats(-5, 50), st.floats(0.1, 30))
def test_weight_is_between_a_tenth_and_one(age: float, slow: float) -> None:
    assert 0.1 <= weight(age, slow) <= 1.0


def test_no_slow_start_at_all() -> None:
    assert weight(0.0, 0.0) == 1.0


def test_small_traffic_may_always_retry() -> None:
    budget = RetryBudget(ratio=0.1, floor_per_s=5.0, burst=2, now=0.0)
    assert [budget.retry(now) for now in (0.0, 0.2, 0.4, 0.6, 60.0)] == [0.0] * 5


def test_beyond_the_budget_a_retry_is_late_and_not_refused() -> None:
    budget = RetryBudget(ratio=0.1, floor_per_s=10.0, burst=3, now=0.0)
    waits = [round(budget.retry(0.0), 6) for _ in range(6)]
    assert waits == [0.0, 0.0, 0.0, 0.1, 0.2, 0.3]


def test_traffic_earns_retries_up_to_the_burst() -> None:
    budget = RetryBudget(ratio=0.5, floor_per_s=0.001, burst=4, now=0.0)
    for _ in range(4):
        budget.retry(0.0)
    assert budget.retry(0.0) > 0
    for _ in range(1000):
        budget.request()
    assert [budget.retry(0.0) > 0 for _ in range(5)] == [False] * 4 + [True]
