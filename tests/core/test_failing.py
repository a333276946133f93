"""What follows from an end: budget, backoff, policy, and that each end counts once."""

from typing import Any

import pytest

from recovery.core.decision import NET_S, Decision
from recovery.core.failing import ExitSeen, Remedy, liveness_lost, on_exit, on_spawn_failed, recycled, stopped, unkillable
from recovery.core.fleet import Placement
from recovery.core.instance import Desired, Instance, Intent
from recovery.core.looking import on_look
from recovery.core.states import PROBED, State
from recovery.core.stepping import on_spawned
from tests.core.making import NOW, TOKEN, look, row

S = State


def ended(token: int = TOKEN, **changes: Any) -> ExitSeen:
    """A crash of this run, this moment."""
    return ExitSeen(**{"token": token, "at": NOW, "code": 1, "cause": "unknown_exit", **changes})


def exit_of(before: Instance, seen: ExitSeen | None = None, now: float = NOW, u: float = 0.0) -> Decision:
    """The decision about an end, which must be one."""
    decision = on_exit(before, seen or ended(before.run or TOKEN), now, u)
    assert decision is not None
    return decision


def started_again(down: Instance, now: float) -> Instance:
    """The row once the start that is due has happened and the server serves."""
    spawned = on_spawned(down, down.token, now)
    assert spawned is not None
    serving = on_look(spawned.after, look(run=down.token), now, 0.0)
    assert serving is not None and serving.after.state is S.HEALTHY
    return serving.after


# --- each end counts once ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", sorted(PROBED))
def test_a_crash_takes_one_restart(state: State) -> None:
    after = exit_of(row(state)).after

    assert (after.state, after.used, after.attempt, after.restarts_total) == (S.RESTARTING, 1, 1, 1)
    assert after.token > TOKEN and after.last_ended == TOKEN
    assert (after.run, after.look_at, after.intent) == (None, None, None)
    assert (after.not_before, after.due) == (NOW + 5, NOW + 5 + NET_S)


@pytest.mark.parametrize("state", State)
def test_the_same_end_told_twice_changes_nothing(state: State) -> None:
    before = row(state)
    once = on_exit(before, ended(), NOW, 0.0)
    assert once is not None
    assert on_exit(once.after, ended(), NOW + 1, 0.0) is None
    assert on_exit(once.after, ended(code=0, clean=True), NOW + 1, 0.0) is None


@pytest.mark.parametrize("token", [0, TOKEN - 10, TOKEN + 1, TOKEN + 10**9])
def test_an_end_of_no_run_of_this_row_changes_nothing(token: int) -> None:
    """
    Older than the last end that is known, or newer than any token ever issued.
    """
    assert on_exit(row(last_ended=TOKEN - 10), ended(token), NOW, 0.0) is None


def test_a_run_that_was_superseded_is_no_failure() -> None:
    """
    Its server was ended because a newer start was decided while it came up: that start keeps its time and its budget.
    """
    waiting = row(S.RESTARTING, token=TOKEN + 7, last_ended=0)

    after = exit_of(waiting, ended(TOKEN)).after

    assert (after.state, after.used, after.token, after.due, after.last_ended) == (S.RESTARTING, 0, TOKEN + 7, waiting.due, TOKEN)


def test_a_run_that_ends_before_the_row_knew_of_it_is_a_failure() -> None:
    """
    It died between its exec and the commit that says so.
    """
    after = exit_of(row(S.RESTARTING, used=1, attempt=1, last_ended=0), ended(TOKEN)).after
    assert (after.state, after.used, after.attempt) == (S.RESTARTING, 2, 2)
    assert after.token > TOKEN


@pytest.mark.parametrize("state", [S.STOPPED, S.FAILED, S.COMPLETED])
def test_a_run_that_ends_late_moves_nothing(state: State) -> None:
    after = exit_of(row(state, last_ended=0), ended()).after
    assert (after.state, after.used, after.last_ended) == (state, 0, TOKEN)


