"""What a look means: startup, readiness, liveness; busy, asleep, hung; validated, forgiven."""

from typing import Any

import pytest

from recovery.core.decision import Action, Decision
from recovery.core.instance import Instance, Intent
from recovery.core.looking import Look, may_be_gone, on_look, wants_completion
from recovery.core.states import PROBED, State
from tests.core.making import NOW, TOKEN, bad, look, memory, row

S = State
FROZEN_ENGINE = look(health="ok", models="ok", completion="timeout", message="a one-token completion got no answer")


def seen(before: Instance, what: Look, now: float = NOW) -> Decision:
    decision = on_look(before, what, now, 0.0)
    assert decision is not None
    return decision


def after_looks(before: Instance, *looks: tuple[float, Look]) -> Decision:
    """The decision about the last of several looks, each `seconds` after NOW."""
    decision = None
    for seconds, what in looks:
        decision = seen(before, what, NOW + seconds)
        before = decision.after
    assert decision is not None
    return decision


def serving(**changes: Any) -> Instance:
    """A healthy row whose last look, this moment, saw progress."""
    return row(**{"probe": memory(steps=10.0, steps_at=NOW, last_ok_at=NOW, cpu_s=50.0, cpu_at=NOW), **changes})


# --- whose look, and when ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", sorted(set(State) - PROBED))
def test_states_that_are_not_probed_take_no_look(state: State) -> None:
    assert on_look(row(state), look(), NOW, 0.0) is None


@pytest.mark.parametrize("run", [TOKEN - 1, TOKEN + 1])
@pytest.mark.parametrize("state", sorted(PROBED))
def test_a_look_at_another_run_is_dropped(state: State, run: int) -> None:
    assert on_look(row(state), bad(run=run), NOW, 0.0) is None
    assert on_look(row(state), look(run=run), NOW, 0.0) is None


def test_the_interval_is_the_models_own() -> None:
    """
    30 s unless the model says otherwise, 2 s after a failure.
    """
    assert seen(serving(), look(steps=11.0)).after.look_at == NOW + 30
    assert seen(serving(rules={"health_check_interval": 7}), look(steps=11.0)).after.look_at == NOW + 7
    assert seen(serving(), bad()).after.look_at == NOW + 2
    assert seen(serving(rules={"health_confirm_interval": 0.5}), bad()).after.look_at == NOW + 0.5


# --- startup ----------------------------------------------------------------------------------------------------------


def test_started_means_answered() -> None:
    decision = seen(row(S.STARTING, spawned_at=NOW - 12), look())
    after = decision.after
    assert (after.state, after.ready_at, after.load_s, after.look_at) == (S.HEALTHY, NOW, 12, NOW + 30)


@pytest.mark.parametrize(
    "what",
    [
        look(health="refused", models="refused"),
        look(health="timeout"),
        look(models="status", status=404),
        look(health="status", status=500),
        look(health="status", status=503),
        look(completion="failed"),
        look(completion="timeout"),
        look(foreign=True),
        look(health="broken"),
    ],
)
def test_loading_is_not_failed(what: Look) -> None:
    """
    Until the start-up deadline nothing that a loading server does counts against it, however often it is seen.
    """
    loading = row(S.STARTING, spawned_at=NOW)
    for second in range(1, 600):
        decision = seen(loading, what, NOW + second)
        loading = decision.after
        assert (loading.state, loading.used, decision.failure) == (S.STARTING, 0, None)
    over = seen(loading, what, NOW + 600)
    assert (over.after.state, over.after.used, over.after.intent) == (S.RECYCLING, 1, Intent.KILL)
    assert over.failure is not None and over.failure.cause == "startup_timeout"


@pytest.mark.parametrize(("waited", "wait"), [(1, 0.5), (59, 0.5), (61, 2.0)])
def test_a_loading_server_is_asked_often(waited: float, wait: float) -> None:
    after = seen(row(S.STARTING, spawned_at=NOW - waited), look(health="refused")).after
    assert after.look_at == NOW + wait


# --- readiness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "ready"),
    [
        (look(), True),
        (look(completion="off"), True),
        (look(completion="skipped"), True),
        (look(completion="overloaded"), True),  # a 503 on a completion is overload, a 503 on /health is death
        (look(completion="failed"), False),
        (look(completion="timeout"), False),
        (look(completion="timeout", asleep=True), True),
        (look(health="status", status=503, asleep=True), False),
        (look(models="timeout"), False),  # both must answer: one is not enough
        (look(health="timeout"), False),
        (look(foreign=True), False),
        (look(alive=False), False),
        (Look(run=TOKEN, http=False), True),  # no base_url: only the process is checked
        (Look(run=TOKEN, http=False, alive=False), False),
    ],
)
def test_what_ready_means(what: Look, ready: bool) -> None:
    assert what.ready is ready


