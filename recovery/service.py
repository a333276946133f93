"""
The use cases that need no GPU host: commands, the tick, and views. Synchronous; every method is short.
"""

from collections.abc import Callable, Iterable
from typing import Any

from recovery.committing import Committer
from recovery.core.commanding import Command, Refused, Verb, on_command, refusal
from recovery.core.fleet import Fleet
from recovery.core.instance import Instance, Value
from recovery.core.states import State
from recovery.errors import RecoveryError, SchemaError, UnknownModelError
from recovery.ports import Queue, Sender, Store, Webhook
from recovery.queues import host_queue
from recovery.rescheduling import Rescheduler
from recovery.roller import Roller

TICK_ONCE_MS = 800
"""A backlog of ticks (a worker that was away) collapses into one per this time; beat sends one a second."""
PUSH_S = 4.0
"""How far a delivered row's next delivery is pushed: a lost message costs this much (CELERY-FACTS.md, section 3)."""
POP_LIMIT = 500


class Answer(Value):
    """What a public task answers at once."""

    accepted: bool
    model: str
    status: str
    instances: tuple[dict[str, Any], ...] = ()
    token: int | None = None
    reason: str = ""


class Service:
    """The control side. `store` and `sender` may belong to any process of the fleet."""

    def __init__(self, store: Store, sender: Sender, fleet: Callable[[], Fleet] | None = None, webhook: Webhook | None = None) -> None:
        self.store = store
        self.sender = sender
        self.committer = Committer(store, sender)
        self._webhook = webhook
        self.roller = Roller(store, self.committer, fleet)
        self.rescheduler = Rescheduler(store, self.committer, fleet)

    def rows_of(self, model: str) -> tuple[Instance, ...]:
        """Return the rows of a model, replicas in order; raise `UnknownModelError` with the ids there are, `SchemaError`."""
        rows = self.store.load_all()
        found = tuple(sorted((row for row in rows if row.model == model), key=lambda row: row.replica))
        if not found:
            raise not_found(self.store, model, rows)
        return found

    def command(self, model: str, command: Command) -> Answer:
        """Apply an operator's command to every instance of a model. Answers at once; the loop does the work."""
        try:
            rows = self.rows_of(model)
        except UnknownModelError as error:
            return Answer(accepted=False, model=model[:80], status="unknown_model", reason=str(error))
        why_not = refusal(rows, command)
        if why_not is not None:
            return Answer(accepted=False, model=model, status="refused", reason=why_not)
        touched: list[dict[str, Any]] = []
        refused: list[str] = []
        for row in rows:
            outcome = self.committer.apply(row.id, lambda row, now: on_command(row, command, now))
            if isinstance(outcome, Refused):
                refused.append(outcome.reason)
            elif outcome is not None:
                touched.append({"instance": row.id, "token": outcome.after.token, "reason": outcome.reason})
                if command.verb is Verb.CHECK:
                    self._probe_now(outcome.after)
        reasons = "; ".join(dict.fromkeys([*(str(entry["reason"]) for entry in touched), *refused]))
        token = max((int(entry["token"]) for entry in touched), default=None)
        status = "ok" if touched else "refused"
        return Answer(accepted=bool(touched), model=model, status=status, instances=tuple(touched), token=token, reason=reasons)

    def tick(self) -> int:
        """Deliver what is due to the hosts that live: one look message per host, one step message per instance. Returns messages sent."""
        if not self.store.once("tick", TICK_ONCE_MS):
            return 0
        now = self.store.now()
        self.store.put("tick", now, ttl_s=86_400)
        alive, sent = self.store.hosts(), 0
        for host in self.store.hosts_with_rows():
            if host not in alive:
                continue
            looks = self._pop("looks", host)
            if looks:
                self.sender.send("recovery.probe_host", {"instances": list(looks), "sent_at": now}, queue=host_queue(host))
                sent += 1
            for row in self.store.load_many(self._pop("steps", host)):
                if row.due is not None:
                    self.committer.deliver(row, now)
                    sent += 1
        self.rescheduler.advance()
        self.roller.advance()  # last: a roll that cannot go on holds up no repair
        return sent

    def incident(self, incident_id: str) -> dict[str, Any] | None:
        """An incident with the evidence kept beside it; None when it is not (or no longer) known."""
        found = self.store.incident(incident_id)
        if found is None:
            return None
        kept = self.store.get(f"evidence:{incident_id}") or {}
        return {**found.model_dump(mode="json"), "evidence": {**found.evidence, **kept}}

    def tell(self, incident_id: str, what: str) -> None:
        """Tell the webhook, if there is one, that an incident was opened or closed."""
        found = self.incident(incident_id)
        if self._webhook is not None and found is not None:
            self._webhook.tell({"event": f"incident.{what}", "incident": found})

    def _pop(self, queue: Queue, host: str) -> tuple[str, ...]:
        return self.store.pop_due(queue, host, PUSH_S, POP_LIMIT)

    def _probe_now(self, row: Instance) -> None:
        kwargs = {"instances": [row.id], "sent_at": self.store.now()}
        self.sender.send("recovery.probe_host", kwargs, queue=host_queue(row.placement.host))


def not_found(store: Store, name: str, rows: Iterable[Instance]) -> RecoveryError:
    """Why there are no rows of a model, or of an instance, of that name: `SchemaError` when there are, but of a newer version."""
    for instance, why in store.unreadable().items():
        if name in (instance, instance.rpartition("-")[0]):
            return SchemaError(why)
    known = ", ".join(sorted({row.model for row in rows})) or "none yet"
    return UnknownModelError(f"cannot find a model {name[:80]!r} in the fleet; there are: {known}")


def outcome_of(rows: tuple[Instance, ...], verb: Verb, token: int | None) -> str | None:
    """`done`, `failed`, or None while the command's effect is still under way."""
    if any(row.state is State.FAILED for row in rows):
        return "failed" if verb is not Verb.STOP else None
    if verb is Verb.STOP:
        return "done" if all(row.state in (State.STOPPED, State.COMPLETED) for row in rows) else None
    reached = all(row.state is State.HEALTHY and row.intent is None for row in rows)
    return "done" if reached and (token is None or max(row.run or 0 for row in rows) >= token) else None
