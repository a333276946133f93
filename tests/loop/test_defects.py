"""The defects of the launcher that this project replaces, none of which it has (FAILURE-MODES.md, section 1), with real processes."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from recovery.metrics import FleetCollector
from tests.loop.fleet import Fleet, Model, gone
from tests.loop.plane import OPERATORS, Plane, wait_until


def delays(model: Model) -> list[float]:
    """The delays of its automatic restarts, in order."""
    return [event["data"]["delay_s"] for event in model.events if event["kind"] == "restarting" and "delay_s" in event["data"]]


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_b01_a_base_url_with_or_without_v1_is_probed_where_vllm_answers(fleet: Fleet, end: str) -> None:
    one = fleet.model(f"b01-{len(end)}", endpoints={"base_url": f"http://127.0.0.1:{{port}}{end}"})
    pid = one.serves()

    one.looked(3)

    row = one.row
    assert (one.state, one.server, row.restart_count, row.probe.failures, row.probe.message) == ("healthy", pid, 0, 0, None)


def test_b02_a_server_that_dies_at_once_is_counted(fleet: Fleet) -> None:
    """
    Every start counts, the delays grow, and the limit is kept.
    """
    one = fleet.model("b02", "--crash-after", "0", "--exit-code", "7", max_restarts=3, restart_delay=0.2, remedies=False)

    row = one.reaches("failed")

    assert (row.used, row.restart_count, one.starts) == (3, 3, 4)
    planned = [0.2, 0.4, 0.8]  # counted from the failure, so seen a little later they are a little shorter
    assert len(delays(one)) == 3 and all(seen <= wanted for seen, wanted in zip(delays(one), planned, strict=True))
    assert row.attempt == 3


def test_b03_max_restarts_0_means_no_limit(fleet: Fleet) -> None:
    one = fleet.model("b03", "--crash-after", "0", max_restarts=0, restart_delay=0.1, max_restart_delay=0.1, remedies=False)

    row = one.until(lambda row: row.used >= 6)

    assert row.state.value != "failed" and one.starts >= 5


def test_b04_a_long_load_is_left_alone(fleet: Fleet) -> None:
    """
    Also the load after a restart: failed looks of the last run do not count for the next.
    """
    times: dict[str, Any] = {"health_check_interval": 0.2, "health_confirm_interval": 0.2, "hang_window_s": 1, "completion_timeout_s": 1}
    one = fleet.model("b04", "--load-s", "4", **times)
    pid = one.serves()
    assert one.starts == 1

    one.fault(hang=True)
    one.until(lambda row: row.probe.failures >= 1)
    one.kill()

    one.serves(but=pid)
    assert (one.starts, one.row.used, one.row.probe.failures) == (2, 1, 0)


def test_b05_stable_serving_forgives(fleet: Fleet) -> None:
    """
    More crashes in its life than its budget holds, each forgiven by serving.
    """
    one = fleet.model("b05", max_restarts=1, stable_s=0.5, health_check_interval=0.3)
    pid = one.serves()

    for crash in range(1, 4):
        one.kill()
        pid = one.serves(but=pid)
        row = one.until(lambda row: row.used == 0)
        assert (row.attempt, row.restarts_total) == (0, crash)


def test_b06_nothing_of_a_run_outlives_it(fleet: Fleet) -> None:
    """
    Kill -9 of the API server alone: its engine, and a child in a session of its own, are gone before the next run begins.
    """
    one = fleet.model("b06", "--orphan")
    server = one.serves()
    members = {stray.pid for stray in fleet.plane.host.members(one.instance, one.row.run or 0)}
    assert len(members) >= 3 and server in members

    one.kill()

    one.serves(but=server)
    assert [pid for pid in members if not gone(pid)] == []
    assert (one.starts, one.overlaps) == (2, [])


def test_b07_a_stop_is_not_undone(fleet: Fleet) -> None:
    """
    Its server ignores SIGTERM, so it ends by SIGKILL: not a good end, and still no reason to start it again.
    """
    one = fleet.model("b07", "--ignore-sigterm", stop_grace_s=0.5, restart_policy="always")
    one.serves()

    one.command("stop")

    row = one.reaches("stopped")
    fleet.plane.ticked(3)
    fleet.join()
    assert (one.state, one.server, one.starts, row.desired.value) == ("stopped", None, 1, "stopped")


def test_b08_stop_and_start_make_one_process(fleet: Fleet) -> None:
    """
    Started again while the stopped one has not gone yet, and when it has.
    """
    one = fleet.model("b08", "--ignore-sigterm", stop_grace_s=1)
    first = one.serves()

    one.command("stop")
    one.command("start")

    second = one.serves(but=first)
    one.command("stop")
    one.reaches("stopped")
    one.command("start")
    third = one.serves(but=second)
    fleet.plane.ticked(3)
    assert (gone(first), gone(second), one.server) == (True, True, third)
    assert (one.starts, one.overlaps) == (3, [])


def test_b09_what_is_added_later_is_watched(fleet: Fleet) -> None:
    """
    A model that came with a changed file, and one that died in the first moment of its first run.
    """
    quick = fleet.model("b09-dies", "--crash-after", "0", max_restarts=1, remedies=False)
    late = fleet.model("b09-late")
    first = late.serves()

    late.kill()

    late.serves(but=first)
    row = quick.reaches("failed")
    assert (row.used, quick.starts) == (1, 2)


def test_b10_a_backoff_delays_nobody(fleet: Fleet) -> None:
    slow = fleet.model("b10-slow", restart_delay=300, max_restart_delay=300, join=False)
    quick = fleet.model("b10-quick")
    slow.serves()
    first = quick.serves()

    slow.kill()
    slow.reaches("restarting")
    quick.kill()

    quick.serves(but=first)
    assert (slow.state, slow.starts) == ("restarting", 1)


def test_b11_a_stop_blocks_nothing(fleet: Fleet) -> None:
    """
    While one takes its whole grace, commands are answered, others are looked at, and another is stopped and started.
    """
    stubborn = fleet.model("b11-stubborn", "--ignore-sigterm", stop_grace_s=600, join=False)
    other = fleet.model("b11-other")
    stubborn.serves()
    first = other.serves()

    stubborn.command("stop")
    stubborn.reaches("stopping")

    other.looked(2)
    assert other.command("check")["accepted"]
    other.command("stop")
    other.reaches("stopped")
    other.command("start")
    other.serves(but=first)
    assert stubborn.state == "stopping"

    stubborn.command("stop", force=True)
    stubborn.reaches("stopped")


def test_b12_a_manual_and_an_automatic_restart_exclude_each_other(fleet: Fleet) -> None:
    """
    The operator restarts what waits for its automatic restart: one new run, and the delayed job that comes later is refused.
    """
    one = fleet.model("b12", restart_delay=8, max_restart_delay=8)
    pid = one.serves()

    one.kill()
    one.reaches("restarting")
    task = fleet.plane.store.incidents(one.id, 1)[0].steps[-1]["task"]
    one.command("restart")

    pid = one.serves(but=pid)
    result = fleet.plane.app.AsyncResult(task)
    wait_until(lambda: result.state, "SUCCESS")
    assert result.result["outcome"] == "refused"
    assert (one.state, one.server, one.starts, one.overlaps) == ("healthy", pid, 2, [])
    assert (one.row.manual, one.row.used) == (1, 1)


def test_b12_restarts_at_the_same_moment(fleet: Fleet) -> None:
    """
    Killed and restarted by the operator at once, whichever is seen first: never two processes, and one that serves.
    """
    one = fleet.model("b12-race", max_restarts=0, restart_delay=0.05, max_restart_delay=0.05)
    pid = one.serves()

    for _ in range(4):
        one.kill()
        one.command("restart")
        pid = one.serves(but=pid)

    fleet.plane.ticked(2)
    pid = one.serves()
    assert one.overlaps == [] and 5 <= one.starts <= 9
    assert one.row.manual == 4
    run = one.row.run
    assert run is not None and pid in {stray.pid for stray in fleet.plane.host.members(one.instance, run)}
    assert fleet.plane.view(one.instance).strays == ()


def test_b13_an_oom_on_stdout_is_seen(fleet: Fleet) -> None:
    """
    vLLM's logger writes to stdout.
    """
    one = fleet.model("b13", restart_policy="no")
    one.serves()

    one.fault(serve_error="oom")

    row = one.reaches("failed")
    assert row.has_cuda_oom
    assert row.last_exit is not None and row.last_exit.cause == "cuda_oom_serving"
    assert "utilization" in row.last_exit.advice


def test_b14_the_oom_flag_is_of_the_current_run(fleet: Fleet) -> None:
    one = fleet.model("b14", restart_delay=1)
    first = one.serves()

    one.fault(serve_error="oom")

    assert one.until(lambda row: row.last_exit is not None).has_cuda_oom
    second = one.serves(but=first)
    assert not one.row.has_cuda_oom
    one.kill()
    one.serves(but=second)
    row = one.row
    assert not row.has_cuda_oom and row.last_exit is not None and row.last_exit.cause == "killed"


def test_b15_the_operators_environment_reaches_the_server(fleet: Fleet) -> None:
    """
    HF_TOKEN, VLLM_*, NCCL_* and the model's own; nothing of ours.
    """
    one = fleet.model("b15", env={"VLLM_OWN": "{replica}"})
    pid = one.serves()

    words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")

    env = dict(word.split("=", 1) for word in words if word)
    assert OPERATORS.items() <= env.items() and env["VLLM_OWN"] == "0"
    ours = {name for name in env if name.startswith(("RECOVERY_", "FMCP_", "CELERY_", "FLOWER_")) or name == "REDIS_URL"}
    assert ours == {"RECOVERY_RUN"}


def test_b16_a_manual_restart_is_refused_by_the_rules_or_works_without_budget(fleet: Fleet) -> None:
    """
    Policy `no` and a spent budget refuse it in the specification's words; `override` works, at once, and uses none.
    """
    never = fleet.model("b16-no", restart_policy="no", max_restarts=3, restart_delay=300, max_restart_delay=300, join=False)
    spent = fleet.model("b16-spent", max_restarts=1)
    pid, first = never.serves(), spent.serves()
    spent.kill()
    first = spent.serves(but=first)

    for one, limit in ((never, 3), (spent, 1)):
        answer = one.command("restart", override=False)
        words = f"Cannot restart model '{one.id}': restart policy is 'no' or max restarts ({limit}) reached"
        assert (answer["accepted"], answer["status"], answer["reason"]) == (False, "refused", words)

    for one, old in ((never, pid), (spent, first)):
        used = one.row.used
        assert one.command("restart", override=True)["accepted"]
        one.serves(but=old)
        assert (one.row.used, one.row.manual) == (used, 1)


def test_b17_each_model_has_its_own_interval(fleet: Fleet) -> None:
    often = fleet.model("b17-often", health_check_interval=0.5, join=False)
    seldom = fleet.model("b17-seldom", health_check_interval=600)
    often.serves()
    seldom.serves()
    last = seldom.row.probe.last_at

    often.looked(4)

    assert seldom.row.probe.last_at == last


def test_b18_automatic_and_manual_restarts_are_in_the_metrics(fleet: Fleet) -> None:
    one = fleet.model("b18")
    pid = one.serves()
    one.kill()
    pid = one.serves(but=pid)
    one.command("restart")
    one.serves(but=pid)

    said = scrape(fleet.plane)

    assert 'fluidmcp_server_restarts_total{server="b18"} 2.0' in said
    assert 'fluidmcp_server_status{server="b18"} 1.0' in said
    assert 'recovery_restarts_total{by="policy",cause="killed",host="loop",model="b18"} 1.0' in said
    assert 'recovery_restarts_total{by="operator",cause="operator",host="loop",model="b18"} 1.0' in said


def test_b19_a_hung_engine_behind_a_healthy_health_is_seen(fleet: Fleet) -> None:
    one = fleet.model("b19")
    pid = one.serves()

    one.fault(engine_hang=True)
    assert one.answers()

    one.serves(but=pid)
    assert one.row.used == 1
    assert [incident.cause for incident in fleet.plane.store.incidents(one.id, 5)] == ["engine_hang"]


def test_b20_models_outlive_the_supervisor(fleet: Fleet) -> None:
    """
    Kill -9 of every part: the server lives on, is taken over by the next, and is repaired by it; one that died meanwhile too.
    """
    plane = fleet.plane
    one = fleet.model("b20", join=False)
    dead = fleet.model("b20-dead")
    server, first = one.serves(), dead.serves()
    run = one.row.run

    plane.end("host", "control", "beat", how=signal.SIGKILL)
    assert one.answers() and one.server == server
    dead.kill()
    plane.start("host", "control", "beat")

    dead.serves(but=first)
    plane.ticked(2)
    assert (one.serves(), one.row.run, one.starts, one.row.restart_count) == (server, run, 1, 0)
    one.kill()
    one.serves(but=server)
    assert (one.starts, dead.starts, one.overlaps, dead.overlaps) == (2, 2, [], [])


@pytest.mark.parametrize("policy", ["on-failure", "always"])
def test_b21_exit_0_after_the_engines_death_is_a_failure(fleet: Fleet, policy: str) -> None:
    one = fleet.model(f"b21-{policy}", restart_policy=policy)
    pid = one.serves()

    os.kill(one.engine, signal.SIGKILL)

    one.serves(but=pid)
    row = one.row
    assert row.last_exit is not None
    assert (row.last_exit.code, row.last_exit.clean, row.used) == (0, False, 1)
    assert "exit" in [line["event"] for line in one.lines]


def scrape(plane: Plane) -> str:
    """What Prometheus would read."""
    registry = CollectorRegistry()
    registry.register(FleetCollector(plane.store))
    return generate_latest(registry).decode()
