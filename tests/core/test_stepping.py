"""The steps of a stop, of a drain, of a kill, and whether a start may happen, from what the host shows."""

from typing import Any

import pytest

from recovery.core.decision import NET_S, Action
from recovery.core.host import ExitRecord, HostRecord, HostView
from recovery.core.instance import Desired, Instance, Intent
from recovery.core.states import ENDING, PROBED, State
from recovery.core.stepping import before_start, blocked, found, moved, not_yet, on_ending, on_spawned
from tests.core.making import NOW, TOKEN, row, stray, view

S = State
GONE = view(alive=False, exit_token=TOKEN)


def step(before: Instance, shown: HostView, now: float = NOW, in_flight: int | None = None) -> tuple[Instance, tuple[Action, ...]]:
    decision = on_ending(before, shown, in_flight, now)
    assert decision is not None
    return decision.after, decision.actions


# --- stopping ---------------------------------------------------------------------------------------------------------


def test_the_steps_of_a_stop() -> None:
    """
    SIGTERM, again after 3 s, at the end of the grace SIGKILL, again and again, and a report when nothing helps.
    """
    instance = row(S.STOPPING, intent=Intent.GRACEFUL, rules={"stop_grace_s": 8, "kill_deadline_s": 2})
    now, taken = NOW, []
    for _ in range(12):
        instance, actions = step(instance, view(), now)
        taken.append((now - NOW, *actions))
        if instance.state is not S.STOPPING:
            break
        assert instance.due == instance.not_before + NET_S
        now = instance.not_before
    term, kill = Action.TERMINATE, Action.KILL
    assert taken == [(0, term), (3, term), (6, term), (8, kill), (8.5, kill), (9, kill), (9.5, kill), (10,)]
    assert instance.state is S.FAILED and "cannot end the server" in instance.reason


def test_a_forced_stop_kills_at_once() -> None:
    after, actions = step(row(S.STOPPING, intent=Intent.KILL), view())
    assert actions == (Action.KILL,) and after.kill_at == NOW


def test_no_grace_kills_at_once() -> None:
    assert step(row(S.STOPPING, intent=Intent.GRACEFUL, rules={"stop_grace_s": 0}), view())[1] == (Action.KILL,)


@pytest.mark.parametrize(("state", "expected"), [(S.STOPPING, S.STOPPED), (S.DRAINING, S.STOPPED)])
def test_nothing_left_is_stopped(state: State, expected: State) -> None:
    assert step(row(state), GONE)[0].state is expected


@pytest.mark.parametrize("state", [S.RECYCLING, S.RELEASING])
def test_nothing_left_starts_again_in_its_time(state: State) -> None:
    after, _ = step(row(state, restart_at=NOW + 9), GONE)
    assert (after.state, after.not_before) == (S.RESTARTING, NOW + 9)


@pytest.mark.parametrize("state", [S.STOPPING, S.RECYCLING])
@pytest.mark.parametrize("shown", [view(alive=False, left=(stray(),)), view(server_alive=False), view(keeper_alive=False)])
def test_whatever_is_left_keeps_it_from_being_over(state: State, shown: HostView) -> None:
    """
    A stray, a keeper that still tidies up, a server without a keeper.
    """
    after, actions = step(row(state, intent=Intent.KILL), shown)
    assert (after.state, actions) == (state, (Action.KILL,))


def test_what_will_not_die_is_named() -> None:
    held = view(alive=False, left=(stray(pid=77, state="D"),))
    after, _ = step(row(S.STOPPING, kill_at=NOW - 30), held)
    assert after.state is S.FAILED
    assert after.reason == "cannot end VLLM::EngineCor (pid 77, D): alive 30 s after SIGKILL; look at it by hand"


# --- draining ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "after_state"), [(S.DRAINING, S.STOPPING), (S.RELEASING, S.RECYCLING)])
def test_a_drain_waits_for_requests_and_not_for_ever(state: State, after_state: State) -> None:
    draining = row(state, drain_since=NOW, rules={"drain_timeout_s": 10})
    waiting, actions = step(draining, view(), NOW + 1, in_flight=2)
    assert (waiting.state, actions, waiting.reason) == (state, (), "2 requests in flight")
    for now, in_flight in ((NOW + 1, 0), (NOW + 1, None), (NOW + 10, 2)):
        after, actions = step(draining, view(), now, in_flight)
        assert (after.state, actions, after.term_at) == (after_state, (Action.TERMINATE,), now)


