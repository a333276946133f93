"""
A simulated world for the real loop: hosts with disks, processes and clocks, a queue that loses and doubles, a Redis that forgets.

Everything that decides is the product's own: `HostService`, `Service`, `Committer`, the core. Only what they touch is made up:
processes, time, and the wires between them. The world checks at every exec what must never happen.
"""

import pickle
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recovery.adapters.memory_store import ManualClock, MemoryStore
from recovery.core.commanding import Command, Refused, Verb, on_command
from recovery.core.diagnosis import GpuReading
from recovery.core.fleet_file import load_fleet_text
from recovery.core.fleet_plan import plan
from recovery.core.host import ExitRecord, GoneRecord, HostRecord, HostView, PortHolder, RunRecord, Stray
from recovery.core.instance import Desired, Instance
from recovery.core.looking import Look
from recovery.core.states import PROBED
from recovery.errors import DiskError, LeaseHeldError, RecoveryError, SpawnError, StoreUnavailableError
from recovery.host.context import Clocks, HostContext
from recovery.host.repairs import Repairs
from recovery.host.service import HostService
from recovery.service import Service

LOAD_S = 2.0
FLEET = """{
  "max_loads_per_host": 1, "port_range": [9100, 9120],
  "llmModels": {
    "a": {"hosts": ["h1", "h2"], "replicas": 2, "max_restarts": 2, %(policy)s},
    "b": {"host": "h1", "restart_policy": "always", "max_restarts": 0, %(rest)s},
    "c": {"host": "h2", "restart_policy": "no", %(rest)s},
    "d": {"host": "h2", "restart_policy": "always", "max_restarts": 0, %(bare)s}
  }
}"""
ONE = """{"port_range": [9100, 9120], "llmModels": {"b": {"host": "h1", "restart_policy": "always", "max_restarts": 0, %(rest)s}}}"""
BARE = """"command": "sim", "restart_delay": 1, "max_restart_delay": 4, "health_check_interval": 5, "health_confirm_interval": 1,
    "startup_timeout_s": 20,
    "stable_s": 30, "stop_grace_s": 3, "kill_deadline_s": 6, "drain_timeout_s": 2, "busy_limit_s": 60, "hang_window_s": 5,
    "validate_s": 2"""
REST = f""""args": ["--port", "{{port}}"], "endpoints": {{"base_url": "http://{{host}}:{{port}}/v1"}}, {BARE}"""


class Cut(BaseException):
    """The worker is killed at this very point."""


class BrokenRule(AssertionError):
    """Something that must never happen has happened."""


@dataclass
class SimRun:
    """One life of a simulated server: its main process, its keeper, and whatever else of it still lives."""

    token: int
    spawned_at: float
    server: bool = True
    keeper: bool = True
    frozen_keeper: bool = False
    strays: int = 0
    hung: bool = False
    deaf_to_term: bool = False
    stuck: bool = False
    """In state D: a SIGKILL waits, and takes effect when it comes out of it."""
    condemned: bool = False

    @property
    def lives(self) -> bool:
        return self.server or self.strays > 0


@dataclass
class SimInstance:
    """What a host's disk and process table hold of one instance."""

    record: HostRecord | None = None
    run: RunRecord | None = None
    exit: ExitRecord | None = None
    gone: GoneRecord | None = None
    runs: dict[int, SimRun] = field(default_factory=dict)


