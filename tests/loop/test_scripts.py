"""What scripts and Flower see and do: public tasks from everywhere, each automatic restart as a delayed job with reason and result."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from recovery import part_list
from tests.loop.fleet import Fleet, Model
from tests.loop.plane import HOST, Plane, wait_until

RESTART = "recovery.restart_instance"


@pytest.fixture(scope="module")
def flower(plane: Plane) -> Iterator[httpx.Client]:
    """Flower of the plane, with its password."""
    plane.start("flower")
    password = part_list.flower_password(plane.settings)
    address = f"http://127.0.0.1:{plane.settings.flower_port}"
    with httpx.Client(base_url=address, auth=(part_list.FLOWER_USER, password), timeout=30, trust_env=False) as client:
        yield client


def test_celery_call(fleet: Fleet) -> None:
    """
    `celery -A workers.app call recovery.restart --args '["id"]'`, from any directory with the environment.
    """
    one = fleet.model("called")
    first = one.serves()

    said = fleet.plane.run(sys.executable, "-m", "celery", "-A", "workers.app", "call", "recovery.restart", "--args", json.dumps([one.id]))

    assert said.returncode == 0, said.stderr
    one.serves(but=first)
    assert (one.row.manual, one.row.used, one.starts) == (1, 0, 2)
    answer = fleet.plane.app.AsyncResult(said.stdout.strip().splitlines()[-1]).get(timeout=60)
    assert answer["accepted"] and answer["model"] == one.id
    assert answer["token"] == answer["instances"][0]["token"]


def test_delay_from_python(fleet: Fleet) -> None:
    """
    `stop.delay("id")` in another process: accepted at once, done by the loop.
    """
    one = fleet.model("delayed")
    one.serves()
    script = "import json, sys; from workers.tasks import stop; print(json.dumps(stop.delay(sys.argv[1]).get(timeout=60)))"

    said = fleet.plane.run(sys.executable, "-c", script, one.id)

    assert said.returncode == 0, said.stderr
    answer = json.loads(said.stdout.strip().splitlines()[-1])
    assert answer["accepted"] and answer["status"] == "ok"
    one.reaches("stopped")


def test_flower_asks_for_a_restart(fleet: Fleet, flower: httpx.Client) -> None:
    """
    `POST /api/task/async-apply/recovery.restart` with the password; 401 without.
    """
    one = fleet.model("by-flower")
    first = one.serves()
    path, body = "/api/task/async-apply/recovery.restart", {"args": [one.id]}

    assert httpx.post(f"{flower.base_url}{path}", json=body, timeout=30, trust_env=False).status_code == 401
    answer = flower.post(path, json=body)

    assert answer.status_code == 200, answer.text
    one.serves(but=first)
    assert (one.row.manual, one.starts) == (1, 2)
    result = fleet.plane.app.AsyncResult(answer.json()["task-id"]).get(timeout=60)
    assert result["accepted"] and result["model"] == one.id


def test_a_delayed_restart_is_seen_and_leaves_its_result(fleet: Fleet, flower: httpx.Client) -> None:
    """
    While it waits: in `inspect scheduled` and in Flower, with instance, attempt, delay and reason. Afterwards: its result.
    """
    one = fleet.model("scheduled", restart_delay=12, max_restart_delay=12)
    first = one.serves()

    one.kill()

    one.reaches("restarting")
    ((task, kwargs),) = wait_until(lambda: scheduled(one))
    assert (kwargs["instance"], kwargs["attempt"], kwargs["token"]) == (one.instance, 1, one.row.token)
    assert kwargs["delay"] == pytest.approx(12, abs=6) and "killed by signal 9" in kwargs["reason"]
    seen = wait_until(lambda: flower.get("/api/tasks", params={"taskname": RESTART}).json().get(task))
    assert seen["eta"] and seen["state"] in ("PENDING", "RECEIVED")
    assert all(word in seen["kwargs"] for word in (one.instance, "'attempt': 1", "'delay': ", "killed by signal 9"))

    one.serves(but=first)
    result = fleet.plane.app.AsyncResult(task)
    assert (result.state, result.result["outcome"]) == ("SUCCESS", "started")
    steps = fleet.plane.store.incidents(one.id, 1)[0].steps
    assert task in [step.get("task") for step in steps]


def scheduled(one: Model) -> list[tuple[str, dict[str, Any]]]:
    """The delayed restarts of a model that its host's worker holds: task id and arguments."""
    answers = one.plane.app.control.inspect(destination=[f"gpu@{HOST}"], timeout=5).scheduled() or {}
    requests = [entry["request"] for entries in answers.values() for entry in entries]
    found = [request for request in requests if request["name"] == RESTART and request["kwargs"]["instance"] == one.instance]
    return [(str(request["id"]), request["kwargs"]) for request in found]