def test_one_failed_look_takes_it_out_of_routing_and_one_good_one_puts_it_back() -> None:
    lost = seen(serving(), bad())
    assert (lost.after.state, lost.after.routable, lost.after.probe.failures) == (S.UNHEALTHY, False, 1)
    again = seen(lost.after, look(steps=11.0), NOW + 2)
    assert (again.after.state, again.after.routable, again.after.probe.failures, again.after.used) == (S.HEALTHY, True, 0, 0)


# --- liveness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "cause"),
    [
        (FROZEN_ENGINE, "engine_hang"),
        (bad(cpu_s=50.0), "server_hang"),
        (look(health="status", status=503), "engine_died"),
        (look(health="refused", models="refused", steps=None), "server_hang"),
        (look(foreign=True), "port_in_use"),
    ],
)
def test_what_no_waiting_cures(what: Look, cause: str) -> None:
    """
    Two looks in a row, far enough from the last progress.
    """
    decision = after_looks(serving(), (10, what), (12, what))
    assert (decision.after.state, decision.after.used, decision.after.intent) == (S.RECYCLING, 1, Intent.KILL)
    assert decision.failure is not None and decision.failure.cause == cause


def test_one_failed_look_kills_nothing() -> None:
    for what in (FROZEN_ENGINE, bad(cpu_s=50.0), look(health="status", status=503), look(health="refused")):
        assert seen(serving(), what, NOW + 3600).after.state is S.UNHEALTHY


def test_the_threshold_is_a_setting() -> None:
    patient = serving(rules={"failure_threshold": 4})
    dead = look(health="status", status=503)
    assert after_looks(patient, (30, dead), (32, dead), (34, dead)).after.state is S.UNHEALTHY
    assert after_looks(patient, (30, dead), (32, dead), (34, dead), (36, dead)).after.state is S.RECYCLING


def test_no_progress_must_last() -> None:
    """
    Looks closer together than `hang_window_s` prove nothing, however many there are.
    """
    looks = [(float(second), FROZEN_ENGINE) for second in range(1, 10)]
    assert after_looks(serving(), *looks).after.state is S.UNHEALTHY
    assert after_looks(serving(), *looks, (10, FROZEN_ENGINE)).after.state is S.RECYCLING


def test_moving_is_busy_and_busy_has_a_limit() -> None:
    """
    /health takes 40 s while the step counter moves: no reason to kill, before `busy_limit_s` has gone by.
    """
    busy = serving(rules={"busy_limit_s": 600})
    for second in range(30, 620, 10):
        decision = seen(busy, look(health="timeout", steps=100.0 + second, completion="skipped"), NOW + second)
        busy = decision.after
        assert (busy.state, busy.used) == (S.UNHEALTHY, 0), second
    over = seen(busy, look(health="timeout", steps=9999.0, completion="skipped"), NOW + 631)
    assert (over.after.state, over.after.used) == (S.RECYCLING, 1)


def test_tokens_seen_by_the_front_door_are_progress() -> None:
    streaming = bad(moved=True, cpu_s=50.0)
    assert after_looks(serving(), (10, streaming), (20, streaming), (30, streaming)).after.state is S.UNHEALTHY


@pytest.mark.parametrize("completion", ["ok", "overloaded"])
def test_a_completion_that_succeeds_is_life(completion: Any) -> None:
    slow_health = look(health="timeout", completion=completion)
    assert after_looks(serving(), (30, slow_health), (60, slow_health)).after.state is S.UNHEALTHY


def test_an_unreadable_counter_is_unknown_and_the_processor_decides() -> None:
    """
    A server too busy to answer /metrics uses its processor; a frozen one does not. Not knowing either kills nothing.
    """
    idle = after_looks(serving(), (30, bad(cpu_s=50.0)), (40, bad(cpu_s=50.1)))
    working = after_looks(serving(), (30, bad(cpu_s=80.0)), (40, bad(cpu_s=90.0)))
    unknown = after_looks(serving(probe=memory(steps=10.0, steps_at=NOW)), (30, bad()), (40, bad()))
    assert [each.after.state for each in (idle, working, unknown)] == [S.RECYCLING, S.UNHEALTHY, S.UNHEALTHY]


def test_asleep_is_not_hung() -> None:
    """
    A sleeping or paused server answers /health and hangs on completions, for hours.
    """
    asleep = look(completion="timeout", asleep=True, steps=10.0)
    decision = after_looks(serving(), *((30.0 * minute, asleep) for minute in range(1, 100)))
    assert (decision.after.state, decision.after.used) == (S.HEALTHY, 0)


