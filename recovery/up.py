"""
An installation on one machine: brought up with everything it needs, taken down with everything it left.

The parts may die and be killed as they like; what must not happen is two of what there may be only one of. So a lock
keeps a second manager out, and what an earlier one left is found before anything is started.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from recovery import parts, wiring
from recovery.adapters import embedded_redis
from recovery.adapters.processes import Processes
from recovery.core.commanding import Command, Verb, on_command
from recovery.core.instance import Desired, Instance
from recovery.core.states import AT_REST
from recovery.errors import ConfigError, ConflictError, LeaseHeldError, RecoveryError, StoreUnavailableError
from recovery.part_list import LONGEST_DRAIN_S, Listed, RedisRunner
from recovery.part_restarts import Restarter
from recovery.parts import Manager, PartRunner, Say
from recovery.ports import Sender, Store
from recovery.service import Service
from recovery.settings import Settings, load_fleet, port_clashes
from recovery.watchdog import Watchdog

RESUME = "resume.json"
"""The instances that taking the installation down has stopped: the next start starts them again."""
ROTATE_S = 5.0
TWO_BEATS_S = 5.0
KEEPER_S = 10.0
"""A keeper whose server is dead and that has not ended by then is frozen."""
DIRECT_GRACE_S = 15.0
"""From SIGTERM to SIGKILL for models that are ended without the loop."""


class Ending:
    """What the operator asked for by signals: to stop, whether the models stay, whether to hurry."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.leave_models = False
        self.times = 0

    def listen(self) -> None:
        """Take SIGINT and SIGTERM (end), SIGUSR1 (end, the models stay). SIGHUP: a lost terminal ends nothing."""
        signal.signal(signal.SIGINT, self._end)
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGUSR1, self._end_parts)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _end(self, _number: int, _frame: FrameType | None) -> None:
        self.times += 1
        self.asked.set()

    def _end_parts(self, _number: int, _frame: FrameType | None) -> None:
        self.leave_models = True
        self.asked.set()


@dataclass(frozen=True)
class Place:
    """Where an installation is and what its parts are told."""

    settings: Settings
    environ: Mapping[str, str]

    @property
    def home(self) -> Path:
        """RECOVERY_HOME without links, as markers carry it."""
        return self.settings.home.resolve()

    @property
    def logs(self) -> Path:
        """Where the parts write."""
        return self.home / "logs"

    @property
    def embedded(self) -> bool:
        """Whether Redis is ours to start."""
        return self.settings.redis_url is None


def place(settings: Settings) -> Place:
    """The installation of these settings, its folders made; `ConfigError` when they cannot be."""
    for folder in (settings.home, settings.home / "logs", settings.run_dir):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(f"cannot make {folder}: {error.strerror}; set RECOVERY_HOME to a folder that can be written") from None
    told = {"RECOVERY_HOME": str(settings.home), "RECOVERY_RUN_DIR": str(settings.run_dir), "RECOVERY_HOST": settings.host}
    if settings.fleet is not None:
        told["RECOVERY_FLEET"] = str(settings.fleet.expanduser().absolute())
    tools = str(Path(sys.executable).parent)  # what is installed beside us (vllm, python) is what a fleet file means
    environ = {name: value for name, value in os.environ.items() if name != parts.MARKER}
    return Place(settings, {**environ, **told, "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', os.defpath)}"})


