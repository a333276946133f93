"""
The use cases of one GPU host: start, stop, adopt, report an end, look.

Every step runs under the instance's `step.lock` and re-reads row and disk, so a late, lost or doubled message does
no harm.
"""

from typing import Any

from recovery.errors import UnknownModelError
from recovery.host.brake import FleetBrake
from recovery.host.context import HostContext
from recovery.host.ends import Ends
from recovery.host.health import Health
from recovery.host.joins import Joins
from recovery.host.leases import Leases
from recovery.host.starts import Starts
from recovery.host.steps import Steps


class HostService:
    """One GPU host, for its worker: one method per thing that a task or a thread of it asks for."""

    def __init__(self, here: HostContext) -> None:
        brake = FleetBrake(here)
        ends = Ends(here, brake)
        starts = Starts(here, brake, ends)
        joins = Joins(here, ends)
        self.name, self.store, self.host, self.fleet, self.repairs = here.name, here.store, here.host, here.fleet, here.repairs
        self.start = starts.start
        self.step = Steps(here, starts, ends).step
        self.ended = ends.ended
        self.looked = Health(here, brake, ends).looked
        self.join = joins.join
        self.reconcile = joins.reconcile
        self.renew = Leases(here).renew
        self.launch_of = here.launch_of
        self.tokens = here.tokens

    def plan_of(self, instance_id: str, cause: str | None) -> dict[str, Any]:
        """The ladder left for a cause (by default the last failure's), as data for people."""
        row = self.store.load(instance_id)
        if row is None:
            raise UnknownModelError(f"cannot plan for {instance_id[:80]!r}: there is no such instance")
        wanted = cause or (row.last_failure.cause if row.last_failure is not None else "engine_died")
        return {"instance": row.id, "cause": wanted, "steps": self.repairs.plan(row, wanted, self.fleet(), self.host.look(row.id))}
