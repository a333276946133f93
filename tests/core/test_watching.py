"""Which of our own parts do not do their work though they run."""

import pytest

from recovery.core.watching import Traces, deaf_hosts, idle_parts, remarks, unrepairable, works_since

NOW = 1_000_000.0
WELL = {"age_s": 1.0, "served_at": NOW - 2, "up_s": 500.0}


@pytest.mark.parametrize(
    ("traces", "expected"),
    [
        pytest.param(Traces(now=NOW, tick_at=NOW - 1, hosts={"h": WELL}), set(), id="all well"),
        pytest.param(Traces(now=NOW, tick_at=NOW - 1, hosts={"h": {**WELL, "served_at": NOW - 31}}), {"host"}, id="up but deaf"),
        pytest.param(
            Traces(now=NOW, tick_at=NOW - 1, hosts={"h": {"age_s": 1.0, "served_at": NOW - 31}}), {"host"}, id="up since whenever"
        ),
        pytest.param(Traces(now=NOW, tick_at=NOW - 1, hosts={"h": {**WELL, "age_s": 31.0}}), {"host"}, id="frozen: no heartbeat"),
        pytest.param(Traces(now=NOW, tick_at=NOW - 1, hosts={"h": {**WELL, "served_at": 0.0, "up_s": 20.0}}), set(), id="just come up"),
        pytest.param(Traces(now=NOW, tick_at=NOW - 1, hosts={"h": {**WELL, "served_at": 0.0, "up_s": 31.0}}), {"host"}, id="never served"),
        pytest.param(Traces(now=NOW, tick_at=NOW - 16, control_waiting=9, hosts={"h": WELL}), {"control"}, id="ticks pile up"),
        pytest.param(Traces(now=NOW, tick_at=NOW - 16, hosts={"h": WELL}), {"beat"}, id="no ticks come"),
        pytest.param(Traces(now=NOW, tick_at=None, hosts={}), set(), id="nothing has begun"),
        pytest.param(Traces(now=NOW, tick_at=NOW, hosts={"other": {**WELL, "age_s": 99.0}}), set(), id="another machine's business"),
    ],
)
def test_what_runs_without_working_is_named(traces: Traces, expected: set[str]) -> None:
    assert set(idle_parts(traces, "h")) == expected


def test_a_host_that_is_gone_is_not_deaf() -> None:
    deaf = {**WELL, "served_at": NOW - 40}
    hosts = {"well": WELL, "deaf": {**deaf, "alive": True}, "gone": {**deaf, "alive": False}}
    assert deaf_hosts(hosts, NOW) == {"deaf": "it beats but has taken no task for 40 s"}


@pytest.mark.parametrize(
    ("part", "traces", "expected"),
    [
        pytest.param("host", Traces(now=NOW, hosts={"h": WELL}), True, id="beaten and served since"),
        pytest.param("host", Traces(now=NOW, hosts={"h": {**WELL, "served_at": NOW - 11}}), False, id="served before"),
        pytest.param("host", Traces(now=NOW, hosts={"h": {**WELL, "served_at": 0.0}}), False, id="not yet served"),
        pytest.param("host", Traces(now=NOW, hosts={"h": {**WELL, "age_s": 11.0}}), False, id="beaten before"),
        pytest.param("host", Traces(now=NOW, hosts={"other": WELL}), False, id="another host"),
        pytest.param("beat", Traces(now=NOW, tick_at=NOW - 1), True, id="ticked since"),
        pytest.param("control", Traces(now=NOW, tick_at=NOW - 11), False, id="ticked before"),
        pytest.param("control", Traces(now=NOW), False, id="never ticked"),
    ],
)
def test_a_part_that_was_started_works_once_it_has_left_a_trace(part: str, traces: Traces, expected: bool) -> None:
    assert works_since(part, traces, "h", since=NOW - 10) is expected


DEAF = {**WELL, "served_at": NOW - 40, "alive": True}


@pytest.mark.parametrize(
    ("traces", "why", "said"),
    [
        pytest.param(Traces(now=NOW, tick_at=NOW - 1), None, 0, id="no host yet"),
        pytest.param(Traces(now=NOW), "clock", 0, id="never ticked"),
        pytest.param(Traces(now=NOW, tick_at=NOW - 16, hosts={"h": WELL}), "clock", 0, id="ticks are late"),
        pytest.param(Traces(now=NOW, tick_at=NOW - 1, hosts={"h": WELL, "i": DEAF}), None, 1, id="one of two is deaf"),
        pytest.param(
            Traces(now=NOW, tick_at=NOW - 1, hosts={"h": {**WELL, "alive": False}, "i": DEAF}), "No host", 1, id="all that live are deaf"
        ),
    ],
)
def test_what_readyz_says(traces: Traces, why: str | None, said: int) -> None:
    found = unrepairable(traces)
    assert (found is None) if why is None else (found is not None and why in found)
    assert len(remarks(traces)) == said and len(remarks(traces, unreadable=2)) == said + 1