class Installation:
    """The parts of one home, kept alive by this process until `stop`."""

    def __init__(self, where: Place, listed: tuple[Listed, ...], store: Store, say: Say) -> None:
        self.place, self.listed = where, listed
        self._store = store
        self._say = say
        self._manager = Manager(say)
        self._lock = parts.HomeLock(where.home)
        self._rotating = threading.Event()

    def start(self, command: str, *, to_files: bool = True, redis: bool = True) -> None:
        """Take the home's lock, end what an earlier manager left, and start the parts. Nothing is started after an error."""
        self._lock.take(command)
        try:
            self._check()
            if redis and self.place.embedded:
                embedded_redis.start(self.place.settings.home, self.place.settings.run_dir)  # its errors are ours; the runner adopts it
                self._manager.start([RedisRunner(self.place.settings)])
            log = (lambda name: self.place.logs / f"{name}.log") if to_files else (lambda _name: None)
            environ = self.place.environ
            self._manager.start(PartRunner(each.part, self.place.home, environ, log(each.part.name)) for each in self.listed)
        except BaseException:
            self.stop()
            raise
        threading.Thread(target=self._rotate, name="rotate", daemon=True).start()
        managed = frozenset(each.part.name for each in self.listed)
        host = self.place.settings.host
        dog = Watchdog(self._store, host, managed, self._manager.recycle, self._say)
        restarter = Restarter(self.place.home, self.listed, self._manager, self._store, host, say=self._say, spare=dog.spare)
        for name, run in (("watchdog", dog.run), ("restarter", restarter.run)):
            threading.Thread(target=run, args=(self._rotating,), name=name, daemon=True).start()

    def _check(self) -> None:
        left = parts.find(self.place.home)
        handed = {each.part.name for each in self.listed if each.part.hands_over}
        old = [found.process for found in left if found.part not in handed]
        if left:
            names = ", ".join(sorted({found.part for found in left}))
            self._say(f"found parts that an earlier start left ({names}); ending them, the models live on")
        parts.end(old, 10.0)
        ours = {found.process.pid for found in left}
        host = Processes(self.place.home)
        problems = [text for each in self.listed for text in _ports_taken(each, host, ours)]
        if problems:
            raise ConfigError("cannot start:" + "".join(f"\n  {line}" for line in problems), tuple(problems))
        if not self.place.embedded:
            self._refuse_a_second_host()

    def _refuse_a_second_host(self) -> None:
        """On a Redis that others use too, a worker of another home may have this host's name. What lives beats every 3 s."""
        name = self.place.settings.host

        def beat() -> Any:
            return self._store.hosts().get(name, {}).get("wall")

        with contextlib.suppress(StoreUnavailableError):  # it may come later than we do
            first = beat()
            until = time.monotonic() + TWO_BEATS_S
            while first is not None and time.monotonic() < until:
                if beat() not in (None, first):
                    raise ConflictError(
                        f"cannot start: another worker of host {name!r} lives on the same Redis; "
                        "end it, or set another RECOVERY_HOST (or RECOVERY_KEY_PREFIX)"
                    )
                time.sleep(0.1)

    def pids(self) -> dict[str, int | None]:
        """The pid of every part, None for one that is down."""
        return self._manager.pids()

    def stop(self, *, hurry: bool = False) -> None:
        """End all parts, Redis last, and give the home free."""
        self._rotating.set()
        running = self._manager.pids()
        self._manager.stop([name for name in running if name != RedisRunner.name], within_s=10.0 if hurry else None)
        self._manager.stop()
        self._lock.release()

    def _rotate(self) -> None:
        while not self._rotating.wait(ROTATE_S):
            parts.rotate(self.place.logs)


def check_fleet(settings: Settings) -> None:
    """Raise `ConfigError` when the fleet file cannot be used here."""
    if settings.fleet is None:
        raise ConfigError("cannot start without a fleet file: pass --fleet FILE or set RECOVERY_FLEET")
    if clashes := port_clashes(load_fleet(settings.fleet, settings.host), settings):
        raise ConfigError("cannot start:" + "".join(f"\n  {line}" for line in clashes), clashes)


def _ports_taken(listed: Listed, host: Processes, ours: set[int]) -> Iterator[str]:
    for name, (address, port) in listed.ports.items():
        try:
            family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((address, port))
        except OSError as error:
            holder = host.port_holder(port)
            if holder is not None and holder.pid in ours:
                continue
            who = f"{holder.name} (pid {holder.pid}) listens there" if holder is not None and holder.pid else str(error.strerror or error)
            yield f"port {port} of the {listed.part.name} cannot be used: {who}; end it or set {name} to another port"


# --- models ------------------------------------------------------------------------------------------------------