class SimHost:
    """The `Host` port over simulated processes. The disk survives everything; processes survive all but their own end and a boot."""

    def __init__(self, name: str, world: "World") -> None:
        self.name, self._world = name, world
        self.boots, self.offset = 0, 0.0
        self.disk_full = False
        self.held: set[str] = set()
        self.kept: dict[str, SimInstance] = {}

    def of(self, instance: str) -> SimInstance:
        return self.kept.setdefault(instance, SimInstance())

    def current(self, instance: str) -> SimRun | None:
        kept = self.kept.get(instance)
        return kept.runs.get(kept.run.token) if kept is not None and kept.run is not None else None

    def wall(self) -> float:
        return self._world.clock.now + self.offset

    # --- the port ---

    def stay_ahead(self) -> None:
        return None

    def instances(self) -> tuple[str, ...]:
        return tuple(sorted(name for name, kept in self.kept.items() if kept.record is not None))

    def read_record(self, instance: str) -> HostRecord:
        return self.of(instance).record or HostRecord()

    def write_record(self, instance: str, record: HostRecord) -> None:
        if self.disk_full:
            raise DiskError(f"cannot write host.json of {instance}: no space")
        self.of(instance).record = record

    @contextmanager
    def step_lock(self, instance: str) -> Iterator[None]:
        if instance in self.held:
            raise LeaseHeldError(f"cannot act on {instance}: another step holds it")
        self.held.add(instance)
        try:
            yield
        finally:
            self.held.discard(instance)

    def look(self, instance: str) -> HostView:
        kept, current = self.of(instance), self.current(instance)
        live = current is not None and (current.server or current.keeper)
        strays = [
            Stray(pid=run.token % 10_000, name="sim", state="D" if run.stuck else "S")
            for run in kept.runs.values()
            if run.lives and not (live and run is current)
        ]
        return HostView(
            record=self.read_record(instance),
            run=kept.run,
            exit=kept.exit,
            gone=kept.gone,
            keeper_alive=current is not None and current.keeper,
            server_alive=current is not None and current.server,
            locked=any(run.keeper for run in kept.runs.values()),
            strays=tuple(strays),
            boot_id=str(self.boots),
        )

    def spawn(self, instance: str, token: int, argv: Sequence[str], env: Mapping[str, str], **_: Any) -> RunRecord:
        kept = self.of(instance)
        if any(run.keeper for run in kept.runs.values()):
            raise LeaseHeldError(f"cannot start a keeper for {instance}: another holds run.lock")
        if self.disk_full:
            raise DiskError(f"cannot record a run of {instance}: no space")
        self._world.executed(self, instance, token)
        kept.runs = {old: run for old, run in kept.runs.items() if run.lives or run.keeper}
        kept.runs[token] = SimRun(token, self._world.clock.now)
        kept.run = self._record_of(token, adopted=False)
        return kept.run

    def adopt(self, instance: str) -> RunRecord:
        kept, current = self.of(instance), self.current(instance)
        if current is None or not current.server:
            raise SpawnError(f"cannot adopt {instance}: nothing lives")
        if self.disk_full:
            raise DiskError(f"cannot record a run of {instance}: no space")
        if current.keeper:
            raise LeaseHeldError(f"cannot adopt {instance}: its keeper lives")
        current.keeper, current.frozen_keeper = True, False
        kept.run = self._record_of(current.token, adopted=True)
        return kept.run

    def terminate(self, instance: str, token: int) -> bool:
        run = self.of(instance).runs.get(token)
        if run is None or not run.server:
            return False
        if not run.deaf_to_term and not run.stuck and not run.hung:
            self.die(instance, run, code=0)
        return True

    def kill(self, instance: str, token: int) -> tuple[Stray, ...]:
        run = self.of(instance).runs.get(token)
        if run is not None and run.lives and run.stuck:
            run.condemned = True
        elif run is not None and run.lives:
            self.die(instance, run, signal=9)
            run.strays = 0
        return ()

    def end_keeper(self, instance: str, token: int) -> bool:
        run = self.of(instance).runs.get(token)
        if run is None or not run.keeper:
            return False
        run.keeper = False
        return True

    def end_strays(self, instance: str) -> tuple[Stray, ...]:
        current = self.current(instance)
        for token, run in list(self.of(instance).runs.items()):
            if run is not current or not (run.server or run.keeper):
                self.kill(instance, token)
        return ()

    def boot_clock(self) -> float:
        return self._world.clock.now

    def leased(self, instance: str) -> bool:
        return False

    def renew(self, instance: str, until: float) -> bool:
        return False

    def keeper_pidfd(self, instance: str) -> int | None:
        return None

    def port_holder(self, port: int) -> PortHolder | None:
        for name, kept in self.kept.items():
            run = self.current(name)
            if kept.record is not None and kept.record.port == port and run is not None and run.server:
                return PortHolder(pid=1, name="sim", ours=True, instance=name)
        return None

    def listens(self, instance: str, port: int) -> bool:
        run = self.current(instance)
        return run is not None and run.server

    def cpu_seconds(self, instance: str) -> float | None:
        return 0.0

    def read_log(self, instance: str, token: int, max_bytes: int) -> str:
        return ""

    def protect(self, instance: str, token: int) -> None:
        return

    def keeper_lives(self, instance: str) -> bool:
        run = self.current(instance)
        return run is not None and run.keeper

    # --- what happens to it ---

    def die(self, instance: str, run: SimRun, *, code: int | None = None, signal: int | None = None) -> None:
        """The server ends. Its keeper, if it lives, writes that down, ends the rest and goes."""
        kept = self.of(instance)
        run.server = False
        if run.keeper and not run.frozen_keeper:
            self._see_off(kept, run, code, signal)
        elif not run.keeper:
            run.strays = 1

    def thaw(self, instance: str) -> None:
        for run in self.of(instance).runs.values():
            if run.keeper and run.frozen_keeper:
                run.frozen_keeper = False
                if not run.server:
                    self._see_off(self.of(instance), run, None, 9)

    def boot(self) -> None:
        """All processes are gone, the disk is what it was."""
        self.boots += 1
        self.held.clear()
        for kept in self.kept.values():
            kept.runs = {}

    def _see_off(self, kept: SimInstance, run: SimRun, code: int | None, signal: int | None) -> None:
        kept.exit = ExitRecord(token=run.token, code=code, signal=signal, at=self.wall())
        kept.gone = GoneRecord(token=run.token, at=self.wall())
        run.strays, run.keeper = 0, False

    def _record_of(self, token: int, *, adopted: bool) -> RunRecord:
        return RunRecord(
            token=token, keeper_pid=1, keeper_start=1, server_pid=2, server_start=1, session=2, boot_id=str(self.boots),
            marker="", at=self.wall(), boottime=0.0, adopted=adopted,
        )  # fmt: skip


