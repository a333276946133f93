"""An installation of a test's own: `recovery up` as a real process, in a home and on ports of its own, gone afterwards."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import psutil

from recovery import parts, wiring
from recovery.adapters import embedded_redis
from recovery.adapters.processes import Processes
from recovery.settings import load_settings
from recovery.up import end_directly
from tests.helpers import wait_until

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120.0
PARTS = {"host", "control", "beat", "door", "flower"}


_ports = itertools.count(20_000 + os.getpid() * 997 % 10_000)  # far apart for test processes that run side by side


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below the range that outgoing connections are given; never the same twice."""
    found: list[int] = []
    while len(found) < count:
        port = next(_ports)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found


def model(port: int, **more: Any) -> dict[str, Any]:
    """A simulated server that loads at once and is looked at often."""
    arguments = ["-m", "recovery.simulator", "--host", "{host}", "--port", str(port), "--load-s", "0.1"]
    return {
        "command": "python",
        "args": arguments,
        "endpoints": {"base_url": f"http://{{host}}:{port}/v1"},
        "restart_policy": "on-failure",
        "max_restarts": 5,
        "restart_delay": 1,
        "health_check_interval": 2,
        "health_confirm_interval": 1,
        "startup_timeout_s": 120,
        "stop_grace_s": 5,
        "drain_timeout_s": 5,
        "validate_s": 1,
        **more,
    }


class Installation:
    """One home with its ports and its fleet. `up` runs at most once at a time."""

    def __init__(self, *models: str, **environ: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rec-"))
        self.home = self.folder / "home"
        self.api, self.front, self.flower, self.metrics, *ports = free_ports(4 + len(models))
        self.fleet = self.folder / "fleet.json"
        self.fleet.write_text(json.dumps({"llmModels": {name: model(port) for name, port in zip(models, ports, strict=True)}}))
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RECOVERY_", "FMCP_")) and name != "REDIS_URL"}
        self.environ = {
            **kept,
            "RECOVERY_HOME": str(self.home),
            "RECOVERY_RUN_DIR": str(self.folder / "run"),
            "RECOVERY_HOST": "here",
            "RECOVERY_API_PORT": str(self.api),
            "RECOVERY_FRONT_PORT": str(self.front),
            "RECOVERY_FLOWER_PORT": str(self.flower),
            "RECOVERY_FRONT_METRICS_PORT": str(self.metrics),
            **environ,
        }
        self.models = models
        self.process: subprocess.Popen[bytes] | None = None
        self._begun: list[subprocess.Popen[bytes]] = []
        self.wired = wiring.build(load_settings(self.environ))
        self.host = Processes(self.home)

    # --- up ---

    def up(self, *arguments: str) -> Self:
        """Start `recovery up` and wait until it has said all it says."""
        self.process = self.begin("up", *arguments)
        wait_until(lambda: "Ctrl-C ends" in self.said or self._ended(), within_s=PATIENCE_S)
        assert not self._ended(), self.said
        return self

    def begin(self, command: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a command that goes on, and wait for nothing."""
        with (self.folder / f"{command}.out").open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "recovery.cli", command, "--fleet", str(self.fleet), *arguments],
                env=self.environ, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
            )  # fmt: skip
        self._begun.append(process)
        if command == "up":
            self.process = process
        return process

    @property
    def said(self) -> str:
        """What `up` has printed, and the ends of the parts' logs when that tells nothing."""
        return (self.folder / "up.out").read_text(errors="replace")

    def signal(self, number: signal.Signals) -> int:
        """Signal `up` and wait for its end; its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)

    def _ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    # --- the command line ---

    def run(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        command = [sys.executable, "-m", "recovery.cli", *arguments]
        return subprocess.run(
            command, env={**self.environ, **environ}, capture_output=True, text=True, timeout=PATIENCE_S, check=False, cwd=ROOT
        )

    def ok(self, *arguments: str) -> str:
        """What a command prints that must succeed."""
        done = self.run(*arguments)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    # --- what there is ---

    def parts(self) -> dict[str, psutil.Process]:
        """The living parts by name; fails when there are two of one (but for a door that hands over)."""
        found: dict[str, psutil.Process] = {}
        for each in parts.find(self.home):
            assert each.part not in found or each.part == "door", f"two of {each.part}"
            found[each.part] = each.process
        return found

    def part_pids(self) -> dict[str, int]:
        """The pids of the living parts."""
        return {name: process.pid for name, process in self.parts().items()}

    def redis_pid(self) -> int | None:
        """The pid of the embedded Redis."""
        server = embedded_redis.find(self.home)
        return server.pid if server is not None else None

    def server(self, name: str) -> int | None:
        """The pid of a living server of an instance."""
        view = self.host.look(f"{name}-0")
        return view.run.server_pid if view.run is not None and view.server_alive else None

    def servers(self) -> dict[str, int | None]:
        """The pids of all servers."""
        return {name: self.server(name) for name in self.models}

    def state(self, name: str) -> str:
        """The state in the row."""
        row = self.wired.store.load(f"{name}-0")
        return "absent" if row is None else row.state.value

    def serves(self, name: str, but: int | None = None) -> int:
        """Wait until an instance serves (with another pid than `but`); its server's pid."""

        def look() -> int | None:
            return self.server(name) if self.state(name) == "healthy" else None

        pid = wait_until(look, lambda seen: seen is not None and seen != but, within_s=PATIENCE_S)
        assert pid is not None
        return pid

    def nothing_left(self) -> None:
        """Wait until no part, no Redis and no server is left."""
        wait_until(self.part_pids, {}, within_s=PATIENCE_S)
        wait_until(self.redis_pid, None, within_s=PATIENCE_S)
        wait_until(lambda: {pid for pid in self.servers().values() if pid}, set(), within_s=PATIENCE_S)

    # --- the end ---

    def close(self) -> None:
        """End whatever is left, frozen or not, by pid."""
        for process in self._begun:
            process.kill()
            process.wait(PATIENCE_S)
        parts.end([each.process for each in parts.find(self.home)], 0.0)
        if (self.home / "instances").exists():
            end_directly(self.home, lambda _text: None, grace_s=0.0)
        if (server := embedded_redis.find(self.home)) is not None:
            parts.end([server.process], 0.0)
        self.wired.store.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def installation(*models: str, **environ: str) -> Iterator[Installation]:
    """An installation that is gone afterwards."""
    made = Installation(*models, **environ)
    try:
        yield made
    finally:
        made.close()
