"""What the walks have found once, step by step, so that it is found again in a second."""

import pytest

from recovery.core.commanding import Command, Verb, on_command
from recovery.core.decision import Decision
from recovery.core.failing import ExitSeen, on_exit
from recovery.core.fleet import Placement, Policy
from recovery.core.instance import Desired, Instance
from recovery.core.states import State
from tests.durability.simworld import World, memory_world
from tests.durability.test_walk import Walk


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


def test_a_start_that_redis_forgot_is_not_waited_for_for_ever() -> None:
    """
    Redis says again that the old run is to be ended, when the host has made the start that was to follow.

    The host ends what it finds, which is the new run; a token starts one run only, so another one is needed.
    """
    walk = Walk()
    walk.deliver(pick=0, keep=False)
    walk.crashes_again_and_again(instance="b-0", times=2)  # a look finds it first
    walk.something_comes_between(pick=0, at=0, other=("deliver", 0))
    before = walk.world.store.load("b-0")
    assert before.state.value == "starting" and walk.world.hosts["h1"].read_record("b-0").token == before.token
    walk.redis_loses_its_last_second()
    assert walk.world.store.load("b-0").state.value == "recycling"
    walk.teardown()
    row = walk.world.store.load("b-0")
    assert (row.state.value, row.restarts_total) == ("healthy", before.restarts_total + 1)


@pytest.mark.parametrize("verb", [Verb.START, Verb.RESET, Verb.RESTART])
def test_what_the_operator_asks_for_while_a_run_is_given_up_is_done(verb: Verb) -> None:
    """The budget is spent and the last run is being ended: a start, a restart or a reset asked for meanwhile must not be lost."""
    policy, place = Policy(restart_policy="on-failure", max_restarts=2), Placement(host="h", port=1, replica=0)
    spent = Instance(
        id="a-0",
        model="a",
        policy=policy,
        placement=place,
        state=State.RECYCLING,
        desired=Desired.RUNNING,
        token=7,
        run=7,
        used=2,
        gives_up=True,
    )
    ended = ExitSeen(token=7, at=100.0, signal=9)
    given_up = on_exit(spent, ended, 101.0, 0.0)
    assert given_up is not None and given_up.after.state is State.FAILED

    asked = on_command(spent, Command(verb=verb), 100.0)

    assert isinstance(asked, Decision)
    begun = on_exit(asked.after, ended, 101.0, 0.0)
    assert begun is not None and begun.after.state is State.RESTARTING
    assert begun.after.token > 7 and begun.after.not_before == 101.0
    assert begun.after.used == (0 if verb is Verb.RESET else 2)


def test_why_an_instance_has_failed_survives_a_redis_that_lost_everything() -> None:
    """A process that nobody can end needs a human, who must be told so also by the row that its host has made anew."""
    walk = Walk()
    walk.a_good_while()
    walk.goes_wrong(instance="b-0", what="stuck")
    walk.operator(model="b", verb=Verb.RESTART)
    walk.a_good_while()
    walk.a_good_while()
    before = walk.world.store.load("b-0")
    assert before.state is State.FAILED and "cannot end" in before.reason
    assert before.last_failure is not None and before.last_failure.cause == "unkillable"
    walk.redis_loses_everything()
    walk.crashes_again_and_again(instance="b-0", times=1)
    walk.teardown()
    after = walk.world.store.load("b-0")
    assert (after.state, after.reason) == (State.FAILED, f"{before.reason} (as its host remembers)")


def test_what_is_left_of_a_run_ends_when_it_can() -> None:
    """A process in state D takes its SIGKILL when it comes out of it, though the row is at rest and the disk was full."""
    walk = Walk()
    walk.a_good_while()
    walk.disk(full=True, host="h2")
    walk.keeper_dies(instance="c-0", server_too=False)
    walk.keeper_seen_ending(instance="c-0")
    walk.goes_wrong(instance="c-0", what="stuck")
    walk.crashes_again_and_again(instance="c-0", times=1)
    walk.join(host="h2")
    assert walk.world.hosts["h2"].current("c-0").lives  # type: ignore[union-attr]
    walk.teardown()
    assert walk.world.store.load("c-0").state is State.FAILED
    assert not walk.world.hosts["h2"].current("c-0").lives  # type: ignore[union-attr]
