"""Leases: deadlines of the runs that may be moved to another host, put off as long as Redis hears from this one."""

import math

from recovery.core.decision import Decision
from recovery.core.instance import Instance
from recovery.errors import SchemaError
from recovery.host.context import HostContext


class Leases:
    """Renews them all after each heartbeat."""

    def __init__(self, here: HostContext) -> None:
        self._here = here

    def renew(self, heard_at: float) -> None:
        """
        Put off the end of this host's leased runs; called after Redis has taken a heartbeat that was sent at `heard_at`.

        In that order no lease reaches further than the age of the heartbeat tells, which is what makes a move safe
        (core/leasing.py). A run whose model may not move any more gets a lease without end, once its row says that it
        has none; a row says that its run has one only when that is on disk.
        """
        for instance_id in list(self._here.alive):
            if self._here.host.leased(instance_id):
                self._renew_one(instance_id, heard_at)

    def _renew_one(self, instance_id: str, heard_at: float) -> None:
        try:
            row = self._here.store.load(instance_id)
        except SchemaError:  # a newer part wrote it, so it is left as it is: its server serves on by what the file says
            place = self._here.places(self._here.fleet()).get(instance_id)
            if place is not None:
                self._here.host.renew(instance_id, heard_at + place.spec.policy.lease_s)
            return
        if row is None:
            return
        if not row.policy.reschedule and not row.leased:
            self._here.host.renew(instance_id, math.inf)
        elif not row.policy.reschedule or self._here.host.renew(instance_id, heard_at + row.policy.lease_s):
            self._here.apply(instance_id, _lease_said)


def _lease_said(row: Instance, _now: float) -> Decision | None:
    """The row says whether its run has a lease that ends: the one thing by which it may be moved."""
    if row.leased == row.policy.reschedule:
        return None
    return Decision(after=row.evolve(leased=row.policy.reschedule), reason="lease")