@pytest.mark.parametrize(("state", "expected"), [(S.DRAINING, S.STOPPED), (S.STOPPING, S.STOPPED)])
@pytest.mark.parametrize("code", [0, 1, None])
def test_an_end_while_stopping_is_a_stop(state: State, expected: State, code: int | None) -> None:
    decision = exit_of(row(state), ended(code=code))
    assert (decision.after.state, decision.after.used, decision.failure, decision.after.due) == (expected, 0, None, None)


@pytest.mark.parametrize("state", [S.RELEASING, S.RECYCLING])
def test_an_end_while_recycling_keeps_the_start_that_was_decided(state: State) -> None:
    """
    The budget was taken when it was given up, and the start comes at the time that was set then.
    """
    before = row(state, used=1, attempt=1, restart_at=NOW + 7, token=TOKEN + 3)

    decision = exit_of(before, ended())

    after = decision.after
    assert (after.state, after.used, after.attempt, after.token, decision.failure) == (S.RESTARTING, 1, 1, TOKEN + 3, None)
    assert (after.not_before, after.restart_at) == (NOW + 7, None)


# --- backoff and budget -----------------------------------------------------------------------------------------------


def test_the_delays_are_those_of_the_specification() -> None:
    """
    5, 10, 20, 40, 80, 160 s from the moment of each failure, and 160 s from then on.
    """
    instance, now, delays = row(rules={"max_restarts": 0}), NOW, []
    for _ in range(8):
        now += 100.0
        instance = exit_of(instance, ended(instance.run or 0, at=now), now).after
        delays.append(instance.not_before - now)
        now = instance.not_before
        instance = started_again(instance, now)
    assert delays == [5, 10, 20, 40, 80, 160, 160, 160]
    assert (instance.used, instance.restarts_total) == (8, 8)


def test_the_delay_counts_from_the_failure_not_from_its_discovery() -> None:
    seen_late = exit_of(row(), ended(at=NOW - 3)).after
    seen_too_late = exit_of(row(), ended(at=NOW - 60)).after
    assert (seen_late.not_before, seen_too_late.not_before) == (NOW + 2, NOW)


def test_jitter_adds_up_to_its_fraction() -> None:
    jittery = row(rules={"restart_jitter": 0.1})
    assert exit_of(jittery, u=0.0).after.not_before == NOW + 5
    assert exit_of(jittery, u=0.999).after.not_before == pytest.approx(NOW + 5.4995)


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_the_budget_is_exact(limit: int) -> None:
    """
    `max_restarts` restarts, and the next failure is the last word.
    """
    instance, restarts = row(rules={"max_restarts": limit}), 0
    while (decision := exit_of(instance, ended(instance.run or 0))).after.state is S.RESTARTING:
        restarts += 1
        instance = started_again(decision.after, NOW)
    failed = decision.after
    assert restarts == limit
    assert (failed.state, failed.due, failed.used, failed.restarts_total) == (S.FAILED, None, limit, limit)
    assert failed.reason == f"exit code 1; max restarts ({limit}) reached"
    assert failed.desired is Desired.RUNNING, "the operator still wants it: a reset brings it back"


def test_zero_is_no_limit() -> None:
    instance = row(rules={"max_restarts": 0})
    for restart in range(1, 51):
        instance = exit_of(instance, ended(instance.run or 0)).after
        assert (instance.state, instance.used) == (S.RESTARTING, restart)
        instance = started_again(instance, NOW)


def test_a_server_that_dies_before_it_serves_is_counted_too() -> None:
    instance = row(S.STARTING)
    for _ in range(3):
        instance = exit_of(instance, ended(instance.run or 0)).after
        spawned = on_spawned(instance, instance.token, NOW)
        assert spawned is not None
        instance = spawned.after
    assert exit_of(instance, ended(instance.run or 0)).after.state is S.FAILED


