"""What each command does in each state."""

from typing import Any

import pytest

from recovery.core.commanding import Command, Refused, Verb, on_command, refusal
from recovery.core.decision import Decision
from recovery.core.failing import ExitSeen, on_exit
from recovery.core.instance import Desired, Instance, Intent
from recovery.core.states import ENDING, PROBED, State
from recovery.core.stepping import on_ending
from tests.core.making import NOW, TOKEN, row, view

S, V = State, Verb


def done(before: Instance, verb: Verb, **options: Any) -> Decision:
    decision = on_command(before, Command(verb=verb, **options), NOW)
    assert isinstance(decision, Decision), decision
    return decision


# --- every command in every state -------------------------------------------------------------------------------------

# fmt: off
LEADS_TO: dict[tuple[str, State], State | None] = {  # None: refused
    ("start", S.STOPPED): S.RESTARTING, ("start", S.COMPLETED): S.RESTARTING, ("start", S.STARTING): S.STARTING,
    ("start", S.HEALTHY): S.HEALTHY, ("start", S.UNHEALTHY): S.UNHEALTHY, ("start", S.DRAINING): S.RELEASING,
    ("start", S.RELEASING): S.RELEASING, ("start", S.STOPPING): S.RECYCLING, ("start", S.RECYCLING): S.RECYCLING,
    ("start", S.RESTARTING): S.RESTARTING, ("start", S.FAILED): S.RESTARTING,
    ("stop", S.STOPPED): S.STOPPED, ("stop", S.COMPLETED): S.STOPPED, ("stop", S.STARTING): S.STOPPING,
    ("stop", S.HEALTHY): S.DRAINING, ("stop", S.UNHEALTHY): S.DRAINING, ("stop", S.DRAINING): S.DRAINING,
    ("stop", S.RELEASING): S.DRAINING, ("stop", S.STOPPING): S.STOPPING, ("stop", S.RECYCLING): S.STOPPING,
    ("stop", S.RESTARTING): S.STOPPING, ("stop", S.FAILED): S.STOPPING,
    ("kill", S.STOPPED): S.STOPPED, ("kill", S.COMPLETED): S.STOPPED, ("kill", S.STARTING): S.STOPPING,
    ("kill", S.HEALTHY): S.STOPPING, ("kill", S.UNHEALTHY): S.STOPPING, ("kill", S.DRAINING): S.STOPPING,
    ("kill", S.RELEASING): S.STOPPING, ("kill", S.STOPPING): S.STOPPING, ("kill", S.RECYCLING): S.STOPPING,
    ("kill", S.RESTARTING): S.STOPPING, ("kill", S.FAILED): S.STOPPING,
    ("crash", S.STOPPED): None, ("crash", S.COMPLETED): None, ("crash", S.STARTING): S.STARTING, ("crash", S.HEALTHY): S.HEALTHY,
    ("crash", S.UNHEALTHY): S.UNHEALTHY, ("crash", S.DRAINING): None, ("crash", S.RELEASING): None, ("crash", S.STOPPING): None,
    ("crash", S.RECYCLING): None, ("crash", S.RESTARTING): None, ("crash", S.FAILED): None,
    ("restart", S.STOPPED): S.RESTARTING, ("restart", S.COMPLETED): S.RESTARTING, ("restart", S.STARTING): S.RECYCLING,
    ("restart", S.HEALTHY): S.RELEASING, ("restart", S.UNHEALTHY): S.RELEASING, ("restart", S.DRAINING): S.RELEASING,
    ("restart", S.RELEASING): S.RELEASING, ("restart", S.STOPPING): S.RECYCLING, ("restart", S.RECYCLING): S.RECYCLING,
    ("restart", S.RESTARTING): S.RESTARTING, ("restart", S.FAILED): S.RESTARTING,
    ("check", S.STOPPED): None, ("check", S.COMPLETED): None, ("check", S.STARTING): S.STARTING, ("check", S.HEALTHY): S.HEALTHY,
    ("check", S.UNHEALTHY): S.UNHEALTHY, ("check", S.DRAINING): None, ("check", S.RELEASING): None, ("check", S.STOPPING): None,
    ("check", S.RECYCLING): None, ("check", S.RESTARTING): None, ("check", S.FAILED): None,
    ("reset", S.FAILED): S.RESTARTING, **{("reset", state): state for state in State if state is not S.FAILED},
}
# fmt: on
COMMANDS = {
    "start": Command(verb=V.START),
    "stop": Command(verb=V.STOP),
    "kill": Command(verb=V.STOP, force=True),
    "crash": Command(verb=V.STOP, force=True, stay_down=False),
    "restart": Command(verb=V.RESTART),
    "check": Command(verb=V.CHECK),
    "reset": Command(verb=V.RESET),
}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_in_every_state(name: str, state: State) -> None:
    """
    It leads where the rules say or is refused with a sentence, and never leaves the row without a next step.
    """
    before = row(state)
    decision = on_command(before, COMMANDS[name], NOW)
    expected = LEADS_TO[name, state]
    if expected is None:
        assert isinstance(decision, Refused) and before.id in decision.reason and state.value in decision.reason
        return
    assert isinstance(decision, Decision)
    after = decision.after
    assert (after.state, bool(decision.reason)) == (expected, True)
    if after.state in ENDING or after.state is S.RESTARTING:
        assert after.due is not None, "nothing would ever happen to it"
    if after.state in PROBED:
        assert after.look_at is not None
    if name in ("start", "restart"):
        assert after.desired is Desired.RUNNING
    if name in ("stop", "kill"):
        assert after.desired is Desired.STOPPED and after.look_at is None
    assert after.used in (before.used, 0), "a command uses no budget"


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("name", ["stop", "start", "restart"])
def test_a_command_that_changes_what_is_wanted_makes_older_messages_stale(name: str, state: State) -> None:
    before = row(state)
    decision = on_command(before, COMMANDS[name], NOW)
    assert isinstance(decision, Decision)
    moved = decision.after.state is not before.state and decision.after.state not in (S.STOPPED,)
    assert (decision.after.token > before.token) == moved or name == "restart"


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_doubled_command_is_no_second_one(name: str, state: State) -> None:
    """
    Given twice, a stop stays one stop and a start one start.
    """
    once = on_command(row(state), COMMANDS[name], NOW)
    if isinstance(once, Refused) or name == "restart":
        return
    twice = on_command(once.after, COMMANDS[name], NOW)
    if isinstance(twice, Decision):
        assert (twice.after.state, twice.after.token) == (once.after.state, once.after.token)


