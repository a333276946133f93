"""
What to do about a run that ended, did not come up, or must be ended: budget, backoff, give up or go on.

Every failure of a run is decided here once, whoever saw it: `last_ended` and the compare-and-set on the row's
version see to it.
"""

from pydantic import Field

from recovery.core import counting
from recovery.core.backoff import delay_s
from recovery.core.change import Count
from recovery.core.decision import Decision, Failure, due_at, event, move, new_token
from recovery.core.fleet import Placement
from recovery.core.instance import Desired, Instance, Intent, LastExit, LastFailure, ProbeMemory, Value
from recovery.core.launch import PORT, Override
from recovery.core.states import Event, State

GPU_OOMS = frozenset({"cuda_oom_load", "cuda_oom_serving"})


class Remedy(Value):
    """What the ladder of `remedies` says beside "start it again"."""

    kind: str = "restart"
    reason: str = ""
    overrides: tuple[Override, ...] = Field((), description="the whole list the next run is launched with")
    placement: Placement | None = None
    give_up: bool = False
    cause: str | None = Field(None, description="what the run's log tells better than the look that gave it up")
    evidence: str = ""


class ExitSeen(Value):
    """The end of a run, as found on the host, with its diagnosis."""

    token: int
    at: float = Field(description="Redis seconds")
    code: int | None = None
    signal: int | None = None
    unknown: bool = False
    clean: bool = Field(False, description="exit 0, was ready until then, an orderly shutdown in the log, no engine death")
    cause: str = "exit"
    evidence: str = ""
    advice: str = ""
    cuda_oom: bool = False
    rebooted: bool = False
    remedy: Remedy = Remedy()

    @property
    def text(self) -> str:
        """How it ended, in words."""
        if self.rebooted:
            return "the host was restarted"
        if self.signal is not None:
            return f"killed by signal {self.signal}"
        return "ended, exit code unknown" if self.code is None else f"exit code {self.code}"


def on_exit(row: Instance, seen: ExitSeen, now: float, u: float) -> Decision | None:
    """Decide about the end of run `seen.token`; None when it is already known or none of this row's runs."""
    if not row.last_ended < seen.token <= row.token:
        return None
    last = LastExit(
        token=seen.token,
        at=seen.at,
        code=seen.code,
        signal=seen.signal,
        cause=seen.cause,
        evidence=seen.evidence,
        advice=seen.advice,
        clean=seen.clean,
    )
    row = row.evolve(
        last_ended=seen.token,
        run=None,
        last_exit=last,
        has_cuda_oom=row.has_cuda_oom or seen.cuda_oom,
        look_at=None,
        term_at=None,
        kill_at=None,
        drain_since=None,
    )
    ended = event("exited", f"{row.id}: {seen.text}", row, token=seen.token, code=seen.code, signal=seen.signal, cause=seen.cause)
    superseded = row.state is State.RESTARTING and seen.token < row.token
    if superseded or row.state in (State.STOPPED, State.FAILED, State.COMPLETED):  # ended because something else was decided meanwhile
        return Decision(after=row, reason=f"a run ended late: {seen.text}", events=(ended,))
    if row.state in (State.STOPPING, State.DRAINING):
        return stopped(row, now, ended_text=seen.text)
    if row.state in (State.RECYCLING, State.RELEASING):
        return recycled(row, now)
    if seen.rebooted:
        return _after_reboot(row, seen, now)
    if seen.clean and row.policy.restart_policy != "always":
        after = move(row, Event.FINISHED, now=now, **GONE, due=None, reason=f"ended by itself in good order ({seen.text})")
        return Decision(after=after, reason=after.reason, events=(ended,))
    kind = "finished" if seen.clean else seen.cause
    failed = _Failed(now=now, at=seen.at, kind=kind, text=seen.text, evidence=seen.evidence, remedy=seen.remedy, token=seen.token)
    return _again_or_never(row, Event.EXITED, failed, u)


def on_spawn_failed(row: Instance, token: int, text: str, *, retry: bool, now: float, u: float) -> Decision | None:
    """Decide about a start that failed before there was a server; None when `token` is not the one being started."""
    if token != row.token or row.state is not State.RESTARTING or row.desired is not Desired.RUNNING:
        return None
    row = row.evolve(last_ended=token, last_exit=LastExit(token=token, at=now, cause="spawn_failed", evidence=text))
    remedy = Remedy(give_up=not retry, reason=text)
    failed = _Failed(now=now, at=now, kind="spawn_failed", text=text, evidence=text, remedy=remedy, token=token)
    return _again_or_never(row, Event.SPAWN_FAILED, failed, u)


