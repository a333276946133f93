"""
Nothing grows without a bound: after a long workload every key either ends by itself or is bounded by the fleet.
"""

from typing import Any

import pytest
from redis.client import Pipeline

from recovery.adapters.redis_keys import HISTORY_TTL_S, Keys
from recovery.adapters.redis_store import RedisStore
from recovery.core.change import Commit, Count, Incident, ModelEvent
from tests.contract.test_redis_failures import every_call
from tests.contract.world import instance, on_host
from tests.helpers import RedisServer, wait_until

FLEET = 3
ROUNDS = 120


@pytest.fixture
def worked(redis_server: RedisServer, prefix: str) -> Any:
    """A store after a long day: commits, moves, incidents, values under ever new names."""
    store = RedisStore(redis_server.url, prefix, changes_kept=100, events_kept=100, incidents_kept=5)
    for call in every_call(store).values():
        call()
    rows = [store.commit(Commit(after=instance(f"m-{number}"), expected_version=0)) for number in range(FLEET)]
    for turn in range(ROUNDS):
        for number, row in enumerate(rows):
            incident = Incident(id=f"i{turn}-{number}", model="m", instance=row.id, host="h", token=5, opened_at=turn, cause="exit")
            after = row.evolve(placement=on_host(row, f"gpu-{turn % 4}"), due=1.0, look_at=1.0)
            said = {
                "events": (ModelEvent(kind="x"),) * 2,
                "counts": (Count(name="x_total", labels=(("model", "m"),)),),
                "incident": incident,
            }
            rows[number] = store.commit(Commit(after=after, expected_version=row.version, **said))
        store.add_event("other", ModelEvent(kind="y"))
        store.once(f"once-{turn}", 600_000)
        store.put(f"value-{turn}", turn, 0.001 if turn else 600)
        store.beat(f"host-{turn % 3}", {}, 10)
    wait_until(lambda: store.get_many("value-"), {"value-0": 0}, within_s=60)
    store.put("value-last", 1, 600)
    yield store
    store.close()


def sizes(store: RedisStore, prefix: str) -> dict[str, tuple[int, int]]:
    """Each key's number of members and its milliseconds to live (-1: for ever, -2: ended just now), without the prefix."""
    measure = {b"hash": "hlen", b"set": "scard", b"zset": "zcard", b"stream": "xlen", b"string": "strlen"}
    found = {}
    with store.url.client(timeout_s=30) as client:
        names: Any = client.scan_iter(f"{prefix}:*", count=10_000)
        for raw in names:
            kind: Any = client.type(raw)
            if kind == b"none":  # it ended while we looked
                continue
            name = raw.decode().removeprefix(f"{prefix}:")
            found[name] = (int(getattr(client, measure[kind])(raw)), int(client.pttl(raw)))  # type: ignore[arg-type]
    return found


def test_every_key_has_an_end_or_a_bound(worked: RedisStore, prefix: str) -> None:
    ids = FLEET + 1  # with the row of `every_call`
    hosts = 4
    bounds = {
        "rows": ids,
        "queue_hosts": hosts,
        "changes": 200,  # 100, and what is left of a block of 100
        "counters": 2,
        "incidents": 5,
        "values": 2,  # those that have not ended
        "row:": 9,  # fields
        "due:": ids,
        "looks:": ids,
    }
    for name, (size, ttl_ms) in sizes(worked, prefix).items():
        stem = name if name in bounds else name.split(":")[0] + ":"
        if stem in bounds:
            assert size <= bounds[stem], f"{name} has {size} members"
        else:
            assert ttl_ms != -1 and ttl_ms <= HISTORY_TTL_S * 1000, f"{name} never ends"


def test_the_number_of_keys_is_bounded_by_the_fleet(worked: RedisStore, prefix: str) -> None:
    names = list(sizes(worked, prefix))
    for stem, most in {"row:": FLEET + 1, "due:": 4, "looks:": 4, "events:": 3, "incident:": 5, "host:": 4}.items():
        assert len([name for name in names if name.startswith(stem)]) <= most, stem


def test_histories_are_bounded(worked: RedisStore, prefix: str) -> None:
    found = sizes(worked, prefix)
    assert found["events:m"][0] <= 200
    assert found["events:other"][0] <= 200


def test_a_removed_fleet_leaves_nothing_that_stays_for_ever(worked: RedisStore, prefix: str) -> None:
    for name in worked.ids():
        worked.delete(name)
    left = {name for name, (_, ttl_ms) in sizes(worked, prefix).items() if ttl_ms == -1}
    assert left <= {"changes", "counters", "incidents", "values"}


def test_a_host_is_not_forgotten_while_something_becomes_due_on_it(store: RedisStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit falls between the last look of `delete` and its transaction."""
    gone = store.commit(Commit(after=instance("gone-0", due=1.0), expected_version=0))
    begin, raced = Pipeline.multi, []

    def commit_first(pipe: Pipeline) -> None:
        if not raced:
            raced.append(store.commit(Commit(after=instance("new-0", due=1.0), expected_version=0)))
        begin(pipe)

    monkeypatch.setattr(Pipeline, "multi", commit_first)
    store.delete(gone.id)
    assert raced
    assert store.ids() == ("new-0",)
    assert store.hosts_with_rows() == ("gpu-1",)


def test_two_prefixes_share_no_key() -> None:
    one, two = vars(Keys("one")), vars(Keys("two"))
    assert set(one.values()).isdisjoint(two.values())
    assert len(set(one.values())) == len(one), "two kinds of key of one name"
