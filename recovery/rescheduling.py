"""Takes the instances of lost hosts to others of their lists, a look each second by whoever ticks."""

from collections.abc import Callable

from recovery.committing import Committer, Decide
from recovery.core import leasing
from recovery.core.decision import Decision
from recovery.core.fleet import Fleet, InstancePlan, Placement
from recovery.core.fleet_plan import plan
from recovery.core.instance import Instance
from recovery.ports import Store


class Rescheduler:
    """Holds no state: heartbeats, rows and the fleet file say all there is to know."""

    def __init__(self, store: Store, committer: Committer, fleet: Callable[[], Fleet] | None) -> None:
        self._store, self._committer, self._fleet = store, committer, fleet

    def advance(self) -> tuple[str, ...]:
        """Move what may be moved; the instances that were."""
        fleet = self._fleet() if self._fleet is not None else None
        if fleet is None or not any(spec.reschedule for spec in fleet.models.values()):
            return ()
        beats, now = self._store.known_hosts(), self._store.now()
        alive = [host for host, beat in beats.items() if beat["alive"]]
        rows, planned = self._store.load_all(), {each.id: each for each in plan(fleet)}
        moved = []
        for row in rows:
            silent = leasing.silent_s(row, beats, now)
            if row.id not in planned or not leasing.may_move(row, silent):
                continue
            home = leasing.new_home(row, planned[row.id], fleet, rows, alive)
            if home is None:
                continue
            if self._committer.apply(row.id, self._to(home, planned[row.id], row.placement.host)) is not None:
                moved.append(row.id)
        return tuple(moved)

    def _to(self, home: Placement, planned: InstancePlan, lost: str) -> Decide:
        """The decision to move, made only if the host is still silent when it is committed."""

        def decide(row: Instance, now: float) -> Decision | None:
            silent = leasing.silent_s(row, self._store.known_hosts(), now)
            if row.placement.host != lost or not leasing.may_move(row, silent):
                return None
            return leasing.moved_away(row, planned, home, silent, now)

        return decide
