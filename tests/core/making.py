"""Rows, views and looks for tests of the decisions: ordinary ones, with what matters to a test named by it."""

from typing import Any

from recovery.core.fleet import Placement, Policy
from recovery.core.host import ExitRecord, GoneRecord, HostRecord, HostView, RunRecord, Stray
from recovery.core.instance import Desired, Instance, ProbeMemory
from recovery.core.looking import Look
from recovery.core.states import ENDING, PROBED, State

NOW = 1_000_000.0
TOKEN = int(NOW * 1e6) - 5_000_000
"""The run of an ordinary row: begun five seconds ago."""
BOOT = "boot-1"


def policy(**changes: Any) -> Policy:
    """The defaults with `on-failure` and no jitter, so that delays are exact."""
    return Policy(**{"restart_policy": "on-failure", "restart_jitter": 0.0, **changes})


def row(state: State = State.HEALTHY, *, rules: dict[str, Any] | None = None, **changes: Any) -> Instance:
    """An instance in this state with everything that belongs to it; `rules` are changes of its policy."""
    alive = state in PROBED or state in ENDING
    wanted = Desired.STOPPED if state in (State.STOPPED, State.STOPPING, State.DRAINING) else Desired.RUNNING
    due = {"due": NOW, "not_before": NOW - 1.5} if state in ENDING or state is State.RESTARTING else {}
    usual: dict[str, Any] = {
        "id": "m-0",
        "model": "m",
        "state": state,
        "desired": wanted,
        "policy": policy(**(rules or {})),
        "placement": Placement(host="h", port=8100),
        "base_url": "http://h:8100/v1",
        "token": TOKEN,
        "run": TOKEN if alive else None,
        "last_ended": 0 if alive else TOKEN - 1,
        "spawned_at": NOW - 5 if alive else None,
        "ready_at": NOW - 3 if alive and state is not State.STARTING else None,
        "entered_at": NOW - 3,
        "look_at": NOW if state in PROBED else None,
        **due,
    }
    return Instance(**{**usual, **changes})


def memory(**changes: Any) -> ProbeMemory:
    """What the looks before remember."""
    return ProbeMemory(**changes)


def look(**changes: Any) -> Look:
    """A look at the ordinary run, which answers well."""
    return Look(**{"run": TOKEN, "steps": 10.0, "completion": "ok", **changes})


def bad(**changes: Any) -> Look:
    """A look that found everything hanging."""
    return look(**{"health": "timeout", "models": "timeout", "steps": None, "completion": "skipped", "message": "no answer", **changes})


def run_record(token: int = TOKEN, boot_id: str = BOOT) -> RunRecord:
    """A run as its keeper wrote it down."""
    return RunRecord(
        token=token,
        keeper_pid=10,
        keeper_start=1,
        server_pid=11,
        server_start=2,
        session=11,
        boot_id=boot_id,
        marker="m",
        at=NOW,
        boottime=1.0,
    )


def stray(pid: int = 12, state: str = "S") -> Stray:
    """A process of a run."""
    return Stray(pid=pid, name="VLLM::EngineCor", state=state)


def view(
    *, run: int | None = TOKEN, alive: bool = True, exit_token: int | None = None, left: tuple[Stray, ...] = (), **changes: Any
) -> HostView:
    """What the host shows: by default the ordinary run, alive with its keeper."""
    usual: dict[str, Any] = {
        "record": HostRecord(token=run or 0),
        "run": run_record(run) if run is not None else None,
        "exit": ExitRecord(token=exit_token, code=1, at=NOW) if exit_token is not None else None,
        "gone": GoneRecord(token=run or 0, at=NOW, left=left) if left else None,
        "keeper_alive": alive and run is not None,
        "server_alive": alive and run is not None,
        "locked": alive,
        "strays": left,
        "boot_id": BOOT,
    }
    return HostView(**{**usual, **changes})
