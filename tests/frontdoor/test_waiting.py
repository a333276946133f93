"""Requests that no replica can take: held within bounds, refused with an honest Retry-After, or served by another model."""

import asyncio
import json
import time
from typing import Any

import httpx

from recovery.frontdoor.keys import digest
from tests.frontdoor.world import Door, Outcome, Sim, World, expected_text, stream, whole
from tests.helpers import wait_until

BODY = {"model": "m", "prompt": "Hello", "max_tokens": 4}


def tell(door: Door, sims: list[Sim], settings: dict[str, Any] | None = None, **row: Any) -> None:
    """Tell the door of a change, and wait until a replica that is not routable gets nothing any more."""
    door.tell([{"name": "m", "settings": settings or {}, "replicas": [sim.row(**row) for sim in sims]}])
    if row.get("routable") is False:
        wait_until(lambda: door.metric("recovery_frontdoor_replica_up"), 0.0, within_s=30)


def ask(door: Door, body: dict[str, Any] | None = None, **headers: str) -> httpx.Response:
    return httpx.post(f"{door.url}/v1/completions", json=body or BODY, headers=headers, timeout=60, trust_env=False)


def test_a_request_waits_for_a_replica_that_is_starting(world: World) -> None:
    (sim,) = world.sims(1)
    door = world.door([sim])
    sim.kill()
    tell(door, [sim], routable=False, state="starting", expected_start_s=30)

    async def run() -> Outcome:
        async with httpx.AsyncClient(base_url=door.url, timeout=60, trust_env=False) as client:
            task = asyncio.create_task(whole(client, "/v1/completions", BODY))
            await asyncio.to_thread(wait_until, lambda: door.metric("recovery_frontdoor_holding", model="m"), 1.0, 30)
            sim.start()
            await asyncio.to_thread(sim.ready)
            assert not task.done()
            tell(door, [sim], state="healthy", run="2")
            return await task

    assert asyncio.run(run()).text == expected_text("Hello", 4)


def test_over_the_bounds_503_says_when_to_come_back(world: World) -> None:
    (sim,) = world.sims(1)
    door = world.door([sim])
    began = time.time()
    settings = {"hold_timeout_s": 1.0, "hold_max_requests": 2}
    tell(door, [sim], settings, routable=False, state="starting", expected_start_s=40, starting_since=began)

    async def run() -> list[Outcome]:
        async with httpx.AsyncClient(base_url=door.url, timeout=60, trust_env=False) as client:
            return list(await asyncio.gather(*(whole(client, "/v1/completions", BODY) for _ in range(5))))

    wait_until(lambda: ask(door).status_code, 503, within_s=30)
    outcomes = asyncio.run(run())
    assert [o.status for o in outcomes] == [503] * 5
    assert all(30 <= int(o.headers["retry-after"]) <= 40 for o in outcomes)
    codes = sorted(httpx.Response(503, text=o.error).json()["error"]["code"] for o in outcomes)
    assert codes == ["hold_full"] * 3 + ["hold_timeout"] * 2


def test_the_queue_is_bounded_in_bytes(world: World) -> None:
    (sim,) = world.sims(1)
    door = world.door([sim])
    tell(door, [sim], {"hold_max_bytes": 1000}, routable=False, state="starting")
    wait_until(lambda: ask(door, {**BODY, "prompt": "x" * 2000}).status_code, 503, within_s=30)


def test_a_client_with_few_requests_gets_a_place_in_a_full_queue(world: World, tmp_path: Any) -> None:
    (sim,) = world.sims(1)
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": [{"name": name, "sha256": digest(name)} for name in ("greedy", "modest")]}))
    door = world.door([sim], keys_file=keys)
    tell(door, [sim], {"hold_max_requests": 6}, routable=False, state="starting", expected_start_s=3)

    async def run() -> tuple[list[Outcome], list[Outcome]]:
        base: dict[str, Any] = {"base_url": door.url, "timeout": 60, "trust_env": False}
        async with (
            httpx.AsyncClient(headers={"authorization": "Bearer greedy"}, **base) as greedy,
            httpx.AsyncClient(headers={"authorization": "Bearer modest"}, **base) as modest,
        ):
            many = [asyncio.create_task(whole(greedy, "/v1/completions", BODY)) for _ in range(6)]
            await asyncio.to_thread(wait_until, lambda: door.metric("recovery_frontdoor_holding", model="m"), 6.0, 30)
            few = [asyncio.create_task(whole(modest, "/v1/completions", BODY)) for _ in range(2)]
            await asyncio.to_thread(wait_until, lambda: sum(t.done() for t in many), 2, 30)
            tell(door, [sim])
            return [await t for t in many], [await t for t in few]

    many, few = asyncio.run(run())
    assert [o.status for o in few] == [200, 200]
    assert sorted(o.status for o in many) == [200] * 4 + [503] * 2


def test_failed_replicas_are_not_waited_for(world: World) -> None:
    (sim,) = world.sims(1)
    door = world.door([sim])
    sim.kill()
    tell(door, [sim], {"hold_timeout_s": 600}, routable=False, state="failed")
    wait_until(lambda: ask(door).status_code, 503, within_s=30)
    answer = ask(door)
    assert answer.json()["error"]["code"] == "failed" and "retry-after" not in answer.headers


