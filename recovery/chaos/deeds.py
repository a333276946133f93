"""What each fault does, and how it is taken back."""

import contextlib
import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from recovery.chaos.plan import Kind, Planned
from recovery.chaos.world import World
from recovery.core.commanding import Command, Verb

Back = Callable[[], None]

FILL = "fill"
FRESH_S = 15.0
"""A command this young may not have reached its host yet, on a machine that is busy with being broken."""
RUNNING_AGAIN_S = 30.0


@dataclass(frozen=True)
class Outage:
    """A time in which the operator wanted a model down. `until` None: still."""

    model: str
    since: float
    until: float | None = None


class Deeds:
    """Carries out faults. Remembers what the judge has to know: kills, operator's starts, and when a model was wanted down."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.kills: list[tuple[str, int, float]] = []  # instance, token, wall
        self.operator_starts: list[tuple[str, float]] = []
        self.outages: list[Outage] = []

    def possible(self) -> tuple[Kind, ...]:
        """The faults that can be made here."""
        missing = set() if self._world.disk else {Kind.DISK_FULL}
        if "api" not in self._world.manager.pids():
            missing |= {Kind.API_KILLED, Kind.API_FROZEN}
        return tuple(kind for kind in Kind if kind not in missing)

    def do(self, planned: Planned) -> tuple[str, Back | None] | None:
        """
        Do it; the target in words and how it is taken back (None: it is over at once). None: there is no target now.

        What a fault leaves for the loop to repair is never taken back.
        """
        with contextlib.suppress(ProcessLookupError):
            return self._do(planned)
        return None

    def _do(self, planned: Planned) -> tuple[str, Back | None] | None:
        world = self._world
        match planned.kind:
            case Kind.SERVER_KILLED:
                return self._at_server(planned, lambda name, pid: self._kill(name, pid))
            case Kind.SERVER_CRASHED:
                return self._at_server(planned, lambda name, _pid: self._order(name, {"crash": {"exit_code": 3}}))
            case Kind.SERVER_OOM:
                return self._at_server(planned, lambda name, _pid: self._order(name, {"serve_error": "oom"}))
            case Kind.SERVER_FROZEN:
                return self._at_server(planned, lambda _name, pid: world.freeze(pid))
            case Kind.ENGINE_KILLED | Kind.ENGINE_FROZEN:
                deed = world.freeze if planned.kind is Kind.ENGINE_FROZEN else _kill
                return self._at(planned, world.engine_pid, lambda _name, pid: deed(pid))
            case Kind.KEEPER_KILLED:
                return self._at(planned, world.keeper_pid, lambda _name, pid: _kill(pid))
            case Kind.KEEPER_AND_SERVER_KILLED:
                return self._at(planned, world.keeper_pid, self._kill_both)
            case Kind.KEEPER_FROZEN:
                return self._frozen_keeper(planned)
            case Kind.HOST_DOUBLED:
                world.double_host()
                return "host", world.single_host
            case Kind.HOST_HALF_OPEN:
                return f"{world.proxy.go_half_open()} connections", None
            case Kind.PARTS_KILLED:
                world.kill_redis()
                for pid in [pid for pid in world.manager.pids().values() if pid is not None]:
                    with contextlib.suppress(ProcessLookupError):
                        _kill(pid)
                return "all", self._redis_again(lambda: None)
            case Kind.HOST_KILLED | Kind.CONTROL_KILLED | Kind.BEAT_KILLED | Kind.API_KILLED:
                return self._part(planned, _kill, back=False)
            case Kind.HOST_FROZEN | Kind.CONTROL_FROZEN | Kind.BEAT_FROZEN | Kind.API_FROZEN | Kind.REDIS_FROZEN:
                return self._part(planned, world.freeze, back=True)
            case Kind.REDIS_KILLED:
                world.kill_redis()
                return "redis", self._redis_again(lambda: None)
            case Kind.REDIS_WIPED:
                world.kill_redis()
                return "redis", self._redis_again(world.wipe_redis, forgets=True)
            case Kind.REDIS_FORGOT:
                return self._redis_forgets()
            case Kind.DISK_FULL:
                return self._fill_disk(planned)
            case Kind.OPERATOR_RESTART:
                self._command("always", Verb.RESTART)
                self.operator_starts.append(("always-0", time.time()))
                return "always", None
            case Kind.OPERATOR_STOP:
                self._command("always", Verb.STOP)
                self.outages.append(Outage("always", time.time()))
                return "always", self._start_again

    # --- servers ---

    def _at_server(self, planned: Planned, deed: Callable[[str, int], None]) -> tuple[str, Back | None] | None:
        return self._at(planned, self._world.server_pid, deed)

    def _at(self, planned: Planned, find: Callable[[str], int | None], deed: Callable[[str, int], None]) -> tuple[str, Back | None] | None:
        """To the first instance, from the planned one on, that has what is looked for."""
        names = self._world.wanted()
        for at in range(len(names)):
            name = names[(planned.target + at) % len(names)]
            pid = find(name)
            if pid is not None:
                deed(name, pid)
                return name, None
        return None

    def _kill(self, instance: str, pid: int) -> None:
        view = self._world.host.look(instance)
        _kill(pid)
        if view.run is not None:
            self.kills.append((instance, view.run.token, time.time()))

    def _kill_both(self, instance: str, keeper: int) -> None:
        server = self._world.server_pid(instance)
        _kill(keeper)
        if server is not None:
            self._kill(instance, server)

    def _frozen_keeper(self, planned: Planned) -> tuple[str, Back | None] | None:
        """A keeper that does not act, and a server that dies meanwhile."""
        frozen: list[int] = []

        def deed(name: str, keeper: int) -> None:
            server = self._world.server_pid(name)
            self._world.freeze(keeper)
            frozen.append(keeper)
            if server is not None and planned.target % 2:
                self._kill(name, server)

        done = self._at(planned, self._world.keeper_pid, deed)
        return None if done is None else (done[0], lambda: self._world.resume(frozen[0]))

    def _order(self, instance: str, order: dict[str, object]) -> None:
        """Over the simulator's admin endpoint; a server that is just ending does not answer, and need not."""
        port = self._port(instance)
        body = json.dumps(order).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/admin/fault", body, {"Content-Type": "application/json"})
        with contextlib.suppress(OSError):
            urllib.request.urlopen(request, timeout=2.0).close()

    def _port(self, instance: str) -> int:
        record = self._world.host.read_record(instance)
        return record.port or self._world.ports()[instance]

    # --- parts ---

    def _part(self, planned: Planned, deed: Callable[[int], None], *, back: bool) -> tuple[str, Back | None] | None:
        name = {"host": "host", "control": "control", "clock": "beat", "api": "api", "redis": "redis"}[planned.kind.split()[0]]
        if name == "beat" and planned.target % 2:
            name = "beat2"
        pid = self._world.pid(name)
        if pid is None:
            return None
        deed(pid)
        return name, (lambda: self._world.resume(pid)) if back else None

    # --- Redis and disk ---

    def _redis_again(self, meanwhile: Back, *, forgets: bool = False) -> Back:
        def back() -> None:
            self._world.kill_redis()
            meanwhile()
            self._world.start_redis()
            if forgets:
                self._look_after_the_start()

        return back

    def _redis_forgets(self) -> tuple[str, Back | None]:
        """What was appended in the last second before a power cut is gone: the file is cut back to what it was then."""
        world = self._world
        before = world.redis_log_size()
        time.sleep(1.0)
        world.kill_redis()

        def cut() -> None:
            for path, size in before.items():
                if path.exists() and path.stat().st_size > size:
                    os.truncate(path, size)

        return "redis", self._redis_again(cut, forgets=True)

    def _fill_disk(self, planned: Planned) -> tuple[str, Back | None]:
        fill = self._world.instances / FILL
        _fill(fill)
        done = self._at_server(planned, self._kill)
        return f"disk, {done[0] if done else 'nobody'} killed", lambda: fill.unlink(missing_ok=True)

    # --- the operator ---

    def _command(self, model: str, verb: Verb) -> None:
        """Until it is accepted: an operator whose command fails gives it again."""
        for _ in _tries():
            with contextlib.suppress(Exception):
                if self._world.service.command(model, Command(verb=verb, override=True, by="chaos")).accepted:
                    return

    def _look_after_the_start(self) -> None:
        """A command whose second Redis lost, before any host knew of it, is gone: its operator looks, and gives it again."""
        if any(time.time() - at < FRESH_S for _, at in self.operator_starts) and not any(outage.until is None for outage in self.outages):
            self._command("always", Verb.START)

    def _start_again(self) -> None:
        self._command("always", Verb.START)
        self.operator_starts.append(("always-0", time.time()))
        outage = self.outages.pop()
        self.outages.append(Outage(outage.model, outage.since, time.time()))


def _tries() -> Iterator[None]:
    until = time.monotonic() + RUNNING_AGAIN_S
    while time.monotonic() < until:
        yield
        time.sleep(0.2)


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def _fill(path: Path) -> None:
    """Write until nothing fits any more."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"\0" * size)
