"""
What is kept beside the rows: the streams, counters, incidents, heartbeats, small values.
"""

import threading
from typing import Any

from recovery.core.change import Commit, Count, Incident, ModelEvent
from recovery.core.instance import Intent
from recovery.core.states import State
from tests.contract.world import World, instance


def incident(number: int, model: str = "vllm", **fields: Any) -> Incident:
    given = {"id": f"i{number}", "model": model, "instance": f"{model}-0", "host": "gpu-1", "token": 5, "cause": "exit"}
    return Incident.model_validate({**given, "opened_at": float(number), **fields})


def test_every_commit_is_one_change(world: World) -> None:
    position, found = world.store.snapshot()
    assert found == ()
    row = world.put_new(instance())
    row = world.put_next(row, state=State.HEALTHY, run=5, base_url="http://gpu-1:8001/v1")
    last = world.put_next(row, intent=Intent.CRASH)
    changes = world.store.follow(position, 0)
    assert [(change.state, change.run, change.base_url, change.routable) for change in changes] == [
        ("restarting", None, None, False),
        ("healthy", 5, "http://gpu-1:8001/v1", True),
        ("healthy", 5, "http://gpu-1:8001/v1", False),
    ]
    assert [(change.instance, change.model) for change in changes] == [("vllm-0", "vllm")] * 3
    assert changes[-1].version == last.version
    assert world.store.follow(changes[1].id, 0) == changes[2:]
    assert world.store.snapshot() == (changes[-1].id, (last,))


def test_following_ends_empty_when_nothing_comes(world: World) -> None:
    world.put_new(instance())
    position, _ = world.store.snapshot()
    assert world.store.follow(position, 0) == ()
    assert world.store.follow(position, 0.05) == ()


def test_following_wakes_for_a_change(world: World) -> None:
    position, _ = world.store.snapshot()
    seen: list[Any] = []
    reader = threading.Thread(target=lambda: seen.append(world.store.follow(position, 120)))
    reader.start()
    world.put_new(instance())
    reader.join(60)
    assert not reader.is_alive()
    assert [change.instance for change in seen[0]] == ["vllm-0"]


def test_a_reader_that_fell_behind_is_told_so(world: World) -> None:
    start, _ = world.store.snapshot()
    row = world.put_new(instance())
    position, _ = world.store.snapshot()
    for _ in range(world.limits["changes_kept"] * 3):
        row = world.put_next(row)
    assert world.store.follow(position, 0) is None
    assert world.store.follow(start, 0) is None
    position, rows = world.store.snapshot()
    assert rows == (row,)
    assert world.store.follow(position, 0) == ()


def test_a_reader_whose_position_redis_forgot_is_told_so(world: World) -> None:
    world.put_new(instance())
    position, _ = world.store.snapshot()
    if world.memory:
        world.store.wipe()
    else:
        assert world.server
        with world.server.client() as client:
            client.delete(world.store.keys.changes)
    assert world.store.follow(position, 0) is None
    world.put_next(world.store.load("vllm-0") or world.put_new(instance()))
    assert world.store.follow(position, 0) is None, "new entries do not hide that old ones were lost"


def test_events_of_a_model_in_order(world: World) -> None:
    before = world.store.now()
    row = instance()
    first = Commit(
        after=row, expected_version=0, events=(ModelEvent(kind="started", text="läuft", data={"token": 5}), ModelEvent(kind="b"))
    )
    world.store.commit(first)
    world.store.add_event("vllm", ModelEvent(kind="c"))
    world.store.add_event("other", ModelEvent(kind="d"))
    events = world.store.events("vllm", 10)
    assert [event["kind"] for event in events] == ["started", "b", "c"]
    assert {name: events[0][name] for name in ("text", "data")} == {"text": "läuft", "data": {"token": 5}}
    assert set(events[0]) == {"id", "at", "kind", "text", "data"}
    assert before - 0.01 <= events[0]["at"] <= world.store.now() + 0.01
    assert [event["kind"] for event in world.store.events("vllm", 2)] == ["b", "c"], "the newest, oldest first"
    assert [event["kind"] for event in world.store.events("vllm", 1, after=events[0]["id"])] == ["b"]
    assert world.store.events("vllm", 10, after=events[2]["id"]) == ()
    assert world.store.events("nobody", 10) == ()


def test_following_events(world: World) -> None:
    world.store.add_event("vllm", ModelEvent(kind="old"))
    assert [event["kind"] for event in world.store.follow_events("vllm", "0-0", 0)] == ["old"]
    assert world.store.follow_events("vllm", "$", 0.05) == ()
    (old,) = world.store.events("vllm", 1)
    seen: list[Any] = []
    reader = threading.Thread(target=lambda: seen.append(world.store.follow_events("vllm", old["id"], 120)))
    reader.start()
    world.store.add_event("vllm", ModelEvent(kind="new"))
    reader.join(60)
    assert [event["kind"] for event in seen[0]] == ["new"]


def test_events_are_bounded(world: World) -> None:
    for number in range(350):
        world.store.add_event("vllm", ModelEvent(kind=str(number)))
    kept = world.store.events("vllm", 10_000)
    assert kept[-1]["kind"] == "349"
    assert len(kept) <= world.limits["events_kept"] + 100, "trimmed by whole blocks of 100"


