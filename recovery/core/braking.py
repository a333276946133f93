"""
The fleet brake: when many instances fail with one cause, mass repair stops. One repair first, then waves.

The same driver, model revision or storage can take a fleet down at once; repairing everything at once then turns a
blip into an outage. The brake is one small document in Redis; everything else is derived from the rows, so it
needs no bookkeeping of its own. Limits on simultaneous loads hold always.
"""

from collections.abc import Iterable

from pydantic import Field

from recovery.core.fleet import FleetKeys
from recovery.core.instance import Instance, Value
from recovery.core.states import State

BRAKE_KEY = "brake"
BRAKE_TTL_S = 86_400.0
"""A brake that nobody released lets go by itself after a day."""


class Brake(Value):
    """The brake as it stands in Redis."""

    cause: str
    since: float
    instances: tuple[str, ...] = Field((), description="who had failed when it was put on")
    released_at: float | None = None


def should_brake(rows: Iterable[Instance], cause: str, limits: FleetKeys, present: Brake | None, now: float) -> Brake | None:
    """The brake to put on after a failure with `cause`; None when it is on already or there is no reason for it."""
    if not limits.brake_failures:
        return None
    if present is not None and (present.released_at is None or now - present.released_at < limits.brake_window_s):
        return None
    failed = tuple(sorted(row.id for row in rows if _failed_with(row, cause) and now - _failed_at(row) <= limits.brake_window_s))
    return Brake(cause=cause, since=now, instances=failed) if len(failed) >= limits.brake_failures else None


def why_wait(row: Instance, rows: Iterable[Instance], limits: FleetKeys, brake: Brake | None, now: float) -> str | None:
    """Why this start has to wait for others, in a sentence; None when it may happen now."""
    others = [other for other in rows if other.id != row.id]
    loading = [other for other in others if _loading(other, now)]
    here = sum(other.placement.host == row.placement.host for other in loading)
    if here >= limits.max_loads_per_host:
        return f"{here} servers load on {row.placement.host} already (max_loads_per_host {limits.max_loads_per_host})"
    if len(loading) >= limits.max_loads_fleet:
        return f"{len(loading)} servers load in the fleet already (max_loads_fleet {limits.max_loads_fleet})"
    if brake is None or brake.released_at is not None or not _failed_with(row, brake.cause):
        return None
    repaired = sum(_repaired(other, brake) for other in others)
    under_way = sum(_failed_with(other, brake.cause) for other in loading)
    if under_way < max(1, 2 * repaired):
        return None
    wave = "one repair first" if not repaired else f"{repaired} repaired, {2 * repaired} at a time"
    return f"fleet brake: {len(brake.instances)} instances failed with {brake.cause}; {wave}; `recovery brake release` lifts it"


def over(rows: Iterable[Instance], brake: Brake) -> bool:
    """True when nothing that failed with the brake's cause is left to be repaired."""
    waiting = (State.RESTARTING, State.STARTING, State.RECYCLING)
    return not any(_failed_with(row, brake.cause) and row.state in waiting for row in rows)


def _loading(row: Instance, now: float) -> bool:
    return row.state is State.STARTING or (row.state is State.RESTARTING and row.lease_until > now)


def _failed_with(row: Instance, cause: str) -> bool:
    """The last failure of the row, whether its run has ended by itself or is being ended for it."""
    return row.last_failure is not None and row.last_failure.cause == cause


def _failed_at(row: Instance) -> float:
    return row.last_failure.at if row.last_failure is not None else 0.0


def _repaired(row: Instance, brake: Brake) -> bool:
    served = row.state is State.HEALTHY and row.ready_at is not None and row.ready_at > brake.since
    return served and _failed_with(row, brake.cause)
