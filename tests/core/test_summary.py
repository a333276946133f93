"""What a server's counters mean over the last minute or two."""

import pytest

from recovery.core.summary import Memory, Traffic, load_of, quantile, remember

BUCKETS = {"0.1": 50.0, "1.0": 90.0, "10.0": 100.0, "+Inf": 100.0}


def look(at: float, run: int = 1, seen: float = 0.0, **more: float) -> Traffic:
    """A look after `seen` requests, all faster than a tenth of a second."""
    return Traffic(at=at, run=run, ttft={"0.1": seen, "+Inf": seen}, finished={"stop": seen}, **more)


def after(*looks: Traffic) -> Memory:
    """What is remembered after these."""
    kept: Memory | None = None
    for each in looks:
        kept = remember(kept, each)
    assert kept is not None
    return kept


@pytest.mark.parametrize(("share", "value"), [(0.5, 0.1), (0.25, 0.05), (0.9, 1.0), (0.95, 5.5), (1.0, 10.0), (0.0, 0.0)])
def test_percentiles_lie_inside_their_bucket(share: float, value: float):
    assert quantile(BUCKETS, share) == pytest.approx(value)


def test_beyond_the_last_bound_it_is_that_bound_and_nothing_is_none():
    assert quantile({"1.0": 0.0, "+Inf": 5.0}, 0.5) == 1.0
    assert quantile({"1.0": 0.0, "+Inf": 0.0}, 0.5) is None
    assert quantile({}, 0.5) is None


def test_the_window_is_one_to_two_minutes_of_looks():
    kept = after(look(0), look(30, seen=10), look(60, seen=20), look(90, seen=30), look(120, seen=40), look(150, seen=50))

    assert kept.base.at == 60
    load = load_of([kept], now=150)
    assert load is not None
    assert load.finished == {"stop": 30}
    assert load.window_s == 90


def test_a_new_run_begins_a_new_window():
    assert load_of([after(look(0, seen=100), look(30, run=2, seen=5))], now=30).finished == {"stop": 0}  # type: ignore[union-attr]
    fell = load_of([after(look(0, seen=100), look(30, seen=5), look(59, seen=20))], now=60)
    assert fell is not None
    assert fell.finished == {"stop": 15}, "a counter that fell belongs to a new process"


def test_replicas_are_added_before_percentiles_are_taken():
    fast = Memory(last=Traffic(at=9, run=1, running=1, ttft={"0.1": 90.0, "1.0": 90.0, "+Inf": 90.0}), base=look(0), middle=look(0))
    slow = Memory(last=Traffic(at=9, run=1, running=2, ttft={"0.1": 0.0, "1.0": 10.0, "+Inf": 10.0}), base=look(0), middle=look(0))

    load = load_of([fast, slow], now=10)

    assert load is not None
    assert load.running == 3
    assert load.ttft_s["0.5"] < 0.1 < load.ttft_s["0.95"]


def test_old_looks_say_nothing():
    assert load_of([after(look(0))], now=1000) is None


def test_the_error_rate_counts_what_got_no_answer():
    base = Traffic(at=0, run=1)
    last = Traffic(at=9, run=1, finished={"stop": 6, "length": 2, "error": 1, "abort": 1})

    load = load_of([Memory(last=last, base=base, middle=base)], now=9)

    assert load is not None
    assert load.error_rate == pytest.approx(0.2)
