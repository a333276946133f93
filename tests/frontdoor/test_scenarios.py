"""
The five scenarios that cost other proxies 8 to 832 requests: here none may fail, and every token comes exactly once.

Sixteen clients, two replicas. The view says "routable" throughout, as it does while Redis is away: what is known of
deaths is what the door sees itself.
"""

import asyncio
import signal

from tests.frontdoor.world import Load, World


async def _seconds(seconds: float) -> None:
    """Let an outage last: the scenario is defined by its length."""
    await asyncio.sleep(seconds)


def test_kill_one_of_two_while_answers_do_not_stream(world: World) -> None:
    sims = world.sims(2, "--tokens-per-s", "100")
    door = world.door(sims)

    async def run() -> Load:
        async with Load(door, streaming=False, chat=True, tokens=40) as load:
            await load.finished(16)
            sims[0].kill()
            await load.finished(48)
        return load

    load = asyncio.run(run())
    assert load.failures() == []
    assert door.metric("recovery_frontdoor_retried_total") > 0


def test_kill_one_of_two_before_the_first_token(world: World) -> None:
    sims = world.sims(2, "--ttft-s", "1.0", "--tokens-per-s", "200")
    door = world.door(sims)

    async def run() -> Load:
        async with Load(door, streaming=True, chat=True, tokens=10) as load:
            while load.begun < 16:
                await asyncio.sleep(0.01)
            await _seconds(0.3)
            sims[0].kill()
            await load.finished(32)
        return load

    load = asyncio.run(run())
    assert load.failures() == []
    assert door.metric("recovery_frontdoor_retried_total") > 0
    assert door.metric("recovery_frontdoor_continued_total") == 0


def test_kill_one_of_two_in_mid_stream(world: World) -> None:
    sims = world.sims(2, "--tokens-per-s", "50")
    door = world.door(sims)

    async def run(chat: bool) -> Load:
        async with Load(door, streaming=True, chat=chat, tokens=100) as load:
            while load.begun < 16:
                await asyncio.sleep(0.01)
            await _seconds(1.0)
            sims[0].kill()
            await load.finished(20)
        return load

    for chat in (True, False):
        load = asyncio.run(run(chat))
        assert load.failures() == []
        continued = door.metric("recovery_frontdoor_continued_total", by="ids")
        assert continued >= 4
        sims[0].start()
        sims[0].ready()


def test_freeze_one_of_two_for_8_s_with_clients_that_give_up_after_6_s(world: World) -> None:
    sims = world.sims(2, "--tokens-per-s", "100")
    door = world.door(sims)

    async def run(streaming: bool) -> Load:
        async with Load(door, streaming=streaming, chat=True, tokens=60, timeout_s=6.0) as load:
            await load.finished(8)
            sims[0].signal(signal.SIGSTOP)
            await _seconds(8.0)
            sims[0].signal(signal.SIGCONT)
            await load.finished(16)
        return load

    for streaming in (False, True):
        load = asyncio.run(run(streaming))
        assert load.failures() == []


def test_both_down_for_5_s(world: World) -> None:
    sims = world.sims(2, "--tokens-per-s", "100")
    door = world.door(sims)

    async def run(streaming: bool) -> Load:
        async with Load(door, streaming=streaming, chat=True, tokens=60) as load:
            await load.finished(16)
            for sim in sims:
                sim.kill()
            await _seconds(5.0)
            for sim in sims:
                sim.start()
            await load.finished(48)
        return load

    for streaming in (False, True):
        load = asyncio.run(run(streaming))
        assert load.failures() == []
    assert door.metric("recovery_frontdoor_held_total") >= 16


def test_one_replica_crashes_and_reloads_while_its_clients_wait(world: World) -> None:
    """
    One GPU, one replica: the clients see a pause, streams go on where they were cut.
    """
    (sim,) = world.sims(1, "--tokens-per-s", "50")
    door = world.door([sim])

    async def run() -> Load:
        async with Load(door, streaming=True, chat=True, tokens=100) as load:
            while load.begun < 16:
                await asyncio.sleep(0.01)
            await _seconds(1.0)
            sim.kill()
            sim.start("--load-s", "3")
            await load.finished(16)
        return load

    load = asyncio.run(run())
    assert load.failures() == []
    assert door.metric("recovery_frontdoor_continued_total", by="ids") >= 8
