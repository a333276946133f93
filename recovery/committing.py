"""
Load, decide, commit, tell: the one path on which a row changes.

A refused commit (somebody was faster) is read and decided again. A commit that makes a step due sends its message;
the message is the fast path and may be lost, the row is the net.
"""

from collections.abc import Callable
from typing import Any
from uuid import uuid4

from recovery.core import incidents
from recovery.core.change import Commit, Incident
from recovery.core.commanding import Refused
from recovery.core.decision import Decision
from recovery.core.instance import Instance
from recovery.core.states import State
from recovery.errors import LeaseHeldError, VersionConflictError
from recovery.ports import Sender, Store
from recovery.queues import CONTROL_QUEUE, host_queue

TRIES = 20
"""Commits of one row collide only with another hand's on the same row; losing twenty in a row means something is wrong."""
MESSAGE_LIFE_S = 60.0
"""Celery compares `expires` with host clocks: it only takes out rubbish, so it is generous (DESIGN.md, Clocks)."""

Decide = Callable[[Instance, float], Decision | Refused | None]


class Committer:
    """Applies decisions to rows and sends what becomes due. Thread-safe; holds no state."""

    def __init__(self, store: Store, sender: Sender) -> None:
        self._store = store
        self._sender = sender

    def apply(self, instance_id: str, decide: Decide, *, send: bool = True) -> Decision | Refused | None:
        """Commit what `decide` says of the row as it is now; None when there is no row or nothing to decide."""
        for _ in range(TRIES):
            row, now = self._store.load_now(instance_id)
            if row is None:
                return None
            decision = decide(row, now)
            if decision is None or isinstance(decision, Refused):
                return decision
            try:
                return self._commit(row, decision, now, send=send)
            except VersionConflictError:
                continue
        raise LeaseHeldError(
            f"cannot change {instance_id}: its row changed {TRIES} times while it was decided about; the next tick looks again"
        )

    def create(self, row: Instance) -> Instance:
        """Write a row that must not exist yet; raise `VersionConflictError` when somebody else made it."""
        made = self._store.commit(Commit(after=row, expected_version=0))
        if made.due is not None:
            self.deliver(made, self._store.now())
        return made

    def _commit(self, row: Instance, decision: Decision, now: float, *, send: bool) -> Decision:
        current = self._store.incident(row.incident) if row.incident else None
        task_id = str(uuid4()) if send and decision.after.due is not None and decision.after.due != row.due else None
        decision, incident = incidents.follow(row, decision, current, now, task_id)
        if decision.after == row and not decision.events and not decision.counts:
            return decision
        commit = Commit(
            after=decision.after, expected_version=row.version, events=decision.events, counts=decision.counts, incident=incident
        )
        decision = decision.evolve(after=self._store.commit(commit))
        if task_id is not None:
            self.deliver(decision.after, now, task_id)
        if incident is not None:
            self._tell(incident, current)
        return decision

    def _tell(self, incident: Incident, before: Incident | None) -> None:
        """Have the webhook told when an incident opens and when it closes."""
        opened = before is None or before.id != incident.id
        closed = incident.closed_at is not None and (opened or before is None or before.closed_at is None)
        if opened or closed:
            self._sender.send("recovery.tell", {"incident": incident.id, "what": "closed" if closed else "opened"}, queue=CONTROL_QUEUE)

    def deliver(self, row: Instance, now: float, task_id: str | None = None) -> str | None:
        """Send the message of the row's step: a delayed restart that Flower shows with its reason, or a step."""
        wait_s = max(0.0, row.not_before - now)
        if row.state is State.RESTARTING:
            name, kwargs = "recovery.restart_instance", self._explained(row, wait_s)
        else:
            name, kwargs = "recovery.step_instance", {"instance": row.id, "token": row.token}
        queue = host_queue(row.placement.host)
        return self._sender.send(name, kwargs, queue=queue, countdown_s=wait_s, expires_s=wait_s + MESSAGE_LIFE_S, task_id=task_id)

    def _explained(self, row: Instance, wait_s: float) -> dict[str, Any]:
        return {"instance": row.id, "token": row.token, "attempt": row.attempt, "delay": round(wait_s, 3), "reason": row.reason[:300]}
