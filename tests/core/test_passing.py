"""What front doors say of their work, added up."""

from recovery.core.passing import WINDOW_S, Latencies, Passed, Windows, passage_of, passages


def look(few: float, all_: float) -> Latencies:
    """So many first events within 0.1 s, so many in all."""
    return Latencies(ttft={"0.1": few, "0.5": all_, "+Inf": all_})


def test_doors_are_added_before_percentiles_are_taken():
    one = Passed(codes={"200": 8, "503": 2}, held=3, holding=1, retried=2, window=look(9, 9))
    two = Passed(codes={"200": 1, "422": 1}, held=1, continued=1, refused=1, window=look(0, 1))

    both = passage_of([one, two])

    assert both is not None
    assert (both.doors, both.requests, both.errors) == (2, 12, 2)
    assert (both.held, both.holding, both.retried, both.continued, both.refused) == (4, 1, 2, 1, 1)
    assert both.ttft_s["0.5"] < 0.1 < both.ttft_s["0.99"] <= 0.5
    assert both.e2e_s == {}


def test_nothing_told_is_nothing_known():
    assert passage_of([]) is None
    assert passages([]) == {}


def test_what_another_version_wrote_is_passed_over():
    good = Passed(codes={"200": 1}).model_dump(mode="json")

    assert set(passages([{"m": good, "n": {"of": "the future"}}, {"m": good}])) == {"m"}
    assert passages([{"m": good}, {"m": good}])["m"].requests == 2


def test_a_window_is_the_last_minute_or_two():
    windows = Windows()
    assert windows.take("m", 0.0, look(1, 1)).ttft["+Inf"] == 1
    assert windows.take("m", WINDOW_S, look(1, 5)).ttft["+Inf"] == 4, "what was before the first look's minute is out"
    assert windows.take("m", 1.5 * WINDOW_S, look(1, 7)).ttft["+Inf"] == 6
    assert windows.take("m", 2 * WINDOW_S, look(1, 7)).ttft["+Inf"] == 2
    assert windows.take("m", 3 * WINDOW_S, look(1, 7)).ttft["+Inf"] == 0
    assert windows.take("n", 3 * WINDOW_S, look(2, 2)).ttft["+Inf"] == 2