# --- start ------------------------------------------------------------------------------------------------------------


def test_a_start_ends_a_backoff() -> None:
    waiting = row(S.RESTARTING, due=NOW + 161.5, not_before=NOW + 160)
    after = done(waiting, V.START).after
    assert (after.not_before, after.token) == (NOW, TOKEN)


def test_a_start_during_a_stop_waits_for_its_end() -> None:
    stopping = row(S.STOPPING, intent=Intent.GRACEFUL, term_at=NOW - 2)
    after = done(stopping, V.START).after
    assert (after.state, after.restart_at, after.term_at) == (S.RECYCLING, NOW, NOW - 2)
    gone = on_ending(after, view(alive=False, exit_token=TOKEN), None, NOW + 1)
    assert gone is not None and (gone.after.state, gone.after.not_before, gone.after.used) == (S.RESTARTING, NOW + 1, 0)


# --- stop -------------------------------------------------------------------------------------------------------------


def test_a_stop_is_final() -> None:
    """
    The end that follows is no failure, whatever the exit code; its budget and its history stay.
    """
    stopping = done(row(used=1, attempt=1), V.STOP).after
    ended = on_exit(stopping, ExitSeen(token=TOKEN, at=NOW, code=1, cause="unknown_exit"), NOW, 0.0)
    assert ended is not None
    assert (ended.after.state, ended.after.desired, ended.after.used, ended.after.due) == (S.STOPPED, Desired.STOPPED, 1, None)


def test_a_forced_stop_takes_over_one_under_way() -> None:
    patient = done(row(), V.STOP).after
    forced = done(patient, V.STOP, force=True).after
    assert (forced.state, forced.intent, forced.not_before) == (S.STOPPING, Intent.KILL, NOW)


