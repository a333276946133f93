"""Counters: one key per series, and histograms that come back cumulative."""

from collections import Counter

import pytest

from recovery.core import counting
from recovery.core.change import Count


def kept(counts: tuple[Count, ...]) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """What a store holds after these additions."""
    held: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
    for count in counts:
        held[count.name, count.labels] += count.by  # type: ignore[assignment]
    return dict(held)


def test_one_series_has_one_key():
    held = kept(counting.restarted("m", "h", "exit") * 3 + counting.restarted("m", "h", "exit", manual=True))

    assert sorted(held.values()) == [1, 3]


def test_a_histogram_is_cumulative_and_keeps_its_sum():
    held = kept(counting.detected("m", "oom", 0.01) + counting.detected("m", "oom", 0.2) + counting.detected("m", "oom", 4000.0))

    (histogram,) = counting.histogram(held, counting.TIME_TO_DETECT)

    assert (histogram.model, histogram.cause) == ("m", "oom")
    assert histogram.total_s == pytest.approx(4000.21)
    buckets = dict(histogram.buckets)
    assert [buckets["0.01"], buckets["0.1"], buckets["0.25"], buckets["300.0"], buckets["+Inf"]] == [1, 1, 2, 2, 3]


def test_a_clock_that_ran_backwards_counts_as_no_time():
    (bucket, total) = counting.ready("m", -3.0)

    assert dict(bucket.labels)["le"] == "1.0"
    assert total.by == 0.0


def test_every_counter_has_a_help_text_and_every_histogram_its_buckets():
    made = (
        counting.restarted("m", "h", "c")
        + counting.failed("m", "h", "k")
        + counting.incident_closed("m", "c", "recovered")
        + counting.out_of_memory("m", "h", "gpu")
        + counting.detected("m", "oom", 1)
        + counting.ready("m", 1)
        + counting.recovered("m", "oom", 1)
    )

    bases = {c.name.removesuffix("_bucket").removesuffix("_sum") for c in made}
    assert bases == set(counting.HELP)
    assert all(list(b) == sorted(set(b)) for b in counting.BUCKETS_S.values())
