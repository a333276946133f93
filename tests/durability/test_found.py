"""What the walks have found once, step by step, so that it is found again in a second."""

from recovery.core.commanding import Verb
from tests.durability.simworld import World, memory_world


def serving() -> World:
    world = memory_world()
    world.settle()
    return world


def good_while(world: World, turns: int = 6) -> None:
    """Ticks with everything delivered."""
    for _ in range(turns):
        world.step += 1
        world.advance(1.0)
        world.tick()
        for message in [each for each in world.bag.messages if each.eta <= world.clock.now]:
            world.bag.messages.remove(message)
            world.deliver(message)


def test_a_stop_that_the_host_knows_survives_a_redis_that_forgot_it() -> None:
    """The host has written the stop down; Redis loses that second and says again that it is to run."""
    world = serving()
    world.command("a", Verb.STOP, force=True)
    world.boot("h1")
    assert world.hosts["h1"].read_record("a-0").desired == "stopped"
    world.step += 1
    world.forget_last_second()
    world.settle()  # the world raises if it is executed once more
    row = world.store.load("a-0")
    assert (row.state.value, row.desired.value) == ("stopped", "stopped")


def test_no_decision_is_made_on_a_row_that_is_behind() -> None:
    """Between that loss and the host's next join a look finds the server hung: its new token must not outrank the stop."""
    world = serving()
    run = world.hosts["h1"].current("a-0")
    assert run is not None
    run.hung = run.deaf_to_term = True
    good_while(world, 2)
    world.command("a", Verb.STOP)
    for message in list(world.bag.messages):
        world.deliver(message)
    assert world.hosts["h1"].read_record("a-0").desired == "stopped"
    world.step += 1
    world.forget_last_second()
    good_while(world, 20)
    world.settle()
    assert world.store.load("a-0").desired.value == "stopped"


def test_an_end_that_was_seen_while_redis_had_no_row_is_reported_later() -> None:
    """The watcher wakes once per end. What it could not tell anybody then is told by the next join."""
    world = serving()
    world.wipe()
    host = world.hosts["h2"]
    run = host.current("d-0")
    assert run is not None
    host.die("d-0", run, signal=9)
    world.ended("d-0")
    world.settle()
    row = world.store.load("d-0")
    assert row.state.value == "healthy"
    assert row.restarts_total == 1


def test_a_stopped_keeper_does_not_hide_the_end_of_a_server_without_a_url() -> None:
    """Only its process is looked at, and its keeper, which would tell, does not act: it must not load for ever and hold up others."""
    world = serving()
    host = world.hosts["h2"]
    run = host.current("d-0")
    assert run is not None
    run.frozen_keeper = True
    host.die("d-0", run, code=1)
    world.settle()
    assert world.store.load("d-0").restarts_total == 1
