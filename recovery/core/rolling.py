"""
A rolling restart: replicas one after another, each serving before the next, stopped at the first failure.

The roll is a document in Redis that the tick advances, so it goes on after a crash of whoever asked for it. With
one replica and a spare place, a second one comes first: it serves while the first is restarted, then goes again.
"""

from typing import Literal

from pydantic import Field

from recovery.core.fleet import Placement
from recovery.core.instance import Instance, Value
from recovery.core.states import State

ROLL_TTL_S = 86_400.0
"""A roll is remembered for a day; one that takes longer is stuck, and its rows say why."""


class Roll(Value):
    """One roll of one model."""

    model: str
    id: str
    started_at: float
    order: tuple[str, ...]
    done: tuple[str, ...] = ()
    current: str | None = None
    token: int | None = None
    since: float | None = None
    surge: Placement | None = Field(None, description="where a second replica may serve meanwhile; None: there is no place")
    surge_id: str | None = None
    failure: str | None = Field(None, description="why it stops, once that is known; only cleaning up is left")
    state: Literal["running", "done", "failed"] = "running"
    reason: str = ""
    finished_at: float | None = None


class RollStep(Value):
    """What to do next for a roll: `roll` is how it stands after it."""

    kind: Literal["wait", "restart", "surge", "drop_surge", "finish"]
    roll: Roll
    instance: str | None = None


def next_step(roll: Roll, rows: tuple[Instance, ...], now: float) -> RollStep:
    """The next step of a roll, from the rows as they are; calling it twice on the same rows gives the same step."""
    by_id = {row.id: row for row in rows}
    failed = roll.failure or _failure(roll, by_id)
    if failed is not None:
        return _end(roll, by_id, now, "failed", failed)
    if roll.current is not None:
        row = by_id.get(roll.current)
        if row is None:
            return _end(roll, by_id, now, "failed", f"{roll.current} is no longer in the fleet")
        if not _serves(row, roll.token):
            return RollStep(kind="wait", roll=roll)
        roll = roll.evolve(done=(*roll.done, roll.current), current=None, token=None, since=None)
    left = [instance for instance in roll.order if instance not in roll.done]
    if not left:
        return _end(roll, by_id, now, "done", f"{len(roll.done)} replicas restarted")
    if roll.surge is not None:
        surge = by_id.get(roll.surge_id or "")
        if surge is None:
            return RollStep(kind="surge", roll=roll.evolve(since=now), instance=roll.surge_id)
        if not _serves(surge, None):
            return RollStep(kind="wait", roll=roll)
    others = [row for row in rows if row.id != left[0] and row.id in roll.order]
    if any(row.state is not State.HEALTHY for row in others if row.state not in (State.STOPPED, State.COMPLETED, State.FAILED)):
        return RollStep(kind="wait", roll=roll.evolve(reason="waiting for the other replicas to serve"))
    return RollStep(kind="restart", roll=roll.evolve(current=left[0], since=now, reason=f"restarting {left[0]}"), instance=left[0])


def _failure(roll: Roll, rows: dict[str, Instance]) -> str | None:
    """Why the roll stops: the instance under way, or the one that was to serve meanwhile, has failed since it was touched."""
    for instance in (roll.current, roll.surge_id):
        row = rows.get(instance or "")
        if row is None or roll.since is None:
            continue
        failed_since = row.last_failure is not None and row.last_failure.at > roll.since
        if row.state is State.FAILED or failed_since:
            return f"{row.id} did not come up: {row.reason}"
        if row.state in (State.STOPPED, State.STOPPING, State.DRAINING, State.COMPLETED) and instance == roll.current:
            return f"{row.id} was stopped meanwhile"
    return None


def _serves(row: Instance, token: int | None) -> bool:
    return row.state is State.HEALTHY and row.intent is None and (token is None or (row.run or 0) >= token)


def _end(roll: Roll, rows: dict[str, Instance], now: float, state: Literal["done", "failed"], reason: str) -> RollStep:
    """The end of a roll; the replica that served meanwhile goes first."""
    roll = roll.evolve(reason=reason)
    surge = rows.get(roll.surge_id or "")
    if surge is not None and surge.state not in (State.STOPPED, State.STOPPING, State.DRAINING):
        return RollStep(
            kind="drop_surge", roll=roll.evolve(surge=None, current=None, failure=reason if state == "failed" else None), instance=surge.id
        )
    return RollStep(kind="finish", roll=roll.evolve(state=state, current=None, finished_at=now))