def test_who_waits_is_told_when_the_last_replica_fails(world: World) -> None:
    (sim,) = world.sims(1)
    door = world.door([sim])
    sim.kill()
    tell(door, [sim], {"hold_timeout_s": 600}, routable=False, state="starting")

    async def run() -> Outcome:
        async with httpx.AsyncClient(base_url=door.url, timeout=60, trust_env=False) as client:
            task = asyncio.create_task(whole(client, "/v1/completions", BODY))
            await asyncio.to_thread(wait_until, lambda: door.metric("recovery_frontdoor_holding", model="m"), 1.0, 30)
            tell(door, [sim], {"hold_timeout_s": 600}, routable=False, state="failed")
            return await task

    assert asyncio.run(run()).status == 503


def test_comments_keep_a_held_stream_alive(world: World) -> None:
    (sim,) = world.sims(1)
    door = world.door([sim], hold_comments_s=0.2)
    tell(door, [sim], routable=False, state="starting")

    async def run() -> list[str]:
        lines: list[str] = []
        async with (
            httpx.AsyncClient(base_url=door.url, timeout=60, trust_env=False) as client,
            client.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response,
        ):
            async for line in response.aiter_lines():
                lines.append(line)
                if line.startswith(":") and len([x for x in lines if x.startswith(":")]) == 3:
                    tell(door, [sim])
        return lines

    lines = asyncio.run(run())
    assert "data: [DONE]" in lines
    assert [line for line in lines if line.startswith(":")][:1] == [": waiting for a replica"]


def test_vllms_503_is_overload_and_another_replica_takes_it(world: World) -> None:
    sims = world.sims(2)
    door = world.door(sims)
    sims[0].fault(completion_status=503)
    assert [ask(door).status_code for _ in range(8)] == [200] * 8
    sims[1].fault(completion_status=503)
    answer = ask(door)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    sims[0].fault(completion_status=0)
    assert ask(door).status_code == 200
    assert door.metric("recovery_frontdoor_replica_up") == 2


def test_a_breaker_keeps_requests_from_a_replica_that_fails_them(world: World) -> None:
    sims = world.sims(2)
    door = world.door(sims)
    sims[0].fault(completion_status=500)
    assert [ask(door).status_code for _ in range(30)] == [200] * 30
    assert door.metric("recovery_frontdoor_retried_total", reason="error") < 15


def test_a_fallback_model_serves_when_all_replicas_are_failed(world: World) -> None:
    (small,) = world.sims(1, model="small")
    door = Door(world.folder)
    world.parts.append(door)
    dead = {"instance": "m-0", "model": "m", "host": "127.0.0.1", "port": 1, "routable": False}
    settings = {"fallback": "small"}
    door.tell(
        [
            {"name": "m", "settings": settings, "replicas": [{**dead, "state": "failed"}]},
            {"name": "small", "settings": {"fallback": "m"}, "replicas": [small.row()]},
        ]
    )
    door.start()
    answer = ask(door)
    assert answer.json()["choices"][0]["text"] == expected_text("Hello", 4)
    assert (answer.headers["x-recovery-fallback"], answer.json()["model"]) == ("small", "small")

    async def run() -> Outcome:
        async with httpx.AsyncClient(base_url=door.url, timeout=60, trust_env=False) as client:
            return await stream(client, "/v1/completions", BODY)

    streamed = asyncio.run(run())
    assert (streamed.text, streamed.headers["x-recovery-fallback"]) == (expected_text("Hello", 4), "small")
    assert door.metric("recovery_frontdoor_fallback_total", model="m", by="small") == 2

    failed = small.row(routable=False, state="failed")
    door.tell(
        [
            {"name": "m", "settings": settings, "replicas": [{**dead, "state": "failed"}]},
            {"name": "small", "settings": {"fallback": "m"}, "replicas": [failed]},
        ]
    )
    wait_until(lambda: ask(door).status_code, 503, within_s=30)  # and not for ever round in a circle


def test_a_replica_taken_out_finishes_its_streams_and_that_is_reported(world: World) -> None:
    sims = world.sims(2, "--tokens-per-s", "40")
    door = world.door(sims)

    async def run() -> list[Outcome]:
        async with httpx.AsyncClient(base_url=door.url, timeout=60, trust_env=False) as client:
            tasks = [asyncio.create_task(stream(client, "/v1/completions", {**BODY, "max_tokens": 60})) for _ in range(4)]
            busy = {"instance": "m-0", "in_flight": 2}
            await asyncio.to_thread(wait_until, lambda: any(busy.items() <= row.items() for row in door.activity()), True, 30)
            door.tell([{"name": "m", "replicas": [sims[0].row(routable=False, state="draining"), sims[1].row()]}])
            return [await task for task in tasks]

    outcomes = asyncio.run(run())
    assert [o.text for o in outcomes] == [expected_text("Hello", 60)] * 4
    assert door.metric("recovery_frontdoor_retried_total") == 0
    assert ask(door).status_code == 200
    assert door.metric("recovery_frontdoor_requests_total", replica="m-0") == 2
    assert any(row["tokens"] > 0 for row in door.activity() if row["instance"] == "m-0")
