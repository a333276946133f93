"""
A drill: cause one fault on a live model of this host, watch, and report what happened when.

The fault comes from outside, as on a bad day; nothing tells the supervisor. Times are read off the model's own history,
by Redis' clock. A drill uses the restart budget like any failure, and every drill stands in the history.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from enum import StrEnum
from typing import Any, Literal, Protocol

from pydantic import Field

from recovery.core.change import ModelEvent
from recovery.core.host import HostView
from recovery.core.instance import Instance, Value
from recovery.core.states import State
from recovery.errors import ConflictError, UnknownModelError
from recovery.ports import Store

FOLLOW_S = 0.5
HOLD_PORT_S = 20.0
"""How long the fault `port` keeps the port: long enough for a start to meet it."""
SLACK_S = 60.0


class Fault(StrEnum):
    """What a drill can cause."""

    KILL = "kill"  # SIGKILL to the server
    ENGINE = "engine"  # SIGKILL to vLLM's engine process: the server then exits with code 0
    HANG = "hang"  # SIGSTOP to the engine: /health stays 200, nothing moves
    OOM = "oom"  # the server runs out of GPU memory in its own words; only where it offers injected faults
    PORT = "port"  # SIGKILL to the server, and its port is taken while it is down


class Hands(Protocol):
    """What touches processes (`adapters/drill_hands.py`)."""

    def kill(self, view: HostView) -> str:
        """SIGKILL the server."""

    def kill_engine(self, view: HostView) -> str:
        """SIGKILL its engine."""

    def freeze(self, view: HostView) -> tuple[str, tuple[int, int]]:
        """SIGSTOP its engine."""

    def thaw(self, who: tuple[int, int]) -> None:
        """SIGCONT."""

    def inject_oom(self, view: HostView, root_url: str | None) -> str:
        """Have it run out of memory."""

    def hold_port(self, port: int) -> AbstractContextManager[str]:
        """Listen on its port."""


class Moment(Value):
    """One thing that happened."""

    at: float = Field(description="Redis seconds")
    after_s: float = Field(description="seconds after the fault")
    kind: str
    text: str


class DrillReport(Value):
    """What a drill saw. Times are seconds after the fault; None = it did not come to that."""

    model: str
    instance: str
    host: str
    fault: Fault
    did: str
    at: float
    detected_s: float | None = None
    restarted_s: float | None = None
    ready_s: float | None = None
    cause: str | None = Field(None, description="what the diagnosis made of it")
    outcome: Literal["recovered", "gave_up", "stays_down", "not_detected", "not_ready_in_time"]
    moments: tuple[Moment, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the model came back."""
        return self.outcome == "recovered"

    def lines(self) -> tuple[str, ...]:
        """The report for a person, one line a moment."""
        head = f"drill {self.fault.value} on {self.instance} ({self.host}): {self.did}"
        body = tuple(f"  {each.after_s:8.2f} s  {each.kind:<11} {each.text}" for each in self.moments)
        parts = (("detected", self.detected_s), ("restarted", self.restarted_s), ("ready", self.ready_s))
        times = ", ".join(f"{name} after {value:.2f} s" for name, value in parts if value is not None)
        return (
            head,
            *body,
            f"{self.outcome.replace('_', ' ')}{': ' if times else ''}{times}{f' (cause: {self.cause})' if self.cause else ''}",
        )


def run_drill(
    store: Store,
    look: Callable[[str], HostView],
    hands: Hands,
    host: str,
    model: str,
    fault: Fault,
    *,
    yes: bool = False,
    replica: int | None = None,
    deadline_s: float | None = None,
    on_event: Callable[[Moment], None] = lambda moment: None,
) -> DrillReport:
    """
    Cause `fault` on a healthy instance of `model` on this `host`, watch it through, and report.

    `look` is the host's look at an instance (`Processes.look`). `deadline_s` is how long to watch (default: from the
    model's settings). Raises `UnknownModelError`; `ConflictError` when the model is not marked `drill: true` and `yes`
    is not given, when nothing of it is healthy here, or when the fault cannot be caused.
    """
    row = _victim(store, host, model, replica, yes)
    view = look(row.id)
    if view.run is None or view.run.token != row.run or not view.server_alive:
        raise ConflictError(f"cannot drill {row.id}: this host does not see the run that its row names; look again in a moment")
    newest = store.events(model, 1)
    last = str(newest[-1]["id"]) if newest else "0-0"
    at = store.now()
    with _caused(hands, fault, row, view) as did:
        store.add_event(
            model, ModelEvent(kind="drill", text=f"{row.id}: drill {fault.value}: {did}", data={"instance": row.id, "fault": fault})
        )
        on_event(Moment(at=at, after_s=0.0, kind="drill", text=did))
        watched = _Watched(row, at, on_event)
        until_s = deadline_s if deadline_s is not None else _deadline_s(row)
        while not watched.over and store.now() - at < until_s:
            for each in store.follow_events(model, last, FOLLOW_S):
                last = str(each["id"])
                watched.take(each)
            if fault is Fault.PORT and store.now() - at > HOLD_PORT_S:
                did.release()
    return watched.report(fault, str(did), store.load(row.id))


