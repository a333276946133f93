"""
Why a run failed: the causes, what each means for the operator, and the rules by which a log line tells them.

A rule is data: a pattern over error lines (`log_lines.py`), the cause it proves, how much it weighs and when in the
server's life it counts. Wording comes from vLLM 0.32 recorded (`tests/corpus`), from its source (VLLM-FACTS.md, section c),
and from public reports, named beside the rule where there is one.
"""

import re
from enum import IntEnum, StrEnum
from typing import Final, Literal, NamedTuple

Phase = Literal["load", "serving"]


class Cause(StrEnum):
    """Why a run ended or had to be ended. The value is a metric label and the word of `recovery diagnose --json`."""

    CUDA_OOM_LOAD = "cuda_oom_load"
    CUDA_OOM_SERVING = "cuda_oom_serving"
    KV_CACHE_TOO_SMALL = "kv_cache_too_small"
    GPU_MEMORY_TAKEN = "gpu_memory_taken"
    PORT_IN_USE = "port_in_use"
    BAD_ARGUMENT = "bad_argument"
    CONFIG_ERROR = "config_error"
    MODEL_NOT_FOUND = "model_not_found"
    MODEL_GATED = "model_gated"
    BAD_MODEL_FILES = "bad_model_files"
    BROKEN_INSTALL = "broken_install"
    NETWORK = "network"
    DISK_FULL = "disk_full"
    HOST_OOM = "host_oom"
    GPU_LOST = "gpu_lost"
    ILLEGAL_ACCESS = "illegal_access"
    NCCL = "nccl"
    STEP_TIMEOUT = "step_timeout"
    STARTUP_TIMEOUT = "startup_timeout"
    ENGINE_HANG = "engine_hang"
    SERVER_HANG = "server_hang"
    SEGFAULT = "segfault"
    WORKER_DIED = "worker_died"
    ENGINE_DIED = "engine_died"
    KILLED = "killed"
    CLEAN_EXIT = "clean_exit"
    UNKNOWN_EXIT = "unknown_exit"

    @property
    def hopeless(self) -> bool:
        """True where the same command line fails again for certain: nothing but a change by a human helps."""
        return self in HOPELESS

    @property
    def is_cuda_oom(self) -> bool:
        """True for what the API calls `has_cuda_oom`."""
        return self in (Cause.CUDA_OOM_LOAD, Cause.CUDA_OOM_SERVING)


HOPELESS: Final = frozenset(
    {Cause.BAD_ARGUMENT, Cause.CONFIG_ERROR, Cause.MODEL_NOT_FOUND, Cause.MODEL_GATED, Cause.BAD_MODEL_FILES, Cause.BROKEN_INSTALL}
)

SAME_FLAGS_FAIL: Final = HOPELESS | {Cause.CUDA_OOM_LOAD, Cause.KV_CACHE_TOO_SMALL, Cause.GPU_LOST}
"""Starting it again unchanged does not help; changing a flag or the card may."""

CUDA_OOM_ADVICE: Final = (
    "Reduce `--gpu-memory-utilization` (default: 0.9)",
    "Use smaller `max_tokens` values",
    "Reduce model context length (`--max-model-len`)",
    "Use a smaller model variant",
)
"""The specification's recommendations, word for word."""

