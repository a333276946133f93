"""The transition table, pair by pair."""

import pytest

from recovery.core.states import ENDING, PROBED, TRANSITIONS, Event, State, advance
from recovery.errors import IllegalTransitionError

S, E = State, Event

# What an operator, a server and a host can do to an instance, written down a second time, by event.
EXPECTED: dict[Event, dict[State, State]] = {
    E.SPAWNED: {S.RESTARTING: S.STARTING},
    E.STARTED: {S.STARTING: S.HEALTHY},
    E.START_TIMED_OUT: {S.STARTING: S.RECYCLING},
    E.READINESS_LOST: {S.HEALTHY: S.UNHEALTHY},
    E.READINESS_REGAINED: {S.UNHEALTHY: S.HEALTHY},
    E.LIVENESS_LOST: dict.fromkeys((S.STARTING, S.HEALTHY, S.UNHEALTHY), S.RECYCLING),
    E.EXITED: {
        **dict.fromkeys((S.STARTING, S.HEALTHY, S.UNHEALTHY, S.RELEASING, S.RECYCLING, S.RESTARTING), S.RESTARTING),
        **dict.fromkeys((S.DRAINING, S.STOPPING), S.STOPPED),
    },
    E.FINISHED: dict.fromkeys((S.STARTING, S.HEALTHY, S.UNHEALTHY, S.RESTARTING), S.COMPLETED),
    E.SPAWN_FAILED: {S.RESTARTING: S.RESTARTING},
    E.GAVE_UP: {S.RESTARTING: S.FAILED, S.RECYCLING: S.FAILED},
    E.UNKILLABLE: dict.fromkeys((S.STOPPING, S.RECYCLING, S.RESTARTING), S.FAILED),
    E.STOP_REQUESTED: {
        **dict.fromkeys((S.STOPPED, S.COMPLETED), S.STOPPED),
        **dict.fromkeys((S.HEALTHY, S.UNHEALTHY, S.RELEASING), S.DRAINING),
        **dict.fromkeys((S.STARTING, S.RECYCLING, S.RESTARTING, S.FAILED), S.STOPPING),
    },
    E.START_REQUESTED: {
        **dict.fromkeys((S.STOPPED, S.COMPLETED, S.FAILED, S.RESTARTING), S.RESTARTING),
        S.DRAINING: S.RELEASING,
        S.STOPPING: S.RECYCLING,
    },
    E.RESTART_REQUESTED: {
        **dict.fromkeys((S.STOPPED, S.COMPLETED, S.FAILED, S.RESTARTING), S.RESTARTING),
        **dict.fromkeys((S.HEALTHY, S.UNHEALTHY, S.DRAINING), S.RELEASING),
        **dict.fromkeys((S.STARTING, S.STOPPING), S.RECYCLING),
    },
    E.RESET: {S.FAILED: S.RESTARTING},
    E.DRAINED: {S.DRAINING: S.STOPPING, S.RELEASING: S.RECYCLING},
    E.ADOPTED: dict.fromkeys(
        (S.STOPPED, S.COMPLETED, S.STARTING, S.HEALTHY, S.UNHEALTHY, S.RESTARTING, S.FAILED), S.STARTING
    ),
}  # fmt: skip


@pytest.mark.parametrize("event", Event)
@pytest.mark.parametrize("state", State)
def test_every_pair(state: State, event: Event) -> None:
    """
    Each pair leads where the rules say, or is refused.
    """
    expected = EXPECTED[event].get(state)
    if expected is None:
        with pytest.raises(IllegalTransitionError, match=rf"cannot apply '{event}' to an instance that is '{state}'"):
            advance(state, event)
    else:
        assert advance(state, event) is expected


def _reachable(start: State) -> set[State]:
    found, queue = {start}, [start]
    while queue:
        for after in TRANSITIONS[queue.pop()].values():
            if after not in found:
                found.add(after)
                queue.append(after)
    return found


@pytest.mark.parametrize("state", State)
def test_every_state_can_come_back_to_healthy_and_can_be_stopped(state: State) -> None:
    assert {S.HEALTHY, S.STOPPED} <= _reachable(state), f"{state} is a trap"


@pytest.mark.parametrize("state", State)
def test_what_nobody_asked_for_leads_from_no_rest(state: State) -> None:
    """
    A server that is stopped, completed or failed stays so until somebody asks, or until it is found alive.
    """
    if state in (S.STOPPED, S.COMPLETED, S.FAILED):
        asked = {E.START_REQUESTED, E.RESTART_REQUESTED, E.STOP_REQUESTED, E.RESET, E.ADOPTED}
        assert TRANSITIONS[state].keys() <= asked


def test_a_stop_never_leads_back() -> None:
    """
    From STOPPING and DRAINING only a command leads anywhere but down.
    """
    commands = {E.START_REQUESTED, E.RESTART_REQUESTED}
    for state in (S.STOPPING, S.DRAINING):
        for event, after in TRANSITIONS[state].items():
            assert event in commands or after in (S.STOPPING, S.STOPPED, S.FAILED), (state, event)


def test_the_groups() -> None:
    assert not PROBED & ENDING
    assert all(E.EXITED in TRANSITIONS[state] for state in PROBED | ENDING), "any process may end at any time"
