"""
The transition table: the only place that moves a state.

`STOPPING` (wanted down) and `RECYCLING` (to be started again) differ only in where `EXITED` leads,
as do `DRAINING` and `RELEASING` before them. A lost host is not a state but a reading on top.
"""

from collections.abc import Mapping
from enum import StrEnum

from recovery.errors import IllegalTransitionError


class State(StrEnum):
    """What an instance is observed to be."""

    STOPPED = "stopped"  # down because the operator wants it down, or never started
    COMPLETED = "completed"  # ended by itself in good order, and the policy leaves it there
    STARTING = "starting"  # a process lives, it has not answered yet
    HEALTHY = "healthy"  # answers; may take traffic
    UNHEALTHY = "unhealthy"  # lives, but failed its last look
    DRAINING = "draining"  # out of routing, finishing its work, then down
    RELEASING = "releasing"  # out of routing, finishing its work, then again
    STOPPING = "stopping"  # being ended, to stay down
    RECYCLING = "recycling"  # being ended, to start again
    RESTARTING = "restarting"  # no process; the next start is due
    FAILED = "failed"  # gave up; a human or a reset brings it back


class Event(StrEnum):
    """What can happen to an instance."""

    SPAWNED = "spawned"
    STARTED = "started"
    START_TIMED_OUT = "start_timed_out"
    READINESS_LOST = "readiness_lost"
    READINESS_REGAINED = "readiness_regained"
    LIVENESS_LOST = "liveness_lost"
    EXITED = "exited"
    FINISHED = "finished"
    SPAWN_FAILED = "spawn_failed"
    GAVE_UP = "gave_up"
    UNKILLABLE = "unkillable"
    STOP_REQUESTED = "stop_requested"
    START_REQUESTED = "start_requested"
    RESTART_REQUESTED = "restart_requested"
    RESET = "reset"
    DRAINED = "drained"
    ADOPTED = "adopted"


S, E = State, Event

# fmt: off
TRANSITIONS: Mapping[State, Mapping[Event, State]] = {
    S.STOPPED:    {E.START_REQUESTED: S.RESTARTING, E.RESTART_REQUESTED: S.RESTARTING, E.STOP_REQUESTED: S.STOPPED, E.ADOPTED: S.STARTING},
    S.COMPLETED:  {E.START_REQUESTED: S.RESTARTING, E.RESTART_REQUESTED: S.RESTARTING, E.STOP_REQUESTED: S.STOPPED, E.ADOPTED: S.STARTING},
    S.STARTING:   {E.STARTED: S.HEALTHY, E.START_TIMED_OUT: S.RECYCLING, E.LIVENESS_LOST: S.RECYCLING, E.EXITED: S.RESTARTING,
                   E.FINISHED: S.COMPLETED, E.STOP_REQUESTED: S.STOPPING, E.RESTART_REQUESTED: S.RECYCLING, E.ADOPTED: S.STARTING},
    S.HEALTHY:    {E.READINESS_LOST: S.UNHEALTHY, E.LIVENESS_LOST: S.RECYCLING, E.EXITED: S.RESTARTING, E.FINISHED: S.COMPLETED,
                   E.STOP_REQUESTED: S.DRAINING, E.RESTART_REQUESTED: S.RELEASING, E.ADOPTED: S.STARTING},
    S.UNHEALTHY:  {E.READINESS_REGAINED: S.HEALTHY, E.LIVENESS_LOST: S.RECYCLING, E.EXITED: S.RESTARTING, E.FINISHED: S.COMPLETED,
                   E.STOP_REQUESTED: S.DRAINING, E.RESTART_REQUESTED: S.RELEASING, E.ADOPTED: S.STARTING},
    S.DRAINING:   {E.DRAINED: S.STOPPING, E.EXITED: S.STOPPED, E.START_REQUESTED: S.RELEASING, E.RESTART_REQUESTED: S.RELEASING},
    S.RELEASING:  {E.DRAINED: S.RECYCLING, E.EXITED: S.RESTARTING, E.STOP_REQUESTED: S.DRAINING},
    S.STOPPING:   {E.EXITED: S.STOPPED, E.UNKILLABLE: S.FAILED, E.START_REQUESTED: S.RECYCLING, E.RESTART_REQUESTED: S.RECYCLING},
    S.RECYCLING:  {E.EXITED: S.RESTARTING, E.UNKILLABLE: S.FAILED, E.STOP_REQUESTED: S.STOPPING, E.GAVE_UP: S.FAILED},
    S.RESTARTING: {E.SPAWNED: S.STARTING, E.ADOPTED: S.STARTING, E.SPAWN_FAILED: S.RESTARTING, E.EXITED: S.RESTARTING,
                   E.FINISHED: S.COMPLETED, E.GAVE_UP: S.FAILED, E.UNKILLABLE: S.FAILED,
                   E.STOP_REQUESTED: S.STOPPING, E.RESTART_REQUESTED: S.RESTARTING, E.START_REQUESTED: S.RESTARTING},
    S.FAILED:     {E.RESET: S.RESTARTING, E.START_REQUESTED: S.RESTARTING, E.RESTART_REQUESTED: S.RESTARTING, E.STOP_REQUESTED: S.STOPPING,
                   E.ADOPTED: S.STARTING},
}
# fmt: on


def advance(state: State, event: Event) -> State:
    """Return the state that follows; raise `IllegalTransitionError` if the table has no such row."""
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise IllegalTransitionError(f"cannot apply {event.value!r} to an instance that is {state.value!r}") from None


ENDING = frozenset({S.DRAINING, S.RELEASING, S.STOPPING, S.RECYCLING})
"""States whose next step is taken by looking at the host until nothing of the run is left."""

AT_REST = frozenset({S.STOPPED, S.COMPLETED, S.FAILED})
"""States that only an operator or a changed fleet file ends."""

PROBED = frozenset({S.STARTING, S.HEALTHY, S.UNHEALTHY})
"""States in which the server is asked how it is."""