class _Cards:
    def readings(self) -> tuple[GpuReading, ...]:
        return ()

    def xids(self, gpus: Sequence[int], since: float) -> tuple[int, ...]:
        return ()

    def oom_killed(self, *_: object) -> bool:
        return False


@dataclass
class Message:
    """A task on its way."""

    task: str
    kwargs: dict[str, Any]
    queue: str
    eta: float


class Bag:
    """The `Sender` port: messages wait until the walk delivers, doubles or loses them."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.messages: deque[Message] = deque(maxlen=60)

    def send(self, task: str, kwargs: dict[str, Any], *, queue: str, countdown_s: float = 0.0, **_: Any) -> str | None:
        if task in ("recovery.restart_instance", "recovery.step_instance", "recovery.probe_host"):
            self.messages.append(Message(task, kwargs, queue, self._world.clock.now + countdown_s))
        return "id"


class Tap:
    """A port on its way to the service: every call can be the last one, be answered into the void, or let others in between."""

    def __init__(self, inner: Any, world: "World", host: SimHost, *, remote: bool) -> None:
        self._inner, self._world, self._host, self._remote = inner, world, host, remote

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name == "step_lock" or not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._remote and self._host.name in self._world.cut_off:
                raise StoreUnavailableError("cannot reach Redis")
            self._world.passing("before")
            result = found(*args, **kwargs)
            if self._world.passing("after") and self._remote:
                raise StoreUnavailableError("the answer was lost")
            return result

        return call


@dataclass
class Ghost:
    """What the world knows of an instance beside rows and disks: the judge's own memory."""

    last_exec: int = 0
    starts: int = 0
    allowed: int = 1
    forgiven: float = 0.0
    stopped_at_step: int | None = None


@dataclass
class _Hook:
    at: int
    what: str
    nested: Callable[[], None] | None = None
    calls: int = 0


