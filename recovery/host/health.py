"""What looks at a server mean: each is completed with what only this host can see of it, and committed."""

from recovery.core.decision import Action, Decision
from recovery.core.failing import Remedy
from recovery.core.host import HostView
from recovery.core.instance import Instance
from recovery.core.looking import Look, may_be_gone, on_look
from recovery.core.states import State
from recovery.host.brake import FleetBrake
from recovery.host.context import HostContext
from recovery.host.ends import Ends


class Health:
    """Takes the looks of this host's servers as they come in, from any thread."""

    def __init__(self, here: HostContext, brake: FleetBrake, ends: Ends) -> None:
        self._here = here
        self._brake = brake
        self._ends = ends
        self._idle: dict[str, int] = {}

    def looked(self, instance_id: str, look: Look) -> None:
        """Commit what a look saw."""
        if look.http and look.ready and self._goes_on(instance_id, look):
            return
        row, now = self._here.store.load_now(instance_id)
        if row is None or row.run != look.run:
            return
        look = self._completed(row, look)
        if may_be_gone(row, look):
            self._end_idle_keeper(instance_id, look.run)
        if not look.alive:
            return
        view: HostView | None = None
        remedy: Remedy | None = None
        expected = on_look(row, look, now, 0.0)
        if expected is not None and expected.failure is not None:
            view = self._here.host.look(instance_id)
            remedy = self._here.repairs.remedy_for(row, expected.failure.cause, expected.failure.evidence, self._here.fleet(), view)
            seen = row.evolve(probe=expected.after.probe)
            self._ends.keep_evidence(seen, expected.failure, view)  # before the commit: the kill destroys what there is to be seen
        decision = self._here.apply(instance_id, lambda now_row, now: on_look(now_row, look, now, self._here.clocks.chance(), remedy))
        if decision is None:
            return
        if Action.FORGIVE in decision.actions:
            self._here.remember(decision.after)
        if view is not None:
            self._brake.put_on(decision)

    def _goes_on(self, instance_id: str, look: Look) -> bool:
        """The ordinary look: a healthy server that answers needs no second thought. False when this was none."""

        def decide(row: Instance, now: float) -> Decision | None:
            return on_look(row, look, now, 0.0) if row.state is State.HEALTHY else None

        decision = self._here.apply(instance_id, decide)
        if decision is not None and Action.FORGIVE in decision.actions:
            self._here.remember(decision.after)
        return decision is not None

    def _completed(self, row: Instance, look: Look) -> Look:
        """The look with what only this host can add: is it our process that answers, does it use the processor."""
        if not look.http:
            view = self._here.host.look(row.id)
            return look.evolve(alive=view.server_alive, message="" if view.server_alive else "the process is gone")
        if look.ready and row.state is not State.HEALTHY and row.placement.port is not None:
            holder = self._here.host.port_holder(row.placement.port)
            if holder is not None and holder.pid is not None and not self._here.host.listens(row.id, row.placement.port):
                who = f"port {row.placement.port} is answered by {holder.name} (pid {holder.pid}), not by this server"
                return look.evolve(foreign=True, message=who)
        if look.ready:
            return look
        reports = self._here.store.get_many(f"door:{row.id}:").values()
        moved = any(report["in_flight"] and report["silent_s"] < row.policy.hang_window_s / 2 for report in reports)
        return look.evolve(moved=moved, cpu_s=self._here.host.cpu_seconds(row.id) if look.steps is None else None)

    def _end_idle_keeper(self, instance_id: str, token: int) -> None:
        """
        End a keeper that does not act (stopped, say): two looks in a row found its server gone, and it has not written that down.

        What follows is an end that nobody saw. Without this a model that only its process is looked at would wait for ever.
        """
        if not self._here.host.look(instance_id).keeper_idles(token):
            self._idle.pop(instance_id, None)
        elif self._idle.get(instance_id) == token:
            self._here.host.end_keeper(instance_id, token)
        else:
            self._idle[instance_id] = token
