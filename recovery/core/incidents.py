"""
The record of an outage, followed from commit to commit: opened, diagnosed, each step, served again, validated, closed.

`follow` is the only place that writes one, and it is called for every commit, so an incident can be neither
forgotten nor opened twice.
"""

from typing import Any

from recovery.core import counting
from recovery.core.change import Count, Incident
from recovery.core.decision import Decision, Failure
from recovery.core.instance import Instance
from recovery.core.states import State

MAX_STEPS = 50
"""Steps kept per incident: a server that fails for hours must not grow its record without bound; the first 10 stay."""
SEEN = frozenset({"failed", "started", "ready"})
"""Entries that say what was seen; every other one is a step taken, and gets an outcome."""


def incident_id(row: Instance, failure: Failure) -> str:
    """The id of the incident that this failure opens."""
    return f"{row.id}-{failure.token}"


def follow(
    before: Instance, decision: Decision, current: Incident | None, now: float, task_id: str | None = None
) -> tuple[Decision, Incident | None]:
    """
    The decision with its incident in the row, and the incident to be written with it (None = nothing to write).

    An outage opens at the first failure, goes on through further ones, and closes when a repaired server has kept
    serving for `validate_s`, when the operator stops it, or, unrepaired, when no step is left.
    """
    after = decision.after
    incident = current
    if decision.failure is not None:
        cause = decision.failure.cause
        incident = _opened(after, decision, now) if incident is None else _settled(incident, f"failed: {cause}")
        incident = _noted(incident, now, "failed", cause, decision.failure.evidence, after)
    if incident is None:
        return decision, None
    counts: tuple[Count, ...] = ()
    if decision.step is not None:
        incident = _noted(incident, now, decision.step, decision.reason, "", after, task_id)
    if before.state is not after.state:
        incident, counts = _moved(incident, before, after, now)
    if before.validate_until is not None and after.validate_until is None and after.state is State.HEALTHY:
        incident, counts = _closed(_settled(incident, "recovered").evolve(validated_at=now), "recovered", now)
        counts += counting.recovered(incident.model, incident.cause, _down_s(incident, now))
    over = incident.closed_at is not None and (incident.outcome != "failed" or after.state in (State.STOPPED, State.COMPLETED))
    row_incident = None if over else incident.id
    decision = decision.evolve(after=after.evolve(incident=row_incident), counts=decision.counts + counts)
    return decision, incident if incident != current else None


def _opened(row: Instance, decision: Decision, now: float) -> Incident:
    assert decision.failure is not None
    failure = decision.failure
    return Incident(
        id=incident_id(row, failure),
        model=row.model,
        instance=row.id,
        host=row.placement.host,
        token=failure.token,
        opened_at=now,
        failed_at=failure.at,
        detected_at=now,
        cause=failure.cause,
        reason=decision.reason,
        evidence={"line": failure.evidence} if failure.evidence else {},
    )


def _moved(incident: Incident, before: Instance, after: Instance, now: float) -> tuple[Incident, tuple[Count, ...]]:
    match after.state:
        case State.STARTING:
            started = incident.evolve(started_at=incident.started_at or now, closed_at=None, outcome=None)
            return _noted(started, now, "started", f"run {after.run}", "", after), ()
        case State.HEALTHY if before.state is State.STARTING:
            ready = _settled(incident, "serves").evolve(ready_at=now)
            return _noted(ready, now, "ready", f"after {after.load_s or 0:.1f} s", "", after), ()
        case State.FAILED:
            gave_up = _noted(_settled(incident, "did not help"), now, "give_up", after.reason, "", after)
            return _closed(gave_up, "failed", now)
        case State.STOPPED | State.COMPLETED:
            return _closed(_settled(incident, "stopped"), "stopped", now)
        case _:
            return incident, ()


def _noted(incident: Incident, now: float, kind: str, what: str, why: str, row: Instance, task_id: str | None = None) -> Incident:
    step: dict[str, Any] = {"at": now, "kind": kind, "what": what, "why": why, "token": row.token, "attempt": row.attempt}
    if kind == "give_up":
        step["outcome"] = "a human is needed"
    if task_id is not None:
        step["task"] = task_id
    steps = (*incident.steps, step)
    return incident.evolve(steps=steps if len(steps) <= MAX_STEPS else (*steps[:10], *steps[-(MAX_STEPS - 10) :]))


def _settled(incident: Incident, outcome: str) -> Incident:
    """What became of the last step taken: said again only as it gets truer (it serves, then it recovered)."""
    at = next((i for i in reversed(range(len(incident.steps))) if incident.steps[i]["kind"] not in SEEN), None)
    if at is None or incident.steps[at]["kind"] == "give_up":
        return incident
    steps = (*incident.steps[:at], {**incident.steps[at], "outcome": outcome}, *incident.steps[at + 1 :])
    return incident.evolve(steps=steps)


def _down_s(incident: Incident, now: float) -> float:
    return (incident.ready_at or now) - (incident.failed_at if incident.failed_at is not None else incident.opened_at)


def _closed(incident: Incident, outcome: str, now: float) -> tuple[Incident, tuple[Count, ...]]:
    if incident.closed_at is not None:
        return incident, ()
    closed = incident.evolve(closed_at=now, outcome=outcome)
    return closed, counting.incident_closed(incident.model, incident.cause, outcome)
