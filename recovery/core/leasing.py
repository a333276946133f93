"""
Models that may move: the lease by which a lost host's servers end, and the move to another host after it.

A host that cannot be heard may be dead, or only cut off with its servers alive. So the worker of a model with
`reschedule: true` puts off a deadline on its own disk each time Redis has taken its heartbeat, and the keeper ends the
server when that has not happened for `lease_s`. Whoever waits longer than that, by the age of the last heartbeat that
Redis has, starts it elsewhere in the certainty that it lives nowhere. Without `reschedule` nothing of this happens.
"""

from collections.abc import Iterable, Mapping

from recovery.core import counting
from recovery.core.decision import Decision, Failure, due_at, event, move, new_token
from recovery.core.failing import GONE
from recovery.core.fleet import Fleet, InstancePlan, Placement, Policy
from recovery.core.fleet_plan import spare_ports, uses
from recovery.core.instance import Desired, Instance
from recovery.core.states import Event, State

MARGIN_S = 15.0
"""On top of lease and kill deadline: a keeper's tick of 1 s, two clocks that run at slightly different speeds, a loaded host."""
MOVABLE = frozenset({State.STARTING, State.HEALTHY, State.UNHEALTHY, State.RELEASING, State.RECYCLING, State.RESTARTING})


def wait_s(policy: Policy) -> float:
    """Seconds after a host's last heartbeat from which nothing of a leased run can be alive there."""
    return policy.lease_s + policy.kill_deadline_s + MARGIN_S


def may_move(row: Instance, silent_s: float) -> bool:
    """Whether the instance may be started on another host, its own having been silent for so long."""
    if not row.policy.reschedule or row.desired is not Desired.RUNNING or row.state not in MOVABLE or row.gives_up:
        return False
    return (row.run is None or row.leased) and silent_s >= wait_s(row.policy)


def silent_s(row: Instance, beats: Mapping[str, Mapping[str, float]], now: float) -> float:
    """Seconds since anybody heard the row's host; of one that Redis has no heartbeat of, since the row last changed its state."""
    beat = beats.get(row.placement.host)
    return float(beat["age_s"]) if beat is not None else now - row.entered_at


def new_home(row: Instance, planned: InstancePlan, fleet: Fleet, rows: Iterable[Instance], alive: Iterable[str]) -> Placement | None:
    """Where it goes: the living host of its list that has the fewest instances, at a port that nobody has there. None: nowhere."""
    spec = fleet.models[row.model]
    living = set(alive) - {row.placement.host}
    others = [other for other in rows if other.id != row.id]
    hosts = sorted(
        (host for host in dict.fromkeys(fleet.hosts_of(spec)) if host in living),
        key=lambda host: sum(other.placement.host == host for other in others),
    )
    for host in hosts:
        taken = {other.placement.port for other in others if other.placement.host == host}
        port = planned.placement.port
        if port is not None and uses(spec, "port"):
            port = next((each for each in spare_ports(fleet, row.model, host) if each not in taken), None)
        if planned.placement.port is None or (port is not None and port not in taken):
            return planned.placement.model_copy(update={"host": host, "port": port, "address": fleet.addresses.get(host)})
    return None


def moved_away(row: Instance, planned: InstancePlan, home: Placement, silent: float, now: float) -> Decision:
    """The decision that takes the instance to another host. It costs no budget: the model has done nothing wrong."""
    lost = row.placement.host
    why = f"host {lost} has not been heard from for {silent:.0f} s; starting on {home.host}"
    changes = {
        **GONE,
        "token": new_token(row, now),
        "last_ended": row.token,
        "placement": home,
        "planned": planned.placement,
        "restarts_total": row.restarts_total + 1,
        "last_restart_at": now,
        "leased": False,
        "reason": why,
        **due_at(now),
    }
    after = move(row, Event.EXITED, now=now, **changes)
    return Decision(
        after=after,
        reason=why,
        step="other_host",
        failure=Failure(cause="host_lost", at=now - silent, token=row.run or row.token),
        counts=counting.restarted(row.model, lost, "host_lost"),
        events=(event("moved", f"{row.id}: {why}", after, host=home.host, lost=lost),),
    )
