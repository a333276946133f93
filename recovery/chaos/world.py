"""The installation under test: a folder of its own, a Redis of its own, every part, and a fleet of simulated servers."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from recovery import parts, wiring
from recovery.adapters import embedded_redis
from recovery.adapters.processes import Processes
from recovery.chaos.proxy import Proxy
from recovery.core.fleet import Fleet
from recovery.core.fleet_plan import plan
from recovery.core.host import HostView
from recovery.part_list import Listed, api, beat, control, host
from recovery.parts import Manager, Part, PartRunner, Say
from recovery.service import Service
from recovery.settings import Settings, load_fleet, load_settings

DISK_BYTES = 24 << 20
"""The disk that gets full: logs and records of a handful of simulators for an hour take less than half of it."""
MOUNTED = "RECOVERY_CHAOS_DISK"
"""Set when this process may mount a disk of its own (see `run`)."""
START_S = 180.0
SERVER_PORTS = 20

# Short times, so that a run of 90 s sees many repairs; on a loaded machine a healthy server must still be told from a hung one.
POLICY = {
    "restart_policy": "on-failure", "max_restarts": 0, "restart_delay": 0.2, "max_restart_delay": 2, "health_check_interval": 1,
    "health_check_timeout": 3, "health_confirm_interval": 0.5, "completion_timeout_s": 3, "hang_window_s": 3, "busy_limit_s": 30,
    "startup_timeout_s": 30, "stable_s": 8, "stop_grace_s": 2, "kill_deadline_s": 15, "drain_timeout_s": 1, "validate_s": 1,
}  # fmt: skip


class World:
    """One installation. `up`, then faults, then `down`, whatever happened in between."""

    def __init__(self, home: Path, say: Say) -> None:
        self.home, self.say = home.resolve(), say
        self.run_dir = Path(tempfile.mkdtemp(prefix="chaos-"))
        self.journal = self.home / "journal"
        self.instances = self.home / "instances"
        self.instances.mkdir(parents=True, mode=0o700)
        self.disk = _mounted(self.instances)
        (self.home / "logs").mkdir()
        fleet_file = self.home / "fleet.json"
        port = _ports(SERVER_PORTS + 1)
        fleet_file.write_text(json.dumps(fleet_of(self.journal, port)))
        self.settings = load_settings(
            {
                "RECOVERY_HOME": str(self.home),
                "RECOVERY_RUN_DIR": str(self.run_dir),
                "RECOVERY_FLEET": str(fleet_file),
                "RECOVERY_HOST": "chaos",
                "RECOVERY_API_PORT": str(port + SERVER_PORTS),
            }
        )
        self.fleet: Fleet = load_fleet(fleet_file, "chaos")
        self.wired = wiring.build(self.settings)
        self.store = self.wired.store
        self.service = Service(self.store, _NoSender())
        self.host = Processes(self.home)
        self.proxy = Proxy(self.run_dir / "proxy.sock", self.run_dir / embedded_redis.SOCKET_NAME)
        self.redis: embedded_redis.EmbeddedRedis | None = None
        self.manager = Manager(say)
        self._extra = Manager(say)
        self._stopped: set[int] = set()

    # --- up and down ---

    def up(self) -> None:
        """Start Redis and every part."""
        self.start_redis()
        self.manager.start(self._runner(each.part) for each in self._listed())

    def down(self) -> None:
        """End everything that is left of it and take the folder's disk away."""
        for pid in list(self._stopped):
            self.resume(pid)
        with contextlib.suppress(Exception):
            self._extra.stop(within_s=5.0)
        self.manager.stop(within_s=5.0)
        parts.end([found.process for found in parts.find(self.home)], 5.0)
        self._end_servers()
        self.proxy.close()
        if self.redis is not None:
            embedded_redis.stop(self.redis)
        if self.disk:
            self._keep_disk()
        shutil.rmtree(self.run_dir, ignore_errors=True)

    def _end_servers(self) -> None:
        until = time.monotonic() + 30.0
        while time.monotonic() < until:
            left = [name for name in self.host.instances() if _lives(self.host.look(name))]
            if not left:
                return
            for name in left:
                view = self.host.look(name)
                if view.run is not None and view.keeper_alive:
                    self.resume(view.run.keeper_pid)
                if view.run is not None:
                    self.host.kill(name, view.run.token)
                    if view.keeper_alive and not view.server_alive and not view.strays:
                        self.host.end_keeper(name, view.run.token)
                self.host.end_strays(name)
            time.sleep(0.1)

    def _keep_disk(self) -> None:
        """Unmount the small disk; what lay on it stays in the folder, for whoever looks at what went wrong."""
        kept = self.home / "kept"
        shutil.copytree(self.instances, kept, ignore=shutil.ignore_patterns("fill"), dirs_exist_ok=True)
        subprocess.run(["umount", "-l", str(self.instances)], check=False)
        self.instances.rmdir()
        kept.rename(self.instances)

    def _listed(self) -> Iterator[Listed]:
        settings, store = self.settings, self.store
        yield host(settings, store)
        yield control(settings, store)
        yield beat(settings, store)
        second = beat(settings, store)
        argv = tuple(str(self.home / "beat2") if word == str(self.home / "beat") else word for word in second.part.argv)
        yield Listed(Part("beat2", argv), second.ready)
        if wiring_has_api():
            yield api(settings)

    def _runner(self, part: Part) -> PartRunner:
        """A part of this world: workers reach Redis through the proxy, everything else directly."""
        told = {
            "RECOVERY_HOME": str(self.home), "RECOVERY_RUN_DIR": str(self.run_dir), "RECOVERY_HOST": self.settings.host,
            "RECOVERY_FLEET": str(self.settings.fleet), "RECOVERY_API_PORT": str(self.settings.api_port),
        }  # fmt: skip
        if part.name in ("host", "control"):
            told["REDIS_URL"] = f"unix://{self.proxy.front}"
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("RECOVERY_", "REDIS_", "FMCP_"))}
        return PartRunner(part, self.home, {**clean, **told}, self.home / "logs" / f"{part.name}.log")

    def double_host(self) -> None:
        """A second worker on this host's queue, as an upgrade or a mistake starts one."""
        listed = host(self.settings, self.store)
        argv = tuple(word.replace("gpu@", "gpu2@") for word in listed.part.argv)
        self._extra = Manager(self.say)
        self._extra.start([self._runner(Part("host2", argv))])

    def single_host(self) -> None:
        """End the second worker, hard."""
        self._extra.stop(within_s=0.0)

    # --- Redis ---

    def start_redis(self) -> None:
        """Start Redis on what is left of its data."""
        self.redis = embedded_redis.start(self.settings.home, self.settings.run_dir, START_S)
        self.proxy.open()

    def kill_redis(self) -> None:
        """SIGKILL, and nobody listens any more."""
        if self.redis is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self.redis.process.kill()
            while self.redis.alive:
                time.sleep(0.01)
        self.proxy.shut()

    def redis_log_size(self) -> dict[Path, int]:
        """The files that Redis appends to, with what they hold now."""
        return {path: path.stat().st_size for path in (self.home / "redis").glob("appendonlydir/*.incr.aof")}

    def wipe_redis(self) -> None:
        """Remove the data directory of a Redis that is down."""
        shutil.rmtree(self.home / "redis")

    # --- processes ---

    def pid(self, part: str) -> int | None:
        """The pid of a part, None while it is down."""
        return self.redis.pid if part == "redis" and self.redis is not None else self.manager.pids().get(part)

    def part_pids(self) -> dict[str, int]:
        """Every part that runs."""
        return {name: pid for name, pid in {**self.manager.pids(), "redis": self.pid("redis")}.items() if pid is not None}

    def server_pid(self, instance: str) -> int | None:
        """The main process of an instance's live run."""
        view = self.host.look(instance)
        return view.run.server_pid if view.run is not None and view.server_alive else None

    def keeper_pid(self, instance: str) -> int | None:
        """The keeper of an instance's live run."""
        view = self.host.look(instance)
        return view.run.keeper_pid if view.run is not None and view.keeper_alive and view.server_alive else None

    def engine_pid(self, instance: str) -> int | None:
        """The engine's process of an instance's live run."""
        server = self.server_pid(instance)
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(server).children() if server is not None else []
            return children[0].pid if children else None
        return None

    def freeze(self, pid: int) -> None:
        """SIGSTOP; `down` wakes whoever is still frozen."""
        self._stopped.add(pid)
        os.kill(pid, signal.SIGSTOP)

    def resume(self, pid: int) -> None:
        """SIGCONT."""
        self._stopped.discard(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    # --- the fleet ---

    def wanted(self) -> tuple[str, ...]:
        """The instances that are to serve at the end."""
        return tuple(planned.id for planned in plan(self.fleet) if planned.model != DOOMED)

    def ports(self) -> dict[str, int]:
        """The planned port of every instance."""
        return {planned.id: planned.placement.port or 0 for planned in plan(self.fleet)}


DOOMED = "doomed"
"""A model that ends right after each start: exactly its budget may be spent on it."""


def fleet_of(journal: Path, first_port: int) -> dict[str, object]:
    """The fleet file: two replicas without a limit, one that restarts after every end, one with a budget, one without hope."""

    def model(*arguments: str, **policy: object) -> dict[str, object]:
        args = ["-m", "recovery.simulator", "--port", "{port}", "--admin", "--journal", str(journal), "--tokens-per-s", "0", *arguments]
        return {"command": sys.executable, "args": args, "endpoints": {"base_url": "http://127.0.0.1:{port}/v1"}, **POLICY, **policy}

    return {
        "port_range": [first_port, first_port + SERVER_PORTS - 1],
        "llmModels": {
            "pair": model("--load-s", "0.3", replicas=2),
            "always": model("--load-s", "0.3", "--orphan", restart_policy="always"),
            "bounded": model("--load-s", "0.3", max_restarts=5),
            DOOMED: model("--crash-after", "0.2", "--exit-code", "3", max_restarts=2, stable_s=600),
        },
    }


class _NoSender:
    """The chaos run commits what an operator wants and sends nothing: the rows alone must do."""

    def send(self, task: str, kwargs: dict[str, Any], **_more: Any) -> str | None:
        return None


def _lives(view: HostView) -> bool:
    return view.keeper_alive or view.server_alive or bool(view.strays)


def wiring_has_api() -> bool:
    """Whether the API is installed."""
    from importlib.util import find_spec

    return find_spec("recovery.api.__main__") is not None


def _mounted(folder: Path) -> bool:
    """Give the folder a small disk of its own, where this process may."""
    if not os.environ.get(MOUNTED):
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", "chaos", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _ports(count: int) -> int:
    """The first of `count` ports in a row that nobody has at this moment."""
    for first in range(21_000 + os.getpid() % 5000, 32_000, count):
        if all(_free(port) for port in range(first, first + count)):
            return first
    raise OSError(f"cannot find {count} free ports in a row")


def _free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


__all__ = ["DOOMED", "MOUNTED", "POLICY", "Settings", "World", "fleet_of"]