def test_a_patient_stop_does_not_weaken_a_forced_one() -> None:
    forced = done(row(), V.STOP, force=True).after
    assert done(forced, V.STOP).after.intent is Intent.KILL


def test_a_stop_takes_it_out_of_routing_at_once() -> None:
    assert not done(row(), V.STOP).after.routable
    assert not done(row(), V.STOP, force=True, stay_down=False).after.routable
    assert not done(row(), V.RESTART).after.routable


def test_force_is_a_crash_where_the_specification_says_so() -> None:
    """
    The specification's recovery test 5: stop?force=true, and it comes back by its policy, counted.
    """
    killed = done(row(), V.STOP, force=True, stay_down=False).after
    assert (killed.state, killed.desired, killed.intent) == (S.HEALTHY, Desired.RUNNING, Intent.CRASH)
    ended = on_exit(killed, ExitSeen(token=TOKEN, at=NOW, signal=9, cause="killed"), NOW, 0.0)
    assert ended is not None and (ended.after.state, ended.after.restart_count, ended.after.intent) == (S.RESTARTING, 1, None)


# --- restart ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", State)
def test_a_manual_restart_counts_and_uses_no_budget(state: State) -> None:
    after = done(row(state, used=2, attempt=2, restarts_total=5), V.RESTART).after
    assert (after.used, after.attempt, after.manual, after.restart_count, after.restarts_total) == (2, 2, 1, 3, 6)


@pytest.mark.parametrize("state", [S.STOPPED, S.COMPLETED, S.FAILED, S.RESTARTING])
def test_a_manual_restart_sleeps_no_backoff(state: State) -> None:
    assert done(row(state, attempt=5, used=3), V.RESTART).after.not_before == NOW


def test_a_manual_restart_while_a_hung_server_is_ended_comes_at_once() -> None:
    recycling = row(S.RECYCLING, restart_at=NOW + 160, gives_up=True)
    after = done(recycling, V.RESTART).after
    assert (after.restart_at, after.gives_up) == (NOW, False)


@pytest.mark.parametrize(
    ("rules", "used", "refused"),
    [
        ({"restart_policy": "no"}, 0, True),
        ({"restart_policy": "on-failure", "max_restarts": 3}, 3, True),
        ({"restart_policy": "always", "max_restarts": 3}, 3, True),
        ({"restart_policy": "on-failure", "max_restarts": 3}, 2, False),
        ({"restart_policy": "on-failure", "max_restarts": 0}, 99, False),
    ],
)
def test_refused_in_the_words_of_the_specification(rules: dict[str, Any], used: int, refused: bool) -> None:
    rows = (row(rules=rules, used=used, model="vllm"),)
    text = "Cannot restart model 'vllm': restart policy is 'no' or max restarts (3) reached" if refused else None
    assert refusal(rows, Command(verb=V.RESTART)) == text
    assert refusal(rows, Command(verb=V.RESTART, override=True)) is None
    assert refusal(rows, Command(verb=V.STOP)) is None


# --- reset ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", State)
def test_a_reset_clears_the_budget(state: State) -> None:
    before = row(state, used=3, attempt=4, manual=2, restarts_total=9, sees={"cuda_oom_load": 3})
    after = done(before, V.RESET).after
    assert (after.used, after.attempt, after.manual, after.restarts_total, after.sees, after.forgiven) == (0, 0, 0, 9, {}, NOW)
    assert after.budget_spent is False


def test_a_reset_starts_what_gave_up() -> None:
    after = done(row(S.FAILED, used=3), V.RESET).after
    assert (after.state, after.not_before, after.used) == (S.RESTARTING, NOW, 0) and after.token > TOKEN


def test_a_reset_starts_nothing_that_was_stopped() -> None:
    """
    A stop that could not end its server leaves it failed, and wanted down.
    """
    after = done(row(S.FAILED, desired=Desired.STOPPED), V.RESET).after
    assert (after.state, after.desired, after.due) == (S.FAILED, Desired.STOPPED, None)


# --- check ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", sorted(PROBED))
def test_a_check_makes_the_next_look_due(state: State) -> None:
    before = row(state, look_at=NOW + 29)
    after = done(before, V.CHECK).after
    assert after == before.evolve(look_at=NOW)
