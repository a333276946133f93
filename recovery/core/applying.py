"""
What a changed fleet file asks for, as the smallest set of actions: add, remove, restart, or nothing but new rules.
"""

from typing import Literal

from recovery.core.fleet import Fleet, digest, launch_digest
from recovery.core.fleet_plan import plan
from recovery.core.instance import Desired, Instance, Value
from recovery.core.states import State

Kind = Literal["add", "remove", "move", "restart", "rules"]


class Action(Value):
    """One action on one instance; `why` is for the person who reads it before it is done."""

    kind: Kind
    model: str
    instance: str
    why: str


def actions(rows: tuple[Instance, ...], fleet: Fleet) -> tuple[Action, ...]:
    """The actions that bring `fleet` into force, in the order in which they are done: rules, additions, restarts, removals."""
    known = {row.id: row for row in rows if not row.surge}
    wanted = {planned.id: planned for planned in plan(fleet)}
    found: list[Action] = []
    for planned in wanted.values():
        row, spec = known.get(planned.id), fleet.models[planned.model]
        if row is None:
            where = f"{planned.placement.host}:{planned.placement.port or '-'}"
            found.append(Action(kind="add", model=planned.model, instance=planned.id, why=f"new, on {where}"))
        elif row.placement.host != planned.placement.host and not row.policy.reschedule:
            why = f"from {row.placement.host} to {planned.placement.host}"
            found.append(Action(kind="move", model=row.model, instance=row.id, why=why))
        elif _needs_restart(row, launch_digest(spec)) or (row.run is not None and row.planned != planned.placement):
            found.append(Action(kind="restart", model=row.model, instance=row.id, why="its command, environment or place changes"))
        elif row.spec_digest != digest(spec):
            found.append(Action(kind="rules", model=row.model, instance=row.id, why="only its rules change; it keeps running"))
    for row in known.values():
        if row.id not in wanted:
            found.append(Action(kind="remove", model=row.model, instance=row.id, why="no longer in the file"))
    order = ("rules", "add", "move", "restart", "remove")
    return tuple(sorted(found, key=lambda action: order.index(action.kind)))


def _needs_restart(row: Instance, wanted: str) -> bool:
    """A row that runs (or will) with other arguments than the file's; one that is down starts with the new ones anyway."""
    return row.run is not None and row.launched not in ("", wanted)


def in_force(rows: tuple[Instance, ...], fleet: Fleet) -> bool:
    """True when nothing is left to be done and everything wanted running serves."""
    settled = all(row.state is State.HEALTHY or row.desired is Desired.STOPPED for row in rows)
    return settled and not actions(rows, fleet)
