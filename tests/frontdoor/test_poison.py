"""A request that was in flight at two crashes is refused, and a third replica lives."""

import asyncio

import httpx
import pytest

from tests.frontdoor.world import Outcome, World, expected_text, stream, whole

POISON = "drink this"
BODY = {"model": "m", "prompt": f"please {POISON}", "max_tokens": 30}


@pytest.mark.parametrize("streaming", [False, True])
def test_poison_kills_two_and_not_a_third(world: World, streaming: bool) -> None:
    sims = world.sims(3, "--poison", POISON, "--tokens-per-s", "100", "--death-s", "0.1")
    door = world.door(sims)
    ask = stream if streaming else whole

    async def run() -> tuple[Outcome, Outcome, list[Outcome]]:
        async with httpx.AsyncClient(base_url=door.url, timeout=60, trust_env=False) as client:
            good = [asyncio.create_task(whole(client, "/v1/completions", {**BODY, "prompt": f"good {i}"})) for i in range(6)]
            first = await ask(client, "/v1/completions", BODY)
            again = await ask(client, "/v1/completions", BODY)
            return first, again, [await task for task in good]

    first, again, good = asyncio.run(run())
    assert (first.status, again.status) == (422, 422)
    assert "poison_request" in first.error and POISON not in first.error
    alive = [sim for sim in sims if sim.process is not None and sim.process.poll() is None]
    assert len(alive) == 1
    poisoned = [o for o in good if o.status == 422]
    assert [o.text for o in good if o.status == 200] == [expected_text(f"good {i}", 30) for i, o in enumerate(good) if o.status == 200]
    assert len(poisoned) <= 6
    events = door.events("poison")
    assert events and POISON not in str(events) and len(events[0]["data"]["runs"]) == 2
    assert door.events("crash")


def test_one_crash_proves_nothing(world: World) -> None:
    """
    The same body from sixteen clients, a crash, and another crash later: whoever has been answered is acquitted.
    """
    sims = world.sims(2, "--tokens-per-s", "50")
    door = world.door(sims)
    body = {"model": "m", "prompt": "Hello", "max_tokens": 50}

    async def run(victim: int) -> list[Outcome]:
        async with httpx.AsyncClient(base_url=door.url, timeout=60, trust_env=False) as client:
            tasks = [asyncio.create_task(stream(client, "/v1/completions", body)) for _ in range(8)]
            await asyncio.sleep(0.5)  # they are in mid-stream
            sims[victim].kill()
            return [await task for task in tasks]

    for victim in (0, 1):
        outcomes = asyncio.run(run(victim))
        assert [(o.status, o.text) for o in outcomes] == [(200, expected_text("Hello", 50))] * 8
        sims[victim].start()
        sims[victim].ready()
