"""How a row comes to be, comes back, catches up and goes: from the fleet file and from what the host's disk remembers."""

from datetime import UTC, datetime
from typing import Any

import pytest

from recovery.core.failing import ExitSeen, on_exit
from recovery.core.fleet import InstancePlan, ModelSpec, Placement
from recovery.core.host import HostRecord, HostView
from recovery.core.instance import Desired, Instance
from recovery.core.joining import caught_up, changed, hindered, new_row, recorded, remembered, retired
from recovery.core.launch import Override
from recovery.core.states import State
from tests.core.making import NOW, TOKEN, row, run_record, stray, view

S = State
PLAN = InstancePlan(id="m-0", model="m", replica=0, placement=Placement(host="h", port=8100))
RECORD = HostRecord(token=TOKEN, used=2, attempt=2, manual=1, restarts_total=7, port=8100)


def spec(**changes: Any) -> ModelSpec:
    return ModelSpec(**{"command": "vllm", "args": ("--port", "{port}"), "restart_policy": "on-failure", **changes})


def made(shown: HostView, *, known: bool = True, rules: dict[str, Any] | None = None) -> Instance:
    """The row that a Redis without one is given."""
    facts = {"digest": "d", "base_url": "http://h:8100/v1", "hosts": ("h",)}
    return new_row(PLAN, spec(**(rules or {})), **facts, view=shown, known=known, now=NOW)


def disk(alive: bool = False, exit_token: int | None = TOKEN, **changes: Any) -> HostView:
    """What the host shows, with this record."""
    return view(alive=alive, exit_token=exit_token, record=RECORD.model_copy(update=changes))


# --- a row that is new ------------------------------------------------------------------------------------------------


def test_a_new_model_is_started() -> None:
    """
    Also with policy `no`: that is about restarts.
    """
    for policy in ("no", "on-failure", "always"):
        fresh = made(view(run=None, record=HostRecord()), known=False, rules={"restart_policy": policy})
        assert (fresh.state, fresh.desired, fresh.not_before, fresh.used, fresh.run) == (S.RESTARTING, Desired.RUNNING, NOW, 0, None)
        assert fresh.token >= int(NOW * 1e6)


def test_a_new_model_without_autostart_is_left_down() -> None:
    fresh = made(view(run=None, record=HostRecord()), known=False, rules={"autostart": False})
    assert (fresh.state, fresh.desired, fresh.due) == (S.STOPPED, Desired.STOPPED, None)


# --- Redis wiped ------------------------------------------------------------------------------------------------------


def test_a_live_server_is_taken_over_and_not_started_again() -> None:
    back = made(view(record=RECORD, exit_token=TOKEN - 9))
    assert (back.state, back.run, back.token, back.due, back.look_at) == (S.STARTING, TOKEN, TOKEN, None, NOW)
    assert (back.used, back.attempt, back.manual, back.restarts_total) == (2, 2, 1, 7)


def test_a_server_that_was_being_stopped_is_stopped() -> None:
    back = made(view(record=RECORD.model_copy(update={"desired": "stopped"})))
    assert (back.state, back.desired, back.run, back.look_at) == (S.STOPPING, Desired.STOPPED, TOKEN, None)
    assert back.due is not None


@pytest.mark.parametrize(
    ("changes", "state", "desired"),
    [
        ({"desired": "stopped", "rest": "stopped"}, S.STOPPED, Desired.STOPPED),
        ({"desired": "stopped"}, S.STOPPED, Desired.STOPPED),
        ({"rest": "failed"}, S.FAILED, Desired.RUNNING),
        ({"rest": "completed"}, S.COMPLETED, Desired.RUNNING),
        ({"last_ended": TOKEN, "used": 3}, S.FAILED, Desired.RUNNING),
    ],
)
def test_what_rested_goes_on_resting(changes: dict[str, Any], state: State, desired: Desired) -> None:
    """
    Nothing is started that a human stopped, or that a spent budget left down.
    """
    back = made(disk(**changes))
    assert (back.state, back.desired, back.due, back.last_ended) == (state, desired, None, TOKEN)
    assert on_exit(back, ExitSeen(token=TOKEN, at=NOW, code=1), NOW, 0.0) is None, "its end is known"