class Models:
    """The models of this host, as taking an installation up and down handles them: through their rows, never behind the loop."""

    def __init__(self, wired: wiring.Wiring, sender: Sender) -> None:
        self._store = wired.store
        self._service = Service(wired.store, sender)
        self._host = wired.settings.host
        self._home = wired.settings.home

    def rows(self) -> tuple[Instance, ...]:
        """The rows of this host."""
        return tuple(row for row in self._store.load_all() if row.placement.host == self._host)

    def end(self, say: Callable[[tuple[Instance, ...]], None], hurry: Callable[[], bool]) -> bool:
        """
        Stop this host's models in good order and remember them for `resume`; True when all have ended.

        `say` is shown what is still up, again and again; once `hurry` is true, SIGKILL. Raises `StoreUnavailableError`.
        """
        ours = self._take_down()
        slowest = max((row.policy.drain_timeout_s + row.policy.stop_grace_s + row.policy.kill_deadline_s for row in ours), default=0.0)
        until, hurried = time.monotonic() + slowest + 30.0, False
        while True:
            left = tuple(row for row in self._store.load_many([row.id for row in ours]) if row.state not in AT_REST or row.run is not None)
            say(left)
            if not left:
                return True
            if time.monotonic() >= until:
                return False
            if hurry() and not hurried:
                hurried = True
                self._stop(left, force=True)
            time.sleep(0.1)

    def mark_stopped(self) -> None:
        """Say in the rows that this host's models are to be down, for when nobody is there to stop them; `resume` knows of them."""
        self._take_down()

    def resume(self) -> tuple[str, ...]:
        """Start again what `end` has stopped, unless it has been asked to run meanwhile; the instances started."""
        names, started = remembered(self._home), []
        command = Command(verb=Verb.START, by="recovery up")
        for name in names:
            with contextlib.suppress(LeaseHeldError):
                if self._service.committer.apply(name, lambda row, now: on_command(row, command, now)) is not None:
                    started.append(name)
        (self._home / RESUME).unlink(missing_ok=True)
        return tuple(started)

    def _take_down(self) -> list[Instance]:
        ours = [row for row in self.rows() if row.state not in AT_REST or row.run is not None]
        remember(self._home, [row.id for row in ours if row.desired is Desired.RUNNING])
        self._stop(ours, force=False)
        return ours

    def _stop(self, rows: list[Instance] | tuple[Instance, ...], *, force: bool) -> None:
        command = Command(verb=Verb.STOP, force=force, by="recovery down")
        for row in rows:
            with contextlib.suppress(LeaseHeldError):
                self._service.committer.apply(row.id, lambda row, now: on_command(row, command, now))


def remember(home: Path, names: list[str]) -> None:
    """Note instances that the next start is to start again; added to those noted before."""
    path = home / RESUME
    written = path.with_suffix(".tmp")
    written.write_text(json.dumps(sorted({*remembered(home), *names})))
    written.replace(path)


def remembered(home: Path) -> tuple[str, ...]:
    """The instances noted by `remember`."""
    try:
        return tuple(str(name) for name in json.loads((home / RESUME).read_text()))
    except (OSError, ValueError):
        return ()


def end_directly(home: Path, say: Say, grace_s: float = DIRECT_GRACE_S) -> int:
    """
    End this host's models without Redis or worker: SIGTERM, grace, SIGKILL for what is left; how many there were.

    Only what is proved to belong to a run of this home is touched. Nothing else is left when it returns, or it says so.
    """
    host = Processes(home)

    def left() -> list[str]:
        return [name for name in host.instances() if (view := host.look(name)).server_alive or view.keeper_alive or view.strays]

    names = left()
    if names:
        remember(home, [name for name in names if host.read_record(name).desired == "running"])
    began = asked_at = 0.0
    until = time.monotonic() + grace_s + 30.0
    while remaining := left():
        now = time.monotonic()
        began = began or now
        if now >= until:
            raise ConflictError(
                f"cannot end all processes of {', '.join(remaining)}: look at them by hand (`ps`), a process in state D waits"
            )
        again = now - asked_at >= 3.0  # vLLM can lose a SIGTERM while it loads
        for name in remaining:
            _end_one(host, name, ask=now - began < grace_s, again=again, frozen=now - began > grace_s + KEEPER_S)
        if again:
            asked_at = now
            say(f"ending {', '.join(remaining)}")
        time.sleep(0.1)
    return len(names)


