# ruff: noqa: E501 -- vLLM's lines are as long as they are
"""
vLLM's own log lines, as a real 0.32 prints them, for each way to start, end and fail.

vLLM's logger writes to stdout; uvicorn's start-up lines, argparse errors and the traceback of a dying
API server go to stderr. An out-of-memory error while serving stands on stdout only.
"""

import os
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress

STDOUT, STDERR = 1, 2
API, ENGINE, WORKER = "APIServer", "EngineCore", "Worker"

Line = tuple[int, str, str]
"""Stream, process (empty: no prefix) and text; the text begins with the level where it is a log line."""


def write(stream: int, text: str) -> None:
    """Print at once. A log that cannot be written (pipe gone, disk full) is no reason to die."""
    with suppress(OSError):
        os.write(stream, (text + "\n").encode("utf-8", "replace"))


def logger_stream() -> int:
    """Where vLLM's logger writes: stdout unless `VLLM_LOGGING_STREAM` says stderr."""
    return STDERR if os.environ.get("VLLM_LOGGING_STREAM") == "ext://sys.stderr" else STDOUT


def log(process: str, level: str, where: str, text: str, pid: int = 0) -> None:
    """Print in vLLM's format: `(APIServer pid=6281) INFO 11-24 19:20:16 [api_utils.py:347] …`."""
    head = f"({process} pid={pid or os.getpid()}) "
    stamp = time.strftime("%m-%d %H:%M:%S")
    write(logger_stream(), "\n".join(f"{head}{level} {stamp} [{where}] {line}" for line in text.split("\n")))


def say(lines: Iterable[Line], **values: object) -> None:
    """Print a table entry below; `{names}` in it are filled from `values`."""
    for stream, process, text in lines:
        for name, value in values.items():
            text = text.replace("{" + name + "}", str(value))
        if process and text.startswith(("INFO ", "WARNING ", "ERROR ")):
            level, where, rest = text.split(" ", 2)
            log(process, level, where.strip("[]"), rest)
        elif process:
            write(stream, f"({process} pid={os.getpid()}) {text}")
        else:
            write(stream, text)


def _failed_start(*cause: str, both: bool = False) -> tuple[Line, ...]:
    """The engine cannot start: its traceback on stdout, and on stderr too where `both`."""
    out = [(STDOUT, ENGINE, "ERROR [core.py:1121] EngineCore failed to start.")]
    out += [(STDOUT, ENGINE, "ERROR [core.py:1121] Traceback (most recent call last):")]
    out += [(STDOUT, ENGINE, f"ERROR [core.py:1121] {line}") for line in cause]
    if both:
        out += [(STDERR, ENGINE, "Process EngineCore:"), (STDERR, ENGINE, "Traceback (most recent call last):")]
        out += [(STDERR, ENGINE, line) for line in cause]
    return tuple(out)


_OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.19 GiB of which 1.31 GiB "
    "is free. Process 4242 has 77.87 GiB memory in use. If reserved but unallocated memory is large try setting "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
_KV = (
    "ValueError: To serve at least one request with the model's max seq len ({max_model_len}), (0.03 GiB KV cache is needed, which is "
    "larger than the available KV cache memory (0.01 GiB). Based on the available memory, the estimated maximum model length is {fits}. "
    "Try increasing `gpu_memory_utilization` or decreasing `max_model_len` when initializing the engine."
)
_FREE = (
    "ValueError: Free memory on device cuda:0 (36.75/79.19 GiB) on startup is less than desired GPU memory utilization ({utilization}, "
    "67.31 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
)
_NCCL = "RuntimeError: NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO for details)"
_ILLEGAL = "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"
_CONFIG = "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig"

LOAD_ERRORS: Mapping[str, tuple[Line, ...]] = {
    "oom": (
        (STDOUT, ENGINE, "ERROR [gpu_model_runner.py:4011] Failed to load model - not enough GPU memory. Try lowering "
         "--gpu-memory-utilization to free memory for weights, increasing --tensor-parallel-size, or using --quantization. (original error: "
         "CUDA out of memory. Tried to allocate 2.00 GiB.)"),
        *_failed_start(_OOM),
    ),
    "oom-warmup": _failed_start(
        "RuntimeError: CUDA out of memory occurred when warming up sampler with 256 dummy requests. Please try lowering `max_num_seqs` or "
        "`gpu_memory_utilization` when initializing the engine.", both=True),
    "kv-too-small": _failed_start(_KV, both=True),
    "no-kv": _failed_start("ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when "
                           "initializing the engine.", both=True),
    "free-memory": _failed_start(_FREE),
    "truncated-weights": _failed_start("safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata, file not "
                                       "fully covered"),
    "nccl": _failed_start(_NCCL),
    "engine-died": (),
}  # fmt: skip
"""Failed in the engine while it loads: exit 1, and the API server adds `ENGINE_INIT_FAILED` on stderr."""

CONFIG_ERRORS: Mapping[str, tuple[Line, ...]] = {
    "bad-path": ((STDERR, API, "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or "
                  "'namespace/repo_name': '{model}'. Use `repo_type` argument if needed."),),
    "not-cached": ((STDERR, API, "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an appropriate cached snapshot folder for the "
                    "specified revision on the local disk and outgoing traffic has been disabled."),),
    "bad-directory": ((STDERR, API, _CONFIG),
                      (STDERR, API, "  Value error, Invalid repository ID or local directory specified: '{model}'")),
    "gated": ((STDERR, API, "huggingface_hub.errors.GatedRepoError: 401 Client Error. Access to model {model} is restricted. You must have "
               "access to it and be authenticated to access it. Please log in."),),
    "len-above-model": ((STDERR, API, _CONFIG),
                        (STDERR, API, "  Value error, User-specified max_model_len ({max_model_len}) is greater than the derived max_model_len "
                         "(max_position_embeddings={fits} or model_max_length=None in model's config.json).")),
    "tool-parser": ((STDERR, API, "KeyError: 'invalid tool call parser: nonsense (chose from { hermes,llama3_json,mistral })'"),),
}  # fmt: skip
"""Failed in the API server before an engine is started: exit 1."""

