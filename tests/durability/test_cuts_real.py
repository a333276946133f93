"""The worker is cut in the middle of starting, stopping, adopting and restarting real processes, and once more by SIGKILL."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.durability.luaworld import LuaStore
from tests.durability.realworld import Countdown, Cut, Rig, act, cut_here, outcome, prepare
from tests.helpers import RedisServer

pytestmark = pytest.mark.timeout(600)
SCENARIOS = ("start", "stop", "restart", "adopt", "crash")


@pytest.fixture
def store(redis_server: RedisServer) -> Iterator[LuaStore]:
    store = LuaStore(redis_server.url)
    store.begin()
    yield store
    store.close()


def played(home: Path, store: LuaStore, scenario: str, at: int, moment: str) -> tuple[dict[str, object], bool]:
    """The outcome with a cut there, and whether the place was reached."""
    store.begin()
    rig = Rig(home, store)
    try:
        prepare(rig, scenario)
        rig.cut = counter = Countdown(at, moment, cut_here)
        with contextlib.suppress(Cut):
            act(rig)
        rig.settle()
        return outcome(rig), counter.reached
    finally:
        rig.close()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_cut_anywhere_changes_nothing(tmp_path: Path, store: LuaStore, scenario: str) -> None:
    """Every third call, so that it stays within a minute; the simulated world takes every one."""
    undisturbed, _ = played(tmp_path / "whole", store, scenario, 10**9, "before")
    assert undisturbed["run is the one that lives"]
    for at in range(0, 10_000, 3):
        moment = ("before", "after")[at % 2]
        ended, reached = played(tmp_path / str(at), store, scenario, at, moment)
        assert ended == undisturbed, f"{scenario}, {moment} of call {at}"
        if not reached:
            return


@pytest.mark.parametrize(("scenario", "at"), [("start", 8), ("start", 12), ("stop", 6), ("restart", 10), ("crash", 5), ("adopt", 2)])
def test_kill_9_of_the_worker_changes_nothing(tmp_path: Path, store: LuaStore, redis_server: RedisServer, scenario: str, at: int) -> None:
    """A process of its own, killed in the middle of a call: what it held in memory, its locks and its descriptors are gone."""
    undisturbed, _ = played(tmp_path / "whole", store, scenario, 10**9, "before")
    store.begin()
    rig = Rig(tmp_path / "cut", store)
    try:
        prepare(rig, scenario)
        arguments = (tmp_path / "cut", redis_server.url.path, repr(store.clock.now), at, "after")
        command = [sys.executable, "-m", "tests.durability.realworld", *map(str, arguments)]
        ended = subprocess.run(command, cwd=Path(__file__).parents[2], timeout=120, check=False)
        assert ended.returncode == -signal.SIGKILL, "it was not killed where it was to be"
        store.clock.advance(30.0)
        store.moved()
        rig.settle()
        assert outcome(rig) == undisturbed
    finally:
        rig.close()
