"""
How fast a real vLLM is back after each fault: `make bench-vllm`, or `python -m tests.bench.vllm [--json FILE] [--only NAME ...]`.

Per fault, in seconds: from the fault to the server's end (vLLM's own), from there to the commit that saw it, to the exec of the
next run, and from the fault to the first good token; beside what a bare `vllm serve` takes from exec to its first token in the
same run. The restart delay is set to 0, so what is left between the end and the exec is this project's share.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers import wait_until
from tests.loop.plane import free_ports, plane
from tests.vllm.server import VllmServer
from tests.vllm.supervised import PATIENCE_S, Servers, Vllm, servers

POLL_S = 0.02
BARE_STARTS = 3
Row = dict[str, Any]
QUICK = {"restart_delay": 0, "max_restart_delay": 0}


def bare_start(folder: Path, flags: tuple[str, ...] = ()) -> float:
    """Seconds from the exec of a bare `vllm serve` to its first token."""
    server = VllmServer(folder / "bare.log", free_ports(1)[0], flags)
    began = time.time()
    try:
        wait_until(lambda: '"text"' in server.ask(max_tokens=1), within_s=PATIENCE_S)
        return time.time() - began
    finally:
        server.send(signal.SIGTERM)
        server.wait_exit(30)
        server.close()


def first_token(model: Vllm, but: int | None) -> float:
    """The instant of the first token of a run other than `but`."""
    while True:
        view = model.plane.view(model.instance)
        fresh = view.run is not None and view.run.server_pid != but and view.server_alive
        if fresh and not model.ask(max_tokens=1, timeout_s=2.0).startswith("error"):
            return time.time()
        time.sleep(POLL_S)


def repaired(model: Vllm, began: float, but: int | None) -> Row:
    """What the repair of a fault that began then took; the first token is looked for from outside."""
    good = first_token(model, but)
    incident = model.recovered()
    run = model.plane.view(model.instance).run
    assert run is not None and incident.detected_at is not None and incident.failed_at is not None
    ended = model.row.last_exit.at if model.row.last_exit is not None else incident.failed_at
    hung = incident.cause.endswith("hang")
    # A hung server does not end by itself: its part is nothing, and what it takes to be sure of it is ours.
    failed = began if hung else incident.failed_at
    return {
        "cause": incident.cause,
        "remedy": next((step["kind"] for step in incident.steps if step["kind"] not in ("failed", "started", "ready")), ""),
        "to_end_s": None if hung else failed - began,
        "to_detect_s": incident.detected_at - failed,
        "to_exec_s": run.at - (incident.detected_at if hung else ended),
        "to_first_token_s": good - began,
        "load_s": good - run.at,
    }


def serving_faults(tiny: Vllm) -> dict[str, Callable[[], None]]:
    """What is done to a server that serves."""

    def hang_busy() -> None:
        tiny.write_fault("once hang")

    def in_a_step(fault: str) -> None:
        tiny.write_fault(f"once {fault}")
        threading.Thread(target=tiny.ask, daemon=True).start()

    return {
        "SIGKILL of the API server": lambda: os.kill(tiny.pid, signal.SIGKILL),
        "SIGKILL of EngineCore": lambda: os.kill(tiny.only("EngineCore"), signal.SIGKILL),
        "SIGKILL of the worker": lambda: os.kill(tiny.only("Worker"), signal.SIGKILL),
        "CUDA OOM while serving": lambda: in_a_step("oom"),
        "illegal memory access": lambda: in_a_step("illegal"),
        "engine hangs, busy": hang_busy,
        "engine hangs, idle": lambda: os.kill(tiny.only("EngineCore"), signal.SIGSTOP),
        "SIGSTOP of the API server": lambda: os.kill(tiny.pid, signal.SIGSTOP),
    }


def measure_serving(fleet: Servers, wanted: Callable[[str], bool], note: Callable[[str, Row], None]) -> None:
    """One server, broken again and again."""
    tiny = fleet.vllm("tiny", **QUICK)
    tiny.serves()
    for name, break_it in serving_faults(tiny).items():
        if not wanted(name):
            continue
        first = tiny.serves()
        wait_until(lambda: tiny.row.incident, None, within_s=PATIENCE_S)
        if name == "engine hangs, busy":
            tiny.write_fault("slow:20")
            tiny.ask_later(4, 2000)
            wait_until(lambda: tiny.row.probe.steps, lambda steps: steps is not None and steps > 10, within_s=PATIENCE_S)
        began = time.time()
        break_it()
        note(name, repaired(tiny, began, first))


def measure_loading(fleet: Servers, wanted: Callable[[str], bool], note: Callable[[str, Row], None]) -> None:
    """Servers that cannot load as they are told to. The fault is their end, so the time to it is left out."""
    loads: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {
        "CUDA OOM at load": ("oom", ("--max-model-len", "2048"), {"FAULT_LOAD": "oom if max_model_len>1024"}),
        "KV cache too small": ("kv", ("--max-model-len", "8192", "--kv-cache-memory-bytes", "8000000"), {"VLLM_CPU_KVCACHE_SPACE": ""}),
    }
    for name, (model_id, flags, env) in loads.items():
        if wanted(name):
            began = time.time()
            one = fleet.vllm(model_id, *flags, env=env, **QUICK)
            row = repaired(one, began, wait_until(lambda one=one: one.server, within_s=PATIENCE_S))
            note(name, row | {"to_first_token_s": row["to_first_token_s"] - row["to_end_s"], "to_end_s": None})
            stop(one)
    if wanted("port taken"):
        with socket.create_server(("127.0.0.1", 0)) as stranger:
            port = stranger.getsockname()[1]
            one = fleet.vllm("taken", port_range=[port, port + 50], autostart=False, **QUICK)
            began = time.time()
            one.command("start")
            good = first_token(one, None)
            run = one.plane.view(one.instance).run
            assert run is not None
            row = {"cause": "port_in_use", "remedy": "other_port", "to_end_s": None, "to_detect_s": None}
            note("port taken", row | {"to_exec_s": run.at - began, "to_first_token_s": good - began, "load_s": good - run.at})
            stop(one)
    for name, flags, model in (("bad flag", ("--no-such-flag",), "tiny-model"), ("missing model", (), "/models/no/such")):
        if wanted(name):
            one = fleet.vllm(name.replace(" ", "-"), *flags, model=model, **QUICK)
            one.reaches("failed")
            (incident,) = one.incidents()
            assert incident.detected_at is not None and incident.failed_at is not None
            found = {"cause": incident.cause, "remedy": "give_up", "to_end_s": None, "to_exec_s": None, "to_first_token_s": None}
            note(name, found | {"to_detect_s": incident.detected_at - incident.failed_at, "load_s": None})


def measure_stop(fleet: Servers, wanted: Callable[[str], bool], note: Callable[[str, Row], None]) -> None:
    """A stop while the engine starts, when vLLM loses a SIGTERM."""
    if wanted("stop during load"):
        one = fleet.vllm("stopped", **QUICK)
        one.loads()
        began = time.time()
        one.command("stop")
        one.reaches("stopped")
        assert one.row.last_exit is not None
        found = {"cause": one.row.last_exit.cause, "remedy": "stop", "to_end_s": one.row.last_exit.at - began}
        note("stop during load", found | dict.fromkeys(("to_detect_s", "to_exec_s", "to_first_token_s", "load_s")))


def stop(model: Vllm) -> None:
    """Take one out of the way of the next."""
    model.command("stop")
    model.reaches("stopped")


def figures(bare: list[float], rows: dict[str, Row]) -> dict[str, Any]:
    """What has been measured so far."""
    return {
        "what": "seconds; a real vLLM 0.32 on CPU with a tiny model; restart_delay 0, health_check_interval 2, hang_window_s 5",
        "bare_start_s": {"median": round(statistics.median(bare), 1), "each": [round(each, 1) for each in bare]},
        "faults": rows,
        "machine": {"cores": os.cpu_count(), "load_average": round(os.getloadavg()[0], 1)},
    }


def run(only: list[str], keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All figures; `keep` gets them anew after each fault."""
    rows: dict[str, Row] = {}

    def wanted(name: str) -> bool:
        return not only or name in only

    def note(name: str, row: Row) -> None:
        rows[name] = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
        sys.stderr.write(f"{name}: {rows[name]}\n")
        keep(figures(bare, rows))

    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        bare = [bare_start(Path(folder)) for _ in range(BARE_STARTS)]
    sys.stderr.write(f"bare starts: {bare}\n")
    for measure in (measure_serving, measure_loading, measure_stop):
        with plane() as made, servers(made) as fleet:
            measure(fleet, wanted, note)
    return figures(bare, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--only", nargs="*", default=[], help="only these faults, by their names in the table")
    given = parser.parse_args()

    def keep(result: dict[str, Any]) -> None:
        if given.json is not None:
            given.json.parent.mkdir(parents=True, exist_ok=True)
            given.json.write_text(json.dumps(result, indent=1) + "\n")

    sys.stdout.write(json.dumps(run(given.only, keep), indent=1) + "\n")


if __name__ == "__main__":
    main()
