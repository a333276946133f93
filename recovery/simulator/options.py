"""The command line: vLLM's flags as `vllm serve` takes them, and the simulator's own."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from recovery.simulator import lines
from recovery.simulator.faults import FAULT_NAMES, Faults

IGNORED_FLAGS = tuple(
    """
    allowed-origins api-server-count async-scheduling block-size chat-template compilation-config config-format convert
    cpu-offload-gb data-parallel-size disable-log-requests disable-log-stats distributed-executor-backend download-dir dtype
    enable-auto-tool-choice enable-chunked-prefill enable-expert-parallel enable-log-outputs enable-log-requests enable-lora
    enable-prefix-caching enable-request-id-headers enable-sleep-mode generation-config guided-decoding-backend hf-overrides
    hf-token kv-cache-dtype kv-cache-memory-bytes limit-mm-per-prompt load-format log-config-file lora-modules
    max-num-batched-tokens model-impl no-enable-chunked-prefill no-enable-log-requests no-enable-prefix-caching
    otlp-traces-endpoint override-generation-config pipeline-parallel-size quantization reasoning-parser revision root-path runner
    seed speculative-config swap-space task tensor-parallel-size tokenizer tokenizer-mode tool-call-parser trust-remote-code
    uvicorn-log-level
    """.split()  # noqa: SIM905 -- seventy lines else
)
"""vLLM's flags that are taken, shown by /admin/state and have no effect here."""


class Options(argparse.Namespace):
    """The parsed command line; durations are seconds, those named `*_after` counted from the start of the process."""

    model: str
    host: str
    port: int
    served_model_name: list[str]
    api_key: list[str]
    max_model_len: int
    max_num_seqs: int
    max_num_queued_reqs: int
    gpu_memory_utilization: float
    enforce_eager: bool
    shutdown_timeout: float
    enable_server_load_tracking: bool
    disable_uvicorn_access_log: bool
    disable_access_log_for_endpoints: list[str]

    admin: bool
    engine: str
    instance: str
    journal: str
    load_s: float
    load_error: str
    lose_sigterm: bool
    oom_above_len: int
    oom_above_utilization: float
    oom_above_seqs: int
    oom_unless_eager: bool
    kv_fits_len: int
    fail_first: int
    fail_file: str
    fault_file: str
    crash_after: float
    exit_code: int
    signal: int
    exit_after: float
    hang_after: float
    engine_hang_after: float
    kill_engine_after: float
    serve_error: str
    serve_error_after: float
    say: list[str]
    say_on: str
    death_s: float
    orphan: bool
    orphan_limit_s: float
    default_max_tokens: int

    faults: Faults
    ignored: dict[str, object]

    @property
    def name(self) -> str:
        """The name that answers and metrics carry: the first served one, else the model."""
        return self.served_model_name[0] if self.served_model_name else self.model

    @property
    def names(self) -> list[str]:
        """All names a request may use."""
        return self.served_model_name or [self.model]


_SHORT = {"flap_s": ("--flap",), "health_delay_s": ("--health-delay",)}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exit 2 with vLLM's words on stderr."""
        program = "vllm" if message.startswith("unrecognized") else "vllm serve"
        lines.write(lines.STDERR, f"usage: {program} [model_tag] [options]\n{program}: error: {message}")
        raise SystemExit(2)


def _length(text: str) -> int:
    """A length as vLLM takes it: `4096`, `4k` (4000), `4K` (4096), `auto` (0)."""
    if text in ("auto", "-1"):
        return 0
    scale = {"k": 1000, "K": 1024, "m": 10**6, "M": 1 << 20}.get(text[-1:], 0)
    return int(float(text[:-1]) * scale) if scale else int(text)


_length.__name__ = "int"


def _signal(text: str) -> int:
    """A signal by number, `KILL` or `SIGKILL`."""
    if text.isdigit():
        return int(text)
    name = text.upper()
    return int(signal.Signals[name if name.startswith("SIG") else f"SIG{name}"])