def liveness_lost(row: Instance, *, cause: str, text: str, evidence: str, remedy: Remedy, now: float, u: float) -> Decision:
    """End a run that lives but does not serve; the budget for its successor is counted here, once."""
    cause, evidence = remedy.cause or cause, remedy.evidence or evidence
    verb = Event.START_TIMED_OUT if row.state is State.STARTING else Event.LIVENESS_LOST
    token = row.run or row.token
    since = row.probe.failing_since if row.state is not State.STARTING else None
    failed = _Failed(now=now, at=now, since=since, kind=cause, text=text, evidence=evidence, remedy=remedy, token=token)
    outcome = _weigh(row, failed, u)
    ends = {"restart_at": outcome.start_at} if outcome.why_not is None else {"gives_up": True}
    oom = row.has_cuda_oom or cause in GPU_OOMS
    after = move(
        row, verb, now=now, **{**outcome.changes, "intent": Intent.KILL, "look_at": None, "has_cuda_oom": oom, **due_at(now), **ends}
    )
    return outcome.decision(after)


GONE: dict[str, object] = {
    "run": None, "intent": None, "look_at": None, "term_at": None, "kill_at": None, "drain_since": None, "restart_at": None,
    "gives_up": False, "lease_until": 0.0, "probe": ProbeMemory(),
}  # fmt: skip
"""What a row forgets when nothing of its run is left."""


def recycled(row: Instance, now: float) -> Decision:
    """Nothing of the run is left: the start that was decided when it was given up is due at its own time."""
    if not row.gives_up and row.token <= row.last_ended:
        row = _made_already(row, now)
    if row.gives_up:
        after = move(row, Event.GAVE_UP, now=now, **GONE, due=None)
        return Decision(after=after, reason=after.reason, events=(event("failed", f"{row.id}: {after.reason}", after),))
    at = max(now, row.restart_at or now)
    after = move(row, Event.EXITED, now=now, **{**GONE, **due_at(at)})
    return Decision(after=after, reason=f"the old run is gone, starting in {at - now:.1f} s")


def _made_already(row: Instance, now: float) -> Instance:
    """
    Redis forgot that the start which was decided had been made, and the run it made was ended for the one before.

    A token starts one run only, so there is another one, for another restart.
    """
    if row.budget_spent:
        return row.evolve(gives_up=True, reason=f"{row.reason}; max restarts ({row.policy.max_restarts}) reached")
    return row.evolve(token=new_token(row, now), used=row.used + 1, restarts_total=row.restarts_total + 1, last_restart_at=now)


def stopped(row: Instance, now: float, ended_text: str = "nothing of it is left") -> Decision:
    """Nothing of the run is left and none is wanted."""
    after = move(row, Event.EXITED, now=now, **GONE, due=None, reason="stopped by the operator")
    return Decision(after=after, reason=after.reason, events=(event("stopped", f"{row.id} is stopped: {ended_text}", after),))


def unkillable(row: Instance, text: str, now: float) -> Decision:
    """Something survived SIGKILL: no second server may be started beside it."""
    ends = {"due": None, "look_at": None, "intent": None, "gives_up": False, "restart_at": None}
    after = move(row, Event.UNKILLABLE, now=now, **ends, reason=text, last_failure=LastFailure(cause="unkillable", at=now))
    failure = Failure(cause="unkillable", at=now, evidence=text, token=row.run or row.token)
    return Decision(
        after=after,
        reason=text,
        failure=failure,
        events=(event("failed", f"{row.id}: {text}", after, cause="unkillable"),),
        counts=counting.failed(row.model, row.placement.host, "unkillable"),
    )


def _after_reboot(row: Instance, seen: ExitSeen, now: float) -> Decision:
    """A reboot of the host uses no budget; policy `no` stays down after one."""
    if row.policy.restart_policy == "no":
        why = "the host was restarted; restart policy is 'no'"
        after = move(row, Event.FINISHED, now=now, **{**GONE, "desired": Desired.STOPPED, "due": None, "reason": why})
        return Decision(after=after, reason=why, events=(event("completed", f"{row.id}: {why}", after),))
    changes = {"token": new_token(row, now), "last_restart_at": now, "restarts_total": row.restarts_total + 1}
    after = move(row, Event.EXITED, now=now, **{**GONE, **changes, **due_at(now)}, reason="the host was restarted")
    return Decision(
        after=after,
        reason=after.reason,
        events=(event("restarting", f"{row.id}: {after.reason}", after),),
        counts=counting.restarted(row.model, row.placement.host, "host_reboot"),
    )


