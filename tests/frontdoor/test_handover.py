"""Stopping and replacing a door: nobody notices."""

import asyncio
import signal

import httpx

from tests.frontdoor.world import Door, Load, Outcome, World, expected_text, stream
from tests.helpers import wait_until

BODY = {"model": "m", "prompt": "Hello", "max_tokens": 80}


def test_sigterm_finishes_what_is_in_flight(world: World) -> None:
    sims = world.sims(1, "--tokens-per-s", "40")
    door = world.door(sims)

    async def run() -> list[Outcome]:
        async with httpx.AsyncClient(base_url=door.url, timeout=60, trust_env=False) as client:
            tasks = [asyncio.create_task(stream(client, "/v1/completions", BODY)) for _ in range(4)]
            await asyncio.to_thread(wait_until, lambda: door.metric("recovery_frontdoor_stream_events_total"), lambda n: n > 8, 30)
            door.signal(signal.SIGTERM)
            return [await task for task in tasks]

    assert [o.text for o in asyncio.run(run())] == [expected_text("Hello", 80)] * 4
    assert door.ended() == 0


def test_a_drain_has_an_end_and_the_stream_is_told(world: World) -> None:
    sims = world.sims(1, "--tokens-per-s", "5")
    door = world.door(sims, drain_timeout_s=1.0)

    async def run() -> Outcome:
        async with httpx.AsyncClient(base_url=door.url, timeout=60, trust_env=False) as client:
            task = asyncio.create_task(stream(client, "/v1/completions", BODY))
            await asyncio.to_thread(wait_until, lambda: door.metric("recovery_frontdoor_stream_events_total"), lambda n: n > 1, 30)
            door.signal(signal.SIGTERM)
            return await task

    outcome = asyncio.run(run())
    assert "shutting down" in outcome.error and outcome.done
    assert door.ended() == 1


def test_a_successor_takes_over_under_load_and_no_request_is_lost(world: World) -> None:
    """
    Three doors one after the other on one socket, sixteen clients throughout.
    """
    sims = world.sims(2, "--tokens-per-s", "200")
    runtime = world.folder / "run"
    runtime.mkdir()
    doors = [world.door(sims, runtime_dir=runtime)]

    async def run() -> Load:
        async with Load(doors[0], streaming=True, chat=True, tokens=60) as load:
            for _ in range(2):
                await load.finished(24)
                successor = Door(world.folder)
                world.parts.append(successor)
                await asyncio.to_thread(successor.start, runtime_dir=runtime, port=doors[-1].port)
                doors.append(successor)
                await load.finished(24)
                assert await asyncio.to_thread(doors[-2].ended) == 0
        return load

    load = asyncio.run(run())
    assert load.failures() == []
    assert len({door.port for door in doors}) == 1 and len({door.pid for door in doors}) == 3
    assert doors[-1].metric("recovery_frontdoor_requests_total") > 0


def test_a_successor_that_dies_before_it_is_ready_changes_nothing(world: World) -> None:
    from recovery.frontdoor.handover import take_over

    (sim,) = world.sims(1)
    runtime = world.folder / "run"
    runtime.mkdir()
    door = world.door([sim], runtime_dir=runtime)
    successor = take_over(runtime)
    assert successor is not None
    successor.listener.close()
    successor._control.close()
    for _ in range(3):
        answer = httpx.post(f"{door.url}/v1/completions", json={**BODY, "max_tokens": 3}, timeout=60)
        assert answer.json()["choices"][0]["text"] == expected_text("Hello", 3)
    door.kill()
    assert take_over(runtime) is None  # the path is stale, and cleared away