class _Done(str):
    """What was done, and how to end it early."""

    release: Callable[[], None]


@contextlib.contextmanager
def _caused(hands: Hands, fault: Fault, row: Instance, view: HostView) -> Iterator[_Done]:
    """Cause the fault; what outlives the drill otherwise is undone at the end of the block."""
    with contextlib.ExitStack() as undo:
        match fault:
            case Fault.KILL:
                did = hands.kill(view)
            case Fault.ENGINE:
                did = hands.kill_engine(view)
            case Fault.HANG:
                did, who = hands.freeze(view)
                undo.callback(hands.thaw, who)
            case Fault.OOM:
                did = hands.inject_oom(view, _root(row))
            case Fault.PORT:
                if row.placement.port is None:
                    raise ConflictError(f"cannot take the port of {row.id}: nothing tells which it is")
                did = hands.kill(view)
                did += f"; {_held(hands, row.placement.port, undo)}"
        done = _Done(did)
        done.release = undo.close
        yield done


def _held(hands: Hands, port: int, undo: contextlib.ExitStack) -> str:
    """Take the port as soon as the dying server lets go of it."""
    for _ in range(2000):
        with contextlib.suppress(ConflictError):
            return undo.enter_context(hands.hold_port(port))
    return f"port {port} could not be had"


def _victim(store: Store, host: str, model: str, replica: int | None, yes: bool) -> Instance:
    rows = sorted((row for row in store.load_all() if row.model == model), key=lambda row: row.replica)
    if not rows:
        raise UnknownModelError(f"cannot find a model {model[:80]!r} in the fleet")
    if not rows[0].policy.drill and not yes:
        raise ConflictError(f"cannot drill {model}: it is not marked 'drill: true' in the fleet file; --yes does it all the same")
    here = [row for row in rows if row.placement.host == host and replica in (None, row.replica)]
    if not here:
        places = ", ".join(sorted({row.placement.host for row in rows}))
        raise ConflictError(
            f"cannot drill {model} from {host}: {'that replica' if replica is not None else 'it'} runs on {places}; run it there"
        )
    healthy = [row for row in here if row.state is State.HEALTHY and row.run is not None]
    if not healthy:
        raise ConflictError(f"cannot drill {here[0].id}: it is {here[0].state.value}, and a drill wants a healthy one")
    return healthy[0]


class _Watched:
    """Reads one instance's history until it is over."""

    def __init__(self, row: Instance, at: float, on_event: Callable[[Moment], None]) -> None:
        self._row = row
        self._at = at
        self._on_event = on_event
        self._moments: list[Moment] = []
        self._cause: str | None = None
        self.over = False

    def take(self, event: dict[str, Any]) -> None:
        """Note one line of the model's history."""
        data = event.get("data") or {}
        if data.get("instance") != self._row.id or event["kind"] == "drill":
            return
        moment = Moment(at=event["at"], after_s=max(0.0, event["at"] - self._at), kind=event["kind"], text=event["text"])
        self._moments.append(moment)
        self._on_event(moment)
        self._cause = self._cause or data.get("cause")
        again = self._first("spawned") is not None
        self.over = moment.kind in ("failed", "stopped", "completed") or (moment.kind == "healthy" and again)

    def _first(self, *kinds: str) -> float | None:
        return next((each.after_s for each in self._moments if each.kind in kinds), None)

    def report(self, fault: Fault, did: str, row: Instance | None) -> DrillReport:
        """What was seen."""
        spawned = self._first("spawned")
        ready = next(
            (each.after_s for each in self._moments if each.kind == "healthy" and spawned is not None and each.after_s >= spawned), None
        )
        detected = next((each.after_s for each in self._moments), None)
        ends = {each.kind for each in self._moments}
        outcome: Literal["recovered", "gave_up", "stays_down", "not_detected", "not_ready_in_time"]
        if ready is not None:
            outcome = "recovered"
        elif "failed" in ends:
            outcome = "stays_down" if self._row.policy.restart_policy == "no" else "gave_up"
        elif ends & {"stopped", "completed"}:
            outcome = "stays_down"
        else:
            outcome = "not_detected" if detected is None else "not_ready_in_time"
        return DrillReport(
            model=self._row.model,
            instance=self._row.id,
            host=self._row.placement.host,
            fault=fault,
            did=did,
            at=self._at,
            detected_s=detected,
            restarted_s=spawned,
            ready_s=ready,
            cause=self._cause
            or (row.last_exit.cause if row is not None and row.last_exit is not None and row.last_ended > self._row.last_ended else None),
            outcome=outcome,
            moments=tuple(self._moments),
        )


def _deadline_s(row: Instance) -> float:
    """Long enough for the slowest way there that the settings allow, short of their upper bounds."""
    policy = row.policy
    detect_s = policy.health_check_interval + policy.failure_threshold * (policy.health_check_timeout + policy.completion_timeout_s)
    return detect_s + policy.hang_window_s + policy.max_restart_delay + policy.kill_deadline_s + 3.0 * (row.load_s or 60.0) + SLACK_S


def _root(row: Instance) -> str | None:
    return row.base_url.rstrip("/").removesuffix("/v1").rstrip("/") if row.base_url else None