class World:
    """Two hosts, one Redis, one queue, the whole loop."""

    def __init__(self, store: Any, clock: ManualClock, fleet: str = FLEET) -> None:
        self.store, self.clock = store, clock
        self.fleet = load_fleet_text(fleet % {"policy": f'"restart_policy": "on-failure", {REST}', "rest": REST, "bare": BARE}, "h1")
        self.plans = {planned.id: planned for planned in plan(self.fleet)}
        self.ids = tuple(self.plans)
        self.bag = Bag(self)
        self.hosts = {name: SimHost(name, self) for name in ("h1", "h2")}
        self.cut_off: set[str] = set()
        self.ghosts = {name: Ghost() for name in self.ids}
        self.step = 0
        self._hook: _Hook | None = None
        self.watched: dict[str, set[str]] = {}
        self.workers = {name: self._worker(host) for name, host in self.hosts.items()}
        self.service = Service(store, self.bag, lambda: self.fleet)
        self._saved: deque[tuple[float, object]] = deque(maxlen=8)
        for name in self.hosts:
            self.join(name)
        self.beat()
        self._save()

    def _worker(self, host: SimHost) -> HostService:
        self.watched[host.name] = watched = set()
        here = HostContext(
            name=host.name,
            store=Tap(self.store, self, host, remote=True),
            sender=self.bag,
            host=Tap(host, self, host, remote=False),
            fleet=lambda: self.fleet,
            clocks=Clocks(wall=host.wall, chance=lambda: 0.5),
            operator_env={},
            repairs=Repairs(host, _Cards(), _Cards(), {}, Path("/")),
            on_run=lambda instance: watched.add(instance),
        )
        return HostService(here)

    # --- what must never happen ---

    def executed(self, host: SimHost, instance: str, token: int) -> None:
        """A server is executed: the moment at which almost everything that must not happen would show."""
        ghost = self.ghosts[instance]
        for other in self.hosts.values():
            for run in other.of(instance).runs.values():
                if run.lives:
                    raise BrokenRule(f"{instance}: run {token} is executed while run {run.token} lives on {other.name}")
        if token <= ghost.last_exec:
            raise BrokenRule(f"{instance}: run {token} is executed after run {ghost.last_exec}")
        ghost.last_exec = token
        ghost.starts += 1
        limit = self.fleet.models[self.plans[instance].model].max_restarts
        if limit and ghost.starts > ghost.allowed + limit:
            raise BrokenRule(
                f"{instance}: start {ghost.starts} since the last forgiveness; {ghost.allowed} and {limit} restarts were allowed"
            )
        if ghost.stopped_at_step is not None and ghost.stopped_at_step < self.step:
            raise BrokenRule(f"{instance}: run {token} is executed though the operator had stopped it in an earlier step")
        if host.name != self.plans[instance].placement.host:
            raise BrokenRule(f"{instance}: executed on {host.name}")

    def check(self) -> None:
        """What must hold between steps."""
        for instance in self.ids:
            alive = [run.token for host in self.hosts.values() for run in host.of(instance).runs.values() if run.server]
            if len(alive) > 1:
                raise BrokenRule(f"{instance}: runs {alive} live at once")
            row = self.store.load(instance)
            if row is not None:
                self._check_forgiven(instance, row)
                if row.budget_spent and row.policy.max_restarts and row.used > row.policy.max_restarts:
                    raise BrokenRule(f"{instance}: {row.used} of {row.policy.max_restarts} restarts used")
                if row.token < row.last_ended or (row.run is not None and row.run > row.token):
                    raise BrokenRule(f"{instance}: token {row.token}, run {row.run}, last ended {row.last_ended}")

    def _check_forgiven(self, instance: str, row: Instance) -> None:
        ghost = self.ghosts[instance]
        if row.forgiven <= ghost.forgiven:
            return
        ghost.forgiven = row.forgiven
        run = self.hosts[row.placement.host].current(instance)
        served_s = self.clock.now - run.spawned_at if run is not None else 0.0
        if served_s < row.policy.stable_s:
            raise BrokenRule(f"{instance}: forgiven after {served_s:.1f} s")
        ghost.starts, ghost.allowed = 0, 1

    # --- hooks at the ports ---

    @contextmanager
    def hooked(self, at: int, what: str, nested: Callable[[], None] | None = None) -> "Iterator[_Hook]":
        """At the port call number `at` the worker dies "before" or "after" it, its "answer" is lost, or `nested` comes in "between"."""
        self._hook = hook = _Hook(at, what, nested)
        try:
            yield hook
        except Cut:
            for name in self.hosts:  # what a worker knew in memory is gone with it
                self.workers[name] = self._worker(self.hosts[name])
                self.join(name)
        finally:
            self._hook = None

    def passing(self, moment: str) -> bool:
        """Called around every port call of a worker; True: the answer gets lost."""
        hook = self._hook
        if hook is None:
            return False
        hook.calls += moment == "before"
        if hook.calls - 1 != hook.at or moment != ("before" if hook.what in ("before", "between") else "after"):
            return False
        self._hook = None
        match hook.what:
            case "before" | "after":
                raise Cut
            case "between" if hook.nested is not None:
                hook.nested()
        return hook.what == "answer"

    # --- what happens ---

    def advance(self, seconds: float) -> None:
        """Time goes on."""
        self.clock.advance(seconds)
        self.store.moved()
        self.beat()
        self._save()

    def beat(self) -> None:
        for name in self.hosts:
            if name not in self.cut_off:
                self.store.beat(name, {"wall": self.hosts[name].wall()}, 10.0)

    def tick(self) -> None:
        self.service.tick()

    def join(self, host: str) -> None:
        self._quietly(lambda: self.workers[host].join())

    def reconcile(self, instance: str) -> None:
        self._quietly(lambda: self.workers[self.plans[instance].placement.host].reconcile(instance))

    def ended(self, instance: str) -> None:
        """The watcher wakes for an instance: if the keeper that it watches is gone, it acts as `workers/watcher.py` does."""
        host = self.hosts[self.plans[instance].placement.host]
        watched = self.watched[host.name]
        if instance not in watched or host.keeper_lives(instance):
            return
        try:
            done = self.workers[host.name].ended(instance)
        except StoreUnavailableError:
            done = False
        except RecoveryError:
            done = True
        if done:
            watched.discard(instance)
            if host.keeper_lives(instance):
                watched.add(instance)

    def deliver(self, message: Message) -> None:
        worker = self.workers[message.queue.removeprefix("gpu.")]
        match message.task:
            case "recovery.restart_instance":
                self._quietly(lambda: self._restart(worker, message))
            case "recovery.step_instance":
                self._quietly(lambda: worker.step(message.kwargs["instance"]))
            case "recovery.probe_host":
                for instance in message.kwargs["instances"]:
                    self._quietly(lambda instance=instance: self.probe(worker, instance))

    def _restart(self, worker: HostService, message: Message) -> None:
        answer = worker.start(message.kwargs["instance"], message.kwargs["token"])
        if answer.outcome == "retry":
            kwargs = {**message.kwargs, "token": answer.token}
            self.bag.messages.append(Message(message.task, kwargs, message.queue, self.clock.now + answer.delay_s))

    def probe(self, worker: HostService, instance: str) -> None:
        row = worker.store.load(instance)
        if row is not None and row.state in PROBED and row.run is not None and row.placement.host == worker.name:
            worker.looked(instance, self._look(self.hosts[worker.name].current(instance), row))

    def _look(self, run: SimRun | None, row: Instance) -> Look:
        assert row.run is not None
        if row.base_url is None:
            return Look(run=row.run, http=False)
        if run is None or not run.server or run.token != row.run or self.clock.now - run.spawned_at < LOAD_S:
            return Look(run=row.run, health="refused", models="refused", message="refused")
        if run.hung:
            return Look(run=row.run, health="ok", models="ok", steps=5.0, completion="timeout", message="no answer")
        return Look(run=row.run, health="ok", models="ok", steps=self.clock.now, completion="ok")

    def command(self, model: str, verb: Verb, *, force: bool = False, stay_down: bool = True) -> None:
        """An operator's command; the judge notes what was accepted."""
        command = Command(verb=verb, force=force, stay_down=stay_down, override=True)
        for instance in [name for name, planned in self.plans.items() if planned.model == model]:
            outcome = self.service.committer.apply(instance, lambda row, now: on_command(row, command, now))
            if outcome is None or isinstance(outcome, Refused):
                continue
            ghost = self.ghosts[instance]
            match verb:
                case Verb.STOP if outcome.after.desired is Desired.STOPPED:
                    ghost.stopped_at_step = self.step
                case Verb.START | Verb.RESTART:
                    ghost.stopped_at_step = None
                    ghost.allowed += 1
                case Verb.RESET:
                    ghost.starts, ghost.allowed, ghost.forgiven = 0, 2, outcome.after.forgiven

    def boot(self, host: str) -> None:
        """The host is restarted: its runs end, at no cost to their budgets."""
        self.hosts[host].boot()
        for instance, planned in self.plans.items():
            if planned.placement.host == host:
                self.ghosts[instance].allowed += 1
        self._hook = None  # nobody is in the middle of anything any more
        self.workers[host] = self._worker(self.hosts[host])
        self.join(host)

    def forget_last_second(self) -> None:
        """Redis comes back with what it had up to a second ago."""
        for at, saved in reversed(self._saved):
            if self.clock.now - at <= 1.0:
                self.store.restore(saved)
                self._redis_lost()
                return

    def wipe(self) -> None:
        """Redis comes back empty."""
        self.store.wipe()
        self._redis_lost()

    def _redis_lost(self) -> None:
        """A stop that only Redis knew of may be forgotten with it."""
        self._saved.clear()
        for instance, ghost in self.ghosts.items():
            row = self.store.load(instance)
            on_disk = self.hosts[self.plans[instance].placement.host].read_record(instance)
            if not (row is not None and row.desired is Desired.STOPPED) and on_disk.desired != "stopped":
                ghost.stopped_at_step = None
        self.advance(1.5)

    def _save(self) -> None:
        self._saved.append((self.clock.now, self.store.save()))

    def _quietly(self, work: Callable[[], Any]) -> None:
        """As the tasks do it: our own errors are answers."""
        with suppress(RecoveryError):
            work()

    # --- coming to rest ---

    def settle(self, ticks: int = 120) -> None:
        """No more faults: everything must come to rest in so many ticks of a second."""
        self.cut_off.clear()
        self.bag.messages.clear()  # whatever was under way is lost: the rows alone must do
        for host in self.hosts.values():
            host.disk_full, host.offset = False, 0.0
            for instance, kept in host.kept.items():
                for run in list(kept.runs.values()):
                    run.stuck = False
                    if run.condemned:
                        host.kill(instance, run.token)
        for tick in range(ticks):
            self.step += 1
            for instance in self.ids:
                self.ended(instance)
            if tick % 5 == 0:
                for name in self.hosts:
                    self.join(name)
            self.advance(1.0)
            self.tick()
            for message in [each for each in self.bag.messages if each.eta <= self.clock.now]:
                self.bag.messages.remove(message)
                self.deliver(message)
            self.check()
            if tick >= 10 and tick % 5 == 4 and not self.restless():
                return
        raise BrokenRule(f"not at rest after {ticks} ticks: {self.restless()}")

    def restless(self) -> list[str]:
        """What is not as the policy says."""
        found = []
        for instance in self.ids:
            row = self.store.load(instance)
            alive = [run.token for host in self.hosts.values() for run in host.of(instance).runs.values() if run.lives]
            if row is None:
                found.append(f"{instance} has no row")
            elif not _rests(row, alive, kept=self.hosts[row.placement.host].keeper_lives(instance)):
                found.append(f"{instance} is {row.state.value}, wanted {row.desired.value}, run {row.run}, alive {alive}: {row.reason}")
        return found