def test_one_that_was_waiting_for_its_start_is_started() -> None:
    back = made(disk(last_ended=TOKEN))
    assert (back.state, back.used, back.not_before) == (S.RESTARTING, 2, NOW)
    assert back.token > TOKEN


@pytest.mark.parametrize(
    ("policy", "used", "expected"), [("on-failure", 2, S.RESTARTING), ("on-failure", 3, S.FAILED), ("no", 0, S.FAILED)]
)
def test_an_end_that_nobody_reported_counts(policy: str, used: int, expected: State) -> None:
    """
    A server that dies while Redis is wiped is no way around policy and budget.
    """
    back = made(disk(used=used, last_ended=TOKEN - 5), rules={"restart_policy": policy})
    assert (back.state, back.run, back.due) == (S.STARTING, TOKEN, None), "taken for alive until its end is told"

    ended = on_exit(back, ExitSeen(token=TOKEN, at=NOW, code=1, cause="unknown_exit"), NOW, 0.0)

    assert ended is not None and ended.after.state is expected
    assert ended.after.used == (used + 1 if expected is S.RESTARTING else used)


def test_a_reboot_that_nobody_reported_uses_nothing() -> None:
    back = made(view(alive=False, run=TOKEN, record=RECORD, boot_id="boot-2"))
    ended = on_exit(back, ExitSeen(token=TOKEN, at=NOW, rebooted=True, unknown=True), NOW, 0.0)
    assert ended is not None and (ended.after.state, ended.after.used) == (S.RESTARTING, 2)


def test_tokens_rise_although_redis_forgot_them() -> None:
    """
    Even when Redis' clock is behind the highest token that the host has seen.
    """
    ahead = int(NOW * 1e6) + 10**9
    back = made(disk(token=ahead, last_ended=ahead, exit_token=None))
    assert back.token > ahead


def test_the_port_and_the_cards_of_the_last_start_are_kept() -> None:
    back = made(view(record=RECORD.model_copy(update={"port": 8105, "gpus": (3,)})))
    assert (back.placement.port, back.placement.gpus, back.planned) == (8105, (3,), PLAN.placement)


# --- a row that is behind ---------------------------------------------------------------------------------------------

