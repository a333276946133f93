"""
Makes a real vLLM fail in its own words: a vLLM plugin, loaded in the worker too, that raises inside its model runner.

`FAULT_LOAD` fires while the model loads, `FAULT_FILE` names a file that is read before each step. Both hold

    [once] FAULT [if FIELD>NUMBER]

where FAULT is one of `oom`, `illegal`, `nccl`, `disk`, `hang`, `exit`, `segv` or `slow:MILLISECONDS`. FIELD is `max_model_len`,
`max_num_seqs`, `enforce_eager` or `gpu_memory_utilization` (percent): a card that is too small for some settings and not for others.
`once` (file only) takes the file away before it fires, so that the next life of the server is well.
A line of FAULT_FILE that begins with `load` fires at load: a test can then mend the load without another command line.
"""

import contextlib
import os
import pathlib
import time

OOM = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.12 GiB is free. "
    "Including non-PyTorch memory, this process has 77.98 GiB memory in use. Of the allocated memory 76.50 GiB is allocated by "
    "PyTorch, and 512.00 MiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation for Memory Management  "
    "(https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"
)
ILLEGAL = (
    "CUDA error: an illegal memory access was encountered\n"
    "CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.\n"
    "For debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
    "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
NCCL = "NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO for details)"


def fire(fault: str) -> None:
    import torch

    if fault.startswith("slow:"):
        time.sleep(float(fault.removeprefix("slow:")) / 1000)
    elif fault == "oom":
        raise torch.OutOfMemoryError(OOM)
    elif fault == "illegal":
        raise RuntimeError(ILLEGAL)
    elif fault == "nccl":
        raise RuntimeError(NCCL)
    elif fault == "disk":
        raise OSError(28, "No space left on device")
    elif fault == "hang":
        while True:
            time.sleep(3600)
    elif fault == "exit":
        os._exit(7)
    elif fault == "segv":
        import ctypes

        ctypes.string_at(0)
    else:
        raise ValueError(f"no such fault: {fault!r}")


def setting(runner, field: str) -> float:
    config = runner.vllm_config
    if field == "gpu_memory_utilization":
        return 100 * config.cache_config.gpu_memory_utilization
    for part in (config.model_config, config.scheduler_config):
        if hasattr(part, field):
            return float(getattr(part, field))
    raise ValueError(f"no such setting: {field!r}")


def due(text: str, runner) -> str | None:
    """The fault of `text`, or None when its condition does not hold for this server."""
    fault, _, condition = text.partition(" if ")
    if condition:
        field, _, limit = condition.partition(">")
        if setting(runner, field.strip()) <= float(limit):
            return None
    return fault.strip() or None


def ask_file(moment: str, runner) -> str | None:
    path = os.environ.get("FAULT_FILE")
    if not path:
        return None
    try:
        text = pathlib.Path(path).read_text().strip()
    except FileNotFoundError:
        return None
    at_load = text.startswith("load ")
    if at_load != (moment == "load"):
        return None
    text = text.removeprefix("load ")
    fault = due(text.removeprefix("once "), runner)
    if fault and text.startswith("once "):
        with contextlib.suppress(FileNotFoundError):
            pathlib.Path(path).unlink()
    return fault


def register() -> None:
    """Called by vLLM in each of its processes, perhaps more than once."""
    if not (os.environ.get("FAULT_LOAD") or os.environ.get("FAULT_FILE")):
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if getattr(CPUModelRunner, "_faulty", False):
        return
    CPUModelRunner._faulty = True
    real_step, real_load = CPUModelRunner.execute_model, CPUModelRunner.load_model

    def execute_model(self, *args, **kwargs):
        if fault := ask_file("step", self):
            fire(fault)
        return real_step(self, *args, **kwargs)

    def load_model(self, *args, **kwargs):
        if fault := due(os.environ.get("FAULT_LOAD", ""), self) or ask_file("load", self):
            fire(fault)
        return real_load(self, *args, **kwargs)

    CPUModelRunner.execute_model, CPUModelRunner.load_model = execute_model, load_model
