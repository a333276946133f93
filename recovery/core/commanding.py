"""
What an operator's command does to one instance. Commands change what is wanted; the loop makes it so.

Every command is accepted in every state or refused with a sentence; none sleeps and none touches the host.
"""

from enum import StrEnum

from recovery.core import counting
from recovery.core.decision import Decision, due_at, event, move, new_token
from recovery.core.failing import GONE
from recovery.core.instance import Desired, Instance, Intent, Value
from recovery.core.states import PROBED, Event, State


class Verb(StrEnum):
    """The commands there are."""

    START = "start"
    STOP = "stop"
    RESTART = "restart"
    CHECK = "check"
    RESET = "reset"


class Command(Value):
    """A command as given. `force` and `stay_down` belong to stop, `override` to restart."""

    verb: Verb
    force: bool = False
    stay_down: bool = True
    override: bool = False
    by: str = "operator"


class Refused(Value):
    """A command that does not fit; the text is the specification's where it has one."""

    reason: str


def on_command(row: Instance, command: Command, now: float) -> Decision | Refused:
    """Decide what `command` does to this instance."""
    match command.verb:
        case Verb.START:
            return _start(row, now)
        case Verb.STOP if command.force and not command.stay_down:
            return _crash(row, now)
        case Verb.STOP:
            return _stop(row, command, now)
        case Verb.RESTART:
            return _restart(row, command, now)
        case Verb.RESET:
            return _reset(row, now)
        case Verb.CHECK:
            return _check(row, now)


def refusal(rows: tuple[Instance, ...], command: Command) -> str | None:
    """Why a restart of this model is refused, in the specification's words; None when it is not."""
    if command.verb is not Verb.RESTART or command.override:
        return None
    for row in rows:
        if row.policy.restart_policy == "no" or row.budget_spent:
            limit = row.policy.max_restarts
            return f"Cannot restart model '{row.model}': restart policy is 'no' or max restarts ({limit}) reached"
    return None


def _start(row: Instance, now: float) -> Decision | Refused:
    if row.state in PROBED:
        return Decision(after=row.evolve(desired=Desired.RUNNING), reason=f"{row.id} is already {row.state.value}")
    if row.state in (State.RESTARTING, State.RECYCLING, State.RELEASING) and row.desired is Desired.RUNNING:
        if row.gives_up:
            return Decision(after=_not_given_up(row, now), reason=f"{row.id} is started once its old run is gone")
        wait = {} if row.state is not State.RESTARTING else due_at(now)
        return Decision(after=row.evolve(**wait), reason=f"{row.id} is already {row.state.value}")
    return _to_running(row, Event.START_REQUESTED, now, "start asked for by the operator")


def _to_running(row: Instance, verb: Event, now: float, why: str, **changes: object) -> Decision:
    """From any state that is not serving: a new token, and a start due now or once the old run is gone."""
    after = move(
        row, verb, now=now, desired=Desired.RUNNING, token=new_token(row, now), reason=why, gives_up=False, restart_at=now, **changes
    )
    if after.state is State.RESTARTING:
        after = after.evolve(**{**GONE, **due_at(now)})
    elif after.due is None:
        after = after.evolve(**due_at(now))
    return Decision(after=after, reason=why, events=(event("starting", f"{row.id}: {why}", after),))


def _not_given_up(row: Instance, now: float) -> Instance:
    """The row with a start to follow the end of its old run, where none was to follow."""
    return row.evolve(gives_up=False, restart_at=now, token=new_token(row, now)) if row.gives_up else row


