"""Which of our own parts do not do their work though they run."""

import pytest

from recovery.core.watching import Traces, idle_parts

NOW = 1_000_000.0
WELL = {"age_s": 1.0, "served_at": NOW - 2, "up_s": 500.0}


@pytest.mark.parametrize(
    ("traces", "expected"),
    [
        pytest.param(Traces(now=NOW, tick_at=NOW - 1, hosts={"h": WELL}), set(), id="all well"),
        pytest.param(Traces(now=NOW, tick_at=NOW - 1, hosts={"h": {**WELL, "served_at": NOW - 31}}), {"host"}, id="up but deaf"),
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