ADVICE: Final[dict[Cause, str]] = {
    Cause.CUDA_OOM_LOAD: "; ".join(CUDA_OOM_ADVICE),
    Cause.CUDA_OOM_SERVING: "; ".join(CUDA_OOM_ADVICE),
    Cause.KV_CACHE_TOO_SMALL: "Lower --max-model-len to what vLLM says would fit, raise --gpu-memory-utilization, or free memory on it",
    Cause.GPU_MEMORY_TAKEN: "Another process holds memory on this card: see `nvidia-smi`, end it, or lower --gpu-memory-utilization",
    Cause.PORT_IN_USE: "Another process listens on this port: `ss -ltnp` names it; end it or give the model another port",
    Cause.BAD_ARGUMENT: "Mend the command line: vLLM refuses the flag or its value named here",
    Cause.CONFIG_ERROR: "Mend the settings: they do not fit this model or this machine, for the reason named here",
    Cause.MODEL_NOT_FOUND: "Mend the model's name or path, or fetch it first: it is neither on this host nor to be had from the hub",
    Cause.MODEL_GATED: "Accept the model's licence on the hub and give the server a token that may read it (HF_TOKEN)",
    Cause.BAD_MODEL_FILES: "Fetch the model's files again: what is on disk is incomplete or does not belong together",
    Cause.BROKEN_INSTALL: "Mend the installation: driver, CUDA, torch and vLLM do not fit together, or a package is missing",
    Cause.NETWORK: "The model's files could not be fetched: check network, proxy and the hub's status, or serve from a local folder",
    Cause.DISK_FULL: "Free space on the disk named here (model cache, temporary folder, /dev/shm)",
    Cause.HOST_OOM: "The host ran out of memory: give it more, run fewer models on it, or lower --swap-space and --cpu-offload-gb",
    Cause.GPU_LOST: "Take this GPU out of service: reset it or restart the host, and have it looked at if it returns",
    Cause.ILLEGAL_ACCESS: "A GPU kernel failed; if it comes back on one card only, suspect the card, else the kernel (try --enforce-eager)",
    Cause.NCCL: "The GPUs of this model lost each other; if it comes back, look at links and topology with NCCL_DEBUG=INFO",
    Cause.STEP_TIMEOUT: "One engine step took too long: a stuck kernel or collective; VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS is the limit",
    Cause.STARTUP_TIMEOUT: "It did not come up in time: raise startup_timeout_s for large models, or see in the log what it waited for",
    Cause.ENGINE_HANG: "The engine stood still while its HTTP server answered; if it comes back, take a stack dump with py-spy",
    Cause.SERVER_HANG: "The HTTP server no longer answers; if it comes back, take a stack dump with py-spy",
    Cause.SEGFAULT: "Native code crashed; if it comes back on one card only, suspect the card, else the versions of vLLM, torch and driver",
    Cause.WORKER_DIED: "A worker process died without a word; see the kernel log for the OOM killer and for Xid events",
    Cause.ENGINE_DIED: "The engine died; the lines above the one named here say why",
    Cause.KILLED: "Somebody or something killed it from outside: an operator, a scheduler, or the kernel's OOM killer",
    Cause.CLEAN_EXIT: "Nothing to mend: it ended in good order",
    Cause.UNKNOWN_EXIT: "No known failure: read the end of the log",
}


class Weight(IntEnum):
    """Which of several findings is the cause; among equals the first in the log."""

    ROOT = 0
    GENERAL = 1  # true, but a root elsewhere in the log explains it better
    NATIVE = 2  # a crash: what made it crash may stand elsewhere
    ECHO_WORKER = 3
    ECHO_ENGINE = 4


class Rule(NamedTuple):
    cause: Cause
    pattern: re.Pattern[str]
    """Searched in error lines. A named group is a value that would help, see `diagnosis.suggested_by`."""
    weight: Weight = Weight.ROOT
    phase: Phase | None = None
    """Counts only in this part of the server's life; None = always."""
    confidence: Literal["certain", "likely", "guess"] = "certain"


def _rule(
    cause: Cause,
    *patterns: str,
    weight: Weight = Weight.ROOT,
    phase: Phase | None = None,
    confidence: Literal["certain", "likely", "guess"] = "certain",
) -> Rule:
    return Rule(cause, re.compile("|".join(patterns)), weight, phase, confidence)


CUDA_OOM_TEXT: Final = (
    r"(?:CUDA|HIP|XPU) out of memory",
    r"CUDA error: out of memory",
    r"cudaErrorMemoryAllocation",
    r"Cuda failure (?:\d+ )?'out of memory'",  # inside an NCCL error: vllm-project/vllm#18446
    r"CU(?:BLAS|DNN)_STATUS_ALLOC_FAILED",
    r"not enough GPU memory",
)

