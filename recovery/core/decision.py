"""What a decision is: the next row, what to do about it, and one sentence that a human can read at 3 am."""

from enum import StrEnum

from pydantic import Field

from recovery.core.change import Count, ModelEvent
from recovery.core.instance import Instance, Value
from recovery.core.states import Event, State, advance

NET_S = 1.5
"""How long after its moment a step is due for re-delivery: the message is the fast path, the row is the net (SEQUENCES.md)."""


class Action(StrEnum):
    """What a host does for a decision, after it has been committed."""

    TERMINATE = "terminate"  # SIGTERM to the run's main process
    KILL = "kill"  # SIGKILL to everything of the run
    FORGIVE = "forgive"  # write the cleared budget to the host's own record


class Failure(Value):
    """A failure that a decision answers: it opens an incident or goes on with one."""

    cause: str
    at: float = Field(description="Redis seconds at which it happened, as far as known")
    evidence: str = ""
    token: int


class Decision(Value):
    """The next row and what follows from it. Committed on the version it was made from, before it is acted on."""

    after: Instance
    reason: str
    actions: tuple[Action, ...] = ()
    events: tuple[ModelEvent, ...] = ()
    counts: tuple[Count, ...] = ()
    failure: Failure | None = None
    step: str | None = Field(None, description="the repair step taken, for the incident")


def new_token(row: Instance, now: float) -> int:
    """A token above every earlier one, even when Redis forgot them: microseconds of Redis' clock."""
    return max(row.token + 1, int(now * 1e6))


def move(row: Instance, *events: Event, now: float, **changes: object) -> Instance:
    """The row after `events`, through the table, with `changes`; `entered_at` follows the state."""
    state: State = row.state
    for event in events:
        state = advance(state, event)
    entered = {"entered_at": now} if state is not row.state else {}
    return row.evolve(state=state, **entered, **changes)


def due_at(moment: float) -> dict[str, float]:
    """The fields of a step wanted at `moment`: its time, and the net under it."""
    return {"not_before": moment, "due": moment + NET_S}


def event(kind: str, text: str, row: Instance, **data: object) -> ModelEvent:
    """One line of the model's history about `row`."""
    return ModelEvent(kind=kind, text=text, data={"instance": row.id, "state": row.state.value, **data})
