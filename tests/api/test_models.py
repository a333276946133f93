"""The specification's endpoints, with its fields, types and texts, and what this project adds."""

import threading
from typing import Any

import pytest

from recovery.core.fleet import Policy
from recovery.core.instance import Desired, LastExit, ProbeMemory
from recovery.core.states import State
from recovery.core.view import STATUS_FIELDS
from tests.api.conftest import HOST, Api, Fleet, Worker
from tests.helpers import wait_until

MODEL = "/api/llm/models/vllm"


def in_background(call: Any) -> tuple[threading.Thread, list[Any]]:
    """Run a request that waits; its answer is put into the list."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()), daemon=True)
    thread.start()
    return thread, found


def known(api: Api, **wanted: Any) -> dict[str, Any]:
    """The model, as soon as the API shows these values of it."""

    def look() -> dict[str, Any]:
        found: dict[str, Any] = api.client.get(MODEL).json()
        return found

    return wait_until(look, lambda shown: {"id": "vllm", **wanted}.items() <= shown.items(), within_s=60)


def test_the_list_and_the_status_have_the_specifications_fields(api: Api, fleet: Fleet):
    fleet.add()
    shown = known(api, state="healthy")

    assert tuple(shown)[: len(STATUS_FIELDS)] == STATUS_FIELDS
    listed = api.client.get("/api/llm/models").json()
    assert listed["total"] == 1
    assert tuple(listed["models"][0])[: len(STATUS_FIELDS)] == STATUS_FIELDS
    assert shown["is_running"] is True
    assert shown["uptime_seconds"] > 125
    assert shown["health_message"] is None


@pytest.mark.parametrize("path", ["/models", "/models/vllm", "/models/vllm/events"])
def test_both_paths_answer_the_same(api: Api, fleet: Fleet, path: str):
    fleet.add()
    known(api)

    long, short = api.client.get(f"/api/llm{path}"), api.client.get(f"/llm{path}")

    assert long.status_code == short.status_code == 200
    assert long.json().keys() == short.json().keys()


def test_an_unknown_model_is_404_and_the_text_says_which_there_are(api: Api, fleet: Fleet):
    fleet.add()
    known(api)

    for method, path in (
        ("GET", ""),
        ("POST", "/restart"),
        ("POST", "/stop"),
        ("POST", "/health-check"),
        ("GET", "/logs"),
        ("GET", "/events"),
    ):
        answer = api.client.request(method, f"/api/llm/models/nope{path}")
        assert (answer.status_code, answer.json()) == (404, {"detail": "LLM model 'nope' not found; there are: vllm"})


def test_a_model_that_is_taken_out_is_gone(api: Api, fleet: Fleet):
    fleet.add()
    known(api)

    fleet.store.delete("vllm-0")

    wait_until(lambda: api.client.get(MODEL).status_code, 404, within_s=60)
    assert api.client.get("/api/llm/models").json()["total"] == 0


def test_restart_answers_when_the_new_run_serves(api: Api, fleet: Fleet):
    fleet.add()
    known(api)

    thread, found = in_background(lambda: api.client.post(f"{MODEL}/restart"))
    fleet.bring_up()
    thread.join(60)

    assert found[0].status_code == 200, found[0].text
    told = found[0].json()
    assert told["message"] == "LLM model 'vllm' restarted successfully"
    assert told["restart_count"] == 1
    assert 0 <= told["uptime_seconds"] < 60


@pytest.mark.parametrize(("policy", "used"), [({"restart_policy": "no"}, 0), ({"restart_policy": "on-failure"}, 3)])
def test_a_restart_against_the_policy_is_refused_in_the_specifications_words(api: Api, fleet: Fleet, policy: dict[str, Any], used: int):
    before = fleet.add(policy=Policy(**policy), used=used)
    known(api)

    answer = api.client.post(f"{MODEL}/restart")

    assert answer.status_code == 409
    assert answer.json() == {"detail": "Cannot restart model 'vllm': restart policy is 'no' or max restarts (3) reached"}
    assert fleet.row().version == before.version


def test_override_restarts_against_the_policy(api: Api, fleet: Fleet, worker: Worker):
    fleet.add(policy=Policy(restart_policy="no"))
    known(api)

    answer = api.client.post(f"{MODEL}/restart?override=true&wait=false")

    assert answer.status_code == 202
    assert worker.sent[-1] == ("recovery.restart", {"model": "vllm", "override": True, "by": "api"}, "control")


def test_wait_false_answers_at_once_with_a_link_that_tells_the_outcome(api: Api, fleet: Fleet):
    fleet.add()
    known(api)

    answer = api.client.post(f"{MODEL}/restart?wait=false")

    assert answer.status_code == 202
    link = answer.json()["link"]
    assert answer.headers["location"] == link == f"/api/tasks/{answer.json()['task_id']}"
    task = api.client.get(link).json()
    assert (task["command"], task["model"], task["accepted"], task["outcome"]) == ("restart", "vllm", True, "waiting")
    fleet.bring_up()
    wait_until(lambda: api.client.get(link).json()["outcome"], "done", within_s=60)


def test_a_restart_that_is_not_over_in_time_is_202(api: Api, fleet: Fleet):
    fleet.add()
    known(api)

    assert api.client.post(f"{MODEL}/restart?timeout=0.2").status_code == 202


def test_a_restart_that_fails_says_why(api: Api, fleet: Fleet):
    fleet.add()
    known(api)

    thread, found = in_background(lambda: api.client.post(f"{MODEL}/restart"))
    wait_until(lambda: fleet.row().state, State.RELEASING, within_s=60)
    fleet.change(state=State.FAILED, run=None, intent=None, reason="exit code 2; a restart does not help against bad_argument")
    thread.join(60)

    assert found[0].status_code == 502
    assert found[0].json() == {
        "detail": "LLM model 'vllm' did not come back: vllm-0: exit code 2; a restart does not help against bad_argument"
    }


def test_a_restart_that_another_command_undoes_says_so(api: Api, fleet: Fleet):
    fleet.add()
    known(api)

    thread, found = in_background(lambda: api.client.post(f"{MODEL}/restart"))
    wait_until(lambda: fleet.row().state, State.RELEASING, within_s=60)
    api.client.post(f"{MODEL}/stop?wait=false")
    thread.join(60)

    assert (found[0].status_code, found[0].json()) == (409, {"detail": "Another command took over: vllm-0 was stopped meanwhile"})


def test_stop_answers_when_nothing_of_it_is_left(api: Api, fleet: Fleet):
    fleet.add()
    known(api)

    thread, found = in_background(lambda: api.client.post(f"{MODEL}/stop"))
    wait_until(lambda: fleet.row().desired, Desired.STOPPED, within_s=60)
    fleet.change(state=State.STOPPED, run=None, intent=None, reason="stopped by the operator", due=None)
    thread.join(60)

    assert found[0].status_code == 200, found[0].text
    assert found[0].json()["message"] == "LLM model 'vllm' stopped gracefully"
    assert fleet.row().desired is Desired.STOPPED


def test_stop_with_force_is_a_crash_and_the_answer_says_when_it_comes_back(api: Api, fleet: Fleet):
    fleet.add()
    known(api)

    thread, found = in_background(lambda: api.client.post(f"{MODEL}/stop?force=true"))
    wait_until(lambda: fleet.row().intent, lambda intent: intent is not None, within_s=60)
    now = fleet.store.now()
    fleet.change(
        state=State.RESTARTING, run=None, intent=None, last_ended=7, token=8, not_before=now + 5, used=1, reason="killed by signal 9"
    )
    thread.join(60)

    told = found[0].json()
    assert found[0].status_code == 200, told
    assert told["message"].startswith("LLM model 'vllm' stopped forcefully; it starts again in ")
    assert told["comes_back"] is True
    assert told["next_restart_at"] == pytest.approx(now + 5)


def test_stop_with_force_and_stay_down_stays_down(api: Api, fleet: Fleet, worker: Worker):
    fleet.add()
    known(api)

    api.client.post(f"{MODEL}/stop?force=true&stay_down=true&wait=false")

    assert worker.sent[-1][1] == {"model": "vllm", "force": True, "stay_down": True, "by": "api"}
    assert fleet.row().desired is Desired.STOPPED


def test_start_brings_a_stopped_model_up(api: Api, fleet: Fleet):
    fleet.add(state=State.STOPPED, desired=Desired.STOPPED, run=None)
    known(api, state="stopped")

    thread, found = in_background(lambda: api.client.post(f"{MODEL}/start"))
    wait_until(lambda: fleet.row().state, State.RESTARTING, within_s=60)
    fleet.change(state=State.HEALTHY, run=fleet.row().token, spawned_at=fleet.store.now(), reason="serving")
    thread.join(60)

    assert found[0].status_code == 200, found[0].text
    assert found[0].json()["message"] == "LLM model 'vllm' started successfully"


def test_reset_clears_the_budget_and_shows_it_at_once(api: Api, fleet: Fleet):
    fleet.add(used=3, manual=1)
    known(api, restart_count=4)

    answer = api.client.post(f"{MODEL}/reset")

    assert (answer.status_code, answer.json()["restart_count"]) == (200, 0)
    assert fleet.row().used == 0


def test_a_health_check_answers_with_the_look_it_caused(api: Api, fleet: Fleet):
    fleet.add()
    known(api)

    thread, found = in_background(lambda: api.client.post(f"{MODEL}/health-check"))
    wait_until(lambda: fleet.row().look_at, lambda at: at is not None, within_s=60)
    fleet.change(state=State.UNHEALTHY, probe=ProbeMemory(failures=1, last_at=fleet.store.now(), message="/health: timed out"))
    thread.join(60)

    told = found[0].json()
    assert found[0].status_code == 200, told
    assert (told["model_id"], told["is_healthy"], told["health_message"]) == ("vllm", False, "/health: timed out")
    assert told["consecutive_health_failures"] == 1
    assert told["has_cuda_oom"] is False


def test_a_health_check_of_a_stopped_model_answers_at_once(api: Api, fleet: Fleet, worker: Worker):
    fleet.add(state=State.STOPPED, desired=Desired.STOPPED, run=None, reason="stopped by the operator")
    known(api)

    answer = api.client.post(f"{MODEL}/health-check")

    assert (answer.status_code, answer.json()["is_healthy"]) == (200, False)
    assert worker.sent == []


@pytest.mark.parametrize("path", ["/restart", "/health-check", "/stop?force=true"])
def test_a_host_that_is_away_is_named_and_nothing_is_changed(api: Api, fleet: Fleet, path: str):
    before = fleet.add(host="gpu-9")
    known(api)

    answer = api.client.post(MODEL + path)

    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "2"
    assert "host 'gpu-9' has not been heard from" in answer.json()["detail"]
    assert fleet.row().version == before.version


def test_a_stop_is_noted_though_the_host_is_away(api: Api, fleet: Fleet):
    fleet.add(host="gpu-9")
    known(api)

    answer = api.client.post(f"{MODEL}/stop")

    assert answer.status_code == 503
    assert "the stop is noted" in answer.json()["detail"]
    assert fleet.row().desired is Desired.STOPPED


def test_a_queue_that_takes_nothing_is_503_and_nothing_is_changed(api: Api, fleet: Fleet, worker: Worker):
    before = fleet.add()
    known(api)
    worker.broken = True

    answer = api.client.post(f"{MODEL}/restart")

    assert answer.status_code == 503
    assert "nothing was changed" in answer.json()["detail"]
    assert fleet.row().version == before.version


def test_the_restart_that_is_due_and_the_last_end_are_shown(api: Api, fleet: Fleet):
    at = fleet.store.now()
    end = LastExit(token=7, at=at, signal=9, cause="host_oom", evidence="Killed process 7", advice="add memory")
    fleet.add(state=State.RESTARTING, run=None, not_before=at + 40, last_exit=end, used=1, reason="killed by signal 9")

    shown = known(api, state="restarting")

    assert shown["next_restart_at"] == pytest.approx(at + 40)
    assert (shown["last_exit"]["cause"], shown["last_exit"]["signal"]) == ("host_oom", 9)
    assert shown["is_running"] is False
    assert shown["uptime_seconds"] is None


def test_replicas_are_one_model(api: Api, fleet: Fleet):
    fleet.add()
    fleet.add(replica=1, state=State.STARTING)
    shown = known(api, replicas=2)

    assert shown["health_message"] == "1/2 ready"
    assert [each["id"] for each in shown["instances"]] == ["vllm-0", "vllm-1"]
    assert shown["instances"][0]["host"] == HOST


def test_hosts_are_shown_with_clock_and_cards(api: Api, fleet: Fleet):
    card = {
        "index": 0,
        "name": "H100",
        "used_bytes": 3,
        "total_bytes": 80,
        "utilization": 0.5,
        "processes": [],
        "lost": False,
        "problem": "",
    }
    fleet.hosts["gpu-2"] = {"gpus": [card], "wall": 12.0}

    shown = wait_until(lambda: api.client.get("/api/hosts").json()["hosts"], lambda hosts: len(hosts) == 2, within_s=60)

    assert [host["host"] for host in shown] == ["gpu-1", "gpu-2"]
    assert shown[1]["gpus"] == [{"index": 0, "name": "H100", "used_bytes": 3, "total_bytes": 80, "utilization": 0.5, "lost": False}]
    assert shown[1]["clock_skew_seconds"] < -1000
    assert abs(shown[0]["clock_skew_seconds"]) < 30