def _rests(row: Instance, alive: list[int], *, kept: bool) -> bool:
    match row.state.value:
        case "healthy":
            return row.desired is Desired.RUNNING and alive == [row.run] and kept
        case "unhealthy" if row.policy.restart_policy == "no":
            return alive == [row.run]  # reported, not touched
        case "stopped":
            return row.desired is Desired.STOPPED and not alive
        case "completed":
            return not alive
        case "failed":
            unkillable = "cannot end" in row.reason or (row.last_failure is not None and row.last_failure.cause == "unkillable")
            entitled = row.budget_spent or row.policy.restart_policy == "no" or unkillable
            return entitled and (not alive or unkillable)
        case _:
            return False


class MemoryWorldStore(MemoryStore):
    """The fake store, as the walk uses it."""

    def moved(self) -> None:
        """Nothing to do: it reads the clock itself."""

    def save(self) -> object:
        """As the base, but fast: the walk saves after every step of time."""
        return pickle.dumps(self._state)

    def restore(self, saved: object) -> None:
        super().restore(pickle.loads(saved) if isinstance(saved, bytes) else saved)


def memory_world(fleet: str = FLEET) -> World:
    """A world on the store in memory."""
    clock = ManualClock()
    return World(MemoryWorldStore(clock), clock, fleet)
