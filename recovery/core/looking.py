"""
What a look at a server means: startup, readiness and liveness are three questions, as in Kubernetes.

During load vLLM refuses connections: that is "starting", not "failed". `/health` stays 200 when the engine is
frozen and takes 40 s when it is busy (VLLM-FACTS.md, section b), so a live process is given up only when nothing
moved between two looks at least `hang_window_s` apart *and* a one-token completion did not succeed.
"""

from typing import Literal

from pydantic import Field

from recovery.core import counting
from recovery.core.decision import Action, Decision, event, move
from recovery.core.failing import Remedy, liveness_lost
from recovery.core.instance import Instance, ProbeMemory, Value
from recovery.core.states import PROBED, Event, State

STARTUP_LOOK_S = 0.5
"""Between looks at a server that loads; a refused connection costs well under a millisecond."""
IDLE_CORES = 0.05
"""A process tree below this many cores is doing nothing: a frozen simulator uses 0.00, a loading vLLM more than 0.5."""

Answer = Literal["ok", "refused", "timeout", "broken", "status"]
Completion = Literal["ok", "failed", "timeout", "overloaded", "off", "skipped"]


class Look(Value):
    """What one look saw. `run` is the run it looked at; another run's look is dropped."""

    run: int
    alive: bool = True
    http: bool = Field(True, description="False when the model has no base_url: only the process is checked")
    health: Answer = "ok"
    models: Answer = "ok"
    status: int | None = None
    message: str = ""
    steps: float | None = None
    asleep: bool = False
    completion: Completion = "skipped"
    cpu_s: float | None = None
    foreign: bool = Field(False, description="the LISTEN socket belongs to another process")
    moved: bool = Field(False, description="the front door saw tokens of this run since the last look")
    duration_s: float = 0.0

    @property
    def ready(self) -> bool:
        """True when it may take traffic."""
        if not self.http:
            return self.alive
        answers = self.health == "ok" and self.models == "ok" and not self.foreign
        return self.alive and answers and (self.asleep or self.completion in ("ok", "off", "skipped", "overloaded"))


def wants_completion(row: Instance, steps: float | None) -> bool:
    """True when only a real answer can tell: at start-up, and when the step counter stands where the last look left it."""
    if not row.policy.completion_check or row.base_url is None:
        return False
    return row.state is State.STARTING or steps is None or row.probe.steps is None or steps <= row.probe.steps


def may_be_gone(row: Instance, look: Look) -> bool:
    """True when the look lets one doubt that there still is a process: one that loads refuses connections, too."""
    return not look.alive or (look.health == "refused" and row.state is not State.STARTING)


def on_look(row: Instance, look: Look, now: float, u: float, remedy: Remedy | None = None) -> Decision | None:
    """
    Decide about what a look saw; None when it belongs to another run or the row no longer asks.

    `remedy` is for the failure that this look may turn out to be; without one it is answered by a restart.
    """
    remedy = remedy or Remedy()
    if row.state not in PROBED or look.run != row.run:
        return None
    row = row.evolve(probe=_remember(row.probe, look, now))
    if look.ready:
        return _answered(row, look, now)
    if row.state is State.STARTING:
        return _loading(row, look, now, u, remedy)
    return _failed(row, look, now, u, remedy)


def _remember(probe: ProbeMemory, look: Look, now: float) -> ProbeMemory:
    moved = look.moved or (look.steps is not None and look.steps != probe.steps)
    keep_cpu = look.cpu_s is None
    return probe.evolve(
        failures=0 if look.ready else probe.failures + 1,
        last_at=now,
        last_ok_at=now if look.ready else probe.last_ok_at,
        message=None if look.ready else look.message,
        duration_s=look.duration_s,
        failing_since=None if look.ready else (probe.failing_since or now),
        steps=probe.steps if look.steps is None else look.steps,
        steps_at=now if moved or probe.steps_at is None else probe.steps_at,
        cpu_s=probe.cpu_s if keep_cpu else look.cpu_s,
        cpu_at=probe.cpu_at if keep_cpu else now,
        cpu_cores=_cores(probe, look, now),
        asleep=look.asleep,
    )


def _cores(probe: ProbeMemory, look: Look, now: float) -> float | None:
    """Cores the process tree used since the last reading; None when there is nothing to compare with."""
    if look.cpu_s is None or probe.cpu_s is None or probe.cpu_at is None or now <= probe.cpu_at:
        return None
    return max(0.0, look.cpu_s - probe.cpu_s) / (now - probe.cpu_at)


