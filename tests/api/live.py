"""A whole installation for tests: `recovery up` on simulated servers, in a folder and on ports of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import Any

import httpx
import psutil

from tests.helpers import wait_until

PATIENCE_S = 120.0
"""This is how long a hopeless test goes on; a healthy one takes a tenth of it."""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listened on just now."""
    held = [socket.socket() for _ in range(count)]
    try:
        for each in held:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in held]
    finally:
        for each in held:
            each.close()


def simulated(port: int, **changes: Any) -> dict[str, Any]:
    """A model of the fleet file on a simulated server that loads in half a second."""
    return {
        "command": "python",
        "args": ["-m", "recovery.simulator", "--port", str(port), "--load-s", "0.5", "--admin"],
        "endpoints": {"base_url": f"http://127.0.0.1:{port}/v1"},
        "restart_policy": "on-failure",
        "max_restarts": 3,
        "restart_delay": 1,
        "health_check_interval": 1,
        "health_confirm_interval": 0.5,
        "stop_grace_s": 10,
        "drain_timeout_s": 5,
        "validate_s": 1,
        "health_check_timeout": 2,
        "completion_timeout_s": 2,
        "hang_window_s": 2,
        "drill": True,
        **changes,
    }


class Live:
    """The installation: where it answers, and its processes."""

    def __init__(self, folder: Path, models: dict[str, dict[str, Any]], **environment: str) -> None:
        api, front, flower, metrics = free_ports(4)
        self.url = f"http://127.0.0.1:{api}"
        self.folder = folder
        fleet = folder / "fleet.json"
        fleet.write_text(json.dumps({"llmModels": models}))
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RECOVERY_", "FMCP_", "FLOWER_", "REDIS_"))},
            "RECOVERY_HOME": str(folder / "home"),
            "RECOVERY_RUN_DIR": str(folder / "run"),
            "RECOVERY_HOST": "here",
            "RECOVERY_FLEET": str(fleet),
            "RECOVERY_API_PORT": str(api),
            "RECOVERY_FRONT_PORT": str(front),
            "RECOVERY_FLOWER_PORT": str(flower),
            "RECOVERY_FRONT_METRICS_PORT": str(metrics),
            **environment,
        }
        self.log = folder / "up.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Bring everything up and wait until every model serves."""
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "recovery.cli", "up"], env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        token = self.environment.get("FMCP_BEARER_TOKEN")
        self.client = httpx.Client(base_url=self.url, timeout=120, headers={"Authorization": f"Bearer {token}"} if token else {})
        wait_until(lambda: self.client.get("/readyz").status_code, 200, within_s=PATIENCE_S)
        wait_until(lambda: [each["is_healthy"] for each in self.models()], lambda seen: bool(seen) and all(seen), within_s=PATIENCE_S)

    def models(self) -> list[dict[str, Any]]:
        """The list."""
        found: list[dict[str, Any]] = self.client.get("/api/llm/models").json()["models"]
        return found

    def model(self, model: str) -> dict[str, Any]:
        """One model."""
        found: dict[str, Any] = self.client.get(f"/api/llm/models/{model}").json()
        return found

    def server(self, instance: str) -> psutil.Process:
        """The process of a server."""
        record = json.loads(next((self.folder / "home").rglob(f"{instance}/run.json")).read_text())
        return psutil.Process(record["server_pid"])

    def part(self, module: str) -> psutil.Process:
        """The process of one part, by its module."""
        assert self._process is not None
        return next(each for each in psutil.Process(self._process.pid).children() if module in each.cmdline())

    def stop(self) -> None:
        """End everything, models included, whatever became of it."""
        if self._process is None:
            return
        own = psutil.Process(self._process.pid).children(recursive=True) if self._process.poll() is None else []
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        subprocess.run(
            [sys.executable, "-m", "recovery.cli", "down"], env=self.environment, capture_output=True, timeout=PATIENCE_S, check=False
        )
        for each in own:
            if each.is_running():
                each.kill()
        self.client.close()


@contextmanager
def living(models: dict[str, dict[str, Any]], **environment: str) -> Iterator[Live]:
    """An installation for the length of a block, in a short folder (a socket's path has 107 bytes)."""
    folder = Path(tempfile.mkdtemp(prefix="live-"))
    live = Live(folder, models, **environment)
    try:
        live.start()
        yield live
    finally:
        live.stop()
        rmtree(folder, ignore_errors=True)
