"""The models of one test: added to the plane's fleet file, looked at from outside, broken on purpose, taken out again."""

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from recovery.core.instance import Instance
from tests.loop.plane import PATIENCE_S, Plane, free_ports, wait_until

POLICY: dict[str, Any] = {
    "restart_policy": "on-failure", "max_restarts": 5, "restart_delay": 0.2, "max_restart_delay": 2, "restart_jitter": 0,
    "health_check_interval": 1, "health_check_timeout": 5, "health_confirm_interval": 0.5, "completion_timeout_s": 3, "hang_window_s": 3,
    "busy_limit_s": 60, "startup_timeout_s": 120, "stable_s": 600, "stop_grace_s": 10, "kill_deadline_s": 30, "drain_timeout_s": 1,
    "validate_s": 0.5,
}  # fmt: skip
"""Short times; a healthy server of a loaded machine must still be told from a hung one."""


class Model:
    """One model with its first instance, seen through its row, its processes and its servers' own journal."""

    def __init__(self, plane: Plane, name: str, port: int) -> None:
        self.plane, self.id, self.port = plane, name, port
        self.instance = f"{name}-0"
        self.journal = plane.folder / f"{name}.journal"

    # --- what the loop believes ---

    @property
    def row(self) -> Instance:
        """The row in Redis."""
        row = self.plane.store.load(self.instance)
        assert row is not None, f"{self.instance} has no row"
        return row

    @property
    def state(self) -> str:
        """Its state, `absent` without a row."""
        row = self.plane.store.load(self.instance)
        return "absent" if row is None else row.state.value

    @property
    def events(self) -> tuple[dict[str, Any], ...]:
        """Its history, oldest first."""
        return self.plane.store.events(self.id, 500)

    @property
    def history(self) -> list[str]:
        """The kinds of its events, oldest first."""
        return [str(event["kind"]) for event in self.events]

    # --- what is there ---

    @property
    def server(self) -> int | None:
        """The pid of its living server."""
        view = self.plane.view(self.instance)
        return view.run.server_pid if view.run is not None and view.server_alive else None

    @property
    def keeper(self) -> int | None:
        """The pid of the living keeper of its server."""
        view = self.plane.view(self.instance)
        return view.run.keeper_pid if view.run is not None and view.keeper_alive else None

    @property
    def engine(self) -> int:
        """The pid of its server's engine child."""
        children = psutil.Process(self.pid).children()
        return children[0].pid

    @property
    def pid(self) -> int:
        """The pid of its server, which must live."""
        pid = self.server
        assert pid is not None, f"{self.instance} has no server"
        return pid

    @property
    def starts(self) -> int:
        """How often a server was executed, by the servers' own account."""
        return sum(line["event"] == "exec" for line in self.lines)

    @property
    def overlaps(self) -> list[dict[str, Any]]:
        """Every time that two of its runs lived at once, by the servers' own account."""
        return [line for line in self.lines if line["event"] == "overlap"]

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The journal that its servers wrote."""
        with contextlib.suppress(FileNotFoundError):
            return [json.loads(line) for line in self.journal.read_text().splitlines() if line.endswith("}")]
        return []

    @property
    def log(self) -> str:
        """The log of its last run."""
        return self.plane.host.read_log(self.instance, self.row.run or self.row.last_ended, 1 << 20)

    # --- waiting ---

    def reaches(self, state: str) -> Instance:
        """Wait for a state; the row then."""
        wait_until(lambda: (self.state, self.plane.store.load(self.instance)), lambda seen: seen[0] == state)
        return self.row

    def serves(self, but: int | None = None) -> int:
        """Wait until it is healthy with a server (another than `but`); its pid."""

        def look() -> int | None:
            return self.server if self.state == "healthy" else None

        pid = wait_until(look, lambda pid: pid is not None and pid != but)
        assert pid is not None
        return pid

    def until(self, seen: Callable[[Instance], object]) -> Instance:
        """Wait until the row shows something."""
        wait_until(lambda: self.row, lambda row: isinstance(row, Instance) and bool(seen(row)))
        return self.row

    def looked(self, times: int = 3) -> None:
        """Wait until it has been looked at so often from now on."""
        for _ in range(times):
            last = self.row.probe.last_at
            wait_until(lambda: self.row.probe.last_at, lambda at, last=last: at != last)

    # --- breaking it ---

    def kill(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Signal its server; the pid."""
        pid = self.pid
        os.kill(pid, number)
        return pid

    def fault(self, **values: Any) -> None:
        """Set a fault of the simulator at run time."""
        answer = httpx.post(f"http://127.0.0.1:{self.port}/admin/fault", json=values, timeout=PATIENCE_S, trust_env=False)
        assert answer.status_code == 200, answer.text

    def answers(self) -> bool:
        """Whether its server answers /health."""
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=5, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def command(self, verb: str, **options: Any) -> dict[str, Any]:
        """Give a command through the public task, and return its answer."""
        answer: dict[str, Any] = self.plane.call(f"recovery.{verb}", self.id, **options)
        return answer


class Fleet:
    """What a test adds to the plane."""

    def __init__(self, plane: Plane) -> None:
        self.plane = plane
        self._mine: dict[str, Model] = {}

    def model(self, name: str, *arguments: str, join: bool = True, **keys: Any) -> Model:
        """
        Add a model that runs the simulator with these arguments, and bring it into the fleet.

        `keys` are keys of the fleet file. `join=False`: only written down, until the next one joins.
        """
        replicas = int(keys.get("replicas", 1))
        ports = free_ports(replicas)
        made = Model(self.plane, name, ports[0])
        args = ["-m", "recovery.simulator", "--host", "127.0.0.1", "--port", "{port}", "--admin", "--journal", str(made.journal)]
        entry = {
            "command": "python",
            "args": [*args, *arguments],
            "endpoints": {"base_url": "http://127.0.0.1:{port}/v1"},
            "port_range": [ports[0], ports[-1]],
            **POLICY,
            **keys,
        }
        self._mine[name] = made
        self.plane.models[name] = {key: value for key, value in entry.items() if value is not None}
        if join:
            self.join()
        return made

    def join(self) -> None:
        """Write the file and have the host read it."""
        self.plane.write()
        assert self.plane.join()["outcome"] == "joined"

    def change(self, model: Model, **keys: Any) -> None:
        """Change keys of a model's entry."""
        self.plane.models[model.id] |= keys
        self.join()

    def close(self) -> None:
        """Take the models out of the file and end them, whatever became of them."""
        for name in self._mine:
            self.plane.models.pop(name, None)
        self.plane.write()
        names = [name for name in self.plane.host.instances() if name.rpartition("-")[0] in self._mine]
        with contextlib.suppress(Exception):
            self.plane.join()
        self.plane.end_models(*names)


@contextlib.contextmanager
def fleet_of(plane: Plane) -> Iterator[Fleet]:
    """A fleet that is gone afterwards."""
    made = Fleet(plane)
    try:
        yield made
    finally:
        made.close()


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True
