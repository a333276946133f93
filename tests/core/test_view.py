"""The specification's JSON, as a pure sum over a model's rows."""

from datetime import UTC, datetime
from typing import Any

import pytest

from recovery.core.fleet import Placement, Policy
from recovery.core.instance import Desired, Instance, Intent, LastExit, ProbeMemory
from recovery.core.launch import Override
from recovery.core.states import State
from recovery.core.view import STATE_ORDER, STATUS_FIELDS, by_model, check_view, fleet_view, model_view

NOW = 1_705_423_900.0
HOSTS = {"gpu-1", "gpu-2"}


def row(replica: int = 0, model: str = "vllm", host: str = "gpu-1", policy: Policy | None = None, **changes: Any) -> Instance:
    """A healthy instance that has served for 125.3 s."""
    healthy = {
        "state": State.HEALTHY,
        "desired": Desired.RUNNING,
        "reason": "serving",
        "token": 7,
        "run": 7,
        "spawned_at": NOW - 125.3,
        "ready_at": NOW - 100.0,
        "probe": ProbeMemory(last_at=NOW - 9.88),
    }
    return Instance(
        id=f"{model}-{replica}",
        model=model,
        replica=replica,
        policy=policy or Policy(restart_policy="on-failure"),
        placement=Placement(host=host, port=8001 + replica, replica=replica),
        **{**healthy, **changes},
    )


def down(replica: int = 0, **changes: Any) -> Instance:
    """An instance without a process, waiting for its restart."""
    waiting = {"state": State.RESTARTING, "run": None, "reason": "killed by signal 9; starting again", "not_before": NOW + 5, "used": 1}
    return row(replica, **{**waiting, **changes})


def test_the_specifications_example_comes_out_field_by_field():
    shown = model_view([row()], NOW, HOSTS).model_dump(mode="json")

    assert {name: shown[name] for name in STATUS_FIELDS} == {
        "id": "vllm",
        "is_running": True,
        "is_healthy": True,
        "health_message": None,
        "restart_policy": "on-failure",
        "restart_count": 0,
        "max_restarts": 3,
        "consecutive_health_failures": 0,
        "uptime_seconds": 125.3,
        "last_restart_time": None,
        "last_health_check_time": pytest.approx(NOW - 9.88),
        "has_cuda_oom": False,
    }
    assert tuple(shown)[: len(STATUS_FIELDS)] == STATUS_FIELDS, "the specification's fields stand first, in its order"


def test_the_list_holds_every_model_once_sorted():
    fleet = fleet_view([row(model="b"), row(1, model="a"), row(0, model="a")], NOW, HOSTS)

    assert [model.id for model in fleet.models] == ["a", "b"]
    assert fleet.total == 2
    assert [each.replica for each in fleet.models[0].instances] == [0, 1]


def test_replicas_are_summed():
    """1b: running = any, healthy = at least one ready, counts = sums, uptime = the shortest, the message counts."""
    one = row(0, manual=1, restarts_total=4, last_restart_at=NOW - 200, spawned_at=NOW - 50)
    two = row(1, used=1, restarts_total=2, last_restart_at=NOW - 100, spawned_at=NOW - 20)
    three = down(2, used=2, restarts_total=9, probe=ProbeMemory(failures=2), has_cuda_oom=True)

    shown = model_view([one, two, three], NOW, HOSTS)

    assert shown.is_running and shown.is_healthy
    assert shown.health_message == "2/3 ready"
    assert (shown.ready, shown.replicas) == (2, 3)
    assert shown.restart_count == 4
    assert shown.restarts_total == 15
    assert shown.max_restarts == 3
    assert shown.budget_left == 1
    assert shown.consecutive_health_failures == 2
    assert shown.uptime_seconds == 20
    assert shown.last_restart_time == NOW - 100
    assert shown.has_cuda_oom
    assert shown.next_restart_at == NOW + 5
    assert shown.state is State.HEALTHY
    assert shown.reason == three.reason, "the reason is that of the replica in trouble"


def test_all_ready_has_no_message_and_none_ready_counts_them_all():
    assert model_view([row(0), row(1)], NOW, HOSTS).health_message is None
    assert model_view([down(0), down(1)], NOW, HOSTS).health_message == "0/2 ready"