def _end_one(host: Processes, name: str, *, ask: bool, again: bool, frozen: bool) -> None:
    """Ask a server to end, or end it, with all that is left of its runs."""
    view = host.look(name)
    if view.run is not None and view.server_alive and ask:
        if again:
            host.terminate(name, view.run.token)
        return
    if view.run is not None:
        host.kill(name, view.run.token)
        if view.keeper_alive and not view.server_alive and frozen:
            host.end_keeper(name, view.run.token)
    host.end_strays(name)


# --- down --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remains:
    """What there is of an installation."""

    manager: psutil.Process | None
    parts: tuple[parts.Found, ...]
    redis: embedded_redis.EmbeddedRedis | None
    models: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.manager or self.parts or self.redis or self.models)


def remains(home: Path) -> Remains:
    """Look for everything that runs on this home."""
    host = Processes(home)
    alive = tuple(name for name in host.instances() if (view := host.look(name)).server_alive or view.keeper_alive or view.strays)
    return Remains(parts.HomeLock(home).holder(), parts.find(home), embedded_redis.find(home), alive)


def down(wired: wiring.Wiring, sender: Sender, *, keep_models: bool, say: Say, show: Callable[[tuple[Instance, ...]], None]) -> bool:
    """End whatever runs on this home, in the order that hurts least; False when there was nothing."""
    home = wired.settings.home.resolve()
    left = remains(home)
    if not left:
        return False
    if not keep_models and left.models:
        _end_models(wired, sender, left, say, show)
    if left.manager is not None:
        say(f"ending `recovery up` (pid {left.manager.pid}) and its parts")
        with contextlib.suppress(psutil.Error):
            left.manager.resume()
            left.manager.send_signal(signal.SIGUSR1)
        until = time.monotonic() + LONGEST_DRAIN_S + 30.0
        while parts.lives(left.manager) and time.monotonic() < until:
            time.sleep(0.05)
        parts.end([left.manager], 0.0)
    found = parts.find(home)
    if found:
        say(f"ending {', '.join(sorted({each.part for each in found}))}")
        parts.end([each.process for each in found if each.part != "door"], 10.0)
        parts.end([each.process for each in found if each.part == "door"], LONGEST_DRAIN_S if keep_models else 5.0, hurry=True)
    if not keep_models and (count := end_directly(home, say)):
        say(f"ended what was left of {count} model{'s' if count > 1 else ''}")
    if (server := embedded_redis.find(home)) is not None:
        say(f"ending Redis (pid {server.pid})")
        embedded_redis.stop(server)
    return True


def _end_models(wired: wiring.Wiring, sender: Sender, left: Remains, say: Say, show: Callable[[tuple[Instance, ...]], None]) -> None:
    """Through the loop where it lives; what that leaves is ended directly later."""
    alive = {found.part for found in left.parts}
    models = Models(wired, sender)
    try:
        if {"host", "control", "beat"} <= alive and wired.settings.host in wired.store.hosts():
            models.end(show, lambda: False)
        else:
            say("no worker runs: the models are ended directly")
            models.mark_stopped()
    except StoreUnavailableError as error:
        say(f"{error}; the models are ended directly")
    except RecoveryError as error:
        say(str(error))


def wait_ready(installation: Installation, within_s: float, show: Callable[[list[str]], None], stop: threading.Event) -> list[str]:
    """Wait until every part does its work; the names of those that do not yet at the deadline, or when asked to stop."""
    until = time.monotonic() + within_s
    waiting = list(installation.listed)
    while waiting and time.monotonic() < until and not stop.is_set():
        waiting = [each for each in waiting if not _ready(each, installation.pids())]
        show([each.part.name for each in waiting])
        time.sleep(0.1)
    return [each.part.name for each in waiting]


def _ready(each: Listed, pids: Mapping[str, Any]) -> bool:
    return pids.get(each.part.name) is not None and each.ready()
