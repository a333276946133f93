"""
Random interleavings of everything that can happen, against the real decisions, and once more against the real Lua.

`make walk-long` takes 10,000 walks; what CI takes fits into two minutes of one core.
"""

import os
from collections.abc import Iterator
from functools import partial

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from recovery.core.commanding import Verb
from tests.durability.luaworld import LuaStore, lua_world
from tests.durability.simworld import World, memory_world
from tests.helpers import RedisServer

pytestmark = pytest.mark.timeout(36_000 if os.environ.get("RECOVERY_WALKS") else 1200)
LONG = os.environ.get("RECOVERY_WALKS")
"""How many walks instead of the few of CI."""
ASIS = os.environ.get("RECOVERY_WALKS_ASIS")
"""Set: a walk that breaks a rule is told as it is, not made shorter first, which takes minutes."""

COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "phases": (Phase.generate,) if ASIS else (Phase.generate, Phase.shrink),
    "report_multiple_bugs": False,
}
INSTANCES = ("a-0", "a-1", "b-0", "c-0", "d-0")
HOSTS = ("h1", "h2")
instances, hosts, picks = st.sampled_from(INSTANCES), st.sampled_from(HOSTS), st.integers(0, 59)
cuts = st.integers(0, 14)


class Walk(RuleBasedStateMachine):
    """One walk through one world. The world itself raises `BrokenRule`."""

    def __init__(self) -> None:
        super().__init__()
        self.world = self.make()

    def make(self) -> World:
        return memory_world()

    # --- the loop at work ---

    @rule(seconds=st.sampled_from((0.05, 0.5, 1.0, 2.5, 6.0, 12.0, 40.0)))
    def time_passes(self, seconds: float) -> None:
        self.world.advance(seconds)

    @rule(times=st.integers(1, 2))
    def tick(self, times: int) -> None:
        for _ in range(times):
            self.world.tick()

    @rule()
    def a_good_while(self) -> None:
        """Some ticks with everything delivered: without them a walk rarely gets anywhere."""
        for _ in range(6):
            self.world.advance(1.0)
            self.world.tick()
            for message in [each for each in self.world.bag.messages if each.eta <= self.world.clock.now]:
                self.world.bag.messages.remove(message)
                self.world.deliver(message)

    @rule(instance=instances, times=st.integers(1, 3))
    def crashes_again_and_again(self, instance: str, times: int) -> None:
        """A crash loop, so that walks get to where budgets end."""
        for _ in range(times):
            self.server_dies(instance, 1, False)
            self.a_good_while()

    @precondition(lambda self: self.world.bag.messages)
    @rule(pick=picks, keep=st.booleans())
    def deliver(self, pick: int, keep: bool) -> None:
        """Any message, at any time, perhaps not for the last time."""
        self._deliver(pick, keep)

    def _deliver(self, pick: int, keep: bool = False) -> None:
        messages = self.world.bag.messages
        if messages:
            message = messages[pick % len(messages)]
            if not keep:
                messages.remove(message)
            self.world.deliver(message)

    @precondition(lambda self: self.world.bag.messages)
    @rule(pick=picks)
    def lose(self, pick: int) -> None:
        messages = self.world.bag.messages
        messages.remove(messages[pick % len(messages)])

    @rule(host=hosts)
    def join(self, host: str) -> None:
        self.world.join(host)

    @rule(instance=instances)
    def reconcile(self, instance: str) -> None:
        self.world.reconcile(instance)

    @rule(instance=instances)
    def keeper_seen_ending(self, instance: str) -> None:
        self.world.ended(instance)

    # --- workers die, answers get lost, others come in between ---

    @precondition(lambda self: self.world.bag.messages)
    @rule(pick=picks, at=cuts, what=st.sampled_from(("before", "after", "answer")))
    def worker_dies_delivering(self, pick: int, at: int, what: str) -> None:
        with self.world.hooked(at, what):
            self._deliver(pick)

    @rule(host=hosts, at=cuts, what=st.sampled_from(("before", "after", "answer")))
    def worker_dies_joining(self, host: str, at: int, what: str) -> None:
        with self.world.hooked(at, what):
            self.world.join(host)

    @rule(instance=instances, at=cuts, what=st.sampled_from(("before", "after", "answer")))
    def worker_dies_reporting_an_end(self, instance: str, at: int, what: str) -> None:
        with self.world.hooked(at, what):
            self.world.ended(instance)

    @precondition(lambda self: self.world.bag.messages)
    @rule(
        pick=picks,
        at=cuts,
        other=st.one_of(
            st.tuples(st.just("deliver"), picks),
            st.tuples(st.just("die"), instances),
            st.tuples(st.just("stop"), instances),
            st.tuples(st.just("start"), instances),
            st.tuples(st.just("restart"), instances),
            st.tuples(st.just("reconcile"), instances),
            st.tuples(st.just("time"), st.just(11.0)),
            st.tuples(st.just("wipe"), st.just(0)),
            st.tuples(st.just("forget"), st.just(0)),
        ),
    )
    def something_comes_between(self, pick: int, at: int, other: tuple[str, object]) -> None:
        """While a worker is in the middle of a step, somebody else does something: a second worker, an operator, Redis."""
        with self.world.hooked(at, "between", partial(self._other, other)):
            self._deliver(pick)

    def _other(self, other: tuple[str, object]) -> None:
        match other:
            case ("deliver", int(pick)):
                self._deliver(pick)
            case ("die", str(instance)):
                self.server_dies(instance, 1, False)
            case ("reconcile", str(instance)):
                self.world.reconcile(instance)
            case ("time", float(seconds)):
                self.world.advance(seconds)
            case ("wipe", _):
                self.world.wipe()
            case ("forget", _):
                self.world.forget_last_second()
            case (str(verb), str(instance)):
                self.world.command(instance[0], Verb(verb))

    # --- servers and keepers ---

    @rule(instance=instances, code=st.sampled_from((0, 1, 137)), by_signal=st.booleans())
    def server_dies(self, instance: str, code: int, by_signal: bool) -> None:
        host = self.world.hosts[self.world.plans[instance].placement.host]
        run = host.current(instance)
        if run is not None and run.server:
            host.die(instance, run, **({"signal": 9} if by_signal else {"code": code}))

    @rule(instance=instances, server_too=st.booleans())
    def keeper_dies(self, instance: str, server_too: bool) -> None:
        host = self.world.hosts[self.world.plans[instance].placement.host]
        run = host.current(instance)
        if run is not None and run.keeper:
            run.keeper = False
            if server_too and run.server:
                host.die(instance, run, signal=9)

    @rule(instance=instances, what=st.sampled_from(("hung", "deaf_to_term", "stuck", "frozen_keeper")))
    def goes_wrong(self, instance: str, what: str) -> None:
        run = self.world.hosts[self.world.plans[instance].placement.host].current(instance)
        if run is not None and run.server:
            setattr(run, what, True)

    @rule(instance=instances)
    def keeper_thaws(self, instance: str) -> None:
        self.world.hosts[self.world.plans[instance].placement.host].thaw(instance)

    # --- hosts, wires, Redis ---

    @rule(host=hosts)
    def host_reboots(self, host: str) -> None:
        self.world.boot(host)

    @rule(host=hosts, seconds=st.sampled_from((-86_400.0, -30.0, -1.0, 1.0, 30.0, 86_400.0)))
    def host_clock_jumps(self, host: str, seconds: float) -> None:
        self.world.hosts[host].offset = seconds

    @rule(host=hosts, away=st.booleans())
    def partition(self, host: str, away: bool) -> None:
        (self.world.cut_off.add if away else self.world.cut_off.discard)(host)

    @rule(host=hosts, full=st.booleans())
    def disk(self, host: str, full: bool) -> None:
        self.world.hosts[host].disk_full = full

    @rule()
    def redis_loses_its_last_second(self) -> None:
        self.world.forget_last_second()

    @rule()
    def redis_loses_everything(self) -> None:
        self.world.wipe()

    # --- the operator ---

    @rule(model=st.sampled_from("abcd"), verb=st.sampled_from((Verb.START, Verb.STOP, Verb.RESTART, Verb.CHECK, Verb.RESET)))
    def operator(self, model: str, verb: Verb) -> None:
        self.world.command(model, verb)

    @rule(model=st.sampled_from("abcd"), stay_down=st.booleans())
    def operator_forces(self, model: str, stay_down: bool) -> None:
        self.world.command(model, Verb.STOP, force=True, stay_down=stay_down)

    # --- what must hold ---

    @invariant()
    def holds(self) -> None:
        self.world.check()
        self.world.step += 1

    def teardown(self) -> None:
        self.world.settle()


def test_random_walks() -> None:
    """At most one run, no old token, no start beyond the budget or against the operator; and at the end all is as the policy says."""
    walks = int(LONG or 1200)
    run_state_machine_as_test(Walk, settings=settings(max_examples=walks, stateful_step_count=30, derandomize=not LONG, **COMMON))


@pytest.fixture(scope="module")
def lua_store(redis_server: RedisServer) -> Iterator[LuaStore]:
    """A store on a real Redis whose scripts read the walk's clock."""
    store = LuaStore(redis_server.url)
    yield store
    store.close()


def test_random_walks_with_the_real_scripts(lua_store: LuaStore) -> None:
    """The same walks, committed by the Lua that runs in production."""

    class LuaWalk(Walk):
        def make(self) -> World:
            return lua_world(lua_store)

    walks = int(LONG or 2400) // 8
    run_state_machine_as_test(LuaWalk, settings=settings(max_examples=walks, stateful_step_count=30, derandomize=not LONG, **COMMON))
