"""History, logs and everything live: what streams say, where they go on, and what is said when a host is away."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from recovery.core.change import Incident, ModelEvent
from recovery.core.instance import Desired
from recovery.core.states import State
from tests.api.conftest import Api, Fleet, Worker
from tests.helpers import wait_until

MODEL = "/api/llm/models/vllm"
Told = tuple[str, str | None, dict[str, Any]]


@contextmanager
def stream(api: Api, path: str, **headers: str) -> Iterator[Iterator[Told]]:
    """The events of a stream: name, id, data."""
    with httpx.Client(base_url=api.url, timeout=60) as client, client.stream("GET", path, headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield _events(answer)


def _events(answer: httpx.Response) -> Iterator[Told]:
    fields: dict[str, str] = {}
    for line in answer.iter_lines():
        name, _, value = line.partition(": ")
        if line and name:
            fields[name] = value
        elif not line and "data" in fields:
            yield fields.get("event", "message"), fields.get("id"), json.loads(fields["data"])
            fields = {}


def first(events: Iterator[Told], name: str, fits: Any = lambda data: True) -> dict[str, Any]:
    """The data of the first event of that name that fits."""
    return next(data for kind, _, data in events if kind == name and fits(data))


@pytest.fixture
def model(api: Api, fleet: Fleet) -> Api:
    """The API with one model that it knows."""
    fleet.add()
    wait_until(lambda: api.client.get(MODEL).status_code, 200, within_s=60)
    return api


def test_the_fleet_is_told_at_first_and_then_what_changes(model: Api, fleet: Fleet):
    with stream(model, "/api/llm/stream") as events:
        assert [each["id"] for each in first(events, "fleet")["models"]] == ["vllm"]

        fleet.change(state=State.UNHEALTHY, reason="/health: timed out")
        changed = first(events, "models", lambda told: told["models"][0]["state"] == "unhealthy")
        assert changed["models"][0]["health_message"] == "/health: timed out"

        fleet.add(model="other")
        assert [each["id"] for each in first(events, "models", lambda told: told["models"][0]["id"] == "other")["models"]] == ["other"]

        fleet.store.delete("other-0")
        assert first(events, "models", lambda told: told["gone"])["gone"] == ["other"]


def test_a_host_that_goes_away_is_told_though_no_row_changed(model: Api, fleet: Fleet):
    with stream(model, "/api/llm/stream") as events:
        first(events, "fleet")
        fleet.hosts.clear()
        told = first(events, "models", lambda told: told["models"][0]["hosts_away"])

    assert told["models"][0]["is_healthy"] is False


def test_the_history_is_listed_and_followed_where_it_was_cut(model: Api, fleet: Fleet):
    for number in range(3):
        fleet.change(events=(ModelEvent(kind="exited", text=f"end {number}", data={"code": number}),))
    listed = model.client.get(f"{MODEL}/events?count=2").json()["events"]
    assert [each["text"] for each in listed] == ["end 1", "end 2"]
    assert listed[0]["data"] == {"code": 1}

    with stream(model, f"{MODEL}/events", Accept="text/event-stream") as events:
        told = [next(events) for _ in range(3)]
        assert [data["text"] for _, _, data in told] == ["end 0", "end 1", "end 2"]
        fleet.change(events=(ModelEvent(kind="healthy", text="back"),))
        assert next(events)[2]["text"] == "back"

    with stream(model, f"{MODEL}/events?follow=true", **{"Last-Event-ID": told[1][1] or ""}) as events:
        assert [next(events)[2]["text"] for _ in range(2)] == ["end 2", "back"]


def test_lines_of_a_history_that_changed_no_row_are_followed_too(model: Api, fleet: Fleet):
    with stream(model, f"{MODEL}/events?follow=true") as events:
        fleet.store.add_event("vllm", ModelEvent(kind="note", text="from elsewhere"))
        assert next(events)[2]["text"] == "from elsewhere"


def test_incidents_are_listed_newest_first(model: Api, fleet: Fleet):
    for number in (1, 2):
        named = {"id": f"i{number}", "model": "vllm", "instance": "vllm-0", "host": "gpu-1"}
        fleet.change(incident=Incident(**named, token=number, opened_at=float(number), cause="killed"))

    assert [each["id"] for each in model.client.get(f"{MODEL}/incidents").json()["incidents"]] == ["i2", "i1"]


def log_of(*lines: str, end: str = "7:1:9", run: int = 7) -> dict[str, Any]:
    """A host's answer."""
    return {"lines": [f"{line}\n" for line in lines], "total_lines": 245, "run": run, "runs": [5, 7], "end": end}


