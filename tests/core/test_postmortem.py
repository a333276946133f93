"""
An incident as it is read: every part there is, and nothing broken where one is missing.
"""

import pytest

from recovery.core.change import Incident
from recovery.core.postmortem import post_mortem, spans

STEPS = (
    {"at": 100.0, "kind": "failed", "what": "engine_died", "why": "line", "token": 7, "attempt": 0},
    {"at": 100.0, "kind": "restart", "what": "starting again", "why": "", "token": 8, "attempt": 1, "task": "task-1", "outcome": "serves"},
    {"at": 101.0, "kind": "started", "what": "run 8", "why": "", "token": 8, "attempt": 1},
)
OPEN = Incident(
    id="m-0-7", model="m", instance="m-0", host="h", token=7, opened_at=100.0, failed_at=99.9, detected_at=100.0, started_at=101.0,
    cause="engine_died", reason="starting again", evidence={"line": "EngineDeadError"}, steps=STEPS,
)  # fmt: skip
EVIDENCE = {
    "run": 7, "log": ["ERROR one", "ERROR two"], "arguments": ["vllm serve m"], "versions": {"vllm": "0.32.0", "driver": None},
    "processes": [{"pid": 5, "name": "VLLM::Worker", "state": "T", "rss": 2**21}], "gpu": [{"index": 0, "lost": True}], "xids": [79],
    "port": {"port": 8000, "held_by": {"name": "nc", "pid": 9}}, "probe": {"failures": 2, "message": "/health: refused"},
    "metrics": {"running": 3, "look": {"waiting": 4}}, "ended_by_keeper": 2, "overrides": ["--enforce-eager"],
}  # fmt: skip


def told(incident: Incident, evidence: dict[str, object]) -> str:
    return "\n".join(post_mortem(incident, evidence, lambda at: f"{at:.1f}", "look at the log"))


@pytest.mark.parametrize(
    "words",
    [
        "m-0-7: engine_died of m-0 on h, still open", "seen in   EngineDeadError", "advice    look at the log", "99.9  failed",
        "detected: after 0.10 s", "first good token: not reached", "restart: starting again", "outcome: serves, task task-1",
        "started: run 8", "ERROR two", "vllm 0.32.0", "VLLM::Worker (T), 2 MiB", "GPU 0     unnamed, lost", "Xid       79",
        "8000, held by nc (pid 9)", "2 failed in a row; /health: refused", "running 3, look.waiting 4", "vllm serve m",
        "2 more were ended", "--enforce-eager",
    ],
)  # fmt: skip
def test_a_post_mortem_tells_everything_there_is(words):
    text = told(OPEN, EVIDENCE)

    assert words in text, text
    assert "driver" not in text


def test_without_evidence_it_is_short_and_whole():
    text = told(OPEN, {})

    assert "What was done" in text and "What there was to see" not in text


def test_an_outage_that_is_over_says_how_long_it_was_down():
    over = OPEN.evolve(ready_at=120.0, validated_at=130.0, closed_at=130.0, outcome="recovered")

    assert "recovered by itself, down 20.1 s" in told(over, {})
    assert spans(over) == pytest.approx(
        {"detected": 0.1, "started again": 1.1, "first good token": 20.1, "validated": 30.1, "closed": 30.1}, abs=1e-6
    )
