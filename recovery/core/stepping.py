"""
One step of a start or a stop, decided from what the host shows. No step waits: each sets the time of the next.

A stop is: out of routing, SIGTERM, SIGTERM again (vLLM can lose one during its start), grace, SIGKILL for
everything of the run, then *look* until nothing is left.
"""

from datetime import UTC, datetime
from typing import Literal

from recovery.core.decision import Action, Decision, due_at, event, move
from recovery.core.failing import recycled, stopped, unkillable
from recovery.core.fleet import Placement
from recovery.core.host import HostView, Stray
from recovery.core.instance import Desired, Instance, Intent, ProbeMemory, Value
from recovery.core.launch import PORT, Override
from recovery.core.states import ENDING, PROBED, Event, State

TERM_AGAIN_S = 3.0
"""Between two SIGTERMs: one sent while vLLM's engine starts is lost, two 3 s apart end it (VLLM-FACTS.md, section b)."""
LOOK_AGAIN_S = 0.5
DRAIN_LOOK_S = 0.5
FIRST_LOOK_S = 0.2


class Verdict(Value):
    """Whether a start may happen now; `why` is for the operator."""

    kind: Literal["spawn", "adopt", "ended", "wait", "refuse"]
    why: str = ""
    end_strays: bool = False


def on_ending(row: Instance, view: HostView, in_flight: int | None, now: float) -> Decision | None:
    """The next step of a stop, a drain or a recycling; None when the row is not ending."""
    if row.state in (State.DRAINING, State.RELEASING):
        return _drain(row, in_flight, now) if _something_lives(view) else _gone(row, now)
    if row.state in (State.STOPPING, State.RECYCLING):
        return _end(row, view, now) if _something_lives(view) else _gone(row, now)
    if row.state in PROBED and row.intent is Intent.CRASH:
        again = row.evolve(
            **due_at(now + LOOK_AGAIN_S)
        )  # the end that is seen takes the intent away; until then the kill may have been lost
        return Decision(after=again, reason="killed by the operator", actions=(Action.KILL,))
    return None


def before_start(row: Instance, view: HostView, *, port_free: bool, port_ours: bool) -> Verdict:
    """Whether run `row.token` may be started on this host now: never while anything of an older run is there."""
    record = view.record
    if row.desired is not Desired.RUNNING or row.state is not State.RESTARTING:
        return Verdict(kind="refuse", why=f"{row.id} is {row.state.value} and wanted {row.desired.value}")
    if record is not None and record.token > row.token:
        return Verdict(kind="refuse", why=f"this host has seen token {record.token}, newer than {row.token}")
    if record is not None and record.token == row.token:
        if view.server_alive or view.keeper_alive:
            return Verdict(kind="adopt", why="this run was started already")
        if view.run is not None and view.run.token == row.token:
            return Verdict(kind="ended", why="this run was started and has ended")
    if view.keeper_alive or view.server_alive:
        return Verdict(kind="wait", why="an older run is still there", end_strays=True)
    if view.strays:
        return Verdict(kind="wait", why=f"{len(view.strays)} processes of an older run are still there", end_strays=True)
    if not port_free:
        return Verdict(kind="wait", why=f"port {row.placement.port} is in use", end_strays=port_ours)
    return Verdict(kind="spawn")


def _something_lives(view: HostView) -> bool:
    return view.server_alive or view.keeper_alive or bool(view.strays)


def _gone(row: Instance, now: float) -> Decision:
    return stopped(row, now) if row.desired is Desired.STOPPED else recycled(row, now)


def _drain(row: Instance, in_flight: int | None, now: float) -> Decision:
    waited_s = now - (row.drain_since if row.drain_since is not None else now)
    if in_flight and waited_s < row.policy.drain_timeout_s:
        after = row.evolve(**due_at(now + DRAIN_LOOK_S), reason=f"{in_flight} requests in flight")
        return Decision(after=after, reason=after.reason)
    why = "drained" if not in_flight else f"{in_flight} requests still in flight after {waited_s:.0f} s"
    after = move(row, Event.DRAINED, now=now, reason=why, drain_since=None, term_at=now, **due_at(now + _next_look_s(row)))
    return Decision(after=after, reason=why, actions=(Action.TERMINATE,))


def _next_look_s(row: Instance) -> float:
    return min(TERM_AGAIN_S, max(row.policy.stop_grace_s, LOOK_AGAIN_S))


