"""What the doctor says: each thing that is wrong is named, with how to mend it; what is well is not."""

from typing import Any

import pytest

from recovery.core.doctoring import Facts, findings
from recovery.core.watching import Traces

NOW = 1_000_000.0
BEAT = {"age_s": 1.0, "served_at": NOW - 2, "up_s": 500.0, "wall": NOW - 1}
REDIS = {"redis_version": "7.0.15", "aof_enabled": 1, "maxmemory_policy": "noeviction", "used_memory": 1, "maxmemory": 0}
WELL: dict[str, Any] = {
    "redis": REDIS,
    "traces": Traces(now=NOW, tick_at=NOW - 1, hosts={"h": BEAT}),
    "disk_free": 1 << 40,
    "home": "/home",
}


def test_an_installation_that_is_well_has_nothing_to_mend() -> None:
    assert [each for each in findings(Facts(**WELL)) if each.level != "ok"] == []


@pytest.mark.parametrize(
    ("changed", "what", "level"),
    [
        pytest.param({"redis": {**REDIS, "aof_enabled": 0}}, "redis append-only file", "bad", id="no AOF"),
        pytest.param({"redis": {**REDIS, "maxmemory_policy": "allkeys-lru"}}, "redis eviction", "bad", id="evicts"),
        pytest.param({"redis": {**REDIS, "redis_version": "6.0.16"}}, "redis version", "bad", id="too old"),
        pytest.param({"redis": {**REDIS, "maxmemory": 100, "used_memory": 90}}, "redis memory", "warning", id="nearly full"),
        pytest.param({"redis": {**REDIS, "aof_last_write_status": "err"}}, "redis saving", "bad", id="MISCONF"),
        pytest.param({"redis": None, "redis_error": "refused"}, "redis", "bad", id="Redis away"),
        pytest.param({"traces": Traces(now=NOW, tick_at=NOW - 16, hosts={"h": BEAT})}, "clock", "bad", id="no tick"),
        pytest.param({"traces": Traces(now=NOW, tick_at=NOW, hosts={"h": {**BEAT, "served_at": NOW - 40}})}, "host h", "bad", id="deaf"),
        pytest.param({"traces": Traces(now=NOW, tick_at=NOW, hosts={"h": {**BEAT, "wall": NOW + 9}})}, "clock of h", "warning", id="skew"),
        pytest.param({"traces": Traces(now=NOW, tick_at=NOW)}, "hosts", "bad", id="no host"),
        pytest.param({"disk_free": 1 << 20}, "disk", "warning", id="disk"),
        pytest.param({"nvidia_device": True}, "gpu", "warning", id="driver"),
        pytest.param({"flower_open": "open"}, "flower", "bad", id="flower"),
        pytest.param({"unknown_settings": ("RECOVERY_HOEM",)}, "settings", "warning", id="misspelt"),
        pytest.param({"port_problems": ("a and b",)}, "ports", "bad", id="ports"),
        pytest.param({"fleet_problems": ("args: wrong",)}, "fleet file", "bad", id="fleet file"),
        pytest.param({"failed": ("m-0 has failed",)}, "model", "bad", id="failed model"),
        pytest.param({"brake": "on"}, "brake", "warning", id="brake"),
    ],
)
def test_what_is_wrong_is_named_with_how_to_mend_it(changed: dict[str, Any], what: str, level: str) -> None:
    wrong = [each for each in findings(Facts(**{**WELL, **changed})) if each.level != "ok"]

    assert [(each.what, each.level) for each in wrong] == [(what, level)]
    assert all(each.mend for each in wrong)
