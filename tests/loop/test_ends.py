"""However a server ends, it comes to rest in the state that the rules say, with the right counts."""

import os
import signal

from tests.helpers import wait_until
from tests.loop.fleet import Fleet, gone
from tests.loop.plane import PATIENCE_S


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
    assert one.history[-4:] == ["exited", "restarting", "spawned", "healthy"] or one.history[-3:] == ["restarting", "spawned", "healthy"]
    assert (one.row.restart_count, one.row.used, one.row.restarts_total) == (1, 1, 1)
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
    assert row.restart_count == 1 and row.last_exit is not None
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

    wait_until(lambda: one.keeper, lambda pid: pid not in (None, keeper), within_s=PATIENCE_S)
    assert (one.server, one.state, one.row.restart_count, one.starts) == (server, "healthy", 0, 1)

    one.kill()
    one.serves(but=server)
    row = one.row
    assert row.last_exit is not None and (row.last_exit.code, row.last_exit.signal) == (None, None)
    assert (row.restart_count, one.starts, one.overlaps) == (1, 2, [])
