"""Ends of runs: reported once, with their cause and the evidence a post-mortem wants."""

from typing import NamedTuple

from recovery.core import incidents, joining
from recovery.core.decision import Decision, Failure
from recovery.core.failing import ExitSeen, on_exit
from recovery.core.host import ExitRecord, HostView
from recovery.core.instance import Instance
from recovery.core.remedies import StepKind
from recovery.core.states import ENDING, State
from recovery.errors import ConfigError, DiskError, LeaseHeldError
from recovery.host.brake import FleetBrake
from recovery.host.context import HostContext

SOON_S = 0.5
"""A start due within this writes the host's record itself; writing it twice would cost two syncs on the way."""
EVIDENCE_TTL_S = 30 * 86_400.0
"""Shorter than the incident itself is kept: some 20 kB each, where the record has 2."""


class Ended(NamedTuple):
    """A run's end that was committed, and the row as it was until then."""

    before: Instance
    decision: Decision


class Ends:
    """Reports ends, and does what they leave to be done."""

    def __init__(self, here: HostContext, brake: FleetBrake) -> None:
        self._here = here
        self._brake = brake

    def ended(self, instance_id: str) -> bool:
        """
        A keeper is gone: report how its run ended, or take over the server that outlived it.

        True when nothing is left to be done; False = somebody else holds the step, look again.
        """
        try:
            with self._here.host.step_lock(instance_id):
                self._here.alive.pop(instance_id, None)  # whatever becomes of this, the next join looks at it
                view = self._here.host.look(instance_id)
                if view.run is not None and view.server_alive and not view.keeper_alive:
                    self._here.host.adopt(instance_id)
                    self._here.lives(instance_id, view.run.token)
                    return True
                ended = self.report(instance_id, view)
        except LeaseHeldError:
            return False
        if ended is not None:
            self.afterwards(ended, view)
        return True

    def report(self, instance_id: str, view: HostView) -> Ended | None:
        """Commit the end of the newest run if it has ended and the row does not know yet; `afterwards` does what can wait."""
        record = view.ended(self._here.clocks.wall())
        row, now = self._here.store.load_now(instance_id)
        if record is None or row is None or not row.last_ended < record.token <= row.token:
            return None
        if row.state in ENDING and (view.keeper_alive or view.strays):
            return None  # over is over only when nothing of it is left; the next step looks again
        seen = self.exit_seen(row, record, view, now)
        if view.strays:
            self._here.host.end_strays(instance_id)

        def decide(now_row: Instance, now: float) -> Decision | None:
            return on_exit(joining.caught_up(now_row, view.record, now), seen, now, self._here.clocks.chance())

        decision = self._here.apply(row.id, decide)
        if decision is None:
            return None
        self._here.alive.pop(instance_id, None)
        after = decision.after
        if after.state is not State.RESTARTING or after.not_before > now + SOON_S:
            self._here.remember(after)
        return Ended(row, decision)

    def afterwards(self, ended: Ended, view: HostView) -> None:
        """What a reported end leaves to be done; the next start does not wait for it."""
        decision = ended.decision
        if decision.failure is None:
            return
        if decision.after.used <= 1:
            self._here.host.protect(decision.after.id, decision.failure.token)
        self._brake.put_on(decision)
        self.keep_evidence(ended.before, decision.failure, view)
        if decision.step in (StepKind.FREE_GPU.value, StepKind.FREE_PORT.value):
            self._here.end_left_overs()

    def exit_seen(self, row: Instance, record: ExitRecord, view: HostView, now: float) -> ExitSeen:
        """The end of a run with its diagnosis. Ages are measured on this host's clock, instants are Redis' time (`now`)."""
        at = now - max(0.0, self._here.clocks.wall() - record.at)
        return self._here.repairs.exit_seen(row, record, view, self._here.fleet(), at=at)

    def keep_evidence(self, row: Instance, failure: Failure, view: HostView) -> None:
        """Keep what a post-mortem wants of an outage's first failure, under the id of its incident; `row` is as it failed."""
        if row.incident is not None:
            return
        try:
            found = self._here.repairs.collect(row, failure.token, self._here.fleet(), view)
        except (OSError, DiskError, ConfigError) as error:  # a repair does not wait for its papers
            found = {"missing": str(error)[:300]}
        traffic = (self._here.store.get(f"traffic:{row.id}") or {}).get("last")  # what its server last said of itself
        self._here.store.put(f"evidence:{incidents.incident_id(row, failure)}", {**found, "metrics": traffic}, EVIDENCE_TTL_S)