# --- policies and exit codes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "seen", "expected"),
    [
        ("no", {"code": 1}, S.FAILED),
        ("no", {"signal": 9, "code": None}, S.FAILED),
        ("no", {"code": 0, "clean": True}, S.COMPLETED),
        ("on-failure", {"code": 1}, S.RESTARTING),
        ("on-failure", {"code": 0}, S.RESTARTING),  # vLLM exits 0 when its engine dies
        ("on-failure", {"code": None, "unknown": True}, S.RESTARTING),
        ("on-failure", {"code": 0, "clean": True}, S.COMPLETED),
        ("always", {"code": 0, "clean": True}, S.RESTARTING),
        ("always", {"code": 1}, S.RESTARTING),
    ],
)
def test_policies(policy: str, seen: dict[str, Any], expected: State) -> None:
    decision = exit_of(row(rules={"restart_policy": policy}), ended(**seen))
    after = decision.after
    assert after.state is expected
    assert (after.due is not None) == (expected is S.RESTARTING)
    assert (decision.failure is not None) == (not seen.get("clean", False)), "an orderly end opens no incident"


def test_policy_no_says_so() -> None:
    assert exit_of(row(rules={"restart_policy": "no"})).after.reason == "exit code 1; restart policy is 'no'"


def test_always_counts_against_the_budget() -> None:
    """
    A server that ends in good order again and again is a loop like any other.
    """
    again = exit_of(row(rules={"restart_policy": "always", "max_restarts": 1}), ended(code=0, clean=True)).after
    last = exit_of(started_again(again, NOW), ended(again.token, code=0, clean=True)).after
    assert (again.used, last.state) == (1, S.FAILED)


@pytest.mark.parametrize(
    ("seen", "text"),
    [({"code": 3}, "exit code 3"), ({"signal": 9, "code": None}, "killed by signal 9"), ({"code": None}, "ended, exit code unknown")],
)
def test_how_it_ended_in_words(seen: dict[str, Any], text: str) -> None:
    assert ended(**seen).text == text


# --- remedies ---------------------------------------------------------------------------------------------------------


def test_a_cause_that_no_restart_helps_ends_at_once() -> None:
    remedy = Remedy(give_up=True, reason="not started again: unrecognized arguments")
    after = exit_of(row(), ended(cause="bad_argument", remedy=remedy)).after
    assert (after.state, after.used) == (S.FAILED, 0)
    assert after.reason == "exit code 1; not started again: unrecognized arguments"


def test_a_remedy_moves_the_row() -> None:
    place = Placement(host="h", port=8100, gpus=(1,))
    after = exit_of(row(), ended(cause="gpu_lost", remedy=Remedy(kind="other_gpu", placement=place))).after
    assert after.placement == place and after.sees == {"gpu_lost": 1}
    assert exit_of(row(placement=place), ended(cause="gpu_lost")).after.sees == {"gpu_lost": 1, "gpu_lost@1": 1}


def test_oom_is_told() -> None:
    assert exit_of(row(), ended(cuda_oom=True)).after.has_cuda_oom
    assert not exit_of(row(), ended()).after.has_cuda_oom


# --- a reboot ---------------------------------------------------------------------------------------------------------


def test_a_reboot_uses_no_budget() -> None:
    decision = exit_of(row(used=1, attempt=1), ended(rebooted=True, code=None))
    after = decision.after
    assert (after.state, after.used, after.attempt, after.restarts_total, after.not_before) == (S.RESTARTING, 1, 1, 1, NOW)
    assert after.token > TOKEN and decision.failure is None and after.run is None


def test_policy_no_stays_down_after_a_reboot() -> None:
    after = exit_of(row(rules={"restart_policy": "no"}), ended(rebooted=True, code=None)).after
    assert (after.state, after.desired, after.due, after.look_at) == (S.COMPLETED, Desired.STOPPED, None, None)