def _end(row: Instance, view: HostView, now: float) -> Decision:
    policy = row.policy
    if row.kill_at is not None and now - row.kill_at >= policy.kill_deadline_s:
        left = ", ".join(_named(stray) for stray in view.strays) or "the server"
        return unkillable(row, f"cannot end {left}: alive {now - row.kill_at:.0f} s after SIGKILL; look at it by hand", now)
    first = row.term_at if row.term_at is not None else now
    strays_only = not view.server_alive and not view.keeper_alive
    if strays_only or row.intent is Intent.KILL or row.kill_at is not None or now - first >= policy.stop_grace_s:
        after = row.evolve(kill_at=row.kill_at if row.kill_at is not None else now, **due_at(now + LOOK_AGAIN_S))
        said = () if row.kill_at is not None else (event("killing", f"{row.id}: SIGKILL", after),)
        return Decision(after=after, reason="SIGKILL", actions=(Action.KILL,), events=said)
    left_s = max(LOOK_AGAIN_S, policy.stop_grace_s - (now - first))
    after = row.evolve(term_at=first, **due_at(now + min(TERM_AGAIN_S, left_s)))
    return Decision(after=after, reason="SIGTERM", actions=(Action.TERMINATE,))


def _named(stray: Stray) -> str:
    return f"{stray.name} (pid {stray.pid}, {stray.state})"


def on_spawned(row: Instance, token: int, now: float, *, adopted: bool = False) -> Decision | None:
    """A server of run `token` lives on the host; None when a newer decision exists and it must be ended again."""
    if token != row.token or row.desired is not Desired.RUNNING or row.state is not State.RESTARTING:
        return None
    return _began(row, Event.ADOPTED if adopted else Event.SPAWNED, token, now)


def _began(row: Instance, verb: Event, token: int, now: float) -> Decision:
    after = move(
        row,
        verb,
        now=now,
        run=token,
        spawned_at=now,
        ready_at=None,
        due=None,
        lease_until=0.0,
        look_at=now + FIRST_LOOK_S,
        has_cuda_oom=False,
        probe=ProbeMemory(),
        term_at=None,
        kill_at=None,
        reason="loading",
    )
    said = event("spawned", f"{row.id}: {'taken over' if verb is Event.ADOPTED else 'started'} (run {token})", after, token=token)
    return Decision(after=after, reason="started", events=(said,))


def moved(row: Instance, token: int, port: int, planned: Placement, why: str, now: float) -> Decision | None:
    """The start goes on at another port at once; everything that knows the port follows the row."""
    if token != row.token or row.state is not State.RESTARTING:
        return None
    step = Override(flag=PORT, value=str(port), cause="port_in_use", since=datetime.fromtimestamp(now, UTC))
    overrides = (*(each for each in row.overrides if each.flag != PORT), step)
    placement = (row.placement if row.planned == planned else planned).model_copy(update={"port": port})
    after = row.evolve(placement=placement, planned=planned, overrides=overrides, lease_until=0.0, reason=why, **due_at(now))
    said = event("moved", f"{row.id}: {why}", after, port=port, cause="port_in_use")
    return Decision(after=after, reason=why, events=(said,), step="other_port")


def found(row: Instance, token: int, now: float) -> Decision | None:
    """
    A live server of a run that the row does not know of, though it wants one: Redis lost the commit that said so.

    None when the row knows better: it waits for that run's end, or has seen it.
    """
    unknown = max(row.last_ended, row.run or 0) < token <= row.token
    if not unknown or row.desired is not Desired.RUNNING or row.state in ENDING:
        return None
    superseded = {} if row.run is None else {"last_ended": row.run}
    return _began(row.evolve(**superseded), Event.ADOPTED, token, now)


def blocked(row: Instance, view: HostView, why: str, now: float) -> Decision:
    """What is left of an older run is in the way of a start: it has been killed, and is looked at again until it is gone."""
    if row.kill_at is not None and now - row.kill_at >= row.policy.kill_deadline_s:
        left = ", ".join(_named(stray) for stray in view.strays) or why
        return unkillable(row, f"cannot start {row.id}: {left}, {now - row.kill_at:.0f} s after SIGKILL; look at it by hand", now)
    return not_yet(row.evolve(kill_at=row.kill_at if row.kill_at is not None else now), why, now)


def not_yet(row: Instance, why: str, now: float, wait_s: float = LOOK_AGAIN_S) -> Decision:
    """The start has to wait for the world: looked at again in `wait_s`, the token stays."""
    return Decision(after=row.evolve(lease_until=0.0, reason=why, **due_at(now + wait_s)), reason=why)