def test_policy_no_is_told_and_not_touched() -> None:
    untouched = after_looks(serving(rules={"restart_policy": "no"}), (30, FROZEN_ENGINE), (32, FROZEN_ENGINE))
    assert (untouched.after.state, untouched.failure, untouched.after.used) == (S.UNHEALTHY, None, 0)
    assert "restart policy is 'no': reported, not touched" in untouched.after.reason
    assert untouched.after.look_at == NOW + 62


def test_a_hang_without_budget_gives_up() -> None:
    decision = after_looks(serving(used=3), (30, FROZEN_ENGINE), (32, FROZEN_ENGINE))
    assert (decision.after.state, decision.after.gives_up) == (S.RECYCLING, True)


def test_a_hung_server_is_found_while_idle() -> None:
    """
    The counter stands where it stood at the last look: only a completion can tell.
    """
    assert wants_completion(serving(), 10.0)
    assert not wants_completion(serving(), 11.0)


@pytest.mark.parametrize(
    ("before", "steps", "wanted"),
    [
        (row(S.STARTING), 5.0, True),  # started means that it answered a real request
        (row(S.STARTING), None, True),
        (serving(), None, True),
        (serving(probe=memory()), 5.0, True),
        (serving(base_url=None), 10.0, False),
        (serving(rules={"completion_check": False}), 10.0, False),
    ],
)
def test_when_a_completion_is_asked_for(before: Instance, steps: float | None, wanted: bool) -> None:
    assert wants_completion(before, steps) is wanted


def test_the_failure_dates_from_its_first_sign() -> None:
    decision = after_looks(serving(), (30, FROZEN_ENGINE), (32, FROZEN_ENGINE))
    assert decision.failure is not None and decision.failure.at == NOW + 30


# --- repaired, validated, forgiven ------------------------------------------------------------------------------------


def test_a_repair_is_validated_by_serving_on() -> None:
    served = seen(row(S.STARTING, incident="m-0-1"), look(steps=5.0))
    assert (served.after.validate_until, served.after.look_at) == (NOW + 30, NOW + 30)
    early = seen(served.after, look(steps=6.0), NOW + 10)
    assert early.after.validate_until == NOW + 30
    over = seen(early.after, look(steps=7.0), NOW + 30)
    assert over.after.validate_until is None


def test_a_break_begins_the_validation_anew() -> None:
    served = seen(row(S.STARTING, incident="m-0-1"), look(steps=5.0)).after
    lost = seen(served, bad(), NOW + 29).after
    again = seen(lost, look(steps=6.0), NOW + 31).after
    assert (again.state, again.validate_until) == (S.HEALTHY, NOW + 61)
    assert seen(again, look(steps=7.0), NOW + 40).after.validate_until == NOW + 61
    assert seen(again, look(steps=7.0), NOW + 61).after.validate_until is None


def test_without_an_incident_there_is_nothing_to_validate() -> None:
    assert seen(row(S.STARTING), look()).after.validate_until is None


@pytest.mark.parametrize(
    ("served_s", "load_s", "forgiven"), [(599, 10.0, False), (600, 10.0, True), (600, 400.0, False), (800, 400.0, True), (600, None, True)]
)
def test_serving_long_enough_forgives(served_s: float, load_s: float | None, forgiven: bool) -> None:
    """
    `stable_s` 600, or twice the last load where that is longer.
    """
    before = serving(used=2, attempt=2, manual=1, restarts_total=9, sees={"engine_hang": 2}, entered_at=NOW - served_s, load_s=load_s)
    decision = seen(before, look(steps=11.0))
    after = decision.after
    if forgiven:
        assert (after.used, after.attempt, after.manual, after.sees, after.forgiven) == (0, 0, 0, {}, NOW)
        assert after.restarts_total == 9 and decision.actions == (Action.FORGIVE,)
    else:
        assert (after.used, after.attempt, after.manual) == (2, 2, 1) and not decision.actions


def test_only_serving_counts() -> None:
    """
    A server that was unhealthy a minute ago has not been stable for ten.
    """
    flapping = serving(used=2, attempt=2, ready_at=NOW - 6000, entered_at=NOW - 60)
    assert seen(flapping, look(steps=11.0)).after.used == 2


def test_forgiving_nothing_says_nothing() -> None:
    decision = seen(serving(entered_at=NOW - 10_000), look(steps=11.0))
    assert not decision.events and not decision.actions


def test_a_look_that_lets_one_doubt_that_there_is_a_process() -> None:
    refused, gone = look(health="refused"), look(alive=False)
    assert may_be_gone(row(State.HEALTHY), refused) and not may_be_gone(row(State.STARTING), refused)
    assert may_be_gone(row(State.HEALTHY), gone) and may_be_gone(row(State.STARTING), gone)
    assert not may_be_gone(row(State.HEALTHY), look())
