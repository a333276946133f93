"""Simulated servers for tests: started for real in a session of their own, and gone afterwards whatever happened."""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

PATIENCE_S = 60.0


def wait_until(look: Callable[[], Any], expected: Any = True, within_s: float = PATIENCE_S) -> Any:
    """Poll until `look()` equals `expected`; at the deadline fail showing what was seen last."""
    deadline = time.monotonic() + within_s
    while (seen := look()) != expected:
        assert time.monotonic() < deadline, f"waited {within_s} s for {expected!r}, last seen: {seen!r}"
        time.sleep(0.02)
    return seen


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def alive(pid: int) -> bool:
    """Running or stopped, and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def pids() -> Iterator[int]:
    yield from (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


class Server:
    """One simulated server. `marker` is the value of RECOVERY_RUN in its environment."""

    def __init__(self, folder: Path, *arguments: str, port: int | None = None, **environ: str) -> None:
        self.port = port or free_port()
        self.marker = environ.pop("RECOVERY_RUN", uuid.uuid4().hex)
        self.out_path = folder / f"{uuid.uuid4().hex}.out"
        self.err_path = self.out_path.with_suffix(".err")
        environment = {**os.environ, "SPT_NOENV": "1", "RECOVERY_RUN": self.marker, **environ}
        command = [sys.executable, "-m", "recovery.simulator", *arguments, "--port", str(self.port), "--admin"]
        with self.out_path.open("wb") as out, self.err_path.open("wb") as err:
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
                cwd=Path(__file__).parents[2],
            )
        self.pid = self.process.pid
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE_S, trust_env=False)

    def ready(self) -> Self:
        wait_until(lambda: "Application startup complete." in self.err or self.process.poll() is not None)
        assert self.process.poll() is None, f"{self.out}\n{self.err}"
        return self

    @property
    def out(self) -> str:
        return self.out_path.read_text(errors="replace")

    @property
    def err(self) -> str:
        return self.err_path.read_text(errors="replace")

    @property
    def engine(self) -> int:
        """The pid of its engine child, alive or not."""
        line = next(line for line in self.out.splitlines() if line.startswith("(EngineCore pid="))
        return int(line.partition("=")[2].partition(")")[0])

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)

    def terminate(self) -> int:
        self.process.terminate()
        return self.wait()

    def get(self, path: str, timeout: float = PATIENCE_S) -> httpx.Response:
        return self.client.get(path, timeout=timeout)

    def post(self, path: str, body: Any = None, timeout: float = PATIENCE_S) -> httpx.Response:
        return self.client.post(path, json=body, timeout=timeout)

    def fault(self, **values: Any) -> None:
        answer = self.post("/admin/fault", values)
        assert answer.status_code == 200, answer.text

    def complete(self, prompt: str | list[int] = "Hello", max_tokens: int = 16, timeout: float = PATIENCE_S, **more: Any) -> dict[str, Any]:
        answer = self.post("/v1/completions", {"prompt": prompt, "max_tokens": max_tokens, **more}, timeout)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def text(self, prompt: str | list[int] = "Hello", max_tokens: int = 16, **more: Any) -> str:
        return str(self.complete(prompt, max_tokens, **more)["choices"][0]["text"])

    def status(self, path: str = "/health", timeout: float = PATIENCE_S) -> int | str:
        """The status code, or the name of what went wrong."""
        try:
            return self.get(path, timeout).status_code
        except httpx.HTTPError as error:
            return type(error).__name__

    def metric(self, name: str, **labels: str) -> float:
        """The value of a series; NaN without it."""
        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return sample.value
        return float("nan")

    def strays(self) -> list[int]:
        """Living processes that carry its marker or are of its session."""
        found = []
        for pid in pids():
            try:
                session = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[3])
                marked = f"RECOVERY_RUN={self.marker}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()
            except (OSError, IndexError):
                continue
            if (session == self.pid or marked) and alive(pid):
                found.append(pid)
        return found

    def close(self) -> None:
        self.client.close()
        for pid in self.strays():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(PATIENCE_S)