def test_logs_have_the_specifications_shape(model: Api, worker: Worker):
    worker.on_host["recovery.read_logs"] = lambda kwargs: log_of("INFO: Loading model", "INFO: Model loaded successfully")

    told = model.client.get(f"{MODEL}/logs?lines=2&run=5").json()

    assert told == {
        "model_id": "vllm",
        "lines": ["INFO: Loading model\n", "INFO: Model loaded successfully\n"],
        "total_lines": 245,
        "returned_lines": 2,
        "instance": "vllm-0",
        "run": 7,
        "runs": [5, 7],
        "source": "host",
        "at": None,
    }
    assert worker.sent[-1] == ("recovery.read_logs", {"instance": "vllm-0", "opts": {"lines": 2, "run": 5, "after": None}}, "gpu.gpu-1")
    assert worker.answers == {}, "the lines do not stay in the result backend"


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("never_started", "process never started (logs are created on first start)"),
        ("permission", "log file permissions issue"),
        ("no_directory", "log directory not created"),
    ],
)
def test_the_specifications_causes_are_three_texts(model: Api, worker: Worker, kind: str, cause: str):
    worker.on_host["recovery.read_logs"] = lambda _: {"error": kind, "detail": "why"}

    answer = model.client.get(f"{MODEL}/logs")

    assert (answer.status_code, answer.json()) == (404, {"detail": f"Logs of LLM model 'vllm' not available: {cause} (why)"})


def test_while_the_host_is_away_the_kept_tail_is_shown_as_such(model: Api, fleet: Fleet):
    fleet.hosts.clear()
    wait_until(lambda: model.client.get(MODEL).json()["hosts_away"], ["gpu-1"], within_s=60)
    assert model.client.get(f"{MODEL}/logs").status_code == 503

    fleet.store.put("logtail:vllm-0", {**log_of("one", "two"), "at": 1234.5}, 600.0)
    told = model.client.get(f"{MODEL}/logs?lines=1").json()

    assert (told["source"], told["at"], told["lines"]) == ("redis", 1234.5, ["two\n"])
    assert model.client.get(f"{MODEL}/logs?run=5").status_code == 503, "of another run nothing is kept"


def test_the_replica_in_trouble_is_read_first_and_any_can_be_asked_for(model: Api, fleet: Fleet, worker: Worker):
    worker.on_host["recovery.read_logs"] = lambda kwargs: log_of(kwargs["instance"])
    fleet.add(replica=1, state=State.UNHEALTHY)
    wait_until(lambda: model.client.get(MODEL).json()["replicas"], 2, within_s=60)

    assert model.client.get(f"{MODEL}/logs").json()["instance"] == "vllm-1"
    assert model.client.get(f"{MODEL}/logs?replica=0").json()["instance"] == "vllm-0"
    assert model.client.get(f"{MODEL}/logs?replica=5").json() == {"detail": "LLM model 'vllm' has no replica 5; there are: 0, 1"}


def test_a_log_is_followed_across_a_host_that_is_away(model: Api, fleet: Fleet, worker: Worker):
    answers = {None: log_of("one", end="a"), "a": log_of("two", end="b"), "b": log_of(end="b")}
    worker.on_host["recovery.read_logs"] = lambda kwargs: answers[kwargs["opts"]["after"]]

    with stream(model, f"{MODEL}/logs?follow=true") as events:
        assert first(events, "lines")["lines"] == ["one\n"]
        assert first(events, "lines")["lines"] == ["two\n"]
        beats, fleet.hosts = fleet.hosts, {}
        assert "host 'gpu-1' has not been heard from" in first(events, "away")["detail"]
        answers["b"] = log_of("three", end="c")
        answers["c"] = log_of(end="c")
        fleet.hosts = beats
        assert first(events, "lines")["lines"] == ["three\n"]


def test_a_stopped_model_has_logs_and_a_history(model: Api, fleet: Fleet, worker: Worker):
    worker.on_host["recovery.read_logs"] = lambda kwargs: log_of("the end")
    fleet.change(state=State.STOPPED, desired=Desired.STOPPED, run=None)

    assert model.client.get(f"{MODEL}/logs").json()["lines"] == ["the end\n"]