def _stop(row: Instance, command: Command, now: float) -> Decision | Refused:
    intent = Intent.KILL if command.force else Intent.GRACEFUL
    if row.state in (State.STOPPED, State.COMPLETED):
        after = move(row, Event.STOP_REQUESTED, now=now, desired=Desired.STOPPED)
        return Decision(after=after, reason=f"{row.id} is already down")
    if row.state in (State.STOPPING, State.DRAINING):
        wanted = Intent.KILL if command.force else row.intent
        state = move(row, Event.DRAINED, now=now).state if command.force and row.state is State.DRAINING else row.state
        after = row.evolve(desired=Desired.STOPPED, intent=wanted, state=state, **due_at(now))
        return Decision(after=after, reason=f"{row.id} is already being stopped")
    after = move(row, Event.STOP_REQUESTED, now=now)
    if after.state is State.DRAINING and command.force:
        after = move(after, Event.DRAINED, now=now)
    after = after.evolve(
        desired=Desired.STOPPED,
        token=new_token(row, now),
        intent=intent,
        reason="stop asked for by the operator",
        look_at=None,
        drain_since=now if after.state is State.DRAINING else None,
        restart_at=None,
        gives_up=False,
        validate_until=None,
        **due_at(now),
    )
    return Decision(after=after, reason=after.reason, events=(event("stopping", f"{row.id}: {after.reason}", after, by=command.by),))


def _crash(row: Instance, now: float) -> Decision | Refused:
    """`stop?force=true`: SIGKILL, and what follows is a crash like any other (the specification's recovery test 5)."""
    if row.state not in PROBED:
        return Refused(reason=f"Cannot force-stop model '{row.model}': instance {row.id} is {row.state.value}, no server is running")
    after = row.evolve(intent=Intent.CRASH, **due_at(now))
    said = event("killed", f"{row.id}: killed by the operator, to be handled as a crash", after)
    return Decision(after=after, reason="killed by the operator", events=(said,))


def _restart(row: Instance, command: Command, now: float) -> Decision | Refused:
    counts = counting.restarted(row.model, row.placement.host, "operator", manual=True)
    counted = {"manual": row.manual + 1, "restarts_total": row.restarts_total + 1, "last_restart_at": now}
    why = "restart asked for by the operator"
    if row.state in PROBED:
        after = move(row, Event.RESTART_REQUESTED, now=now)
        after = after.evolve(
            desired=Desired.RUNNING,
            token=new_token(row, now),
            intent=Intent.GRACEFUL,
            reason=why,
            look_at=None,
            restart_at=now,
            gives_up=False,
            validate_until=None,
            drain_since=now if after.state is State.RELEASING else None,
            **counted,
            **due_at(now),
        )
        said = event("restarting", f"{row.id}: {why}", after, cause="operator", by=command.by)
        return Decision(after=after, reason=why, counts=counts, events=(said,), step="restart")
    if row.state in (State.RECYCLING, State.RELEASING):
        after = _not_given_up(row, now).evolve(restart_at=now, **counted)
        return Decision(after=after, reason=f"{row.id} is already being restarted; its next start is due at once", counts=counts)
    decision = _to_running(row, Event.RESTART_REQUESTED, now, why, **counted)
    return decision.evolve(counts=counts, step="restart")


def _reset(row: Instance, now: float) -> Decision:
    # Without `planned` the next start takes the fleet file's port and cards again, not those of a remedy.
    cleared = row.evolve(used=0, attempt=0, manual=0, sees={}, forgiven=now, overrides=(), degraded_since=None, planned=None)
    why = "budget, backoff and overrides cleared by the operator"
    if row.run is not None and (row.overrides or row.planned not in (None, row.placement)):
        why = f"{why}; the running server keeps its changed flags until it is restarted"
    if row.state is State.FAILED and row.desired is Desired.RUNNING:
        decision = _to_running(cleared, Event.RESET, now, why)
        return decision.evolve(events=(event("reset", f"{row.id}: {why}; starting again", decision.after),))
    cleared = _not_given_up(cleared, now)
    return Decision(after=cleared, reason=why, events=(event("reset", f"{row.id}: {why}", cleared),))


def _check(row: Instance, now: float) -> Decision | Refused:
    if row.state not in PROBED:
        return Refused(reason=f"instance {row.id} is {row.state.value}: there is nothing to look at")
    return Decision(after=row.evolve(look_at=now), reason="a look is due now")