def test_one_instance_says_why_it_is_not_ready():
    assert model_view([down()], NOW, HOSTS).health_message == "killed by signal 9; starting again"
    failing = row(state=State.UNHEALTHY, probe=ProbeMemory(failures=1, message="/health: timed out after 10 s"))
    assert model_view([failing], NOW, HOSTS).health_message == "/health: timed out after 10 s"
    bare = row(state=State.STOPPING, reason="")
    assert model_view([bare], NOW, HOSTS).health_message == "stopping"


def test_nothing_runs_means_no_uptime_and_not_running():
    shown = model_view([down()], NOW, HOSTS)

    assert (shown.is_running, shown.is_healthy, shown.uptime_seconds) == (False, False, None)


@pytest.mark.parametrize("state", [state for state in State if state is not State.HEALTHY])
def test_only_healthy_is_healthy(state: State):
    assert not model_view([row(state=state)], NOW, HOSTS).is_healthy


def test_an_instance_about_to_be_killed_by_the_operator_is_not_ready_any_more():
    assert not model_view([row(intent=Intent.CRASH)], NOW, HOSTS).is_healthy


def test_a_host_that_is_away_is_a_reading_on_top_of_the_state():
    shown = model_view([row(host="gpu-9")], NOW, HOSTS)

    assert shown.state is State.HEALTHY
    assert not shown.is_healthy, "nobody can vouch for it"
    assert shown.hosts_away == ("gpu-9",)
    assert shown.health_message == "host 'gpu-9' has not been heard from; last seen healthy: serving"
    assert model_view([row(0), row(1, host="gpu-9")], NOW, HOSTS).health_message == "1/2 ready"


def test_a_restart_is_announced_only_while_one_is_due():
    assert model_view([down(desired=Desired.STOPPED)], NOW, HOSTS).next_restart_at is None
    assert model_view([row(not_before=NOW + 5)], NOW, HOSTS).next_restart_at is None


def test_no_limit_is_null_and_never_less_than_nothing_is_left():
    unlimited = Policy(restart_policy="always", max_restarts=0)
    assert model_view([row(policy=unlimited)], NOW, HOSTS).budget_left is None
    assert model_view([row(used=9)], NOW, HOSTS).budget_left == 0


def test_the_newest_exit_is_shown_with_its_evidence():
    early = LastExit(token=3, at=NOW - 60, code=0)
    late = LastExit(token=5, at=NOW - 6, signal=9, cause="host_oom", evidence="Out of memory: Killed process 7", advice="add memory")

    shown = model_view([down(0, last_exit=late), row(1, last_exit=early)], NOW, HOSTS).last_exit

    assert shown is not None
    assert shown.model_dump() == {
        "run": 5,
        "at": NOW - 6,
        "code": None,
        "signal": 9,
        "cause": "host_oom",
        "evidence": "Out of memory: Killed process 7",
        "advice": "add memory",
        "clean": False,
    }


def test_changed_flags_are_shown_and_whole_command_lines_are_not():
    since = datetime(2026, 1, 2, tzinfo=UTC)
    changed = (
        Override(flag="--max-model-len", value="2048", cause="cuda_oom_load", since=since),
        Override(flag="args", value=("serve", "m", "--api-key", "hidden"), cause="cuda_oom_load", since=since),
    )

    shown = model_view([row(overrides=changed, degraded_since=NOW - 5)], NOW, HOSTS)

    assert [(each.flag, each.value) for each in shown.instances[0].overrides] == [
        ("--max-model-len", "2048"),
        ("args", "another argument list"),
    ]
    assert "hidden" not in shown.model_dump_json()
    assert shown.degraded_since == NOW - 5


def test_every_state_has_a_place_in_the_order_of_a_model():
    assert sorted(STATE_ORDER) == sorted(State)
    assert model_view([row(0, state=State.FAILED), down(1)], NOW, HOSTS).state is State.RESTARTING


def test_a_clock_behind_the_start_shows_no_negative_uptime():
    assert model_view([row(spawned_at=NOW + 1)], NOW, HOSTS).uptime_seconds == 0


def test_the_answer_to_a_health_check_has_the_specifications_fields_first():
    shown = check_view(model_view([row()], NOW, HOSTS)).model_dump(mode="json")

    names = ("model_id", "is_healthy", "health_message", "consecutive_health_failures", "last_health_check_time", "has_cuda_oom")
    assert tuple(shown)[: len(names)] == names


def test_rows_are_grouped_whatever_their_order():
    assert {model: len(rows) for model, rows in by_model([row(1), row(model="x"), row(0)]).items()} == {"vllm": 2, "x": 1}
