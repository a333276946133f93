"""Starts: of the run the row asks for, once nothing of an older one is in the way; or the living one is taken over."""

from collections.abc import Mapping
from typing import Literal

from recovery.core import joining, stepping
from recovery.core.decision import Decision
from recovery.core.failing import on_spawn_failed
from recovery.core.fleet import Fleet, InstancePlan, ModelSpec, launch_digest
from recovery.core.host import HostView
from recovery.core.instance import Instance, Value
from recovery.core.launch import PORT, Launch, launch
from recovery.core.states import State
from recovery.errors import DiskError, LeaseHeldError, SpawnError, StaleTokenError
from recovery.host.brake import FleetBrake
from recovery.host.context import HostContext
from recovery.host.ends import Ends

DISK_LOOK_S = 5.0
CLAIM_S = 10.0
"""Lease of a start: how long another hand keeps off; a spawn takes 12 ms, a step never more than 2 s."""
BRAKED_LOOK_S = 1.0


class Started(Value):
    """What became of a start: `retry` carries the new token when the task itself should try again."""

    outcome: Literal["started", "adopted", "ended", "waits", "refused", "held", "locked", "failed", "retry"]
    reason: str = ""
    token: int | None = None
    delay_s: float = 0.0
    attempt: int = 0


class Starts:
    """Takes the step from `restarting` to a server that has been executed."""

    def __init__(self, here: HostContext, brake: FleetBrake, ends: Ends) -> None:
        self._here = here
        self._brake = brake
        self._ends = ends

    def start(self, instance_id: str, token: int) -> Started:
        """Start run `token` of an instance, if that is still what is wanted and nothing of an older run is in the way."""
        try:
            with self._here.host.step_lock(instance_id):
                try:
                    return self._start(self._here.store.claim(instance_id, token, CLAIM_S))
                except LeaseHeldError as error:
                    return Started(outcome="held", reason=str(error))
                except DiskError as error:
                    return self._not_yet(instance_id, token, str(error), DISK_LOOK_S)
        except StaleTokenError as error:
            return Started(outcome="refused", reason=str(error))
        except LeaseHeldError as error:
            return Started(outcome="locked", reason=str(error))

    def _start(self, row: Instance) -> Started:
        found = self._here.spec_of(row)
        if found is None:
            return self._wait(row, f"host {self._here.name} has no model {row.model!r} in its fleet file", 5.0)
        fleet, planned, spec = found
        view = self._here.host.look(row.id)
        now = self._here.store.now()
        raised = joining.caught_up(row, view.record, now)
        if raised != row:
            self._here.raise_row(row.id, view)
            if raised.token != row.token:
                return Started(outcome="refused", reason="this host has seen a newer token; the row is raised")
            row = raised
        if row.planned != planned.placement:  # the file moved it; what a remedy had chosen belongs to the old place
            kept = tuple(step for step in row.overrides if step.flag != PORT)
            row = row.evolve(placement=planned.placement, planned=planned.placement, overrides=kept)
        made = launch(spec, row.placement, row.overrides, self._here.env)
        holder = self._here.host.port_holder(made.port) if made.port else None
        verdict = stepping.before_start(row, view, port_free=holder is None, port_ours=holder is not None and holder.ours)
        match verdict.kind:
            case "refuse":
                return Started(outcome="refused", reason=verdict.why)
            case "adopt":
                return self._adopt(row, view)
            case "ended":
                ended = self._ends.report(row.id, view)
                if ended is not None:
                    self._ends.afterwards(ended, view)
                return Started(outcome="ended", reason=verdict.why)
            case "wait" if holder is not None and not holder.ours and not verdict.end_strays:
                return self._port_taken(row, fleet, planned, spec, f"port {made.port} is held by {holder.name} (pid {holder.pid})")
            case "wait":
                if verdict.end_strays:
                    self._here.end_all(row.id, view)
                    self._here.end_left_overs()
                return self._blocked(row, view, verdict.why)
            case "spawn":
                why = self._brake.why_wait(row, fleet, now)
                return self._wait(row, why, BRAKED_LOOK_S) if why is not None else self._spawn(row, fleet, spec, made)

    def _spawn(self, row: Instance, fleet: Fleet, spec: ModelSpec, made: Launch) -> Started:
        try:
            self._here.write(row.id, joining.recorded(row, self._here.host.read_record(row.id), started_at=self._here.clocks.wall()))
            self._here.host.spawn(
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

        if self._here.apply(row.id, decide) is None:
            self._here.host.kill(row.id, row.token)
            return Started(outcome="refused", reason="a newer decision was taken meanwhile; the server is ended again")
        self._here.lives(row.id, row.token)
        return Started(outcome="adopted" if adopted else "started", token=row.token)

    def _spawn_failed(self, row: Instance, error: SpawnError, *, retry: bool | None = None) -> Started:
        again = error.retry if retry is None else retry
        decision = self._here.apply(
            row.id,
            lambda now_row, now: on_spawn_failed(now_row, row.token, str(error), retry=again, now=now, u=self._here.clocks.chance()),
            send=False,
        )
        if decision is None:
            return Started(outcome="refused", reason="a newer decision was taken meanwhile")
        self._here.remember(decision.after)
        after = decision.after
        if after.state is State.FAILED:
            return Started(outcome="failed", reason=after.reason)
        wait_s = max(0.0, after.not_before - self._here.store.now())
        return Started(outcome="retry", reason=after.reason, token=after.token, delay_s=wait_s, attempt=after.attempt)

    def _port_taken(self, row: Instance, fleet: Fleet, planned: InstancePlan, spec: ModelSpec, why: str) -> Started:
        """A stranger's process is left alone: another port of the range is taken, or the start counts as failed."""
        free = next(iter(self._here.repairs.spare_ports(row, fleet, spec)), None) if spec.remedies else None
        if free is not None:
            why = f"{why}; taking port {free}"
            self._here.apply(row.id, lambda now_row, now: stepping.moved(now_row, row.token, free, planned.placement, why, now))
            return Started(outcome="waits", reason=why)
        return self._spawn_failed(row, SpawnError(f"cannot start {row.id}: {why}; end it or give the model another port"), retry=True)

    def _adopt(self, row: Instance, view: HostView) -> Started:
        if not view.keeper_alive:
            self._here.host.adopt(row.id)
        return self._spawned(row, {}, adopted=True)

    def _blocked(self, row: Instance, view: HostView, why: str) -> Started:
        """Something of an older run is in the way: looked at again until it is gone, or for `kill_deadline_s`."""
        decision = self._here.apply(
            row.id, lambda now_row, now: stepping.blocked(now_row, view, why, now) if now_row.token == row.token else None
        )
        if decision is not None and decision.after.state is State.FAILED:
            self._here.remember(decision.after)
            return Started(outcome="failed", reason=decision.reason)
        return Started(outcome="waits", reason=why)

    def _wait(self, row: Instance, why: str, wait_s: float) -> Started:
        return self._not_yet(row.id, row.token, why, wait_s)

    def _not_yet(self, instance_id: str, token: int, why: str, wait_s: float) -> Started:
        self._here.apply(instance_id, lambda row, now: stepping.not_yet(row, why, now, wait_s) if row.token == token else None)
        return Started(outcome="waits", reason=why)
