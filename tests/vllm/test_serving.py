"""
One real server, broken in every way that a serving one can be, and back each time.

The tests share it and go on where the last one left it: a start costs some twenty seconds.
"""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator

import pytest

from tests.helpers import wait_until
from tests.loop.fleet import gone
from tests.loop.plane import Plane
from tests.vllm.supervised import PATIENCE_S, Scene, Vllm, servers

SATURATED_S = 180.0


@pytest.fixture(scope="module")
def stranger() -> Iterator[socket.socket]:
    """Somebody else's listening socket."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


@pytest.fixture(scope="module")
def tiny(plane: Plane) -> Iterator[Vllm]:
    """The server; its first port is taken by a stranger."""
    with contextlib.ExitStack() as stack:
        fleet = stack.enter_context(servers(plane))
        made = fleet.vllm("tiny", ports=2, autostart=False)
        taken = stack.enter_context(socket.create_server(("127.0.0.1", made.port)))
        made.command("start")
        made.serves()
        assert taken.fileno() >= 0
        yield made


def test_a_port_that_a_stranger_holds_is_left_to_him(tiny: Vllm) -> None:
    """
    It serves on the other port of its range; command line, base_url and probes went along; nothing was counted.
    """
    row = tiny.row

    assert (row.placement.port, row.base_url) == (tiny.port + 1, f"http://127.0.0.1:{tiny.port + 1}/v1")
    assert (row.used, row.degraded_since, tiny.incidents()) == (0, None, ())
    (moved,) = [event for event in tiny.events if event["kind"] == "moved"]
    assert moved["data"]["cause"] == "port_in_use" and "held by" in moved["text"]
    assert not tiny.ask().startswith("error")


def test_sigkill_of_the_api_server(tiny: Vllm) -> None:
    """
    Its engine would live on for ever; the keeper ends it, and the next start finds the card free.
    """
    scene = Scene(tiny)

    os.kill(scene.server, signal.SIGKILL)

    scene.repaired("killed")


def test_sigkill_of_the_engine(tiny: Vllm) -> None:
    """
    vLLM exits with 0, and that is a failure all the same. On a busy machine a look finds /health at 503 before that, and we end it.
    """
    scene = Scene(tiny)

    os.kill(tiny.only("EngineCore"), signal.SIGKILL)

    incident = scene.repaired("engine_died")
    assert tiny.row.last_exit is not None
    if "status 503" not in incident.evidence:
        assert tiny.row.last_exit.code == 0


def test_sigkill_of_the_worker(tiny: Vllm) -> None:
    scene = Scene(tiny)

    os.kill(tiny.only("Worker"), signal.SIGKILL)

    scene.repaired("worker_died")


@pytest.mark.parametrize(("fault", "cause"), [("oom", "cuda_oom_serving"), ("illegal", "illegal_access")])
def test_an_error_in_a_step(tiny: Vllm, fault: str, cause: str) -> None:
    """
    The log's first error is the cause, not its echoes; a fresh process is the first remedy.
    """
    scene = Scene(tiny)
    tiny.write_fault(f"once {fault}")

    assert tiny.ask().startswith("error")

    incident = scene.repaired(cause)
    assert tiny.row.overrides == () or tiny.row.overrides[-1].flag == "--port"
    kept = tiny.plane.store.get(f"evidence:{incident.id}")
    assert "EngineCore" in "\n".join(kept["log"]) and kept["versions"]["vllm"]


def test_an_engine_that_hangs_while_busy(tiny: Vllm) -> None:
    """
    Streams are open, /health stays 200, the counters stand still. The evidence shows the frozen processes.
    """
    scene = Scene(tiny)
    tiny.write_fault("slow:20")
    streams = tiny.ask_later(4, 2000)
    wait_until(lambda: tiny.row.probe.steps, lambda steps: steps is not None and steps > 10, within_s=PATIENCE_S)
    tiny.write_fault("once hang")

    incident = scene.repaired("engine_hang")

    kept = tiny.plane.store.get(f"evidence:{incident.id}")
    assert {each["pid"] for each in kept["processes"]} >= set(scene.before)
    for each in streams:
        each.join(60)


def test_an_engine_that_hangs_while_idle(tiny: Vllm) -> None:
    """
    No gauge of vLLM's shows it; only a completion does.
    """
    scene = Scene(tiny)

    os.kill(tiny.only("EngineCore"), signal.SIGSTOP)

    scene.repaired("engine_hang")


def test_a_stopped_api_server(tiny: Vllm) -> None:
    """
    Connections are taken and nothing is answered; no process of the tree does any work.
    """
    scene = Scene(tiny)

    os.kill(scene.server, signal.SIGSTOP)

    scene.repaired("server_hang")


def test_a_saturated_server_is_left_alone(tiny: Vllm) -> None:
    """
    Slow steps, a long queue, and a look every second.
    """
    scene = Scene(tiny)
    policy, wanted = tiny.row.policy, {"health_check_interval": 1, "completion_timeout_s": 1, "hang_window_s": 3}
    tiny.plane.models[tiny.id] |= wanted
    tiny.plane.write()
    tiny.plane.join()
    wait_until(lambda: tiny.row.policy.health_check_interval, 1, within_s=60)
    tiny.write_fault("slow:100")
    try:
        until, streams = time.monotonic() + SATURATED_S, []
        while time.monotonic() < until:
            streams = [each for each in streams if each.is_alive()]
            streams += tiny.ask_later(64 - len(streams), 100)
            tiny.looked(1)
            assert tiny.server == scene.server and tiny.state in ("healthy", "unhealthy"), (tiny.state, tiny.row.reason)
    finally:
        tiny.clear_fault()
        tiny.plane.models[tiny.id] |= {name: getattr(policy, name) for name in wanted}
        tiny.plane.write()
        tiny.plane.join()
    for each in streams:
        each.join(PATIENCE_S)
    tiny.reaches("healthy")
    assert (tiny.server, tiny.row.used, len(tiny.incidents())) == (scene.server, scene.used, scene.incidents)
    assert not tiny.ask().startswith("error")


def test_ordinary_starts_and_stops_are_no_failures(tiny: Vllm) -> None:
    """
    The last start is stopped while it loads, when vLLM loses a SIGTERM: the second one or the kill ends it.
    """
    scene = Scene(tiny)
    for _ in range(3):
        stop(tiny)
        tiny.command("start")
        tiny.serves()
    stop(tiny)
    tiny.command("start")
    tiny.loads()
    stop(tiny)
    tiny.command("start")
    tiny.serves()

    assert (tiny.row.used, len(tiny.incidents())) == (scene.used, scene.incidents)
    scene.alone()


def stop(model: Vllm) -> None:
    """An operator's stop, to its end: nothing is left, and nothing is the matter."""
    before = model.processes()
    model.command("stop")
    row = model.reaches("stopped")
    wait_until(lambda: [pid for pid in before if not gone(pid)], [], within_s=60)
    assert row.last_exit is not None and row.last_exit.cause == "clean_exit"
