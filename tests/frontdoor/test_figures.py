"""A door's figures on their way to the page: from the meters through the store."""

from recovery.adapters.memory_store import MemoryStore
from recovery.core.passing import KEY, passages
from recovery.frontdoor.figures import Figures
from recovery.frontdoor.meters import Meters
from tests.helpers import wait_until


def busy() -> Meters:
    """Meters of a model that had a bad day, and of one that nobody asked for."""
    meters = Meters()
    meters.model("idle").replica("idle-0").up = True
    meter = meters.model("m")
    for number, instance in enumerate(("m-0", "m-1", "")):
        meter.replica(instance).codes[503 if instance == "" else 200] += number + 1
    meter.replica("m-0").ttft.observe(0.04)
    meter.replica("m-1").ttft.observe(0.04)
    meter.replica("m-0").inter_token.observe(0.004)
    meter.held, meter.holding, meter.poisoned = 4, 2, 1
    meter.retried["broken"] += 1
    meter.retried["stall"] += 1
    meter.continued["ids"] += 1
    meter.refused["hold_full"] += 3
    return meters


def test_figures_are_told_and_added_up() -> None:
    store, meters = MemoryStore(), busy()
    doors = [Figures(store, name, every_s=0.01) for name in ("one", "two")]
    for door in doors:
        door.start(meters)
    try:
        wait_until(lambda: len(store.get_many(KEY)), 2, within_s=60)
    finally:
        for door in doors:
            door.stop()

    found = passages(store.get_many(KEY).values())

    assert set(found) == {"m"}
    told = found["m"]
    assert (told.doors, told.requests, told.errors) == (2, 12, 6)
    assert (told.held, told.holding, told.retried, told.continued, told.refused, told.cut) == (8, 4, 4, 2, 8, 0)
    assert 0.025 < told.ttft_s["0.99"] <= 0.05 and 0.0025 < told.inter_token_s["0.5"] <= 0.005


def test_news_are_told_too() -> None:
    store, meters = MemoryStore(), Meters()
    door = Figures(store, "one", every_s=0.01)
    door.start(meters)
    try:
        meters.model("m").replica("m-0").codes[200] += 1
        wait_until(lambda: {name: each.requests for name, each in passages(store.get_many(KEY).values()).items()}, {"m": 1}, within_s=60)
        meters.model("m").replica("m-0").codes[200] += 1
        wait_until(lambda: passages(store.get_many(KEY).values())["m"].requests, 2, within_s=60)
    finally:
        door.stop()
