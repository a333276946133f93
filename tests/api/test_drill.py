"""A drill's refusals and verdicts; that each fault is really caused is shown on a whole installation."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from recovery.core.change import ModelEvent
from recovery.core.fleet import Policy
from recovery.core.host import HostRecord, HostView, RunRecord
from recovery.core.states import State
from recovery.drill import Fault, run_drill
from recovery.errors import ConflictError, UnknownModelError
from tests.api.conftest import HOST, Fleet
from tests.helpers import wait_until

DRILLED = Policy(restart_policy="on-failure", drill=True)


class Notes:
    """Hands that only note what they were told to do."""

    def __init__(self) -> None:
        self.did: list[str] = []

    def _note(self, what: str) -> str:
        self.did.append(what)
        return what

    def kill(self, view: HostView) -> str:
        """Note it."""
        return self._note("kill")

    def kill_engine(self, view: HostView) -> str:
        """Note it."""
        return self._note("kill engine")

    def freeze(self, view: HostView) -> tuple[str, tuple[int, int]]:
        """Note it."""
        return self._note("freeze"), (1, 2)

    def thaw(self, who: tuple[int, int]) -> None:
        """Note it."""
        self._note(f"thaw {who}")

    def inject_oom(self, view: HostView, root_url: str | None) -> str:
        """Note it."""
        return self._note(f"oom at {root_url}")

    @contextmanager
    def hold_port(self, port: int) -> Iterator[str]:
        """Note it, and its end."""
        yield self._note(f"hold {port}")
        self._note("let go")


def look(instance: str) -> HostView:
    """The host sees run 7 alive."""
    run = RunRecord(
        token=7, keeper_pid=1, keeper_start=1, server_pid=2, server_start=2, session=2, boot_id="b", marker="m", at=0.0, boottime=0.0
    )
    nothing: dict[str, Any] = {"exit": None, "gone": None, "locked": True, "strays": (), "boot_id": "b"}
    return HostView(record=HostRecord(token=7), run=run, keeper_alive=True, server_alive=True, **nothing)


def drill(fleet: Fleet, fault: Fault, hands: Notes, *happens: str, **options: Any) -> Any:
    """Run one while these events happen."""

    def happen() -> None:
        wait_until(lambda: [each["kind"] for each in fleet.store.events("vllm", 10)], lambda kinds: "drill" in kinds, within_s=60)
        for kind in happens:
            fleet.store.add_event("vllm", ModelEvent(kind=kind, text=kind, data={"instance": "vllm-0", "cause": "killed"}))

    thread = threading.Thread(target=happen, daemon=True)
    if happens:
        thread.start()
    report = run_drill(fleet.store, look, hands, HOST, "vllm", fault, **options)
    if happens:
        thread.join(60)
    return report


def test_it_follows_the_way_back(fleet: Fleet):
    fleet.add(policy=DRILLED)

    report = drill(fleet, Fault.KILL, Notes(), "restarting", "spawned", "healthy")

    assert (report.outcome, report.passed, report.cause) == ("recovered", True, "killed")
    assert 0 <= report.detected_s <= report.restarted_s <= report.ready_s
    assert [moment.kind for moment in report.moments] == ["restarting", "spawned", "healthy"]
    assert report.lines()[0] == "drill kill on vllm-0 (gpu-1): kill"
    assert report.lines()[-1].startswith("recovered: detected after ")


@pytest.mark.parametrize(
    ("happens", "outcome"),
    [(("failed",), "gave_up"), (("restarting", "spawned"), "not_ready_in_time"), (("completed",), "stays_down"), ((), "not_detected")],
)
def test_what_does_not_come_back_is_told_apart(fleet: Fleet, happens: tuple[str, ...], outcome: str):
    fleet.add(policy=DRILLED)

    assert drill(fleet, Fault.KILL, Notes(), *happens, deadline_s=2.0).outcome == outcome


def test_what_was_frozen_or_held_is_let_go_whatever_happens(fleet: Fleet):
    fleet.add(policy=DRILLED)
    hands = Notes()
    drill(fleet, Fault.HANG, hands, deadline_s=0.3)
    drill(fleet, Fault.PORT, hands, deadline_s=0.3)
    with pytest.raises(RuntimeError, match="the reader is gone"):
        drill(fleet, Fault.HANG, hands, on_event=_broken)

    assert hands.did == ["freeze", "thaw (1, 2)", "kill", "hold 8001", "let go", "freeze", "thaw (1, 2)"]


def _broken(moment: Any) -> None:
    raise RuntimeError("the reader is gone")


def test_only_what_is_marked_or_insisted_on_is_hurt(fleet: Fleet):
    fleet.add(policy=Policy(restart_policy="on-failure"))
    hands = Notes()

    with pytest.raises(ConflictError, match="not marked 'drill: true'"):
        drill(fleet, Fault.KILL, hands)
    assert hands.did == []
    assert drill(fleet, Fault.KILL, hands, "restarting", "spawned", "healthy", yes=True).passed


def test_nothing_but_a_healthy_instance_of_this_host_is_hurt(fleet: Fleet):
    fleet.add(policy=DRILLED, state=State.STARTING)
    hands = Notes()

    with pytest.raises(ConflictError, match="it is starting, and a drill wants a healthy one"):
        drill(fleet, Fault.KILL, hands)
    with pytest.raises(ConflictError, match="runs on gpu-1; run it there"):
        run_drill(fleet.store, look, hands, "gpu-2", "vllm", Fault.KILL)
    with pytest.raises(UnknownModelError):
        run_drill(fleet.store, look, hands, HOST, "nope", Fault.KILL)
    fleet.change(state=State.HEALTHY, run=8, token=8)
    with pytest.raises(ConflictError, match="does not see the run that its row names"):
        drill(fleet, Fault.KILL, hands)
    assert hands.did == []
