"""
The use cases of one GPU host: start, stop, adopt, report an end, look. The only code that touches processes.

Every step runs under the instance's `step.lock` and re-reads row and disk, so a late, lost or doubled message does
no harm. The order is always: disk before row, row before deed.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from recovery.committing import Committer
from recovery.core import braking, incidents, joining, stepping
from recovery.core.change import ModelEvent
from recovery.core.decision import Action, Decision, Failure, due_at
from recovery.core.failing import ExitSeen, Remedy, on_exit, on_spawn_failed, unkillable
from recovery.core.fleet import Fleet, InstancePlan, ModelSpec, digest, launch_digest
from recovery.core.fleet_plan import plan
from recovery.core.host import ExitRecord, HostRecord, HostView
from recovery.core.instance import Desired, Instance, Value
from recovery.core.launch import PORT, Launch, launch
from recovery.core.looking import Look, may_be_gone, on_look
from recovery.core.remedies import StepKind
from recovery.core.states import AT_REST, ENDING, PROBED, State
from recovery.errors import (
    ConfigError,
    DiskError,
    LeaseHeldError,
    SchemaError,
    SpawnError,
    StaleTokenError,
    UnknownModelError,
    VersionConflictError,
)
from recovery.ports import Host, Sender, Store
from recovery.repairing import Repairs

EARLY_S = 0.1
"""How much before its time a step is still taken: messages are timed by another clock than rows (as CLAIM_EARLY_S)."""
DISK_LOOK_S = 5.0
CLAIM_S = 10.0
"""Lease of a start: how long another hand keeps off; a spawn takes 12 ms, a step never more than 2 s."""
BRAKED_LOOK_S = 1.0
SOON_S = 0.5
"""A start due within this writes the host's record itself; writing it twice would cost two syncs on the way."""
EVIDENCE_TTL_S = 30 * 86_400.0
"""Shorter than the incident itself is kept: some 20 kB each, where the record has 2."""


class Started(Value):
    """What became of a start: `retry` carries the new token when the task itself should try again."""

    outcome: Literal["started", "adopted", "ended", "waits", "refused", "held", "locked", "failed", "retry"]
    reason: str = ""
    token: int | None = None
    delay_s: float = 0.0
    attempt: int = 0


class _Ended(NamedTuple):
    """A run's end that was committed, and the row as it was until then."""

    before: Instance
    decision: Decision


class _Place(NamedTuple):
    """One instance of the fleet file with what its row carries of the file; worked out once per file."""

    planned: InstancePlan
    spec: ModelSpec
    digest: str
    hosts: tuple[str, ...]


class Clocks(Value):
    """This host's clocks and chance, handed in so that tests can move them."""

    wall: Callable[[], float]
    chance: Callable[[], float]


