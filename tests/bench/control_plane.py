"""
What the control plane costs and how fast it is: `make bench`, or `python -m tests.bench.control_plane [--json FILE] [--only PART]`.

- `kill`: SIGKILL of a server → its successor's exec, beside a bare shell loop, supervisord and circus, taking turns.
- `hang`: a server accepts and never answers → its successor's exec.
- `idle`: CPU of all parts per minute at 10 and 100 instances, and their memory.
- `probe`: CPU of one look, beside httpx and a bare socket (`tests.bench.probe`).
- `api`: the management API's requests a second and scrapes at 10, 100 and 1000 instances (`tests.bench.api`).

Moments are those the successors note themselves, by the same clock. Nothing here is a test; what is printed is what was seen.
"""

import argparse
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.bench import api, peers, probe
from tests.bench.measured import Measured, child_model, simulated
from tests.cli.installation import ROOT
from tests.helpers import wait_until

PATIENCE_S = 300.0
APART_S = 8.0
"""Between two servers that hang, on average: it is the time to find one that is asked for, not that of thirty at once."""
OURS = "vllm-recovery"
Figures = dict[str, Any]


def summary(values: Iterable[float]) -> Figures:
    """Median, quartiles and ends of what was measured."""
    known = sorted(values)
    low, median, high = statistics.quantiles(known, n=4) if len(known) > 1 else known * 3
    return {"n": len(known), "min": known[0], "p25": low, "median": median, "p75": high, "max": known[-1]}


def rounded(value: Any, digits: int) -> Any:
    """Figures with so many digits after the point."""
    if isinstance(value, float):
        return round(value, digits)
    return {name: rounded(each, digits) for name, each in value.items()} if isinstance(value, dict) else value


# --- kill → successor's exec ---------------------------------------------------------------------------------------


def kill(rounds: int) -> Figures:
    """Milliseconds from the kill to the successor's exec; contestants take turns, at moments that fit nobody's timer."""
    chance = random.Random(1)
    with tempfile.TemporaryDirectory(prefix="rb-") as place, peers.running() as notes:
        ours = Path(place) / "execs"
        made = Measured({"child": child_model(ours)})
        try:
            made.up()
            notes = {OURS: ours, **notes}
            took: dict[str, list[float]] = {name: [] for name in notes}
            for _ in range(rounds):
                for name, path in notes.items():
                    time.sleep(chance.uniform(0.5, 0.9))
                    took[name].append(_kill_once(path))
            restarts = [task for task in results(made) if task.get("name") == "recovery.restart_instance"]
            done = sum(task.get("status") == "SUCCESS" for task in restarts)
        finally:
            made.close()
    return {
        "unit": "ms",
        "what": "SIGKILL of a server to its successor's exec; restart_delay 0, no jitter, no limit",
        **{name: rounded(summary(values), 2) for name, values in took.items()},
        "restart_tasks_in_result_backend": done,
    }


def _kill_once(path: Path) -> float:
    lines = _execs(path)
    pid = lines[-1][0]
    began = time.time()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(_execs(path)), lambda seen: seen > len(lines), within_s=PATIENCE_S)
    return (_execs(path)[len(lines)][1] - began) * 1000.0


def _execs(path: Path) -> list[tuple[int, float]]:
    wait_until(path.exists, within_s=PATIENCE_S)
    return [(int(pid), float(at)) for pid, _, at in (line.partition(" ") for line in path.read_text().splitlines())]


def results(made: Measured) -> list[dict[str, Any]]:
    """What Celery's result backend holds."""
    with made.wired.url.client() as client:
        keys: Any = client.keys("celery-task-meta-*")
        values: Any = client.mget(keys) if keys else []
        return [json.loads(value) for value in values if value is not None]


# --- hang → successor's exec -----------------------------------------------------------------------------------------