def test_counters_add_up(world: World) -> None:
    labels = (("model", "vllm"), ("cause", 'oom: "x", [y]'))
    counted = (Count(name="restarts_total", labels=labels), Count(name="seconds_total", by=0.25))
    row = world.store.commit(Commit(after=instance(), expected_version=0, counts=counted))
    world.store.commit(Commit(after=row, expected_version=row.version, counts=counted))
    world.store.count((Count(name="restarts_total", labels=labels, by=2), Count(name="restarts_total")))
    assert world.store.counters() == {("restarts_total", labels): 4.0, ("seconds_total", ()): 0.5, ("restarts_total", ()): 1.0}


def test_an_incident_is_written_with_its_row(world: World) -> None:
    opened = incident(1, evidence={"log": "CUDA out of memory ☃"})
    row = world.store.commit(Commit(after=instance(), expected_version=0, incident=opened))
    assert world.store.incident("i1") == opened
    closed = opened.evolve(closed_at=9.0, outcome="repaired", steps=({"kind": "restart"},))
    for _ in range(2):
        row = world.store.commit(Commit(after=row, expected_version=row.version, incident=closed))
    assert world.store.incident("i1") == closed
    assert world.store.incidents(None, 10) == (closed,)
    assert world.store.incident("i2") is None


def test_incidents_newest_first_and_by_model(world: World) -> None:
    row = world.put_new(instance())
    for number, model in ((1, "a"), (3, "b"), (2, "a")):
        row = world.store.commit(Commit(after=row, expected_version=row.version, incident=incident(number, model)))
    assert [found.id for found in world.store.incidents(None, 10)] == ["i3", "i2", "i1"]
    assert [found.id for found in world.store.incidents(None, 2)] == ["i3", "i2"]
    assert [found.id for found in world.store.incidents("a", 10)] == ["i2", "i1"]
    assert world.store.incidents("nobody", 10) == ()
    assert world.store.incidents(None, 0) == ()


def test_incidents_are_bounded_and_the_oldest_go(world: World) -> None:
    row = world.put_new(instance())
    for number in range(1, 9):
        row = world.store.commit(Commit(after=row, expected_version=row.version, incident=incident(number)))
    assert [found.id for found in world.store.incidents(None, 100)] == ["i8", "i7", "i6", "i5", "i4"]
    assert world.store.incident("i3") is None


def test_once_lets_one_through_within_its_time(world: World) -> None:
    assert world.store.once("tick", 1000)
    assert not world.store.once("tick", 1000)
    assert world.store.once("other", 1000)
    world.pass_time(1.1)
    assert world.store.once("tick", 1000)


def test_a_heartbeat_ends_and_is_remembered(world: World) -> None:
    world.store.beat("gpu-1", {"boot_id": "b", "runs": {"vllm-0": 5}}, 1.0)
    world.store.beat("gpu-2", {}, 600)
    alive = world.store.hosts()
    assert set(alive) == {"gpu-1", "gpu-2"}
    assert {name: alive["gpu-1"][name] for name in ("boot_id", "runs")} == {"boot_id": "b", "runs": {"vllm-0": 5}}
    assert 0 <= alive["gpu-1"]["age_s"] < 1.0
    assert "alive" not in alive["gpu-1"]
    world.pass_time(1.1)
    assert set(world.store.hosts()) == {"gpu-2"}
    known = world.store.known_hosts()
    assert {name: info["alive"] for name, info in known.items()} == {"gpu-1": False, "gpu-2": True}
    assert known["gpu-1"]["boot_id"] == "b"
    assert known["gpu-1"]["age_s"] >= 1.0
    world.store.beat("gpu-1", {"boot_id": "c"}, 600)
    assert world.store.hosts()["gpu-1"]["boot_id"] == "c"


def test_small_values_end_by_themselves(world: World) -> None:
    world.store.put_many({"front/b": 0, "front/a": {"in_flight": 3}}, 600)
    world.store.put("front/b", [1, "ü", None], 1.0)
    world.store.put("brake", True, 600)
    assert world.store.get("front/a") == {"in_flight": 3}
    assert world.store.get_many("front/") == {"front/a": {"in_flight": 3}, "front/b": [1, "ü", None]}
    world.pass_time(1.1)
    assert world.store.get("front/b") is None
    assert world.store.get_many("front/") == {"front/a": {"in_flight": 3}}
    world.store.put("front/a", 2, 600)
    assert world.store.get("front/a") == 2
    world.store.remove("front/a")
    world.store.remove("front/a")
    assert world.store.get("front/a") is None
    assert world.store.get_many("") == {"brake": True}
    assert world.store.get_many("nothing") == {}


def test_queue_depths_name_every_queue(world: World) -> None:
    assert world.store.queue_depths(["control", "gpu.gpu-1"]) == {"control": 0, "gpu.gpu-1": 0}
    assert world.store.queue_depths([]) == {}


def test_info_says_what_the_doctor_asks(world: World) -> None:
    said = world.store.info()
    assert said["maxmemory_policy"] == "noeviction"
    assert said["aof_enabled"] == 1
    assert said["appendfsync"] == "everysec"
    assert said["redis_version"]
