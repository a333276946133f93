"""
The worker is killed before and after every single thing it does, and the outcome is that of an undisturbed one.

Every call to a port is a place to be cut: each write to disk, each commit, each signal, each spawn. Here over simulated
processes, all of them; `test_cuts_real.py` does it with real ones.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from recovery.core.commanding import Verb
from tests.durability.simworld import ONE, World, memory_world

INSTANCE, HOST = "b-0", "h1"
STEP_S, STEPS = 1.0, 8


@dataclass(frozen=True)
class Scenario:
    """What is done (`act`, by a worker that is cut) to a world that `prepare` has made."""

    name: str
    prepare: Callable[[World], None]
    act: Callable[[World], None]


def _serving(world: World) -> None:
    world.settle()


def _work(world: World) -> None:
    """The loop at work for a while: ticks, and whatever they have delivered."""
    for _ in range(STEPS):
        world.step += 1
        world.advance(STEP_S)
        world.tick()
        for message in [each for each in world.bag.messages if each.eta <= world.clock.now]:
            world.bag.messages.remove(message)
            if INSTANCE in (message.kwargs.get("instance"), *message.kwargs.get("instances", ())):
                world.deliver(message)


def _told(verb: Verb, *, force: bool = False, in_flight: int = 0) -> Callable[[World], None]:
    def prepare(world: World) -> None:
        world.settle()
        if in_flight:
            world.store.put(f"door:{INSTANCE}:door", {"in_flight": in_flight, "silent_s": 0.0}, 4.0)
        world.command("b", verb, force=force)

    return prepare


def _stopped_then_started(world: World) -> None:
    world.settle()
    world.command("b", Verb.STOP)
    world.settle()
    world.command("b", Verb.START)


def _crashed(world: World) -> None:
    world.settle()
    run = world.hosts[HOST].current(INSTANCE)
    assert run is not None
    world.hosts[HOST].die(INSTANCE, run, code=1)


def _keeper_gone(*, server_too: bool) -> Callable[[World], None]:
    def prepare(world: World) -> None:
        world.settle()
        run = world.hosts[HOST].current(INSTANCE)
        assert run is not None
        run.keeper = False
        if server_too:
            world.hosts[HOST].die(INSTANCE, run, signal=9)

    return prepare


def _hung(world: World) -> None:
    world.settle()
    run = world.hosts[HOST].current(INSTANCE)
    assert run is not None
    run.hung = run.deaf_to_term = True


def _deaf(world: World) -> None:
    """It takes no SIGTERM."""
    world.settle()
    run = world.hosts[HOST].current(INSTANCE)
    assert run is not None
    run.deaf_to_term = True
    world.command("b", Verb.RESTART)


def _wiped(world: World) -> None:
    world.settle()
    world.wipe()


def _end_seen(world: World) -> None:
    world.ended(INSTANCE)
    _work(world)


def _joined(world: World) -> None:
    world.join(HOST)
    _work(world)


SCENARIOS = (
    Scenario("first start", lambda _world: None, _work),
    Scenario("start", _stopped_then_started, _work),
    Scenario("stop", _told(Verb.STOP), _work),
    Scenario("forced stop", _told(Verb.STOP, force=True), _work),
    Scenario("drain and stop", _told(Verb.STOP, in_flight=2), _work),
    Scenario("restart", _told(Verb.RESTART), _work),
    Scenario("drain and restart", _told(Verb.RESTART, in_flight=2), _work),
    Scenario("restart of one that ignores SIGTERM", _deaf, _work),
    Scenario("crash", _crashed, _end_seen),
    Scenario("hang", _hung, _work),
    Scenario("adopt", _keeper_gone(server_too=False), _end_seen),
    Scenario("keeper and server gone", _keeper_gone(server_too=True), _end_seen),
    Scenario("rebuild after Redis was wiped", _wiped, _joined),
)


def outcome(world: World) -> dict[str, object]:
    """What counts of how it ended."""
    row = world.store.load(INSTANCE)
    alive = [run for host in world.hosts.values() for run in host.of(INSTANCE).runs.values() if run.lives]
    return {
        "state": row.state.value,
        "desired": row.desired.value,
        "alive": len(alive),
        "used": row.used,
        "manual": row.manual,
        "restarts": row.restarts_total,
        "starts": world.ghosts[INSTANCE].starts,
        "keepers": sum(run.keeper for run in alive),
    }


def played(scenario: Scenario, at: int, moment: str) -> tuple[dict[str, object], bool]:
    """The outcome with a cut there, and whether the place was reached."""
    world = memory_world(ONE)
    scenario.prepare(world)
    with world.hooked(at, moment) as hook:
        scenario.act(world)
    reached = hook.calls > at
    world.settle()
    return outcome(world), reached


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_cut_anywhere_changes_nothing(scenario: Scenario) -> None:
    """Before and after every port call, and with the answer of every call to Redis lost."""
    undisturbed, _ = played(scenario, 10**9, "before")
    places = 0
    for at in range(10_000):
        reached = False
        for moment in ("before", "after", "answer"):
            ended, here = played(scenario, at, moment)
            assert ended == undisturbed, f"{scenario.name}, {moment} of call {at}"
            reached = reached or here
        if not reached:
            break
        places += 1
    assert places >= 5, "the scenario hardly does anything"