# --- the operator's kill ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", sorted(PROBED))
def test_a_kill_is_repeated_until_the_end_is_seen(state: State) -> None:
    """
    A worker that dies between the commit and the kill must not leave the server alive for ever.
    """
    after, actions = step(row(state, intent=Intent.CRASH), view())
    assert (after.state, actions, after.intent) == (state, (Action.KILL,), Intent.CRASH)
    assert after.due is not None and after.due > NOW


@pytest.mark.parametrize("state", sorted(set(State) - ENDING))
def test_other_states_have_no_step(state: State) -> None:
    assert on_ending(row(state), view(), None, NOW) is None


# --- starting ---------------------------------------------------------------------------------------------------------

NEW = TOKEN + 1
RECORD = HostRecord(token=TOKEN)


@pytest.mark.parametrize(
    ("instance", "shown", "ports", "kind", "ends_strays"),
    [
        ({}, {"run": None, "record": HostRecord()}, {}, "spawn", False),
        ({}, {"alive": False, "record": RECORD}, {}, "spawn", False),
        ({}, {"record": RECORD}, {}, "wait", True),  # an older run lives
        ({}, {"server_alive": False, "record": RECORD}, {}, "wait", True),  # its keeper still tidies up
        ({}, {"keeper_alive": False, "record": RECORD}, {}, "wait", True),
        ({}, {"alive": False, "left": (stray(),), "record": RECORD}, {}, "wait", True),
        ({}, {"alive": False, "record": RECORD}, {"port_free": False}, "wait", False),  # a stranger
        ({}, {"alive": False, "record": RECORD}, {"port_free": False, "port_ours": True}, "wait", True),
        ({}, {"run": NEW}, {}, "adopt", False),
        ({}, {"run": NEW}, {"port_free": False}, "adopt", False),
        ({}, {"run": NEW, "keeper_alive": False}, {}, "adopt", False),
        ({}, {"run": NEW, "alive": False}, {}, "ended", False),
        ({}, {"alive": False, "record": HostRecord(token=NEW)}, {}, "spawn", False),  # written down, never executed
        ({}, {"alive": False, "record": HostRecord(token=NEW + 1)}, {}, "refuse", False),
        ({"desired": Desired.STOPPED}, {"alive": False, "record": RECORD}, {}, "refuse", False),
        ({"state": S.STOPPING}, {"alive": False, "record": RECORD}, {}, "refuse", False),
        ({"state": S.STARTING}, {"alive": False, "record": RECORD}, {}, "refuse", False),
    ],
)  # fmt: skip
def test_whether_a_start_may_happen(
    instance: dict[str, Any], shown: dict[str, Any], ports: dict[str, bool], kind: str, ends_strays: bool
) -> None:
    verdict = before_start(
        row(S.RESTARTING, token=NEW).evolve(**instance), view(**shown), **{"port_free": True, "port_ours": False, **ports}
    )
    assert (verdict.kind, verdict.end_strays) == (kind, ends_strays), verdict.why
    assert kind == "spawn" or verdict.why


def test_a_start_makes_a_new_run() -> None:
    before = row(S.RESTARTING, used=2, has_cuda_oom=True, lease_until=NOW + 9, kill_at=NOW - 1, term_at=NOW - 2)
    decision = on_spawned(before, TOKEN, NOW)
    assert decision is not None
    after = decision.after
    assert (after.state, after.run, after.spawned_at, after.ready_at, after.used) == (S.STARTING, TOKEN, NOW, None, 2)
    assert (after.due, after.lease_until, after.has_cuda_oom, after.kill_at, after.term_at) == (None, 0, False, None, None)
    assert after.look_at is not None and after.look_at > NOW


