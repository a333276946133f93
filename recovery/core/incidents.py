"""
The record of an outage, followed from commit to commit: opened, diagnosed, each step, served again, validated, closed.

`follow` is the only place that writes one, and it is called for every commit, so an incident can be neither
forgotten nor opened twice.
"""

from typing import Any

from recovery.core import counting
from recovery.core.change import Count, Incident
from recovery.core.decision import Decision
from recovery.core.instance import Instance
from recovery.core.states import State

MAX_STEPS = 50
"""Steps kept per incident: a server that fails for hours must not grow its record without bound; the first 10 stay."""


def follow(
    before: Instance, decision: Decision, current: Incident | None, now: float, task_id: str | None = None
) -> tuple[Decision, Incident | None]:
    """
    The decision with its incident in the row, and the incident to be written with it (None = nothing to write).

    An outage opens at the first failure, goes on through further ones, and closes when a repaired server has kept
    serving for `validate_s`, when the operator stops it, or, unrepaired, when the budget is spent.
    """
    after = decision.after
    incident = current
    if decision.failure is not None:
        if incident is None:
            incident = _opened(after, decision, now)
        incident = _stepped(incident, now, "failed", decision.failure.cause, decision.reason, after)
    if incident is None:
        return decision, None
    counts: tuple[Count, ...] = ()
    if decision.step is not None:
        incident = _stepped(incident, now, decision.step, after.reason, decision.reason, after, task_id)
    if before.state is not after.state:
        incident, counts = _moved(incident, before, after, now)
    if before.validate_until is not None and after.validate_until is None and after.state is State.HEALTHY:
        incident, counts = _closed(incident.evolve(validated_at=now), "recovered", now)
    row_incident = None if incident.closed_at is not None and incident.outcome != "failed" else incident.id
    decision = decision.evolve(after=after.evolve(incident=row_incident), counts=decision.counts + counts)
    return decision, incident if incident != current else None


def _opened(row: Instance, decision: Decision, now: float) -> Incident:
    assert decision.failure is not None
    failure = decision.failure
    return Incident(
        id=f"{row.id}-{failure.token}",
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
            return _stepped(started, now, "started", f"run {after.run}", after.reason, after), ()
        case State.HEALTHY if before.state is State.STARTING:
            return _stepped(incident.evolve(ready_at=now), now, "ready", f"after {after.load_s or 0:.1f} s", after.reason, after), ()
        case State.FAILED:
            return _closed(incident, "failed", now)
        case State.STOPPED | State.COMPLETED:
            return _closed(incident, "stopped", now)
        case _:
            return incident, ()


def _stepped(incident: Incident, now: float, kind: str, what: str, why: str, row: Instance, task_id: str | None = None) -> Incident:
    step: dict[str, Any] = {"at": now, "kind": kind, "what": what, "why": why, "token": row.token, "attempt": row.attempt}
    if task_id is not None:
        step["task"] = task_id
    steps = (*incident.steps, step)
    return incident.evolve(steps=steps if len(steps) <= MAX_STEPS else (*steps[:10], *steps[-(MAX_STEPS - 10) :]))


def _closed(incident: Incident, outcome: str, now: float) -> tuple[Incident, tuple[Count, ...]]:
    if incident.closed_at is not None:
        return incident, ()
    closed = incident.evolve(closed_at=now, outcome=outcome)
    return closed, counting.incident_closed(incident.model, incident.cause, outcome)
