"""Clients' API keys, their limits, and what the access log says."""

import asyncio
import json
from pathlib import Path

import httpx
import pytest

from recovery.frontdoor.keys import digest
from tests.frontdoor.world import Door, World, expected_text, whole
from tests.helpers import wait_until

BODY = {"model": "m", "prompt": "my secret prompt", "max_tokens": 4}


@pytest.fixture
def keyed(world: World, tmp_path: Path) -> tuple[Door, Path]:
    (sim,) = world.sims(1, "--api-key", "upstream", "--tokens-per-s", "100")
    keys = tmp_path / "keys.json"
    rows = [
        {"name": "alice", "sha256": digest("sk-alice")},
        {"name": "bob", "sha256": digest("sk-bob"), "rate_per_s": 0.01, "burst": 3},
        {"name": "carol", "sha256": digest("sk-carol"), "concurrency": 2},
        {"name": "dave", "sha256": digest("sk-dave"), "models": ["other"]},
    ]
    keys.write_text(json.dumps({"keys": rows}))
    door = Door(world.folder)
    world.parts.append(door)
    door.tell([{"name": "m", "replicas": [sim.row(api_key="upstream")]}])
    return door.start(keys_file=keys, access_log=tmp_path / "access.log"), keys


def ask(door: Door, key: str | None) -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return httpx.post(f"{door.url}/v1/completions", json=BODY, headers=headers, timeout=60, trust_env=False)


def test_only_known_keys_get_in_and_the_replica_sees_its_own(keyed: tuple[Door, Path]) -> None:
    door, _ = keyed
    assert ask(door, "sk-alice").json()["choices"][0]["text"] == expected_text("my secret prompt", 4)
    for key in (None, "x", "sk-alic", "sk-alicee", digest("sk-alice"), "upstream"):
        answer = ask(door, key)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.get(f"{door.url}/v1/models", timeout=60).status_code == 401
    assert httpx.get(f"{door.url}/health", timeout=60).status_code == 200


def test_rate_concurrency_and_models_are_limited(keyed: tuple[Door, Path]) -> None:
    door, _ = keyed
    assert [ask(door, "sk-bob").status_code for _ in range(4)] == [200, 200, 200, 429]
    assert int(ask(door, "sk-bob").headers["retry-after"]) > 10
    assert (ask(door, "sk-dave").status_code, ask(door, "sk-alice").status_code) == (403, 200)
    listed = httpx.get(f"{door.url}/v1/models", headers={"authorization": "Bearer sk-dave"}, timeout=60).json()
    assert listed["data"] == []

    async def run() -> list[int]:
        headers = {"authorization": "Bearer sk-carol"}
        async with httpx.AsyncClient(base_url=door.url, timeout=60, trust_env=False, headers=headers) as client:
            body = {**BODY, "max_tokens": 100}
            return [o.status for o in await asyncio.gather(*(whole(client, "/v1/completions", body) for _ in range(5)))]

    assert sorted(asyncio.run(run())) == [200, 200, 429, 429, 429]
    assert ask(door, "sk-carol").status_code == 200


def test_a_changed_file_counts_and_a_broken_one_does_not(keyed: tuple[Door, Path]) -> None:
    door, keys = keyed
    keys.write_text("{")
    assert ask(door, "sk-alice").status_code == 200
    keys.write_text(json.dumps({"keys": [{"name": "erin", "sha256": digest("sk-erin")}]}))
    wait_until(lambda: ask(door, "sk-erin").status_code, 200, within_s=30)
    assert ask(door, "sk-alice").status_code == 401


def test_a_door_with_a_broken_keys_file_does_not_open(world: World, tmp_path: Path) -> None:
    door = Door(world.folder)
    world.parts.append(door)
    door.tell([])
    keys = tmp_path / "keys.json"
    keys.write_text('{"keys": [{"name": "x", "sha256": "not a digest"}]}')
    door.spawn("recovery.frontdoor", "--view", str(door.view), "--port", "0", "--keys-file", str(keys))
    assert door.ended() == 2
    assert "cannot read the API keys" in door.text


def test_the_access_log_has_no_prompts_and_no_keys(keyed: tuple[Door, Path], tmp_path: Path) -> None:
    door, _ = keyed
    assert ask(door, "sk-alice").status_code == 200
    log = tmp_path / "access.log"
    wait_until(lambda: log.exists() and log.read_text().count("\n"), 1, within_s=30)
    line = json.loads(log.read_text())
    assert (line["client"], line["model"], line["replica"], line["status"], line["attempts"]) == ("alice", "m", "m-0", 200, 1)
    assert line["took_s"] > 0
    assert "secret" not in log.read_text() and "sk-alice" not in log.read_text()
