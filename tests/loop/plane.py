"""A control plane of a test module's own: a real Redis, a host worker, a control worker and beat, gone afterwards."""

import contextlib
import functools
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from celery import Celery

from recovery import part_list, wiring
from recovery.adapters.processes import Processes
from recovery.core.host import HostView
from recovery.settings import load_settings
from tests import helpers
from tests.helpers import RedisServer

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0
"""Ten times what an idle machine needs for anything waited for here."""
HOST = "loop"
OPERATORS = {"HF_TOKEN": "hf_of_the_operator", "VLLM_LOOP": "1", "NCCL_DEBUG": "WARN", "HF_HOME": "/nowhere/hf"}
"""What an operator's shell would hold, for the models to find."""

T = TypeVar("T")
PACE_S = 0.08
"""Between two looks: those at rows and process tables cost milliseconds, and the fleet wants the processor too."""


def wait_until(look: Callable[[], T], expected: Any = bool, within_s: float = PATIENCE_S) -> T:
    """`tests.helpers.wait_until`, looking less often."""

    def paced() -> T:
        time.sleep(PACE_S)
        return look()

    return helpers.wait_until(paced, expected, within_s)


_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
_ports = itertools.count(10_000 + 1_200 * (_WORKER % 8))


def free_ports(count: int) -> list[int]:
    """Ports in a row that nobody listens on, in a range of this test process's own; never the same twice."""
    while True:
        found = [next(_ports) for _ in range(count)]
        if all(_free(port) for port in found):
            return found