RULES: Final = (
    # --- memory of the card
    _rule(
        Cause.CUDA_OOM_LOAD, r"CUDA out of memory occurred when warming up \w+ with (?P<dummy_requests>\d+) dummy requests", *CUDA_OOM_TEXT
    ),
    _rule(
        Cause.KV_CACHE_TOO_SMALL,
        r"To serve at least one request with .*?(?:estimated maximum model length is (?P<max_model_len>\d+)|$)",
        r"No available memory for the cache blocks",
        r"larger than the maximum number of tokens that can be stored in KV cache \((?P<kv_tokens>\d+)\)",  # up to 0.8
        r"larger than the available KV cache memory",
        phase="load",
    ),
    _rule(
        Cause.GPU_MEMORY_TAKEN,
        r"(?:Free|Available) memory on .*?\((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\) on startup is less than desired",
        r"Error in memory profiling\. Initial free memory",
        phase="load",
    ),
    # --- the command line and what it names
    _rule(
        Cause.BAD_ARGUMENT, r": error: (?:unrecognized arguments|argument|the following arguments|ambiguous option|invalid)", phase="load"
    ),
    _rule(Cause.BAD_ARGUMENT, r"invalid (?:tool call|reasoning) parser", r"No such (?:tool|reasoning) parser", phase="load"),
    _rule(Cause.PORT_IN_USE, r"[Aa]ddress already in use", r"EADDRINUSE", r"[Pp]ort \d+ is already in use"),
    _rule(
        Cause.MODEL_NOT_FOUND,
        r"HFValidationError",
        r"Repo id must be in the form",
        r"Invalid repository ID or local directory",
        r"RepositoryNotFoundError|RevisionNotFoundError|Repository Not Found",
        r"is not a local folder and is not a valid model identifier",
        r"Cannot find an appropriate cached snapshot folder",
        r"does not appear to have a file named config\.json",
        r"No adapter found for ",
        phase="load",
    ),
    _rule(
        Cause.MODEL_GATED,
        r"GatedRepoError|[Cc]annot access gated repo|access a gated repo|is restricted\. You must",
        r"40[13] Client Error",
        r"Invalid (?:user token|username or password)",
        phase="load",
    ),
    _rule(
        Cause.CONFIG_ERROR,
        r"User-specified max_model_len \(\d+\) is greater than the derived max_model_len \(\w+=(?P<max_model_len>\d+)",
        r"must be divisible by tensor parallel size",
        r"larger than the number of available (?:GPUs|devices|nodes)|exceeds the total number of available",
        r"[Mm]odel architectures? \[.*?\] (?:is|are) not supported|failed to be inspected|does not recognize this architecture",
        r"only supported on GPUs with compute capability|is not supported (?:by|for) (?:the )?(?:current )?(?:GPU|device|platform)",
        r"[Qq]uantization method (?:specified|\w+ (?:is not|does not))|Unknown quantization method|Cannot find the config file for \w+",
        r"trust_remote_code=True|contains custom code which must be executed|execute the configuration file",
        phase="load",
    ),
    _rule(Cause.CONFIG_ERROR, r"^Value error, |Input should be ", weight=Weight.GENERAL, phase="load"),
    _rule(Cause.CONFIG_ERROR, r"ValidationError", weight=Weight.NATIVE, phase="load", confidence="likely"),
    _rule(
        Cause.BAD_MODEL_FILES,
        r"SafetensorError|Error while deserializing header|PytorchStreamReader failed",
        r"[Cc]annot find any model weights",
        r"size mismatch for|shape mismatch|Error\(s\) in loading state_dict|There is no module or parameter named",
        r"not a valid JSON file|is not valid JSON|JSONDecodeError",
        r"weights were not initialized from checkpoint",
        phase="load",
    ),
    _rule(
        Cause.BAD_MODEL_FILES,
        r"The size of tensor a \(\d+\) must match the size of tensor b",
        weight=Weight.GENERAL,
        phase="load",
        confidence="likely",
    ),
    # --- the machine
    _rule(
        Cause.GPU_LOST,
        r"uncorrectable ECC error|GPU is lost|fallen off the bus|GpuIsLost|Unable to determine the device handle",
        r"Xid[^:]*(?:: |\): )(?:48|79|95)\b",
    ),
    _rule(
        Cause.ILLEGAL_ACCESS,
        r"an illegal (?:memory access|instruction) was encountered|misaligned address|device-side assert triggered",
        r"unspecified launch failure|cudaErrorIllegalAddress|cudaErrorLaunchFailure",
    ),
    _rule(Cause.DISK_FULL, r"No space left on device|Disk quota exceeded|StorageFull"),
    _rule(
        Cause.HOST_OOM,
        r"DefaultCPUAllocator: (?:can't|not enough)|Cannot allocate memory|^MemoryError\b",
        r"killed due to memory pressure|memory usage threshold|ray\.exceptions\.OutOfMemoryError",  # Ray
    ),
    _rule(
        Cause.BROKEN_INSTALL,
        r"Found no NVIDIA driver|NVIDIA driver on your system is too old|driver version is insufficient|Driver/library version mismatch",
        r"Failed to infer device type|No CUDA GPUs are available|no CUDA-capable device|no kernel image is available",
        r"undefined symbol|cannot open shared object file|No package metadata was found",
        phase="load",
    ),
    _rule(Cause.BROKEN_INSTALL, r"^(?:ImportError|ModuleNotFoundError): ", weight=Weight.GENERAL, phase="load", confidence="likely"),
    _rule(
        Cause.NETWORK,
        r"Max retries exceeded|(?:Connect|Read)Timeout|Name or service not known|failure in name resolution|Network is unreachable",
        r"couldn't connect to|check your (?:internet )?connection|(?:429|50\d) (?:Client|Server) Error|ProxyError|SSLError",
        weight=Weight.GENERAL,
        phase="load",
        confidence="likely",
    ),
    # --- the engine at work
    _rule(
        Cause.NCCL,
        r"NCCL error|ProcessGroupNCCL|nccl(?:UnhandledCuda|System|Internal|Remote)Error|DistBackendError|collective operation timeout",
        weight=Weight.GENERAL,
        confidence="likely",
    ),
    _rule(Cause.STEP_TIMEOUT, r"RPC call to \w+ timed out|Engine iteration timed out", weight=Weight.GENERAL),
    _rule(
        Cause.STARTUP_TIMEOUT,
        r"Timed out waiting for engine(?: core)?|Did not receive response from front-end process",
        weight=Weight.GENERAL,
        phase="load",
    ),
    _rule(
        Cause.SEGFAULT,
        r"Segfault encountered|SIG(?:SEGV|BUS|ILL|FPE|ABRT) received|Fatal Python error|Segmentation fault|Bus error",
        r"died unexpectedly.*\(exit code: -(?:11|7|4|8)\)|died, exit code: -(?:11|7|4|8)\b|Failed core proc\(s\): \{.*: -(?:11|7|4|8)\b",
        weight=Weight.NATIVE,
    ),
    _rule(
        Cause.WORKER_DIED,
        r"Worker proc \S+ died unexpectedly|Worker \w+ pid \d+ died|worker process has died|ActorDiedError|WorkerCrashedError",
        weight=Weight.ECHO_WORKER,
    ),
    _rule(
        Cause.ENGINE_DIED,
        r"EngineDeadError|EngineCore encountered a fatal error|EngineCore failed to start|Engine core initialization failed",
        r"Engine core proc \S+ died|Engine process failed to start|Engine loop is not running|Background loop has errored",
        weight=Weight.ECHO_ENGINE,
        confidence="likely",
    ),
)

FATAL: Final = re.compile(
    r"EngineDeadError|encountered a fatal error|failed to start|initialization failed|died unexpectedly|died, exit code"
    r"|Engine loop is not running|Background loop has errored|process has died"
)
"""After such a line the run is lost: nothing that follows is a new cause, or a sign that all is well."""

IN_A_STEP: Final = re.compile(r"encountered a fatal error|EngineDeadError|Background loop has errored")
AT_START: Final = re.compile(r"failed to start|initialization failed")
"""Where the mark of readiness is not in the excerpt, these tell an OOM at load from one while serving."""

FATAL_XIDS: Final = {
    48: "double bit ECC error",
    79: "GPU has fallen off the bus",
    95: "uncontained ECC error",
}
"""Xid numbers after which no restart on that GPU helps (NVIDIA's list, VLLM-FACTS.md, section c)."""