OVERRIDE = Override(flag="--max-model-len", value="1024", cause="cuda_oom_load", since=datetime(2026, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [
        ({}, {}, {}),
        ({"token": 5}, {"token": 9}, {"token": 9}),
        ({"token": 9}, {"token": 5}, {}),
        ({"used": 1, "attempt": 1}, {"used": 2, "attempt": 3, "manual": 1}, {"used": 2, "attempt": 3, "manual": 1}),
        ({"used": 2}, {"used": 1}, {}),
        ({"used": 0, "forgiven": NOW}, {"used": 3, "forgiven": 0.0}, {}),  # forgiven since
        ({"used": 3, "forgiven": 0.0}, {"used": 0, "forgiven": NOW}, {"used": 0, "forgiven": NOW}),
        ({"restarts_total": 3}, {"restarts_total": 8}, {"restarts_total": 8}),
        ({}, {"overrides": (OVERRIDE.model_dump(mode="json"),)}, {"overrides": (OVERRIDE,)}),
        ({"forgiven": NOW}, {"overrides": (OVERRIDE.model_dump(mode="json"),)}, {}),  # reset since
    ],
)
def test_the_higher_wins(here: dict[str, Any], there: dict[str, Any], expected: dict[str, Any]) -> None:
    before = row(**{"token": 7, "run": None, "state": S.RESTARTING, **here})
    after = remembered(before, HostRecord(**{"token": 0, **there}))
    assert after == before.evolve(**expected)


def test_a_stop_that_redis_lost_is_still_a_stop() -> None:
    after = caught_up(row(), RECORD.model_copy(update={"token": TOKEN + 3, "desired": "stopped"}), NOW)
    assert (after.desired, after.state) == (Desired.STOPPED, S.DRAINING)
    assert after.due is not None and after.token > TOKEN


def test_a_start_that_redis_lost_is_still_a_start() -> None:
    after = caught_up(row(S.STOPPED), RECORD.model_copy(update={"token": TOKEN + 3}), NOW)
    assert (after.desired, after.state) == (Desired.RUNNING, S.RESTARTING)


@pytest.mark.parametrize("state", State)
def test_an_older_record_says_nothing_about_the_wish(state: State) -> None:
    before = row(state)
    wish = "running" if before.desired is Desired.STOPPED else "stopped"
    after = caught_up(before, HostRecord(token=TOKEN - 1, desired=wish), NOW)
    assert (after.desired, after.state) == (before.desired, before.state)


# --- what is written down ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", State)
def test_the_record_brings_the_row_back(state: State) -> None:
    """
    What is written at any time gives a Redis that forgot everything the same wish, budget and rest.
    """
    before = row(state, used=2, attempt=3, manual=1, restarts_total=8, overrides=(OVERRIDE,))
    record = recorded(before, HostRecord())

    alive = before.run is not None
    back = made(view(alive=alive, record=record, run=TOKEN if alive else None))

    assert (back.desired, back.used, back.attempt, back.manual, back.restarts_total, back.overrides) == (
        before.desired, 2, 3, 1, 8, (OVERRIDE,),
    )  # fmt: skip
    assert back.token >= before.token
    if state in (S.STOPPED, S.COMPLETED, S.FAILED):
        assert back.state is state


def test_a_record_never_falls() -> None:
    record = HostRecord(token=TOKEN + 5, last_ended=TOKEN + 4, desired="stopped")
    after = recorded(row(), record)
    assert (after.token, after.last_ended, after.desired) == (TOKEN + 5, TOKEN + 4, "stopped")


def test_starts_are_written_down_and_forgotten_when_forgiven() -> None:
    one = recorded(row(), HostRecord(), started_at=1.0)
    two = recorded(row(), one, started_at=2.0)
    assert (one.starts, two.starts) == ((1.0,), (1.0, 2.0))
    assert recorded(row(forgiven=NOW), two, started_at=3.0).starts == (3.0,)


# --- a file that changed ----------------------------------------------------------------------------------------------

FACTS: dict[str, Any] = {"digest": "d2", "base_url": "http://h:9000/v1", "hosts": ("h",)}


def test_a_changed_policy_reaches_a_live_server() -> None:
    decision = changed(row(planned=PLAN.placement), PLAN, spec(max_restarts=9), **FACTS)
    assert decision is not None
    assert (decision.after.policy.max_restarts, decision.after.state, decision.after.run) == (9, S.HEALTHY, TOKEN)
    assert changed(decision.after, PLAN, spec(max_restarts=9), **FACTS) is None, "and that is all"


def test_a_live_server_keeps_its_place() -> None:
    moved = PLAN.model_copy(update={"placement": Placement(host="h", port=9000)})
    live = changed(row(planned=PLAN.placement), moved, spec(), **FACTS)
    down = changed(row(S.RESTARTING, planned=PLAN.placement), moved, spec(), **FACTS)
    assert live is not None and (live.after.placement.port, live.after.base_url) == (8100, "http://h:8100/v1")
    assert down is not None and (down.after.placement.port, down.after.base_url) == (9000, "http://h:9000/v1")


@pytest.mark.parametrize("state", State)
def test_a_model_that_left_the_file_is_stopped(state: State) -> None:
    decision = retired(row(state), NOW)
    assert decision is not None and decision.after.desired is Desired.STOPPED
    assert decision.after.state in (S.STOPPED, S.STOPPING, S.DRAINING)


def test_strays_alone_are_no_server() -> None:
    """
    What is left of a run that ended does not make its row alive for long: its end is accounted for, and they go first.
    """
    back = made(view(alive=False, run=TOKEN, left=(stray(),), record=RECORD.model_copy(update={"last_ended": TOKEN})))
    assert back.state is S.RESTARTING
    assert run_record().token == TOKEN


# --- what its host cannot do now --------------------------------------------------------------------------------------


def test_what_hinders_its_host_is_said_once_and_not_over_why_it_rests() -> None:
    full = "no space left"
    said = hindered(row(S.HEALTHY), full)
    assert said is not None and (said.after.reason, said.after.state) == (full, S.HEALTHY)
    assert hindered(said.after, full) is None
    for state in (S.FAILED, S.COMPLETED, S.STOPPED):
        assert hindered(row(state, reason="max restarts (3) reached"), full) is None
