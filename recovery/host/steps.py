"""Steps: whatever a row says is due now, above all on the way to a stop."""

from recovery.core import joining, stepping
from recovery.core.decision import Action, Decision
from recovery.core.failing import unkillable
from recovery.core.host import HostView
from recovery.core.instance import Desired, Instance
from recovery.core.states import ENDING, PROBED, State
from recovery.errors import LeaseHeldError
from recovery.host.context import HostContext
from recovery.host.ends import Ends
from recovery.host.starts import Starts

EARLY_S = 0.1
"""How much before its time a step is still taken: messages are timed by another clock than rows (as CLAIM_EARLY_S)."""


class Steps:
    """Takes one step of an instance after another, each under its `step.lock`."""

    def __init__(self, here: HostContext, starts: Starts, ends: Ends) -> None:
        self._here = here
        self._starts = starts
        self._ends = ends

    def step(self, instance_id: str) -> str:
        """Take the next step of whatever the row says is due; returns what was done, for the task list."""
        row = self._here.store.load(instance_id)
        if row is None:
            return "no such row"
        if row.state is State.RESTARTING:
            return self._starts.start(instance_id, row.token).outcome
        try:
            with self._here.host.step_lock(instance_id):
                return self._step(instance_id)
        except LeaseHeldError:
            return "held"

    def _step(self, instance_id: str) -> str:
        row = self._here.store.load(instance_id)
        if row is None:
            return "no such row"
        if row.due is None or self._here.store.now() < row.not_before - EARLY_S:
            return "not yet"  # each step sends the message of the next: a message that came twice must not make two trains of them
        view = self._here.host.look(instance_id)
        if view.gone is not None and view.gone.left and view.strays and not view.keeper_alive:
            left = ", ".join(f"{stray.name} (pid {stray.pid}, {stray.state})" for stray in view.strays)
            text = f"cannot end {left}; look at it by hand, then reset"
            decision = self._here.apply(
                instance_id, lambda now_row, now: unkillable(now_row, text, now) if now_row.state in ENDING else None
            )
            return decision.reason if decision else "nothing"
        ended = self._ends.report(instance_id, view)
        if ended is not None:
            self._ends.afterwards(ended, view)
            return "reported its end"
        if row.state in ENDING or row.state in PROBED:
            self._here.write(instance_id, joining.recorded(row, view.record))
        in_flight = self.in_flight(row)
        decision = self._here.apply(instance_id, lambda now_row, now: stepping.on_ending(now_row, view, in_flight, now))
        if decision is None:
            return "nothing to do"
        self._act(decision, view)
        if decision.after.state in (State.STOPPED, State.FAILED):
            self._here.remember(decision.after)
            if decision.after.desired is Desired.STOPPED:
                self._forget_if_gone(decision.after)
        return decision.reason

    def _act(self, decision: Decision, view: HostView) -> None:
        row = decision.after
        run = view.run.token if view.run is not None else row.run
        for action in decision.actions:
            match action:
                case Action.TERMINATE if run is not None:
                    self._here.host.terminate(row.id, run)
                case Action.KILL:
                    self._here.end_all(row.id, view)
                case _:
                    self._here.remember(row)

    def _forget_if_gone(self, row: Instance) -> None:
        if row.surge or self._here.spec_of(row) is None:
            self._here.forget(row)

    def in_flight(self, row: Instance) -> int | None:
        """Requests that front doors have in flight at this instance; None when none of them reports."""
        reports = self._here.store.get_many(f"door:{row.id}:")
        return sum(int(report.get("in_flight", 0)) for report in reports.values()) if reports else None