class HostService:
    """One GPU host. Thread-safe: what must not overlap is serialised by `step.lock` and by the row's version."""

    def __init__(
        self,
        name: str,
        store: Store,
        sender: Sender,
        host: Host,
        fleet: Callable[[], Fleet],
        clocks: Clocks,
        operator_env: Mapping[str, str],
        repairs: Repairs,
        on_run: Callable[[str], None] = lambda _instance: None,
    ) -> None:
        self.name = name
        self.store = store
        self.host = host
        self.fleet = fleet
        self.clocks = clocks
        self.repairs = repairs
        self.on_run = on_run
        self._env = operator_env
        self._committer = Committer(store, sender)
        self._planned: tuple[Fleet | None, Mapping[str, _Place]] = (None, {})
        self._met: dict[str, int] = {}
        self._alive: dict[str, int] = {}
        self._idle: dict[str, int] = {}

    # --- start ---------------------------------------------------------------------------------------------------

    def start(self, instance_id: str, token: int) -> Started:
        """Start run `token` of an instance, if that is still what is wanted and nothing of an older run is in the way."""
        try:
            with self.host.step_lock(instance_id):
                try:
                    return self._start(self.store.claim(instance_id, token, CLAIM_S))
                except LeaseHeldError as error:
                    return Started(outcome="held", reason=str(error))
                except DiskError as error:
                    return self._not_yet(instance_id, token, str(error), DISK_LOOK_S)
        except StaleTokenError as error:
            return Started(outcome="refused", reason=str(error))
        except LeaseHeldError as error:
            return Started(outcome="locked", reason=str(error))

    def _start(self, row: Instance) -> Started:
        found = self._spec_of(row)
        if found is None:
            return self._wait(row, f"host {self.name} has no model {row.model!r} in its fleet file", 5.0)
        fleet, planned, spec = found
        view = self.host.look(row.id)
        raised = joining.caught_up(row, view.record, self.store.now())
        if raised != row:
            self._raise(row.id, view)
            if raised.token != row.token:
                return Started(outcome="refused", reason="this host has seen a newer token; the row is raised")
            row = raised
        if row.planned != planned.placement:  # the file moved it; what a remedy had chosen belongs to the old place
            kept = tuple(step for step in row.overrides if step.flag != PORT)
            row = row.evolve(placement=planned.placement, planned=planned.placement, overrides=kept)
        made = launch(spec, row.placement, row.overrides, self._env)
        holder = self.host.port_holder(made.port) if made.port else None
        verdict = stepping.before_start(row, view, port_free=holder is None, port_ours=holder is not None and holder.ours)
        match verdict.kind:
            case "refuse":
                return Started(outcome="refused", reason=verdict.why)
            case "adopt":
                return self._adopt(row, view)
            case "ended":
                ended = self._report_end(row.id, view)
                if ended is not None:
                    self._afterwards(ended, view)
                return Started(outcome="ended", reason=verdict.why)
            case "wait" if holder is not None and not holder.ours and not verdict.end_strays:
                return self._port_taken(row, fleet, planned, spec, f"port {made.port} is held by {holder.name} (pid {holder.pid})")
            case "wait":
                if verdict.end_strays:
                    self._end_all(row.id, view)
                    self._end_left_overs()
                return self._blocked(row, view, verdict.why)
            case "spawn":
                why = self._why_wait(row, fleet)
                return self._wait(row, why, BRAKED_LOOK_S) if why is not None else self._spawn(row, fleet, spec, made)

    def _why_wait(self, row: Instance, fleet: Fleet) -> str | None:
        """Limits on simultaneous loads, and the fleet brake."""
        brake = self._brake()
        rows = self.store.load_all()
        now = self.store.now()
        if brake is not None and brake.released_at is None and braking.over((other for other in rows if other.id != row.id), brake):
            self.store.put(braking.BRAKE_KEY, brake.evolve(released_at=now).model_dump(mode="json"), braking.BRAKE_TTL_S)
        return braking.why_wait(row, rows, fleet, brake, now)

    def _brake(self) -> braking.Brake | None:
        found = self.store.get(braking.BRAKE_KEY)
        return braking.Brake.model_validate(found) if found is not None else None

    def _put_brake_on(self, decision: Decision) -> None:
        """After a failure: stop mass repair if many instances failed with this one cause."""
        if decision.failure is None:
            return
        cause = decision.failure.cause
        brake = braking.should_brake(self.store.load_all(), cause, self.fleet(), self._brake(), self.store.now())
        if brake is not None:
            self.store.put(braking.BRAKE_KEY, brake.model_dump(mode="json"), braking.BRAKE_TTL_S)
            text = f"fleet brake put on: {len(brake.instances)} instances failed with {cause}; `recovery brake release` lifts it"
            self.store.add_event(
                decision.after.model, ModelEvent(kind="brake", text=text, data={"cause": cause, "instances": list(brake.instances)})
            )

    def _spawn(self, row: Instance, fleet: Fleet, spec: ModelSpec, made: Launch) -> Started:
        try:
            self._write(row.id, joining.recorded(row, self.host.read_record(row.id), started_at=self.clocks.wall()))
            self.host.spawn(
                row.id,
                row.token,
                made.argv,
                made.env,
                kill_deadline_s=row.policy.kill_deadline_s,
                log_bytes=fleet.log_max_bytes // 2,
                log_files=2,
                keep_logs=fleet.log_runs_kept,
                lease_s=row.policy.lease_s if row.policy.reschedule else None,
            )
        except SpawnError as error:
            return self._spawn_failed(row, error)
        except DiskError as error:
            return self._spawn_failed(row, SpawnError(str(error)))
        except LeaseHeldError as error:
            return self._wait(row, str(error), stepping.LOOK_AGAIN_S)
        placement = row.placement.model_copy(update={"port": made.port})
        place: dict[str, object] = {"placement": placement, "planned": row.planned, "base_url": made.base_url, "overrides": row.overrides}
        place |= {"launched": launch_digest(spec), "leased": row.policy.reschedule}
        return self._spawned(row, place, adopted=False)

    def _spawned(self, row: Instance, place: Mapping[str, object], *, adopted: bool) -> Started:
        """The row learns of the server; a newer decision means that this server has to go again."""

        def decide(now_row: Instance, now: float) -> Decision | None:
            decision = stepping.on_spawned(now_row, row.token, now, adopted=adopted)
            return decision.evolve(after=decision.after.evolve(**place)) if decision is not None else None

        if self._apply(row.id, decide) is None:
            self.host.kill(row.id, row.token)
            return Started(outcome="refused", reason="a newer decision was taken meanwhile; the server is ended again")
        self._lives(row.id, row.token)
        return Started(outcome="adopted" if adopted else "started", token=row.token)

    def _spawn_failed(self, row: Instance, error: SpawnError, *, retry: bool | None = None) -> Started:
        again = error.retry if retry is None else retry
        decision = self._apply(
            row.id,
            lambda now_row, now: on_spawn_failed(now_row, row.token, str(error), retry=again, now=now, u=self.clocks.chance()),
            send=False,
        )
        if decision is None:
            return Started(outcome="refused", reason="a newer decision was taken meanwhile")
        self._remember(decision.after)
        after = decision.after
        if after.state is State.FAILED:
            return Started(outcome="failed", reason=after.reason)
        wait_s = max(0.0, after.not_before - self.store.now())
        return Started(outcome="retry", reason=after.reason, token=after.token, delay_s=wait_s, attempt=after.attempt)

    def _port_taken(self, row: Instance, fleet: Fleet, planned: InstancePlan, spec: ModelSpec, why: str) -> Started:
        """A stranger's process is left alone: another port of the range is taken, or the start counts as failed."""
        free = next(iter(self.repairs.spare_ports(row, fleet, spec)), None) if spec.remedies else None
        if free is not None:
            why = f"{why}; taking port {free}"
            self._apply(row.id, lambda now_row, now: stepping.moved(now_row, row.token, free, planned.placement, why, now))
            return Started(outcome="waits", reason=why)
        return self._spawn_failed(row, SpawnError(f"cannot start {row.id}: {why}; end it or give the model another port"), retry=True)

    def _wait(self, row: Instance, why: str, wait_s: float) -> Started:
        return self._not_yet(row.id, row.token, why, wait_s)

    def _not_yet(self, instance_id: str, token: int, why: str, wait_s: float) -> Started:
        self._apply(instance_id, lambda row, now: stepping.not_yet(row, why, now, wait_s) if row.token == token else None)
        return Started(outcome="waits", reason=why)

    def _blocked(self, row: Instance, view: HostView, why: str) -> Started:
        """Something of an older run is in the way: looked at again until it is gone, or for `kill_deadline_s`."""
        decision = self._apply(
            row.id, lambda now_row, now: stepping.blocked(now_row, view, why, now) if now_row.token == row.token else None
        )
        if decision is not None and decision.after.state is State.FAILED:
            self._remember(decision.after)
            return Started(outcome="failed", reason=decision.reason)
        return Started(outcome="waits", reason=why)

    def _adopt(self, row: Instance, view: HostView) -> Started:
        if not view.keeper_alive:
            self.host.adopt(row.id)
        return self._spawned(row, {}, adopted=True)

    # --- stop ----------------------------------------------------------------------------------------------------

    def step(self, instance_id: str) -> str:
        """Take the next step of whatever the row says is due; returns what was done, for the task list."""
        row = self.store.load(instance_id)
        if row is None:
            return "no such row"
        if row.state is State.RESTARTING:
            return self.start(instance_id, row.token).outcome
        try:
            with self.host.step_lock(instance_id):
                return self._step(instance_id)
        except LeaseHeldError:
            return "held"

    def _step(self, instance_id: str) -> str:
        row = self.store.load(instance_id)
        if row is None:
            return "no such row"
        if row.due is None or self.store.now() < row.not_before - EARLY_S:
            return "not yet"  # each step sends the message of the next: a message that came twice must not make two trains of them
        view = self.host.look(instance_id)
        if view.gone is not None and view.gone.left and view.strays and not view.keeper_alive:
            left = ", ".join(f"{stray.name} (pid {stray.pid}, {stray.state})" for stray in view.strays)
            text = f"cannot end {left}; look at it by hand, then reset"
            decision = self._apply(instance_id, lambda now_row, now: unkillable(now_row, text, now) if now_row.state in ENDING else None)
            return decision.reason if decision else "nothing"
        ended = self._report_end(instance_id, view)
        if ended is not None:
            self._afterwards(ended, view)
            return "reported its end"
        if row.state in ENDING or row.state in PROBED:
            self._write(instance_id, joining.recorded(row, view.record))
        in_flight = self.in_flight(row)
        decision = self._apply(instance_id, lambda now_row, now: stepping.on_ending(now_row, view, in_flight, now))
        if decision is None:
            return "nothing to do"
        self._act(decision, view)
        if decision.after.state in (State.STOPPED, State.FAILED):
            self._remember(decision.after)
            if decision.after.desired is Desired.STOPPED:
                self._forget_if_gone(decision.after)
        return decision.reason

    def _act(self, decision: Decision, view: HostView) -> None:
        row = decision.after
        run = view.run.token if view.run is not None else row.run
        for action in decision.actions:
            match action:
                case Action.TERMINATE if run is not None:
                    self.host.terminate(row.id, run)
                case Action.KILL:
                    self._end_all(row.id, view)
                case _:
                    self._remember(row)

    def _end_all(self, instance_id: str, view: HostView) -> None:
        """SIGKILL to everything of the instance, the live run included; also to a keeper that does not act though its server is dead."""
        if view.run is not None:
            self.host.kill(instance_id, view.run.token)
            if view.keeper_alive and not view.server_alive and not view.strays:
                self.host.end_keeper(instance_id, view.run.token)
        self.host.end_strays(instance_id)

    def _end_left_overs(self) -> None:
        """SIGKILL to what is left of any instance's runs that are over: it may hold the card or the port that another needs."""
        for instance_id in self.host.instances():
            with contextlib.suppress(LeaseHeldError), self.host.step_lock(instance_id):
                self.host.end_strays(instance_id)

    def in_flight(self, row: Instance) -> int | None:
        """Requests that front doors have in flight at this instance; None when none of them reports."""
        reports = self.store.get_many(f"door:{row.id}:")
        return sum(int(report.get("in_flight", 0)) for report in reports.values()) if reports else None

    # --- ends ----------------------------------------------------------------------------------------------------

    def ended(self, instance_id: str) -> bool:
        """
        A keeper is gone: report how its run ended, or take over the server that outlived it.

        True when nothing is left to be done; False = somebody else holds the step, look again.
        """
        try:
            with self.host.step_lock(instance_id):
                self._alive.pop(instance_id, None)  # whatever becomes of this, the next join looks at it
                view = self.host.look(instance_id)
                if view.run is not None and view.server_alive and not view.keeper_alive:
                    self.host.adopt(instance_id)
                    self._lives(instance_id, view.run.token)
                    return True
                ended = self._report_end(instance_id, view)
        except LeaseHeldError:
            return False
        if ended is not None:
            self._afterwards(ended, view)
        return True

    def _report_end(self, instance_id: str, view: HostView) -> "_Ended | None":
        """Commit the end of the newest run if it has ended and the row does not know yet; `_afterwards` does what can wait."""
        record = view.ended(self.clocks.wall())
        row = self.store.load(instance_id)
        if record is None or row is None or not row.last_ended < record.token <= row.token:
            return None
        if row.state in ENDING and (view.keeper_alive or view.strays):
            return None  # over is over only when nothing of it is left; the next step looks again
        seen = self._exit_seen(row, record, view)
        if view.strays:
            self.host.end_strays(instance_id)

        def decide(now_row: Instance, now: float) -> Decision | None:
            return on_exit(joining.caught_up(now_row, view.record, now), seen, now, self.clocks.chance())

        decision = self._apply(row.id, decide)
        if decision is None:
            return None
        self._alive.pop(instance_id, None)
        after = decision.after
        if after.state is not State.RESTARTING or after.not_before > self.store.now() + SOON_S:
            self._remember(after)
        return _Ended(row, decision)

    def _afterwards(self, ended: "_Ended", view: HostView) -> None:
        """What a reported end leaves to be done; the next start does not wait for it."""
        decision = ended.decision
        if decision.failure is None:
            return
        if decision.after.used <= 1:
            self.host.protect(decision.after.id, decision.failure.token)
        self._put_brake_on(decision)
        self._keep_evidence(ended.before, decision.failure, view)
        if decision.step in (StepKind.FREE_GPU.value, StepKind.FREE_PORT.value):
            self._end_left_overs()

    def _raise(self, instance_id: str, view: HostView) -> None:
        """Raise a row that is behind to what this host has seen: Redis lost its last second, or everything."""

        def decide(row: Instance, now: float) -> Decision:
            after = joining.caught_up(row, view.record, now)
            if after.state is State.RESTARTING and after.token != row.token:
                after = after.evolve(lease_until=0.0, **due_at(now))  # the message of the higher token is lost
            return Decision(after=after, reason="raised to the host's record")

        self._apply(instance_id, decide)

    def _exit_seen(self, row: Instance, record: ExitRecord, view: HostView) -> ExitSeen:
        """The end of a run with its diagnosis. Ages are measured on this host's clock, instants are Redis' time."""
        at = self.store.now() - max(0.0, self.clocks.wall() - record.at)
        return self.repairs.exit_seen(row, record, view, self.fleet(), at=at)

    def _keep_evidence(self, row: Instance, failure: Failure, view: HostView) -> None:
        """Keep what a post-mortem wants of an outage's first failure, under the id of its incident; `row` is as it failed."""
        if row.incident is not None:
            return
        try:
            found = self.repairs.collect(row, failure.token, self.fleet(), view)
        except (OSError, DiskError, ConfigError) as error:  # a repair does not wait for its papers
            found = {"missing": str(error)[:300]}
        traffic = (self.store.get(f"traffic:{row.id}") or {}).get("last")  # what its server last said of itself
        self.store.put(f"evidence:{incidents.incident_id(row, failure)}", {**found, "metrics": traffic}, EVIDENCE_TTL_S)

    def _remember(self, row: Instance) -> None:
        """Bring the host's own record up to the row: what it needs to know when Redis has forgotten."""
        self._write(row.id, joining.recorded(row, self.host.read_record(row.id)))

    def _write(self, instance_id: str, record: HostRecord) -> None:
        self.host.write_record(instance_id, record)
        self._met[instance_id] = max(record.token, self._met.get(instance_id, 0))

    # --- leases --------------------------------------------------------------------------------------------------

    def renew(self, heard_at: float) -> None:
        """
        Put off the end of this host's leased runs; called after Redis has taken a heartbeat that was sent at `heard_at`.

        In that order no lease reaches further than the age of the heartbeat tells, which is what makes a move safe
        (core/leasing.py). A run whose model may not move any more gets a lease without end, once its row says that it
        has none; a row says that its run has one only when that is on disk.
        """
        for instance_id in list(self._alive):
            if self.host.leased(instance_id):
                self._renew_one(instance_id, heard_at)

    def _renew_one(self, instance_id: str, heard_at: float) -> None:
        try:
            row = self.store.load(instance_id)
        except SchemaError:  # a newer part wrote it, so it is left as it is: its server serves on by what the file says
            place = self._places(self.fleet()).get(instance_id)
            if place is not None:
                self.host.renew(instance_id, heard_at + place.spec.policy.lease_s)
            return
        if row is None:
            return
        if not row.policy.reschedule and not row.leased:
            self.host.renew(instance_id, math.inf)
        elif not row.policy.reschedule or self.host.renew(instance_id, heard_at + row.policy.lease_s):
            self._apply(instance_id, _lease_said)

    # --- looks ---------------------------------------------------------------------------------------------------

    def looked(self, instance_id: str, look: Look) -> None:
        """Commit what a look saw."""
        if look.http and look.ready and self._goes_on(instance_id, look):
            return
        row = self.store.load(instance_id)
        if row is None or row.run != look.run:
            return
        look = self._completed(row, look)
        if may_be_gone(row, look):
            self._end_idle_keeper(instance_id, look.run)
        if not look.alive:
            return
        view: HostView | None = None
        remedy: Remedy | None = None
        expected = on_look(row, look, self.store.now(), 0.0)
        if expected is not None and expected.failure is not None:
            view = self.host.look(instance_id)
            remedy = self.repairs.remedy_for(row, expected.failure.cause, expected.failure.evidence, self.fleet(), view)
            seen = row.evolve(probe=expected.after.probe)
            self._keep_evidence(seen, expected.failure, view)  # before the commit: the kill destroys what there is to be seen
        decision = self._apply(instance_id, lambda now_row, now: on_look(now_row, look, now, self.clocks.chance(), remedy))
        if decision is None:
            return
        if Action.FORGIVE in decision.actions:
            self._remember(decision.after)
        if view is not None:
            self._put_brake_on(decision)

    def _end_idle_keeper(self, instance_id: str, token: int) -> None:
        """
        End a keeper that does not act (stopped, say): two looks in a row found its server gone, and it has not written that down.

        What follows is an end that nobody saw. Without this a model that only its process is looked at would wait for ever.
        """
        if not self.host.look(instance_id).keeper_idles(token):
            self._idle.pop(instance_id, None)
        elif self._idle.get(instance_id) == token:
            self.host.end_keeper(instance_id, token)
        else:
            self._idle[instance_id] = token

    def _goes_on(self, instance_id: str, look: Look) -> bool:
        """The ordinary look: a healthy server that answers needs no second thought. False when this was none."""

        def decide(row: Instance, now: float) -> Decision | None:
            return on_look(row, look, now, 0.0) if row.state is State.HEALTHY else None

        decision = self._apply(instance_id, decide)
        if decision is not None and Action.FORGIVE in decision.actions:
            self._remember(decision.after)
        return decision is not None

    def _completed(self, row: Instance, look: Look) -> Look:
        """The look with what only this host can add: is it our process that answers, does it use the processor."""
        if not look.http:
            view = self.host.look(row.id)
            return look.evolve(alive=view.server_alive, message="" if view.server_alive else "the process is gone")
        if look.ready and row.state is not State.HEALTHY and row.placement.port is not None:
            holder = self.host.port_holder(row.placement.port)
            if holder is not None and holder.pid is not None and not self.host.listens(row.id, row.placement.port):
                who = f"port {row.placement.port} is answered by {holder.name} (pid {holder.pid}), not by this server"
                return look.evolve(foreign=True, message=who)
        if look.ready:
            return look
        reports = self.store.get_many(f"door:{row.id}:").values()
        moved = any(report["in_flight"] and report["silent_s"] < row.policy.hang_window_s / 2 for report in reports)
        return look.evolve(moved=moved, cpu_s=self.host.cpu_seconds(row.id) if look.steps is None else None)

    def launch_of(self, row: Instance) -> Launch | None:
        """How the row's run was or would be started; None when this host's file does not know its model."""
        found = self._spec_of(row)
        return launch(found[2], row.placement, row.overrides, self._env) if found else None

    def plan_of(self, instance_id: str, cause: str | None) -> dict[str, Any]:
        """The ladder left for a cause (by default the last failure's), as data for people."""
        row = self.store.load(instance_id)
        if row is None:
            raise UnknownModelError(f"cannot plan for {instance_id[:80]!r}: there is no such instance")
        wanted = cause or (row.last_failure.cause if row.last_failure is not None else "engine_died")
        return {"instance": row.id, "cause": wanted, "steps": self.repairs.plan(row, wanted, self.fleet(), self.host.look(row.id))}

    # --- joining -------------------------------------------------------------------------------------------------

    def join(self) -> dict[str, str]:
        """
        Bring Redis and this host together: rows for what the file and the disk know, ends reported, servers taken over.

        Called before the first heartbeat and every few seconds. Only an instance whose row does not fit what this host
        knows of it is looked at, so that a hundred healthy ones cost milliseconds. One that cannot be joined hinders no
        other: its problem is in the answer, by its id.
        """
        fleet = self.fleet()
        places = self._places(fleet)
        rows = {row.id: row for row in self.store.load_all()}
        problems: dict[str, str] = {}
        for instance_id, place in places.items():
            if place.planned.placement.host == self.name:
                with self._alone(instance_id, problems):
                    self._join_one(place, rows.get(instance_id))
        for row in rows.values():
            at = places.get(row.id)
            if row.placement.host == self.name and (at is None or at.planned.placement.host != self.name):
                with self._alone(row.id, problems):
                    self.reconcile(row.id) if self._may_stay(row, fleet) else self._retire(row)
        return problems

    @contextlib.contextmanager
    def _alone(self, instance_id: str, problems: dict[str, str]) -> Iterator[None]:
        """What cannot be done for one instance (its folder is full, damaged or walled off) is said in its row, and delays no other."""
        try:
            yield
        except (DiskError, SchemaError, SpawnError) as error:
            problems[instance_id] = text = str(error)
            self._apply(instance_id, lambda row, _: joining.hindered(row, text))

    def tokens(self) -> Mapping[str, int]:
        """The highest token this host has seen of each instance it has had to do with."""
        return dict(self._met)

    def _places(self, fleet: Fleet) -> Mapping[str, _Place]:
        if self._planned[0] is not fleet:
            specs = fleet.models
            digests = {model: digest(spec) for model, spec in specs.items()}
            hosts = {model: fleet.hosts_of(spec) for model, spec in specs.items()}
            places = {each.id: _Place(each, specs[each.model], digests[each.model], hosts[each.model]) for each in plan(fleet)}
            self._planned = (fleet, places)
        return self._planned[1]

    def _fits(self, row: Instance) -> bool:
        """Whether the row says what this host last saw: nothing newer on disk, and its run is the one that is watched."""
        return self._met.get(row.id, -1) in range(row.token + 1) and self._alive.get(row.id) == row.run

    def _lives(self, instance_id: str, token: int) -> None:
        self._alive[instance_id] = token
        self.on_run(instance_id)

    def _may_stay(self, row: Instance, fleet: Fleet) -> bool:
        """Rows on this host that its plan does not name: one that serves during a roll, one that was moved here."""
        spec = fleet.models.get(row.model)
        if spec is None:
            return False
        if row.surge:
            roll = self.store.get(f"roll:{row.model}")
            return roll is not None and roll["state"] == "running"
        return spec.reschedule and self.name in fleet.hosts_of(spec) and row.id in self._places(fleet)

    def _yield(self, row: Instance) -> None:
        """A row that lives on another host now: whatever this host still has of it is older and goes."""
        try:
            with self.host.step_lock(row.id):
                view = self.host.look(row.id)
                if view.run is not None and view.run.token < row.token and (view.server_alive or view.strays):
                    self._end_all(row.id, view)
        except LeaseHeldError:
            return

    def _join_one(self, place: _Place, row: Instance | None) -> None:
        planned, spec = place.planned, place.spec
        if row is not None and row.placement.host != self.name:
            self._yield(row)
            return
        if row is None:
            view = self.host.look(planned.id)
            at, overrides = joining.last_place(planned, view.record)
            url = launch(spec, at, overrides, self._env).base_url
            known = planned.id in self.host.instances()
            made = joining.new_row(
                planned, spec, digest=place.digest, base_url=url, hosts=place.hosts, view=view, known=known, now=self.store.now()
            )
            try:
                row = self._committer.create(made)
            except VersionConflictError:
                return
        elif row.spec_digest != place.digest or row.hosts != place.hosts or (row.run is None and row.planned != planned.placement):
            url = launch(spec, planned.placement, (), self._env).base_url
            self._apply(
                row.id,
                lambda now_row, _: joining.changed(now_row, planned, spec, digest=place.digest, base_url=url, hosts=place.hosts),
            )
        if not self._fits(row):
            self.reconcile(row.id)

    def reconcile(self, instance_id: str) -> None:
        """Make row and processes agree where no message did: an end nobody reported, a keeper that died, a run nobody watches."""
        try:
            with self.host.step_lock(instance_id):
                view = self.host.look(instance_id)
                ended = self._reconcile(instance_id, view)
        except LeaseHeldError:
            return
        if ended is not None:
            self._afterwards(ended, view)

    def _reconcile(self, instance_id: str, view: HostView) -> "_Ended | None":
        if view.server_alive and not view.keeper_alive:
            self.host.adopt(instance_id)
        self._met[instance_id] = max(view.record.token, self._met.get(instance_id, 0))
        row = self.store.load(instance_id)
        if row is None:
            return None
        if view.record.token > row.token:
            self._raise(instance_id, view)
        ended = self._report_end(instance_id, view)
        if ended is not None:
            return ended
        if view.run is not None and (view.keeper_alive or view.server_alive):
            token = view.run.token
            if view.server_alive:
                self._apply(instance_id, lambda now_row, now: stepping.found(now_row, token, now))
            self._lives(instance_id, token)
            return None
        self._alive.pop(instance_id, None)
        if row.run is not None and view.run is None:
            lost = ExitRecord(token=row.run, at=self.clocks.wall(), unknown=True, reason="no trace of it on this host")
            seen = self._exit_seen(row, lost, view)
            self._apply(instance_id, lambda now_row, now: on_exit(now_row, seen, now, self.clocks.chance()))
        return None

    def _retire(self, row: Instance) -> None:
        """A row whose model left the file: stopped first, then forgotten."""
        if row.state in AT_REST and not self.host.look(row.id).server_alive:
            self._forget(row)
            return
        if row.desired is not Desired.STOPPED:
            self._apply(row.id, joining.retired)

    def _forget_if_gone(self, row: Instance) -> None:
        if row.surge or self._spec_of(row) is None:
            self._forget(row)

    def _forget(self, row: Instance) -> None:
        self._write(row.id, joining.forgotten(self.host.read_record(row.id)))
        self.store.delete(row.id)

    # --- small things --------------------------------------------------------------------------------------------

    def _spec_of(self, row: Instance) -> tuple[Fleet, InstancePlan, ModelSpec] | None:
        fleet = self.fleet()
        spec = fleet.models.get(row.model)
        if spec is None:
            return None
        if row.surge:
            return fleet, InstancePlan(id=row.id, model=row.model, replica=row.replica, placement=row.planned or row.placement), spec
        place = self._places(fleet).get(row.id)
        if place is None or (place.planned.placement.host != self.name and not self._may_stay(row, fleet)):
            return None
        return fleet, place.planned, spec

    def _apply(self, instance_id: str, decide: Callable[[Instance, float], Decision | None], *, send: bool = True) -> Decision | None:
        def caught_up(row: Instance, now: float) -> Decision | None:
            """Redis may have lost its last second: a row that is behind what this host has seen is not decided about as it is."""
            behind = row.token < self._met.get(instance_id, 0)
            return decide(joining.caught_up(row, self.host.read_record(instance_id), now) if behind else row, now)

        decision = self._committer.apply(instance_id, caught_up, send=send)
        return decision if isinstance(decision, Decision) else None


def _lease_said(row: Instance, _now: float) -> Decision | None:
    """The row says whether its run has a lease that ends: the one thing by which it may be moved."""
    if row.leased == row.policy.reschedule:
        return None
    return Decision(after=row.evolve(leased=row.policy.reschedule), reason="lease")