def _free(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind(("127.0.0.1", port))
        return True
    return False


class Plane:
    """One home with its Redis and its parts. `of` is added to the environment of single parts."""

    def __init__(self, *, of: Mapping[str, Mapping[str, str]] | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="loop-"))
        self.home = self.folder / "home"
        self.home.mkdir()
        self.file = self.folder / "fleet.json"
        self.models: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, Any] = {"max_loads_per_host": 100, "max_loads_fleet": 100, "brake_failures": 0}
        self.write()
        self.redis = RedisServer(self.folder)
        api, front, flower, metrics = free_ports(4)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RECOVERY_", "FMCP_", "REDIS_"))}
        self.environ = {
            **kept,
            **OPERATORS,
            "REDIS_URL": f"unix://{self.redis.socket}",
            "RECOVERY_HOME": str(self.home),
            "RECOVERY_RUN_DIR": str(self.folder / "run"),
            "RECOVERY_HOST": HOST,
            "RECOVERY_FLEET": str(self.file),
            "RECOVERY_API_PORT": str(api),
            "RECOVERY_FRONT_PORT": str(front),
            "RECOVERY_FLOWER_PORT": str(flower),
            "RECOVERY_FRONT_METRICS_PORT": str(metrics),
        }
        self.settings = load_settings(self.environ)
        self.wired = wiring.build(self.settings)
        self.store = self.wired.store
        self.host = Processes(self.home)
        self.of = of or {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        url = self.wired.url
        self.app = Celery("test", broker=url.celery, backend=url.result_backend, set_as_current=False)
        self.app.conf.update(broker_transport_options=dict(url.transport_options), task_default_queue="control")

    # --- parts ---

    def up(self, *names: str) -> Self:
        """Start Redis and these parts (default: host, control, beat), and wait until they work."""
        self.redis.start()
        self.start(*(names or ("host", "control", "beat")))
        return self

    def start(self, *names: str) -> None:
        """Start parts that do not run, and wait until each does its work."""
        started = [self._start(name) for name in names]
        for name, listed in zip(names, started, strict=True):
            if name == "control" and "beat" not in self._processes:
                continue  # without a clock there is nothing to see of it
            wait_until(functools.partial(self._ready, name, listed), lambda seen: seen[0])

    def _ready(self, name: str, listed: part_list.Listed) -> tuple[bool, str]:
        return listed.ready(), self.tail(name)

    def tail(self, name: str) -> str:
        """The last lines of a part's log, and whether it lives: for whoever waits for it in vain."""
        return f"{'alive' if self.alive(name) else 'ended'}: ...{self.log_file(name).read_text(errors='replace')[-2000:]}"

    def _start(self, name: str) -> part_list.Listed:
        listed = next(each for each in part_list.all_parts(self.settings, self.store) if each.part.name == name)
        environ = {**self.environ, **listed.part.env, **self.of.get(name, {})}
        with self.log_file(name).open("ab") as log:
            self._processes[name] = subprocess.Popen(
                listed.part.argv,
                env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, start_new_session=True,
            )  # fmt: skip
        return listed

    def pid(self, name: str) -> int:
        """The pid of a part."""
        return self._processes[name].pid

    def alive(self, name: str) -> bool:
        """Whether a part runs."""
        return self._processes[name].poll() is None

    def end(self, *names: str, how: signal.Signals = signal.SIGKILL) -> None:
        """End parts with a signal and wait for that."""
        for name in names:
            with contextlib.suppress(ProcessLookupError):
                self._processes[name].send_signal(how)
        for name in names:
            self._processes.pop(name).wait(PATIENCE_S)

    def log_file(self, name: str) -> Path:
        """Where a part writes."""
        return self.folder / f"{name}.log"

    # --- talking to it ---

    def call(self, task: str, *args: Any, queue: str = "control", **kwargs: Any) -> Any:
        """Run a task in the plane and return its result."""
        sent = self.app.send_task(task, args=args, kwargs=kwargs, queue=queue)
        try:
            return sent.get(timeout=PATIENCE_S)
        finally:
            sent.forget()

    def run(self, *command: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a program in the plane's environment to its end."""
        return subprocess.run(
            command, env={**self.environ, **environ}, capture_output=True, text=True, timeout=2 * PATIENCE_S, check=False, cwd=ROOT
        )

    def write(self) -> None:
        """Put the fleet file in place."""
        made = self.file.with_suffix(".new")
        made.write_text(json.dumps({**self.keys, "llmModels": self.models}))
        made.rename(self.file)

    def join(self) -> dict[str, Any]:
        """Have the host read the fleet file now."""
        answer: dict[str, Any] = self.call("recovery.join_host", queue=f"gpu.{HOST}")
        return answer

    def ticked(self, times: int = 3) -> None:
        """Wait until the clock has ticked so often: whatever was due has been delivered by then."""
        for _ in range(times):
            last = self.store.get("tick")
            wait_until(lambda: self.store.get("tick"), lambda at, last=last: at != last)

    # --- the end ---

    def view(self, instance: str) -> HostView:
        """What the host's disk and process table say."""
        return self.host.look(instance)

    def end_models(self, *instances: str) -> None:
        """End what is left of these instances, frozen or not, and wait until nothing is."""

        def left() -> list[str]:
            return [name for name in instances if self._ends(name)]

        wait_until(left, [])

    def _ends(self, instance: str) -> bool:
        """One attempt at it; True when something was still there."""
        view = self.view(instance)
        if view.run is not None and (view.keeper_alive or view.server_alive):
            if view.keeper_alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(view.run.keeper_pid, signal.SIGCONT)
            self.host.kill(instance, view.run.token)
        self.host.end_strays(instance)
        return view.keeper_alive or view.server_alive or bool(view.strays)

    def close(self) -> None:
        """End everything by its pid and remove the folder."""
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            stack.callback(self.store.close)
            stack.callback(self.app.close)
            stack.callback(self.redis.stop)
            stack.callback(lambda: self.end_models(*self.host.instances()))
            stack.callback(self._end_parts)

    def _end_parts(self) -> None:
        for name, process in list(self._processes.items()):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
            self.end(name)


@contextlib.contextmanager
def plane(**options: Any) -> Iterator[Plane]:
    """A plane that is gone afterwards."""
    made = Plane(**options)
    try:
        yield made.up()
    finally:
        made.close()
