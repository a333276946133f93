"""However a server ends, it comes to rest in the state that the rules say, with the right counts."""

import os
import signal

import pytest

from recovery.core.instance import Instance
from tests.loop.fleet import Fleet, gone
from tests.loop.plane import wait_until


def counts(row: Instance) -> tuple[int, int, int]:
    """restart_count, automatic restarts of the budget, restarts ever."""
    return row.restart_count, row.used, row.restarts_total


def test_kill_9_of_a_server(fleet: Fleet) -> None:
    """
    It passes through RESTARTING and STARTING and serves again; its engine is gone with it.
    """
    one = fleet.model("killed")
    first = one.serves()
    engine = one.engine

    one.kill()

    one.serves(but=first)
    assert gone(engine)
    assert one.history[-3:] == ["restarting", "spawned", "healthy"]
    assert counts(one.row) == (1, 1, 1)
    assert (one.starts, one.overlaps) == (2, [])


def test_kill_9_of_the_engine_only(fleet: Fleet) -> None:
    """
    The server ends with 0, as vLLM does; that is a failure, whose cause is the engine's.
    """
    one = fleet.model("engine-killed")
    first = one.serves()

    os.kill(one.engine, signal.SIGKILL)

    one.serves(but=first)
    row = one.row
    assert counts(row) == (1, 1, 1) and row.last_exit is not None
    assert (row.last_exit.code, row.last_exit.clean) == (0, False)
    assert row.last_exit.cause in ("engine_died", "worker_died")


def test_kill_9_of_the_keeper_only(fleet: Fleet) -> None:
    """
    The server lives on under a new keeper, and is repaired when it dies later, though nobody knows how it ended.
    """
    one = fleet.model("keeper-killed")
    server, keeper = one.serves(), one.keeper
    assert keeper is not None

    os.kill(keeper, signal.SIGKILL)

    wait_until(lambda: one.keeper, lambda pid: pid not in (None, keeper))
    assert (one.server, one.state, one.row.restart_count, one.starts) == (server, "healthy", 0, 1)

    one.kill()
    one.serves(but=server)
    row = one.row
    assert row.last_exit is not None and (row.last_exit.code, row.last_exit.signal) == (None, None)
    assert (row.restart_count, one.starts, one.overlaps) == (1, 2, [])


def test_exit_0_by_itself_is_a_failure(fleet: Fleet) -> None:
    """
    Without the lines of an orderly shutdown an exit code of 0 says nothing: vLLM ends so when its engine dies.
    """
    one = fleet.model("exit-0")
    first = one.serves()

    one.fault(crash={"exit_code": 0})

    one.serves(but=first)
    row = one.row
    assert counts(row) == (1, 1, 1)
    assert row.last_exit is not None and (row.last_exit.code, row.last_exit.clean) == (0, False)


def test_an_orderly_exit_is_left_alone(fleet: Fleet) -> None:
    """
    `on-failure` leaves a server that ended in good order down, in COMPLETED; a start brings it back.
    """
    one = fleet.model("orderly")
    one.serves()

    one.fault(exit=True)

    row = one.reaches("completed")
    assert counts(row) == (0, 0, 0) and row.last_exit is not None and row.last_exit.clean
    fleet.plane.ticked()
    assert (one.state, one.server, one.starts) == ("completed", None, 1)

    assert one.command("start")["accepted"]
    one.serves()
    assert (one.row.restart_count, one.starts) == (0, 2)


def test_always_starts_it_again_after_an_orderly_exit(fleet: Fleet) -> None:
    one = fleet.model("always", restart_policy="always")
    first = one.serves()

    one.fault(exit=True)

    second = one.serves(but=first)
    assert counts(one.row) == (1, 1, 1)
    assert one.row.last_exit is not None and one.row.last_exit.clean
    assert one.plane.store.incidents(one.id, 10) == ()

    one.kill()
    one.serves(but=second)
    assert counts(one.row) == (2, 2, 2)


def test_no_is_never_started_again(fleet: Fleet) -> None:
    """
    Policy `no`: a crash leaves it FAILED and counts nothing; the operator's start works.
    """
    one = fleet.model("never", restart_policy="no")
    first = one.serves()

    one.kill()

    row = one.reaches("failed")
    assert counts(row) == (0, 0, 0) and "restart policy is 'no'" in row.reason
    fleet.plane.ticked()
    assert (one.state, one.starts) == ("failed", 1)

    assert one.command("start")["accepted"]
    one.serves(but=first)