def _parser() -> _Parser:
    parser = _Parser(prog="vllm serve", allow_abbrev=False, add_help=True)
    add = parser.add_argument
    add("positional_model", nargs="?", default="")
    add("--model", default="")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    add("--served-model-name", nargs="+", default=[])
    add("--api-key", nargs="+", default=[])
    add("--max-model-len", type=_length, default=0)
    add("--max-num-seqs", type=int, default=256)
    add("--max-num-queued-reqs", type=int, default=0)
    add("--gpu-memory-utilization", type=float, default=0.9)
    add("--enforce-eager", action="store_true")
    add("--shutdown-timeout", type=float, default=0.0, help="0: abort what is in flight at SIGTERM; else drain so long")
    add("--enable-server-load-tracking", action="store_true")
    add("--disable-uvicorn-access-log", action="store_true")
    add("--disable-access-log-for-endpoints", type=lambda text: [part for part in text.split(",") if part], default=[])
    for flag in IGNORED_FLAGS:
        if flag.startswith(("enable-", "no-enable-", "disable-")) or flag in ("async-scheduling", "trust-remote-code"):
            add(f"--{flag}", action="store_const", const=True, help=argparse.SUPPRESS)
        else:
            add(f"--{flag}", nargs="+", default=None, help=argparse.SUPPRESS)

    own = parser.add_argument_group("the simulator's own").add_argument
    own("--admin", action="store_true", help="bind /admin/state and /admin/fault")
    own("--engine", choices=("process", "none"), default="process", help="none: no child process, for many cheap instances")
    own("--instance", default="", help="name in the journal; else from RECOVERY_RUN, else NAME@PORT")
    own("--journal", default="", metavar="FILE", help="append one JSON line per exec, exit and overlap")
    own("--default-max-tokens", type=int, default=256, help="for a chat without max_tokens (vLLM would fill the context)")
    own("--load-s", type=float, default=0.0, help="refuse connections so long")
    own("--load-error", choices=sorted({**lines.LOAD_ERRORS, **lines.CONFIG_ERRORS}), default="", help="print vLLM's lines, exit 1")
    own("--lose-sigterm", action="store_true", help="a SIGTERM while loading is lost, as in vLLM; a second one is not")
    own("--oom-above-len", type=int, default=0, help="out of memory at load with a larger --max-model-len")
    own("--oom-above-utilization", type=float, default=0.0, help="out of memory at load above this --gpu-memory-utilization")
    own("--oom-above-seqs", type=int, default=0, help="out of memory in warm-up above this --max-num-seqs")
    own("--oom-unless-eager", action="store_true", help="out of memory in warm-up without --enforce-eager")
    own("--kv-fits-len", type=int, default=0, help="with a larger --max-model-len: the KV cache error that names this one")
    own(
        "--fail-first",
        type=int,
        default=0,
        metavar="N",
        help="the first N starts counted in --fail-file end as --load-error, or --exit-code",
    )
    own("--fail-file", default="")
    own("--fault-file", default="", help="content (oom, illegal, nccl, timeout, segv, exit, hang, slow:MS) takes effect at the next step")
    own("--crash-after", type=float, default=-1.0, metavar="S", help="end with --exit-code or by --signal")
    own("--exit-code", type=int, default=1)
    own("--signal", type=_signal, default=0)
    own("--exit-after", type=float, default=-1.0, metavar="S", help="orderly exit 0, as at SIGTERM")
    own("--hang-after", type=float, default=-1.0, metavar="S", help="from then on accept and never answer")
    own("--engine-hang-after", type=float, default=-1.0, metavar="S", help="from then on the engine makes no step")
    own("--kill-engine-after", type=float, default=-1.0, metavar="S", help="SIGKILL the engine child")
    own("--serve-error", choices=sorted(lines.SERVE_ERRORS), default="oom", help="what --serve-error-after does")
    own("--serve-error-after", type=float, default=-1.0, metavar="S", help="the engine ends with vLLM's lines, the server with 0")
    own("--say", action="append", default=[], metavar="TEXT", help="print it at start, as it is; may be given more than once")
    own("--say-on", choices=("stdout", "stderr"), default="stdout")
    own("--death-s", type=float, default=0.3, help="from the engine's death to the server's exit (vLLM: 0.8 to 2.5)")
    own("--orphan", action="store_true", help="a child in a session of its own that outlives the server")
    own("--orphan-limit-s", type=float, default=900.0, help="orphaned children end by themselves after so long, to keep test hosts clean")
    for name, default in ((name, getattr(Faults(), name)) for name in sorted(FAULT_NAMES)):
        flags = ("--" + name.replace("_", "-"), *_SHORT.get(name, ()))
        if isinstance(default, bool):
            own(*flags, action="store_true", help="a lasting fault: see recovery/simulator/faults.py")
        else:
            own(*flags, dest=name, type=type(default), default=default, help="a lasting fault: see recovery/simulator/faults.py")
    return parser


def parse(arguments: Sequence[str]) -> Options:
    """The options; `SystemExit(2)` after vLLM's message for a flag or value it would not take."""
    words = [_dashes(word) for word in arguments]
    if words and words[0] == "serve":
        words = words[1:]
    parser = _parser()
    options = parser.parse_args(words, namespace=Options())
    options.model = options.positional_model or options.model or "sim/tiny-llama"
    if key := os.environ.get("VLLM_API_KEY"):
        options.api_key = [*options.api_key, key]
    options.max_model_len = options.max_model_len or 8192
    options.faults = Faults(**{name: getattr(options, name) for name in FAULT_NAMES})
    given = {name.replace("-", "_"): getattr(options, name.replace("-", "_")) for name in IGNORED_FLAGS}
    options.ignored = {name: value for name, value in given.items() if value is not None}
    if options.fail_first and not options.fail_file:
        parser.error("argument --fail-first: needs --fail-file")
    return options


def _dashes(word: str) -> str:
    """vLLM takes `--max_model_len` for `--max-model-len`."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def usage() -> str:
    """What `--help` prints."""
    return _parser().format_help()


if __name__ == "__main__":
    sys.stdout.write(usage())