class _Failed(Value):
    """One failure to be weighed against policy, budget and remedy."""

    now: float
    at: float
    kind: str
    text: str
    evidence: str
    remedy: Remedy
    token: int
    since: float | None = Field(None, description="the first sign of it, where that is earlier than the loss of liveness")

    @property
    def failure(self) -> Failure | None:
        """What an incident is opened for; an orderly end is none."""
        if self.kind == "finished":
            return None
        return Failure(cause=self.kind, at=self.seen_from, evidence=self.evidence, token=self.token)

    @property
    def seen_from(self) -> float:
        """From when the time to detect counts."""
        return self.at if self.since is None else min(self.since, self.at)


class _Outcome(Value):
    """The verdict: when the next start is due, or why there is none."""

    failed: _Failed
    why_not: str | None
    start_at: float
    changes: dict[str, object]
    counts: tuple[Count, ...]

    def decision(self, after: Instance) -> Decision:
        """The decision that commits `after`, saying what happened and what follows."""
        failed, limit = self.failed, after.policy.max_restarts or "no limit"
        wait = self.start_at - failed.now
        said = after.reason if self.why_not else f"{failed.text}; restart {after.used} of {limit} in {wait:.1f} s"
        facts = {"cause": failed.kind, "evidence": failed.evidence, "attempt": after.attempt, "delay_s": round(wait, 3)}
        return Decision(
            after=after,
            reason=after.reason,
            step=None if self.why_not else failed.remedy.kind,
            failure=failed.failure,
            counts=self.counts,
            events=(event("failed" if self.why_not else "restarting", f"{after.id}: {said}", after, **facts),),
        )


def _again_or_never(row: Instance, verb: Event, failed: _Failed, u: float) -> Decision:
    """The run is over: start again at the time that backoff gives, or give up."""
    outcome = _weigh(row, failed, u)
    if outcome.why_not is not None:
        after = move(row, verb, Event.GAVE_UP, now=failed.now, **{**GONE, **outcome.changes}, due=None)
    else:
        after = move(row, verb, now=failed.now, **{**GONE, **outcome.changes, **due_at(outcome.start_at)})
    return outcome.decision(after)


def _weigh(row: Instance, failed: _Failed, u: float) -> _Outcome:
    """Take one restart from the budget and set its time, or say why not. The one place that counts."""
    model, host, kind, now = row.model, row.placement.host, failed.kind, failed.now
    counts = counting.failed(model, host, kind) + counting.detected(model, kind, now - failed.seen_from)
    if kind in GPU_OOMS or kind == "host_oom":
        counts += counting.out_of_memory(model, host, "host" if kind == "host_oom" else "gpu")
    keys = (kind, *(f"{kind}@{gpu}" for gpu in row.placement.gpus))
    sees = row.sees | {key: row.sees.get(key, 0) + 1 for key in keys}
    said = {"sees": sees, "last_failure": LastFailure(cause=kind, at=failed.at)}
    why_not = _why_not(row, kind, failed.remedy)
    if why_not is not None:
        changes: dict[str, object] = {**said, "reason": f"{failed.text}; {why_not}"}
        return _Outcome(failed=failed, why_not=why_not, start_at=now, changes=changes, counts=counts)
    start_at = max(now, failed.at + delay_s(row.attempt, row.policy, u))
    changes = {
        **said,
        "token": new_token(row, now),
        "attempt": row.attempt + 1,
        "used": row.used + 1,
        "restarts_total": row.restarts_total + 1,
        "last_restart_at": now,
        "reason": f"{failed.text}; {failed.remedy.reason or 'starting again'}",
    }
    if failed.remedy.placement is not None:
        changes["placement"] = failed.remedy.placement
    if failed.remedy.overrides:
        changes["overrides"] = failed.remedy.overrides
        if any(step.flag != PORT for step in failed.remedy.overrides):  # another port serves as well as the first
            changes["degraded_since"] = row.degraded_since or now
    counts += counting.restarted(model, host, kind)
    return _Outcome(failed=failed, why_not=None, start_at=start_at, changes=changes, counts=counts)


def _why_not(row: Instance, kind: str, remedy: Remedy) -> str | None:
    if row.policy.restart_policy == "no":
        return "restart policy is 'no'"
    if row.budget_spent:
        return f"max restarts ({row.policy.max_restarts}) reached"
    if remedy.give_up:
        return remedy.reason or f"a restart does not help against {kind}"
    return None
