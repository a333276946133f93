"""
One outage, one record: opened once, followed through every further failure, closed when a repair has lasted.
"""

from typing import Any

import pytest

from recovery.core.change import Incident
from recovery.core.decision import Decision, Failure
from recovery.core.fleet import Placement, Policy
from recovery.core.incidents import MAX_STEPS, follow
from recovery.core.instance import Instance
from recovery.core.postmortem import post_mortem, spans
from recovery.core.states import State


def row(state: State = State.HEALTHY, **changes: Any) -> Instance:
    return Instance(id="m-0", model="m", policy=Policy(), placement=Placement(host="h"), state=state, run=7, token=7, **changes)


def failed(before: Instance, current: Incident | None, now: float, *, cause: str = "engine_died", step: str | None = "restart") -> Any:
    """A failure of run 7, seen 0.1 s after it happened."""
    after = before.evolve(state=State.RESTARTING, reason="starting again", token=8, run=None)
    decision = Decision(
        after=after, reason="starting again", failure=Failure(cause=cause, at=now - 0.1, evidence="line", token=7), step=step
    )
    return follow(before, decision, current, now, "task-1")


def moved(before: Instance, state: State, current: Incident | None, now: float, **changes: Any) -> Any:
    return follow(before, Decision(after=before.evolve(state=state, **changes), reason=state.value), current, now)


def test_an_outage_from_its_failure_to_its_end():
    decision, opened = failed(row(), None, 100.0)
    assert (opened.id, opened.failed_at, opened.detected_at, opened.cause) == ("m-0-7", 99.9, 100.0, "engine_died")
    assert [step["kind"] for step in opened.steps] == ["failed", "restart"]
    assert opened.steps[1]["task"] == "task-1"

    decision, started = moved(decision.after, State.STARTING, opened, 101.0, run=8)
    decision, ready = moved(decision.after, State.HEALTHY, started, 120.0, load_s=19.0, validate_until=130.0)
    assert (ready.started_at, ready.ready_at, ready.closed_at, ready.steps[1]["outcome"]) == (101.0, 120.0, None, "serves")

    decision, closed = follow(decision.after, Decision(after=decision.after.evolve(validate_until=None), reason="answers"), ready, 130.0)
    assert (closed.outcome, closed.validated_at, closed.closed_at) == ("recovered", 130.0, 130.0)
    assert decision.after.incident is None
    assert spans(closed) == pytest.approx(
        {"detected": 0.1, "started again": 1.1, "first good token": 20.1, "validated": 30.1, "closed": 30.1}, abs=1e-6
    )
    counted = {count.name: dict(count.labels).get("cause") for count in decision.counts}
    assert counted["recovery_incidents_closed_total"] == counted["recovery_time_to_recover_seconds_sum"] == "engine_died"


def test_a_relapse_is_the_same_outage_and_its_step_did_not_help():
    decision, opened = failed(row(), None, 100.0)
    decision, started = moved(decision.after, State.STARTING, opened, 101.0)
    decision, ready = moved(decision.after, State.HEALTHY, started, 102.0, validate_until=110.0)

    decision, again = failed(decision.after, ready, 103.0, cause="cuda_oom_serving", step="override")

    assert (again.id, again.cause, again.closed_at) == (opened.id, "engine_died", None)
    assert again.steps[1]["outcome"] == "failed: cuda_oom_serving"
    assert [step["kind"] for step in again.steps[-2:]] == ["failed", "override"]


def test_giving_up_closes_it_and_a_start_opens_it_again():
    before = row()
    after = before.evolve(state=State.FAILED, reason="every remedy was tried")
    decision, closed = follow(
        before, Decision(after=after, reason=after.reason, failure=Failure(cause="bad_argument", at=1.0, token=7)), None, 2.0
    )
    assert (closed.outcome, closed.steps[-1]["kind"], closed.steps[-1]["outcome"]) == ("failed", "give_up", "a human is needed")
    assert decision.after.incident == closed.id

    decision, reopened = moved(decision.after, State.STARTING, closed, 50.0)
    assert (reopened.closed_at, reopened.outcome) == (None, None)

    decision, _ = moved(closed_row := decision.after.evolve(state=State.FAILED), State.STOPPED, closed, 60.0)
    assert closed_row.incident is not None and decision.after.incident is None  # stopped: the outage is no longer open


def test_an_operators_stop_ends_it():
    decision, opened = failed(row(), None, 100.0)

    decision, closed = moved(decision.after, State.STOPPED, opened, 101.0)

    assert (closed.outcome, closed.steps[1]["outcome"], decision.after.incident) == ("stopped", "stopped", None)


def test_a_crash_loop_does_not_grow_it_without_bound():
    decision, incident = failed(row(), None, 100.0)
    for number in range(200):
        decision, incident = failed(decision.after.evolve(state=State.STARTING), incident, 101.0 + number)

    assert len(incident.steps) == MAX_STEPS
    assert incident.steps[0]["at"] == 100.0  # the first ones stay


def test_a_healthy_row_has_none():
    assert failed(row(), None, 100.0)[1] is not None
    assert moved(row(State.STARTING), State.HEALTHY, None, 100.0)[1] is None


def test_a_post_mortem_tells_it_all_and_an_empty_one_does_not_break():
    _, opened = failed(row(), None, 100.0)
    evidence = {
        "run": 7, "log": ["ERROR one", "ERROR two"], "arguments": ["vllm serve m"], "versions": {"vllm": "0.32.0", "driver": None},
        "processes": [{"pid": 5, "name": "VLLM::Worker", "state": "T", "rss": 2**21}], "gpu": [{"index": 0, "lost": True}], "xids": [79],
        "port": {"port": 8000, "held_by": {"name": "nc", "pid": 9}}, "probe": {"failures": 2, "message": "/health: refused"},
        "metrics": {"running": 3, "look": {"waiting": 4}},
    }  # fmt: skip

    text = "\n".join(post_mortem(opened, evidence, lambda at: f"{at:.1f}", "look at the log"))

    for words in (
        "m-0-7: engine_died of m-0 on h, still open", "99.9  failed", "detected: after 0.10 s", "first good token: not reached",
        "restart: starting again", "task task-1", "ERROR two", "vllm 0.32.0", "VLLM::Worker (T), 2 MiB", "GPU 0", "lost", "Xid       79",
        "held by nc (pid 9)", "2 failed in a row; /health: refused", "running 3, look.waiting 4", "look at the log", "vllm serve m",
    ):  # fmt: skip
        assert words in text, text
    assert "driver" not in text
    assert list(post_mortem(opened, {}, str))