def test_no_hangs_and_is_reported_not_touched(fleet: Fleet) -> None:
    one = fleet.model("never-hung", restart_policy="no")
    server = one.serves()

    one.fault(engine_hang=True)

    row = one.until(lambda row: "reported, not touched" in row.reason)
    assert (row.state.value, one.server, row.restart_count) == ("unhealthy", server, 0)

    one.fault(engine_hang=False)
    assert one.serves() == server


@pytest.mark.parametrize("how", ["engine", "server", "stopped"])
def test_a_hang_is_ended_and_repaired(fleet: Fleet, how: str) -> None:
    """
    The engine stands still with /health at 200; the server answers nothing; SIGSTOP. Counted once.
    """
    one = fleet.model(f"hung-{how}", health_check_timeout=2)
    first = one.serves()

    if how == "stopped":
        one.kill(signal.SIGSTOP)
    else:
        one.fault(**{"engine_hang" if how == "engine" else "hang": True})

    one.serves(but=first)
    assert gone(first)
    assert counts(one.row) == (1, 1, 1)
    assert [kind for kind in one.history if kind in ("unhealthy", "restarting")] == ["unhealthy", "restarting"]
    causes = {incident.cause for incident in one.plane.store.incidents(one.id, 10)}
    assert causes == {"engine_hang" if how == "engine" else "server_hang"}
    assert (one.starts, one.overlaps) == (2, [])


def test_busy_is_not_hung(fleet: Fleet) -> None:
    """
    /health times out for longer than the hang window while the step counter moves: UNHEALTHY, and never killed.
    """
    one = fleet.model("busy", health_check_timeout=0.5, completion_timeout_s=0.5, hang_window_s=1)
    server = one.serves()

    one.fault(busy=True)

    row = one.until(lambda row: row.probe.failures >= 6)
    assert (row.state.value, one.server, row.restart_count) == ("unhealthy", server, 0)

    one.fault(busy=False)
    assert one.serves() == server
    assert one.starts == 1


def test_a_crash_during_load(fleet: Fleet) -> None:
    """
    Twice during its load, then it comes up: two restarts, each counted.
    """
    count = fleet.plane.folder / "crash-in-load"
    one = fleet.model(
        "crash-in-load", "--load-s", "0.3", "--fail-first", "2", "--fail-file", str(count), "--exit-code", "7", remedies=False
    )

    one.serves()
    row = one.row
    assert counts(row) == (2, 2, 2) and row.last_exit is not None and row.last_exit.code == 7
    assert one.starts == 3


def test_a_load_that_never_ends_is_started_again(fleet: Fleet) -> None:
    """
    At the start-up deadline it is ended and started again, from the budget, until that is spent.
    """
    one = fleet.model("endless", "--load-s", "1000", startup_timeout_s=1.5, max_restarts=1)

    row = one.reaches("failed")

    assert counts(row) == (1, 1, 1) and "max restarts (1) reached" in row.reason
    assert one.starts == 2
    wait_until(lambda: one.server, None)


def test_the_budget_is_spent_forgiven_and_reset(fleet: Fleet) -> None:
    """
    One restart, forgiven by serving; two more spend the budget; a reset starts it again with all of it.
    """
    one = fleet.model("budget", max_restarts=2, stable_s=1)
    pid = one.serves()
    one.kill()
    one.serves(but=pid)
    one.until(lambda row: row.used == 0)
    assert counts(one.row) == (0, 0, 1) and "forgiven" in one.history

    fleet.change(one, stable_s=600)
    for spent in (1, 2):
        pid = one.serves()
        one.kill()
        one.serves(but=pid)
        assert counts(one.row) == (spent, spent, spent + 1)
    one.kill()
    row = one.reaches("failed")
    assert counts(row) == (2, 2, 3) and "max restarts (2) reached" in row.reason
    fleet.plane.ticked()
    assert (one.state, one.server) == ("failed", None)

    assert one.command("reset")["accepted"]
    pid = one.serves()
    assert counts(one.row) == (0, 0, 3)
    one.kill()
    one.serves(but=pid)
    assert counts(one.row) == (1, 1, 4)