def hang(count: int, **policy: Any) -> Figures:
    """Seconds from the moment a server answers nothing more to its successor's exec; one after another, at moments of their own."""
    chance = random.Random(2)
    with tempfile.TemporaryDirectory(prefix="rb-") as place:
        journal = Path(place) / "journal"
        models = simulated(count, journal, **policy)
        made = Measured(models)
        try:
            made.up()
            interval_s = float(policy.get("health_check_interval", 30.0))
            time.sleep(interval_s)  # by then every server has been looked at, at a moment of its own
            spread_s = max(interval_s, APART_S * count)
            hung: dict[str, float] = {}
            threads = [
                threading.Thread(target=_hang_one, args=(name, spec, chance.uniform(0, spread_s), hung)) for name, spec in models.items()
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            took = [wait_until(_successor(journal, name, at), within_s=PATIENCE_S) - at for name, at in hung.items()]
        finally:
            made.close()
    return {"unit": "s", "policy": policy, **rounded(summary(took), 2)}


def _hang_one(name: str, spec: dict[str, Any], after_s: float, hung: dict[str, float]) -> None:
    time.sleep(after_s)
    url = spec["endpoints"]["base_url"].replace("{host}", "127.0.0.1").removesuffix("/v1") + "/admin/fault"
    request = urllib.request.Request(url, b'{"hang": true}', {"content-type": "application/json"}, method="POST")
    with urllib.request.urlopen(request, timeout=60):
        hung[name] = time.time()


def _successor(journal: Path, name: str, after: float) -> Callable[[], float | None]:
    def look() -> float | None:
        lines = (json.loads(line) for line in journal.read_text().splitlines())
        return next(
            (each["wall"] for each in lines if each["event"] == "exec" and each["instance"] == f"{name}-0" and each["wall"] > after), None
        )

    return look


# --- idle ------------------------------------------------------------------------------------------------------------


def idle(count: int, minutes: float) -> Figures:
    """CPU seconds per minute of each part with healthy servers that are looked at every 30 s, and memory at the end."""
    made = Measured(simulated(count))
    try:
        made.up()
        time.sleep(45)  # past the first looks, the incidents' validation and the parts' own start
        before, began = made.cpu_s(), time.monotonic()
        time.sleep(minutes * 60)
        after, took = made.cpu_s(), (time.monotonic() - began) / 60
        used = {name: round((after[name] - before[name]) / took, 3) for name in sorted(after)}
        return {"unit": "CPU s per minute", "instances": count, "parts": used, "all": round(sum(used.values()), 3), "memory": made.memory()}
    finally:
        made.close()


def per_look(few: Figures, many: Figures) -> float:
    """
    CPU milliseconds of all parts per look, when there is one instance more: what 90 more add, at two looks a minute each.

    More than the look alone: keepers, reconciling and the door's own looks grow with the instances too.
    """
    return round((many["all"] - few["all"]) / (2 * (many["instances"] - few["instances"])) * 1000, 2)


# --- all of it -------------------------------------------------------------------------------------------------------


def machine() -> Figures:
    """Where it ran, and how busy that was."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_1m": round(os.getloadavg()[0], 2),
        "at": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def commit() -> str:
    """Which code it was; figures of several runs may end up in one file (`--only`)."""
    said = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False)
    return said.stdout.strip() or "unknown"


QUICK = {"health_check_interval": 5, "health_check_timeout": 2, "completion_timeout_s": 2, "restart_delay": 0, "restart_jitter": 0}


def everything(rounds: int, hung: int, minutes: float, only: list[str]) -> Figures:
    """All figures, printed as they come."""
    found: Figures = {"machine": machine()}
    steps: dict[str, Callable[[], Any]] = {
        "kill": lambda: kill(rounds),
        "hang_defaults": lambda: hang(hung),
        "hang_quick": lambda: hang(hung, **QUICK),
        "idle_10": lambda: idle(10, minutes),
        "idle_100": lambda: idle(100, minutes),
        "probe": probe.everything,
        "api": api.everything,
    }
    for name, step in steps.items():
        if not only or name.split("_")[0] in only:
            found[name] = {**step(), "load_1m": round(os.getloadavg()[0], 2), "commit": commit()}
            print(name, json.dumps(found[name], indent=1), flush=True)
    if {"idle_10", "idle_100"} <= set(found):
        found["cpu_ms_per_instance_and_look"] = per_look(found["idle_10"], found["idle_100"])
    return found


def main() -> int:
    """Run, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("bench.json"), help="where the figures go (default: bench.json)")
    parser.add_argument("--rounds", type=int, default=35, help="kills of each contestant")
    parser.add_argument("--hung", type=int, default=30, help="servers that hang, at each setting")
    parser.add_argument("--minutes", type=float, default=3.0, help="how long idleness is watched")
    parser.add_argument(
        "--only",
        action="append",
        choices=("kill", "hang", "idle", "probe", "api"),
        default=[],
        help="only these figures; the file keeps its others",
    )
    given = parser.parse_args()
    found = everything(given.rounds, given.hung, given.minutes, given.only)
    kept = json.loads(given.json.read_text()) if given.only and given.json.exists() else {}
    given.json.write_text(json.dumps({**kept, **found}, indent=2) + "\n")
    print(f"written to {given.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