ENGINE_INIT_FAILED = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {failed}"
ADDRESS_IN_USE = "OSError: [Errno 98] Address already in use"


def _step_failed(cause: str, worker: bool = True) -> tuple[Line, ...]:
    head = [
        (STDOUT, WORKER, "ERROR [multiproc_executor.py:951] WorkerProc hit an exception."),
        (STDOUT, WORKER, "ERROR [multiproc_executor.py:951] Traceback (most recent call last):"),
        (STDOUT, WORKER, f"ERROR [multiproc_executor.py:951] {cause}"),
    ]
    tail = [
        (STDOUT, ENGINE, "ERROR [dump_input.py:72] Dumping input data for V1 LLM engine (v0.32.0) with config: model='sim', dtype=float32"),
        (STDOUT, ENGINE, "ERROR [core.py:1130] EngineCore encountered a fatal error."),
        (STDOUT, ENGINE, "ERROR [core.py:1130] Traceback (most recent call last):"),
        (STDOUT, ENGINE, f"ERROR [core.py:1130] RuntimeError: Worker failed with error '{cause.split(': ', 1)[-1]}', please check the stack "
         "trace above for the root cause"),
    ]  # fmt: skip
    return tuple(head + tail) if worker else (tail[1], tail[2], (STDOUT, ENGINE, f"ERROR [core.py:1130] {cause}"))


def _lost_worker(code: str) -> tuple[Line, ...]:
    died = f"ERROR [multiproc_executor.py:273] Worker proc VllmWorker-0 died unexpectedly (exit code: {code}), shutting down executor."
    return ((STDOUT, ENGINE, died), (STDOUT, ENGINE, "ERROR [core.py:1130] EngineCore encountered a fatal error."))


SERVE_ERRORS: Mapping[str, tuple[Line, ...]] = {
    "oom": _step_failed(_OOM),
    "illegal": _step_failed(_ILLEGAL),
    "nccl": _step_failed(_NCCL),
    "timeout": _step_failed("TimeoutError: RPC call to execute_model timed out.", worker=False),
    "segv": _lost_worker("-11"),
    "worker-killed": _lost_worker("-9"),
    "exit": (),
}
"""Failed in the engine while serving: the engine ends, and the API server follows with exit 0."""

ENGINE_DEAD: tuple[Line, ...] = (
    (STDOUT, API, "ERROR [async_llm.py:704] AsyncLLM output_handler failed."),
    (STDOUT, API, "ERROR [async_llm.py:704] Traceback (most recent call last):"),
    (STDOUT, API, "ERROR [async_llm.py:704] vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace "
     "(above) for the root cause."),
)  # fmt: skip

SHUTTING_DOWN: tuple[Line, ...] = (
    (STDOUT, API, "INFO [launcher.py:137] Shutting down FastAPI HTTP server."),
    (STDERR, "", "INFO:     Shutting down"),
)
WAITING_FOR_CONNECTIONS: tuple[Line, ...] = ((STDERR, "", "INFO:     Waiting for connections to close. (CTRL+C to force quit)"),)
SHUT_DOWN: tuple[Line, ...] = (
    (STDERR, "", "INFO:     Waiting for application shutdown."),
    (STDERR, "", "INFO:     Application shutdown complete."),
    (STDERR, "", "INFO:     Finished server process [{pid}]"),
)

LOADING: tuple[tuple[float, str], ...] = (
    (
        0.0,
        "INFO [core.py:112] Initializing a V1 LLM engine (v0.32.0) with config: model='{model}', dtype=float32, max_seq_len={max_model_len}",
    ),
    (0.05, "INFO [gpu_model_runner.py:3920] Starting to load model {model}..."),
    (0.5, "INFO [default_loader.py:308] Loading weights took {seconds} seconds"),
    (0.55, "INFO [gpu_model_runner.py:4001] Model loading took 0.0063 GiB and {seconds} seconds"),
    (0.7, "INFO [gpu_worker.py:359] Available KV cache memory: 1.0 GiB"),
    (0.7, "INFO [kv_cache_utils.py:1229] GPU KV cache size: 131,072 tokens"),
    (1.0, "INFO [core.py:259] init engine (profile, create kv cache, warmup model) took {seconds} seconds"),
)
"""What the engine says while it loads, and at which share of the load time."""

SERVING: tuple[Line, ...] = (
    (STDOUT, API, "INFO [api_server.py:580] Starting vLLM server on {url}"),
    (STDERR, "", "INFO:     Started server process [{pid}]"),
    (STDERR, "", "INFO:     Waiting for application startup."),
    (STDERR, "", "INFO:     Application startup complete."),
)


def fail(stream: int, process: str, cause: str) -> None:
    """Print an uncaught exception as Python does: a traceback header, then the cause."""
    say(((stream, process, "Traceback (most recent call last):"), (stream, process, cause)))


def flush() -> None:
    """Nothing of ours is buffered, but a traceback of Python's own may be."""
    for file in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            file.flush()
