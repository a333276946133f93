"""
Records the logs of a real vLLM failing in every way we can make it fail: `python -m tests.corpus.record FOLDER [NAME ...]`.

Not a test. The logs of this folder were made by it, one server at a time, and `tests/vllm/setup/build.sh` builds what it
needs. Run it again for a newer vLLM, look at what changed, and copy what is new. Each log starts with a line of facts about
the run, and paths and names of the machine are taken out.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.vllm.server import HOME, READY, VllmServer

PORT = 8017
NOISE = re.compile(r"^(?:.*launcher\.py:\d+\] Route: .*| - (?:leaked|\.\.\. skipped).*|Loading safetensors.*)\n", re.M)
"""Left out of all logs but one, to keep the corpus small: the list of routes, leaks at exit, progress bars."""


def step_fault(text: str) -> Callable[[VllmServer], None]:
    def act(run: VllmServer) -> None:
        run.ask()
        run.fault.write_text(text)
        run.ask()

    return act


def kill(number: int, title: str = "") -> Callable[[VllmServer], None]:
    def act(run: VllmServer) -> None:
        run.ask()
        run.send(number, title)

    return act


def while_loading(number: int, words: str, title: str = "", times: int = 1) -> Callable[[VllmServer], None]:
    def act(run: VllmServer) -> None:
        run.wait_for(words)
        for _ in range(times):
            run.send(number, title)
            time.sleep(3)

    return act


def serve_and_stop(run: VllmServer) -> None:
    for _ in range(3):
        run.ask()
    time.sleep(11)  # one line of statistics
    run.send(signal.SIGTERM)


def odd_requests(run: VllmServer) -> None:
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
    run.send(signal.SIGTERM)


def drain(run: VllmServer) -> None:
    run.fault.write_text("slow:20")
    run.ask_later(2, 300)
    time.sleep(2)
    run.send(signal.SIGTERM)


def nothing(run: VllmServer) -> None:
    del run


@dataclass
class Case:
    name: str
    flags: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    act: Callable[[VllmServer], None] = nothing
    model: str = "tiny-model"
    ready: bool = True
    """Whether `act` waits until the server is ready."""
    stopping: bool = False
    exit_within_s: float = 90


def model_folder(name: str, change: Callable[[Path], None]) -> str:
    folder = HOME / "broken" / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(HOME / "tiny-model", folder)
    change(folder)
    return f"broken/{name}"


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2_000_000])


def edit_config(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def spoil(name: str, text: str = "{ not json") -> Callable[[Path], None]:
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


def record(case: Case, folder: Path) -> None:
    taken = socket.create_server(("127.0.0.1", PORT)) if case.name == "port-taken" else contextlib.nullcontext()
    started = time.monotonic()
    with taken:
        run = VllmServer(folder / f"{case.name}.raw", PORT, case.flags, case.env, case.model)
        try:
            if not case.ready or run.wait_ready():
                case.act(run)
            code = run.wait_exit(case.exit_within_s)
        finally:
            run.close()
    text = run.text()
    run.log.unlink()
    run.fault.unlink(missing_ok=True)
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
    text = text.replace(str(HOME / "lib"), "/venv/lib").replace(str(HOME), "/venv")
    text = re.sub(rf"\b{re.escape(os.uname().nodename)}\b", "host", text)
    text = re.sub(r"mq_connect_ip=[\d.]+", "mq_connect_ip=10.0.0.1", text)
    text = re.sub(r"(?<![\w:/])/[\w./-]*?/lib/python(3\.\d+)/(?!site-packages)", r"/usr/lib/python\1/", text)
    text = re.sub(r"/(?:tmp|root|home)/[^\s'\",)]*", "/tmp/x", text)
    return re.sub(r"\b(?!127\.|0\.0)(?:\d{1,3}\.){3}\d{1,3}\b(?=:\d)", "10.0.0.1", text)


if __name__ == "__main__":
    into = Path(sys.argv[1]).resolve()
    into.mkdir(parents=True, exist_ok=True)
    wanted = set(sys.argv[2:])
    for case in cases():
        if not wanted or case.name in wanted:
            record(case, into)
