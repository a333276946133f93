"""
Real keepers, real processes, a real Redis whose clock is moved by hand: one host with one model, and the loop over it.

Run as a program it is the worker that is killed: `python -m tests.durability.realworld HOME SOCKET NOW AT MOMENT`.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from recovery.adapters.processes import Processes
from recovery.adapters.redis_url import RedisUrl
from recovery.core.commanding import Command, Verb, on_command
from recovery.core.fleet_file import load_fleet_text
from recovery.core.instance import Instance
from recovery.core.looking import Look
from recovery.core.states import PROBED
from recovery.errors import RecoveryError
from recovery.host.context import Clocks, HostContext
from recovery.host.repairs import Repairs
from recovery.host.service import HostService
from recovery.service import Service
from tests.durability.luaworld import LuaStore
from tests.durability.simworld import Bag, Cut, Message, _Cards

INSTANCE, HOST = "m-0", "real"
FLEET = """{"llmModels": {"m": {"host": "real", "command": "sleep", "args": ["600"], "restart_policy": "always", "max_restarts": 0,
  "restart_delay": 1, "max_restart_delay": 4, "health_check_interval": 5, "stop_grace_s": 3, "kill_deadline_s": 20, "drain_timeout_s": 1,
  "validate_s": 1}}}"""
PATIENCE_S = 60.0


class Rig:
    """The loop over one real host. `cut` is called around every call that its worker makes."""

    def __init__(self, home: Path, store: LuaStore, cut: Callable[[str], None] = lambda moment: None) -> None:
        self.store, self.clock = store, store.clock
        self.fleet = load_fleet_text(FLEET, HOST)
        self.bag = Bag(self)
        self.processes = Processes(home)
        self.cut = cut
        self.service = Service(store, self.bag, lambda: self.fleet)
        self.worker = self.new_worker()

    def new_worker(self) -> HostService:
        """A worker that knows nothing but what Redis and the disk say."""
        host = _Cuttable(self.processes, self)
        here = HostContext(
            name=HOST,
            store=_Cuttable(self.store, self),
            sender=self.bag,
            host=host,
            fleet=lambda: self.fleet,
            clocks=Clocks(wall=time.time, chance=lambda: 0.5),
            operator_env={"PATH": os.environ["PATH"]},
            repairs=Repairs(self.processes, _Cards(), _Cards(), {}, self.processes.disk.home),
        )
        return HostService(here)

    def row(self) -> Instance:
        found = self.store.load(INSTANCE)
        assert found is not None
        return found

    def alive(self) -> list[int]:
        """The pids of every server of the instance."""
        view = self.processes.look(INSTANCE)
        mine = [view.run.server_pid] if view.run is not None and view.server_alive else []
        return [*mine, *(stray.pid for stray in view.strays)]

    def command(self, verb: Verb) -> None:
        self.service.committer.apply(INSTANCE, lambda row, now: on_command(row, Command(verb=verb, override=True), now))

    def turn(self, seconds: float = 1.0) -> None:
        """One turn of the loop: time, the watcher, a tick, and whatever the tick has delivered."""
        self.clock.advance(seconds)
        self.store.moved()
        self.store.beat(HOST, {}, 10.0)
        if self._keeper_gone():
            with suppress(RecoveryError):
                self.worker.ended(INSTANCE)
        self.service.tick()
        for message in [each for each in self.bag.messages if each.eta <= self.clock.now]:
            self.bag.messages.remove(message)
            with suppress(RecoveryError):
                self._deliver(message)

    def _keeper_gone(self) -> bool:
        return not self.processes.look(INSTANCE).keeper_alive

    def _deliver(self, message: Message) -> None:
        match message.task:
            case "recovery.restart_instance":
                self.worker.start(INSTANCE, message.kwargs["token"])
            case "recovery.step_instance":
                self.worker.step(INSTANCE)
            case "recovery.probe_host":
                row = self.store.load(INSTANCE)
                if row is not None and row.state in PROBED and row.run is not None:
                    self.worker.looked(INSTANCE, Look(run=row.run, http=False))

    def settle(self) -> None:
        """A fresh worker, and turns until all is at rest."""
        self.cut = lambda moment: None
        self.worker = self.new_worker()
        self.bag.messages.clear()
        until = time.monotonic() + PATIENCE_S
        rested = 0
        while rested < 3:
            with suppress(RecoveryError):
                self.worker.join()
            self.turn()
            rested = rested + 1 if self.at_rest() else 0
            assert time.monotonic() < until, f"not at rest: {self.row()}, alive {self.alive()}"
            if not rested:
                time.sleep(0.02)

    def at_rest(self) -> bool:
        row, alive = self.row(), self.alive()
        if row.desired.value == "stopped":
            return row.state.value == "stopped" and not alive
        return row.state.value == "healthy" and len(alive) == 1 and not self._keeper_gone()

    def kill_keeper(self) -> None:
        """SIGKILL to the keeper; returns when it is gone."""
        view = self.processes.look(INSTANCE)
        assert view.run is not None
        self.processes.end_keeper(INSTANCE, view.run.token)
        while not self._keeper_gone():
            time.sleep(0.005)

    def kill_server(self) -> None:
        """SIGKILL to the server; returns when its keeper has seen it off."""
        view = self.processes.look(INSTANCE)
        assert view.run is not None
        os.kill(view.run.server_pid, signal.SIGKILL)
        while not self._keeper_gone():
            time.sleep(0.005)

    def close(self) -> None:
        """End everything of it."""
        until = time.monotonic() + PATIENCE_S
        while (self.alive() or not self._keeper_gone()) and time.monotonic() < until:
            view = self.processes.look(INSTANCE)
            if view.run is not None:
                self.processes.kill(INSTANCE, view.run.token)
            self.processes.end_strays(INSTANCE)
            time.sleep(0.02)


class _Cuttable:
    """A port whose every call is a place to be cut."""

    def __init__(self, inner: Any, rig: Rig) -> None:
        self._inner, self._rig = inner, rig

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name == "step_lock" or not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            self._rig.cut("before")
            result = found(*args, **kwargs)
            self._rig.cut("after")
            return result

        return call


class Countdown:
    """Calls `deed` at the call number `at`, before or after it."""

    def __init__(self, at: int, moment: str, deed: Callable[[], None]) -> None:
        self.at, self.moment, self.deed, self.calls = at, moment, deed, 0

    @property
    def reached(self) -> bool:
        return self.calls > self.at

    def __call__(self, moment: str) -> None:
        self.calls += moment == "before"
        if self.calls - 1 == self.at and moment == self.moment:
            self.deed()


def cut_here() -> None:
    raise Cut


def act(rig: Rig, turns: int = 6) -> None:
    """What the worker that is cut does."""
    for _ in range(turns):
        rig.turn()
        if rig.at_rest():
            return
        time.sleep(0.02)


def prepare(rig: Rig, scenario: str) -> None:
    """Bring the world to where the scenario begins."""
    with suppress(RecoveryError):
        rig.worker.join()
    if scenario == "start":
        return
    rig.settle()
    match scenario:
        case "stop":
            rig.command(Verb.STOP)
        case "restart":
            rig.command(Verb.RESTART)
        case "adopt":
            rig.kill_keeper()
        case "crash":
            rig.kill_server()


def outcome(rig: Rig) -> dict[str, object]:
    """What counts of how it ended."""
    row = rig.row()
    return {
        "state": row.state.value,
        "desired": row.desired.value,
        "used": row.used,
        "restarts": row.restarts_total,
        "alive": len(rig.alive()),
        "keeper": not rig._keeper_gone(),
        "run is the one that lives": row.run
        == (view.run.token if (view := rig.processes.look(INSTANCE)).server_alive and view.run else None),
    }


def main(home: str, socket: str, now: str, at: str, moment: str) -> None:
    """The worker that is killed by SIGKILL at its own hand, in the middle of a call."""
    store = LuaStore(RedisUrl.unix(Path(socket)))
    store.clock.now = float(now)
    rig = Rig(Path(home), store, Countdown(int(at), moment, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    for _ in range(3):
        rig.service.tick()
        act(rig, 2)


if __name__ == "__main__":
    main(*sys.argv[1:])
