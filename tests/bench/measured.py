"""An installation that is measured: its parts' processes, what they use, and fleets made for the purpose."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.bench.peers import CHILD
from tests.cli.installation import Installation, free_ports

Part = dict[str, float]


def child_model(notes: Path) -> dict[str, Any]:
    """The peers' child as a model: only its process is looked at."""
    return {
        "command": "bash",
        "args": [str(CHILD), str(notes)],
        "restart_policy": "on-failure",
        "max_restarts": 0,
        "restart_delay": 0,
        "restart_jitter": 0,
    }


def simulated(count: int, journal: Path | None = None, **more: Any) -> dict[str, Any]:
    """Models m0, m1, … on cheap simulated servers, with the specification's defaults but for what is given."""
    models = {}
    for number, port in enumerate(free_ports(count)):
        arguments = ["-m", "recovery.simulator", "--engine", "none", "--host", "{host}", "--port", str(port)]
        if journal is not None:
            arguments += ["--admin", "--journal", str(journal)]
        models[f"m{number}"] = {
            "command": "python",
            "args": arguments,
            "endpoints": {"base_url": f"http://{{host}}:{port}/v1"},
            "restart_policy": "on-failure",
            **more,
        }
    return models


def fleet(models: Mapping[str, Any]) -> str:
    """A fleet file that neither brakes nor queues loads: the benchmark breaks many at once on purpose."""
    return json.dumps({"brake_failures": 0, "max_loads_per_host": 1000, "max_loads_fleet": 1000, "llmModels": models})


class Measured(Installation):
    """`recovery up` with a fleet of the benchmark's."""

    def __init__(self, models: Mapping[str, Any]) -> None:
        super().__init__()
        self.fleet.write_text(fleet(models))
        self.models = tuple(models)

    def processes(self) -> dict[str, list[psutil.Process]]:
        """The processes of every part by its name; the servers themselves are nobody's part, their keepers are one."""
        assert self.process is not None
        redis = self.redis_pid()
        found = {name: [process] for name, process in self.parts().items()}
        found |= {"up": [psutil.Process(self.process.pid)], "redis": [psutil.Process(redis)] if redis else [], "keepers": []}
        for name in self.models:
            view = self.host.look(f"{name}-0")
            if view.run is not None and view.keeper_alive:
                found["keepers"].append(psutil.Process(view.run.keeper_pid))
        return found

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds that each part has used so far, its ended children included."""
        return {name: sum(_cpu_s(each) for each in own) for name, own in self.processes().items()}

    def memory(self) -> dict[str, Part]:
        """RSS and USS of each part in MB; of all keepers together, and of one."""
        used = {}
        for name, own in self.processes().items():
            infos = [each.memory_full_info() for each in own]
            used[name] = {"rss_mb": _mb(sum(i.rss for i in infos)), "uss_mb": _mb(sum(i.uss for i in infos)), "processes": len(infos)}
        return used


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def _mb(size: int) -> float:
    return round(size / 1e6, 1)