def _answered(row: Instance, look: Look, now: float) -> Decision:
    policy = row.policy
    if row.state is State.STARTING:
        load_s = now - (row.spawned_at or now)
        after = move(row, Event.STARTED, now=now, ready_at=now, load_s=load_s, reason="serving", look_at=_next_good_look(row, now))
        if row.incident is not None:
            after = after.evolve(
                validate_until=now + policy.validate_s, look_at=min(_next_good_look(row, now), now + max(policy.validate_s, 0.5))
            )
        counts = counting.ready(row.model, load_s)
        said = event("healthy", f"{row.id} serves after {load_s:.1f} s", after, token=row.run, load_s=round(load_s, 3))
        return Decision(after=after, reason="it answered", events=(said,), counts=counts)
    if row.state is State.UNHEALTHY:
        if row.validate_until is not None:  # it has to keep serving: the time starts anew
            row = row.evolve(validate_until=now + policy.validate_s)
        again = None if row.validate_until is None else now + row.policy.validate_s  # a repair is validated by serving without a break
        row = row.evolve(validate_until=again)
        after = move(row, Event.READINESS_REGAINED, now=now, reason="serving", look_at=_next_good_look(row, now))
        return Decision(after=after, reason="it answers again", events=(event("healthy", f"{row.id} answers again", after),))
    row = row.evolve(look_at=_next_good_look(row, now))
    if row.validate_until is not None and now >= row.validate_until:
        row = row.evolve(validate_until=None)
    return _forgiven(row, now) or Decision(after=row, reason="it answers")


def _next_good_look(row: Instance, now: float) -> float:
    due = now + row.policy.health_check_interval
    return min(due, max(row.validate_until, now + 0.5)) if row.validate_until is not None else due


def _forgiven(row: Instance, now: float) -> Decision | None:
    """Serving long enough clears budget and backoff: max(`stable_s`, twice the last load)."""
    stable_s = max(row.policy.stable_s, 2.0 * (row.load_s or 0.0))
    lost = {key: count for key, count in row.sees.items() if key.startswith("gpu_lost@")}  # a card does not heal by itself
    clean = row.used == row.attempt == row.manual == 0 and row.sees == lost
    if clean or now - row.entered_at < stable_s:
        return None
    after = row.evolve(used=0, attempt=0, manual=0, sees=lost, forgiven=now)
    said = event("forgiven", f"{row.id} served for {now - row.entered_at:.0f} s: earlier restarts are forgiven", after)
    return Decision(after=after, reason="stable", events=(said,), actions=(Action.FORGIVE,))


def _loading(row: Instance, look: Look, now: float, u: float, remedy: Remedy) -> Decision:
    waited_s = now - (row.spawned_at or now)
    if waited_s >= row.policy.startup_timeout_s:
        text = f"not serving {waited_s:.0f} s after its start (startup_timeout_s {row.policy.startup_timeout_s:g})"
        return liveness_lost(row, cause="startup_timeout", text=text, evidence=look.message, remedy=remedy, now=now, u=u)
    wait = STARTUP_LOOK_S if waited_s < 60 else min(2.0, row.policy.health_check_interval)
    return Decision(after=row.evolve(look_at=now + wait), reason="still loading")


def _failed(row: Instance, look: Look, now: float, u: float, remedy: Remedy) -> Decision:
    policy, probe = row.policy, row.probe
    pause_s = max(0.0, policy.health_confirm_interval - look.duration_s)  # from look to look: one that waited for an answer has waited
    after = row.evolve(look_at=now + pause_s, reason=look.message)
    if probe.failures >= policy.failure_threshold:
        verdict = _verdict(row, look, now)
        if verdict is not None and policy.restart_policy != "no":
            cause, text = verdict
            return liveness_lost(row, cause=cause, text=text, evidence=look.message, remedy=remedy, now=now, u=u)
        if verdict is not None:
            after = after.evolve(
                reason=f"{verdict[1]}; restart policy is 'no': reported, not touched", look_at=now + policy.health_check_interval
            )
    if row.state is State.HEALTHY:
        after = move(after, Event.READINESS_LOST, now=now)
        return Decision(after=after, reason=look.message, events=(event("unhealthy", f"{row.id}: {look.message}", after),))
    return Decision(after=after, reason=look.message)


def _verdict(row: Instance, look: Look, now: float) -> tuple[str, str] | None:
    """Whether a live process must be given up: the cause and a sentence, or None while it may still be busy."""
    probe, policy = row.probe, row.policy
    if look.health == "status" and look.status == 503:
        return "engine_died", "/health says 503: the engine is dead"
    if look.health == "refused":
        return "server_hang", "connections are refused by a server that had been ready"
    if look.foreign:
        return "port_in_use", "another process answers on its port"
    failing_s = now - (probe.failing_since or now)
    if failing_s >= policy.busy_limit_s:
        return "engine_hang", f"failing for {failing_s:.0f} s (busy_limit_s {policy.busy_limit_s:g})"
    if look.completion in ("ok", "overloaded") or look.moved:
        return None
    still_s = now - (probe.steps_at if probe.steps_at is not None else now)
    if still_s < policy.hang_window_s:
        return None
    if look.steps is None and (probe.cpu_cores is None or probe.cpu_cores > IDLE_CORES):
        return None
    cause = "engine_hang" if look.health == "ok" else "server_hang"
    return cause, f"no progress for {still_s:.0f} s and a one-token completion did not succeed"