@pytest.mark.parametrize(
    "before",
    [row(S.RESTARTING, token=NEW), row(S.RESTARTING, desired=Desired.STOPPED), row(S.STOPPING), row(S.STARTING), row(S.FAILED)],
    ids=["newer token", "not wanted", "stopping", "started", "failed"],
)
def test_a_start_that_was_overtaken_is_none(before: Instance) -> None:
    assert on_spawned(before, TOKEN, NOW) is None


def test_a_start_that_has_to_wait_keeps_its_token_and_gives_the_lease_back() -> None:
    after = not_yet(row(S.RESTARTING, lease_until=NOW + 10), "port 8100 is in use", NOW).after
    assert (after.state, after.token, after.lease_until, after.not_before, after.reason) == (
        S.RESTARTING, TOKEN, 0, NOW + 0.5, "port 8100 is in use",
    )  # fmt: skip


def test_what_blocks_a_start_for_too_long_is_reported() -> None:
    held = view(alive=False, left=(stray(pid=9, state="D"),))
    first = blocked(row(S.RESTARTING), held, "1 processes of an older run are still there", NOW)
    assert (first.after.state, first.after.kill_at) == (S.RESTARTING, NOW)
    still = blocked(first.after, held, "the same", NOW + 29)
    assert (still.after.state, still.after.kill_at) == (S.RESTARTING, NOW)
    over = blocked(still.after, held, "the same", NOW + 30)
    assert over.after.state is S.FAILED and "VLLM::EngineCor (pid 9, D)" in over.after.reason


def test_another_port_is_taken_at_once() -> None:
    before = row(S.RESTARTING)
    decision = moved(before, TOKEN, 8111, before.placement, "port 8100 is taken", NOW)
    assert decision is not None
    assert (decision.after.placement.port, decision.after.not_before, decision.after.token) == (8111, NOW, TOKEN)
    assert moved(before, TOKEN - 1, 8111, before.placement, "late", NOW) is None


# --- a server that the row does not know ------------------------------------------------------------------------------


@pytest.mark.parametrize("state", sorted(set(State) - ENDING))
def test_a_live_server_that_is_wanted_is_taken_over(state: State) -> None:
    """
    Redis lost the commit of the start, and has the row as it was before.
    """
    before = row(state, token=NEW, desired=Desired.RUNNING, used=1)
    decision = found(before, NEW, NOW)
    assert decision is not None
    after = decision.after
    assert (after.state, after.run, after.used, after.ready_at, after.due) == (S.STARTING, NEW, 1, None, None)
    assert after.last_ended == (before.run or before.last_ended), "the run it knew has ended, or there would be no other"


@pytest.mark.parametrize(
    ("before", "token"),
    [
        (row(), TOKEN),  # known
        (row(last_ended=TOKEN, run=None, state=S.FAILED), TOKEN),  # its end is known
        (row(), TOKEN + 1),  # no such token was ever issued
        (row(S.STOPPED, token=NEW), NEW),  # not wanted
        *((row(state, token=NEW, desired=Desired.RUNNING), NEW) for state in sorted(ENDING)),  # being ended, by what the disk shows
    ],
)
def test_any_other_server_is_not(before: Instance, token: int) -> None:
    assert found(before, token, NOW) is None


def test_views_tell_ends() -> None:
    """
    How the newest run ended, as the steps above rely on it.
    """
    assert view().ended(NOW) is None
    assert view(alive=False, exit_token=TOKEN).ended(NOW) == ExitRecord(token=TOKEN, code=1, at=NOW)
    assert view(alive=True, exit_token=TOKEN - 1).ended(NOW) is None, "the exit of an older run says nothing about this one"
    unseen = view(alive=False).ended(NOW)
    assert unseen is not None and unseen.unknown and unseen.token == TOKEN


def test_a_keeper_idles_when_its_server_is_gone_and_no_exit_is_written() -> None:
    assert view(server_alive=False).keeper_idles(TOKEN)
    for other in (view(), view(alive=False), view(server_alive=False, exit_token=TOKEN), view(run=None)):
        assert not other.keeper_idles(TOKEN)
    assert not view(server_alive=False).keeper_idles(TOKEN - 1)