# --- starts that fail -------------------------------------------------------------------------------------------------


def test_a_start_that_fails_is_a_failure_like_any_other() -> None:
    decision = on_spawn_failed(row(S.RESTARTING), TOKEN, "cannot execute vllm", retry=True, now=NOW, u=0.0)
    assert decision is not None
    after = decision.after
    assert (after.state, after.used, after.not_before, after.last_ended) == (S.RESTARTING, 1, NOW + 5, TOKEN)
    assert after.token > TOKEN and "cannot execute vllm" in after.reason


@pytest.mark.parametrize(
    ("before", "token"),
    [(row(S.RESTARTING), TOKEN - 1), (row(S.STOPPING), TOKEN), (row(S.RESTARTING, desired=Desired.STOPPED), TOKEN), (row(), TOKEN)],
)
def test_a_failed_start_of_the_past_changes_nothing(before: Instance, token: int) -> None:
    assert on_spawn_failed(before, token, "text", retry=True, now=NOW, u=0.0) is None


def test_a_start_that_can_never_succeed_ends_it() -> None:
    decision = on_spawn_failed(row(S.RESTARTING), TOKEN, "no such file", retry=False, now=NOW, u=0.0)
    assert decision is not None and (decision.after.state, decision.after.used) == (S.FAILED, 0)


# --- given up while alive ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", sorted(PROBED))
def test_liveness_lost_takes_the_budget_once(state: State) -> None:
    decision = liveness_lost(row(state), cause="engine_hang", text="no progress", evidence="", remedy=Remedy(), now=NOW, u=0.0)
    after = decision.after
    assert (after.state, after.used, after.intent, after.restart_at, after.look_at) == (S.RECYCLING, 1, Intent.KILL, NOW + 5, None)
    assert after.due is not None and after.not_before == NOW and after.run == TOKEN, "the kill is due at once"

    gone = exit_of(after, ended(TOKEN, signal=9, code=None), NOW + 1).after
    assert (gone.state, gone.used, gone.not_before) == (S.RESTARTING, 1, NOW + 5)


def test_liveness_lost_without_budget_kills_and_gives_up() -> None:
    spent = row(used=3)
    decision = liveness_lost(spent, cause="engine_hang", text="no progress", evidence="", remedy=Remedy(), now=NOW, u=0.0)
    assert (decision.after.state, decision.after.gives_up) == (S.RECYCLING, True)

    gone = exit_of(decision.after, ended(TOKEN), NOW + 1).after
    assert (gone.state, gone.due, gone.gives_up) == (S.FAILED, None, False)
    assert gone.reason == "no progress; max restarts (3) reached"


def test_a_recycled_row_never_starts_in_the_past() -> None:
    assert recycled(row(S.RECYCLING, restart_at=NOW - 50), NOW).after.not_before == NOW


def test_stopped_forgets_the_run() -> None:
    after = stopped(row(S.STOPPING, term_at=NOW, kill_at=NOW, intent=Intent.KILL, lease_until=NOW), NOW).after
    assert (after.state, after.term_at, after.kill_at, after.intent, after.due, after.lease_until) == (S.STOPPED, None, None, None, None, 0)


@pytest.mark.parametrize("state", [S.STOPPING, S.RECYCLING, S.RESTARTING])
def test_unkillable_starts_nothing_beside_it(state: State) -> None:
    decision = unkillable(row(state), "cannot end pid 12", NOW)
    after = decision.after
    assert (after.state, after.due, after.reason) == (S.FAILED, None, "cannot end pid 12")
    assert decision.failure is not None and decision.failure.cause == "unkillable"


def test_every_end_is_told() -> None:
    """
    Each decision about an end leaves a line in the model's history.
    """
    for state in State:
        decision = on_exit(row(state, last_ended=0), ended(), NOW, 0.0)
        assert decision is not None
        if state not in (S.RECYCLING, S.RELEASING):  # told when it was given up
            assert decision.events, state
