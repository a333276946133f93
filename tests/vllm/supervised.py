"""Real vLLM servers under a real supervisor: Redis, host worker, control worker and clock, and models that are broken on purpose."""

import contextlib
import json
import re
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

from recovery.core.change import Incident
from recovery.core.instance import Instance
from tests.helpers import wait_until
from tests.loop.fleet import Fleet, Model, gone
from tests.loop.plane import Plane, free_ports
from tests.vllm.server import ENVIRONMENT, FLAGS, HOME

PATIENCE_S = 600.0
"""A start takes 16 to 24 s on two idle cores, and several times that on busy ones."""
POLICY: dict[str, Any] = {
    "restart_policy": "on-failure", "max_restarts": 0, "restart_delay": 0.2, "max_restart_delay": 0.2, "restart_jitter": 0,
    "health_check_interval": 2, "health_check_timeout": 5, "health_confirm_interval": 1, "completion_timeout_s": 5, "hang_window_s": 5,
    "busy_limit_s": 600, "startup_timeout_s": 400, "stable_s": 3600, "stop_grace_s": 20, "kill_deadline_s": 60, "drain_timeout_s": 2,
    "validate_s": 1,
}  # fmt: skip


class Vllm(Model):
    """One real server. `fault` is the file that the fault plugin reads before each step."""

    def __init__(self, plane: Plane, name: str, port: int) -> None:
        super().__init__(plane, name, port)
        self.fault_file = plane.folder / f"{name}.fault"

    def reaches(self, state: str) -> Instance:
        """Wait for a state; the row then."""
        wait_until(lambda: (self.state, self.row.reason), lambda seen: seen[0] == state, within_s=PATIENCE_S)
        return self.row

    def serves(self, but: int | None = None) -> int:
        """Wait until it is healthy with a server (another than `but`); its pid."""

        def look() -> tuple[int | None, str, str]:
            return (self.server if self.state == "healthy" else None, self.state, self.row.reason)

        pid, *_ = wait_until(look, lambda seen: seen[0] is not None and seen[0] != but, within_s=PATIENCE_S)
        assert pid is not None
        return pid

    def loads(self, words: str = "Starting to load model") -> int:
        """Wait until the log of the run that loads holds these words; its server's pid."""
        wait_until(lambda: self.state == "starting" and words in self.log, within_s=PATIENCE_S)
        return self.pid

    def processes(self) -> list[int]:
        """The pids of the live run."""
        return [each.pid for each in self.plane.view(self.instance).members]

    def only(self, role: str) -> int:
        """
        The pid of its `EngineCore` or `Worker`, by its log: the title is not always set.

        Where torch has put something before the first variable of the environment, setproctitle does not find the
        arguments, and with SPT_NOENV, without which it wipes our marker, it leaves the title alone then.
        """
        found = dict.fromkeys(int(pid) for pid in re.findall(rf"^\({role} pid=(\d+)\)", self.log, re.M))
        (pid,) = found
        assert pid in self.processes()
        return pid

    def write_fault(self, text: str) -> None:
        self.fault_file.write_text(text)

    def clear_fault(self) -> None:
        self.fault_file.unlink(missing_ok=True)

    def ask(self, prompt: Any = "hello", max_tokens: int = 4, timeout_s: float = 60.0) -> str:
        """A completion's text; an error in words. Sampling is greedy and goes on to the last token."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        url = f"{self.row.base_url}/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return str(json.load(answer)["choices"][0]["text"])
        except (OSError, ValueError) as error:  # HTTP errors too
            return f"error: {error}"

    def ask_later(self, count: int, max_tokens: int) -> list[threading.Thread]:
        """So many completions at once, in the background."""
        made = [threading.Thread(target=self.ask, args=("go on", max_tokens, PATIENCE_S), daemon=True) for _ in range(count)]
        for each in made:
            each.start()
        return made

    def incidents(self) -> tuple[Incident, ...]:
        """Its outages, newest first."""
        return self.plane.store.incidents(self.id, 100)

    def recovered(self) -> Incident:
        """Wait until the newest outage is closed, as recovered; it."""
        wait_until(lambda: [each.outcome for each in self.incidents()[:1]], ["recovered"], within_s=PATIENCE_S)
        return self.incidents()[0]


class Servers(Fleet):
    """Adds real vLLM servers to a plane."""

    def vllm(
        self, name: str, *flags: str, env: dict[str, str] | None = None, model: str = "tiny-model", ports: int = 1, **keys: Any
    ) -> Vllm:
        """Add a server with these flags (and `ports` to choose from), and bring it into the fleet."""
        found = free_ports(ports)
        made = Vllm(self.plane, name, found[0])
        path = model if model.startswith("/") else str(HOME / model)
        length = () if "--max-model-len" in flags else ("--max-model-len", "2048")
        environment = {**ENVIRONMENT, "FAULT_FILE": str(made.fault_file), **(env or {})}
        self._mine[name] = made
        self.plane.models[name] = {
            "command": str(HOME / "bin" / "vllm"),
            "args": ["serve", path, "--port", "{port}", *FLAGS, *length, *flags],
            "env": {key: value for key, value in environment.items() if value},
            "endpoints": {"base_url": "http://127.0.0.1:{port}/v1"},
            "port_range": [found[0], found[-1]],
            **POLICY,
            **keys,
        }
        self.join()
        return made


@contextlib.contextmanager
def servers(plane: Plane) -> Iterator[Servers]:
    """Servers that are gone afterwards."""
    made = Servers(plane)
    try:
        yield made
    finally:
        made.close()


class Scene:
    """Everything that lives of a model before it is broken, to be looked for afterwards."""

    def __init__(self, model: Vllm) -> None:
        self.model, self.server = model, model.serves()
        self.before = model.processes()
        self.used, self.incidents = model.row.used, len(model.incidents())
        assert len(self.before) >= 3, f"API server, EngineCore and Worker: {self.before}"

    def repaired(self, *causes: str, step: str = "restart") -> Incident:
        """
        Wait for the repair; assert cause, remedy, one restart, nothing left of the old run, one new server that answers.
        """
        model = self.model
        model.serves(but=self.server)
        incident = model.recovered()
        assert incident.cause in causes, (incident.cause, incident.evidence, model.plane.store.get(f"evidence:{incident.id}"))
        taken = [each["kind"] for each in incident.steps if each["kind"] not in ("failed", "started", "ready")]
        assert taken == [step], incident.steps
        assert (model.row.used, len(model.incidents())) == (self.used + 1, self.incidents + 1), model.row
        self.alone()
        return incident

    def alone(self) -> None:
        """Nothing is left of the old run, there is one server, and it answers a completion."""
        wait_until(lambda: [pid for pid in self.before if not gone(pid)], [], within_s=60)
        serves_alone(self.model)


def serves_alone(model: Vllm) -> None:
    """Assert that there is one server with its engine, nothing of any other run, and that it answers a completion."""
    strays = model.plane.view(model.instance).strays
    assert strays == (), strays
    assert {model.only("EngineCore"), model.only("Worker")} <= set(model.processes())
    answer = model.ask()
    assert not answer.startswith("error"), answer
