"""
Why a run failed, from everything that was seen of it: exit, log, probes, card, kernel.

`scan` reads a log once, as a stream; `diagnose` weighs what it found against the other evidence. The first error wins over its
echoes: an OOM makes a worker fail, which makes the engine fail, which makes the API server fail, and all of them say so.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from math import floor
from typing import Final, Literal

from pydantic import Field

from recovery.core.causes import (
    ADVICE,
    AT_START,
    CUDA_OOM_ADVICE,
    FATAL,
    FATAL_XIDS,
    IN_A_STEP,
    RULES,
    SAME_FLAGS_FAIL,
    Cause,
    Phase,
    Rule,
    Weight,
)
from recovery.core.fleet import Frozen
from recovery.core.log_lines import Kind, Line, read

__all__ = [
    "CUDA_OOM_ADVICE",
    "Cause",
    "Diagnosis",
    "Evidence",
    "GpuReading",
    "ProbeFacts",
    "diagnose",
    "diagnose_file_lines",
    "diagnose_text",
]

Confidence = Literal["certain", "likely", "guess"]

SIGNAL_NAMES: Final = {
    1: "SIGHUP",
    2: "SIGINT",
    3: "SIGQUIT",
    4: "SIGILL",
    6: "SIGABRT",
    7: "SIGBUS",
    8: "SIGFPE",
    9: "SIGKILL",
    11: "SIGSEGV",
    15: "SIGTERM",
}
CRASHES: Final = frozenset({4, 6, 7, 8, 11})

EVIDENCE_CHARACTERS: Final = 500
LINE_CHARACTERS: Final = 2000


class ProbeFacts(Frozen):
    """The last looks at a server that was alive, as far as they tell a cause. None = not asked."""

    health_status: int | None = Field(None, description="HTTP status of /health")
    health_timed_out: bool = False
    completion_timed_out: bool = Field(False, description="the one-token completion got no answer in time")
    progress: bool | None = Field(None, description="whether the step counter moved between the looks")


class GpuProcess(Frozen):
    """A process that holds memory of a card."""

    pid: int
    used_bytes: int | None = Field(None, description="None: the driver does not tell")


class GpuReading(Frozen):
    """One card at the time of the failure."""

    index: int
    name: str = ""
    used_bytes: int = Field(0, ge=0)
    total_bytes: int = Field(0, ge=0)
    utilization: float | None = Field(None, description="share of the last second or so that a kernel ran, 0 to 1")
    processes: tuple[GpuProcess, ...] = ()
    lost: bool = Field(False, description="the driver no longer reaches it")
    problem: str = ""
    driver: str = Field("", description="version of the driver")


class Evidence(Frozen):
    """All that is known about how a run ended, or why it has to be ended."""

    exit_code: int | None = Field(None, description="None: killed by a signal, alive, or unknown")
    signal: int | None = None
    log: tuple[str, ...] = Field((), repr=False, description="lines of this run, both streams")
    was_ready: bool = False
    stopping: bool = Field(False, description="the end was asked for")
    probe: ProbeFacts | None = None
    startup_timed_out: bool = False
    gpus: tuple[GpuReading, ...] = ()
    xids: tuple[int, ...] = Field((), description="Xid events of this run's cards since it was started")
    kernel_oom: bool = Field(False, description="the kernel's OOM killer took one of its processes")
    disk_full: str | None = Field(None, description="a folder it writes to that has no space left")
    port_busy: str | None = Field(None, description="who listens on its port, when it is not this run")


class Diagnosis(Frozen):
    """The cause and what follows from it. `cause` None: nothing is wrong as far as this evidence goes."""

    cause: Cause | None = None
    evidence: str = Field("", description="the line or fact that gave it away")
    confidence: Confidence = "guess"
    advice: str = ""
    retry: bool = Field(True, description="starting it again with the same command line can help")
    suggested: dict[str, float] = Field({}, description="values that vLLM's own message says would fit, by setting")


class LogFacts(Frozen):
    """What a log says. Of several lives in one file, the last."""

    rule: int | None = Field(None, description="index into RULES of the finding that weighs most")
    line: str = ""
    text: str = ""
    ready: bool = False
    served: bool = Field(False, description="the finding came while serving")
    fatal: bool = Field(False, description="the engine was lost")
    shutdown: bool = Field(False, description="an orderly shutdown began before anything was lost")
    shut_down: bool = Field(False, description="and was completed")
    cuda_oom: bool = False
    exception: str = Field("", description="the first exception that no rule knows")
    last_error: str = ""


@lru_cache(maxsize=1024)  # a crashing server says the same thing over and over
def _match(text: str, phase: Phase) -> int | None:
    """Index of the rule that fits an error line best; among equals the first in the table."""
    fits = [i for i, rule in enumerate(RULES) if rule.phase in (None, phase) and rule.pattern.search(text)]
    return min(fits, key=lambda i: RULES[i].weight, default=None)


class _Scan:
    """The state of one pass over a log."""

    def __init__(self, ready: bool) -> None:
        self.ready = ready
        self.begin(ready)

    def begin(self, ready: bool) -> None:
        """Forget everything: another life."""
        self.ready = ready
        self.fatal = self.shutdown = self.shut_down = False
        self.forget()

    def forget(self) -> None:
        """Forget the errors: the server lives on."""
        self.found: tuple[Weight, int, Line, bool] | None = None
        self.cuda_oom = self.in_a_step = self.at_start = False
        self.exception = self.last_error = ""

    def take(self, line: Line) -> None:
        """One more line that counts."""
        if line.kind is Kind.STARTED:
            if self.ready or self.fatal or self.shutdown:
                self.begin(False)
        elif line.kind in (Kind.READY, Kind.SERVING, Kind.ANSWERED):
            # An answer says nothing about an error of the same second, but that the time of loading was over.
            if not self.fatal and not (self.ready and line.kind is Kind.ANSWERED):
                self.ready = True
                self.forget()
        elif line.kind is Kind.SHUTDOWN:
            self.shutdown = self.shutdown or not self.fatal
        elif line.kind is Kind.SHUT_DOWN:
            self.shut_down = self.shutdown
        elif not self.shutdown:
            self.take_error(line)

    def take_error(self, line: Line) -> None:
        text = line.text
        self.last_error = line.raw
        self.cuda_oom = self.cuda_oom or is_cuda_oom(text)
        matched = _match(text[:LINE_CHARACTERS], "serving" if self.ready else "load")
        if matched is None:
            if not self.exception and _EXCEPTION_LINE.match(text):
                self.exception = line.raw
        elif self.found is None or RULES[matched].weight < self.found[0]:
            self.found = (RULES[matched].weight, matched, line, self.ready)
        if FATAL.search(text):
            self.fatal = True
            self.in_a_step = self.in_a_step or bool(IN_A_STEP.search(text))
            self.at_start = self.at_start or bool(AT_START.search(text))

    def facts(self) -> LogFacts:
        weight_rule_line = self.found
        served = self.ready or (self.in_a_step and not self.at_start)
        return LogFacts(
            rule=weight_rule_line[1] if weight_rule_line else None,
            line=weight_rule_line[2].raw if weight_rule_line else "",
            text=weight_rule_line[2].text if weight_rule_line else "",
            ready=self.ready,
            served=served,
            fatal=self.fatal,
            shutdown=self.shutdown,
            shut_down=self.shut_down,
            cuda_oom=self.cuda_oom,
            exception=self.exception,
            last_error=self.last_error,
        )


_EXCEPTION_LINE: Final = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt)\b")

_OOM_WORDS: Final = re.compile(r"cuda out of memory|cudaerror|out of memory", re.IGNORECASE)
"""The specification's three patterns."""
_OTHER_CUDA_ERROR: Final = re.compile(r"cudaError(?!MemoryAllocation)[A-Z]\w*")
"""cudaErrorIllegalAddress and the like name another failure, though they hold the specification's "cudaerror"."""
_OOM_ADVICE: Final = re.compile(r"(?:to avoid|may|if|risk of) (?:an? )?(?:OOM|out[- ]of[- ]memory)", re.IGNORECASE)


def is_cuda_oom(text: str) -> bool:
    """Whether the message of an error line tells of an OOM on the card."""
    return bool(_OOM_WORDS.search(_OOM_ADVICE.sub("", _OTHER_CUDA_ERROR.sub("", text))))


def scan(lines: Iterable[str], *, ready: bool = False) -> LogFacts:
    """What a log says; reads each line once and keeps none. `ready`: the server was ready before the first line."""
    state = _Scan(ready)
    for line in read(lines):
        state.take(line)
    return state.facts()


def has_cuda_oom(lines: Iterable[str]) -> bool:
    """The specification's `has_cuda_oom`: an error line of this run tells of an OOM on the card (FAILURE-MODES.md, 1b)."""
    return scan(lines).cuda_oom


def engine_died(lines: Iterable[str]) -> bool:
    """Whether the engine was lost before anybody asked for a shutdown. The EngineDeadError that ends a drain does not count."""
    return scan(lines).fatal


def suggested_by(rule: Rule, text: str) -> dict[str, float]:
    """The settings that the message itself says would fit."""
    found = rule.pattern.search(text)
    named = {name: float(value) for name, value in found.groupdict().items() if value is not None} if found else {}
    if "kv_tokens" in named:
        return {"max_model_len": _whole_blocks(named["kv_tokens"])}
    if "max_model_len" in named:
        return {"max_model_len": named["max_model_len"]} if named["max_model_len"] > 0 else {}
    if "dummy_requests" in named:
        return {"max_num_seqs": max(1.0, named["dummy_requests"] // 2)}
    if named.get("total"):
        # Two hundredths below what is free: vLLM compares with the free memory of the next start, which is never quite the same.
        share = floor(100 * named["free"] / named["total"]) / 100 - 0.02
        return {"gpu_memory_utilization": round(share, 2)} if share >= 0.05 else {}
    return {}


def _whole_blocks(tokens: float) -> float:
    """`tokens` rounded down to whole KV blocks of 16, vLLM's default block size."""
    return max(16.0, tokens // 16 * 16)


def diagnose(evidence: Evidence) -> Diagnosis:
    """The cause of the failure that `evidence` shows, or none."""
    return conclude(evidence, scan(evidence.log, ready=evidence.was_ready))


def diagnose_text(lines: Sequence[str], exit_code: int | None = None, signal: int | None = None) -> Diagnosis:
    """The same from a log alone, and how the process ended where that is known."""
    return diagnose_file_lines(lines, exit_code=exit_code, signal=signal)


def diagnose_file_lines(lines: Iterable[str], *, exit_code: int | None = None, signal: int | None = None) -> Diagnosis:
    """The same for a file of any size, given as an open text file."""
    return conclude(Evidence(exit_code=exit_code, signal=signal), scan(lines))


def conclude(evidence: Evidence, log: LogFacts) -> Diagnosis:
    """Weigh the log's finding against everything else that was seen, the surest first."""
    if evidence.stopping:
        return _because(Cause.CLEAN_EXIT, "the stop was asked for", "certain") if _ended(evidence) else Diagnosis()
    found = RULES[log.rule] if log.rule is not None else None
    root = _from_log(log) if found and found.weight <= Weight.GENERAL else None
    for answer in (_from_kernel(evidence, log), root, _from_probes(evidence), _from_surroundings(evidence, found)):
        if answer is not None:
            return answer
    if found:
        return _from_log(log)
    return _from_exit(evidence, log)


def _because(cause: Cause, evidence: str, confidence: Confidence, suggested: Mapping[str, float] | None = None) -> Diagnosis:
    return Diagnosis(
        cause=cause,
        evidence=evidence.strip()[:EVIDENCE_CHARACTERS],
        confidence=confidence,
        advice=ADVICE[cause],
        retry=cause not in SAME_FLAGS_FAIL,
        suggested=dict(suggested or {}),
    )


def _ended(evidence: Evidence) -> bool:
    return evidence.exit_code is not None or evidence.signal is not None


def _from_log(log: LogFacts) -> Diagnosis:
    """The log's own finding."""
    assert log.rule is not None
    rule = RULES[log.rule]
    cause, line = rule.cause, log.line
    if cause is Cause.CUDA_OOM_LOAD and log.served:
        cause = Cause.CUDA_OOM_SERVING
    if rule.weight is Weight.ECHO_ENGINE and log.exception:
        line = log.exception
    return _because(cause, line, rule.confidence, suggested_by(rule, log.text))


def _from_kernel(evidence: Evidence, log: LogFacts) -> Diagnosis | None:
    """What the kernel and the driver know better than any log."""
    for xid in evidence.xids:
        if xid in FATAL_XIDS:
            return _because(Cause.GPU_LOST, f"Xid {xid}: {FATAL_XIDS[xid]}", "certain")
    if lost := [str(gpu.index) for gpu in evidence.gpus if gpu.lost]:
        return _because(Cause.GPU_LOST, f"the driver no longer reaches GPU {', '.join(lost)}", "certain")
    if evidence.kernel_oom and not log.cuda_oom:
        return _because(Cause.HOST_OOM, "the kernel's OOM killer took one of its processes", "certain")
    return None


def _from_probes(evidence: Evidence) -> Diagnosis | None:
    """What the looks at a live server showed, where the log says nothing of its own."""
    if evidence.startup_timed_out:
        return _because(Cause.STARTUP_TIMEOUT, "it was not ready by its start-up deadline", "certain")
    probe = evidence.probe
    if probe is None:
        return None
    if probe.health_status == 503:
        return _because(Cause.ENGINE_DIED, "/health answers 503", "certain")
    if probe.health_timed_out and not probe.progress:
        return _because(
            Cause.SERVER_HANG, "/health does not answer, and there was no progress", "certain" if probe.progress is False else "likely"
        )
    if probe.completion_timed_out and not probe.progress:
        sure: Confidence = "certain" if probe.progress is False else "likely"
        return _because(Cause.ENGINE_HANG, "/health answers, a completion does not, and there was no progress", sure)
    return None


def _from_surroundings(evidence: Evidence, found: Rule | None) -> Diagnosis | None:
    """Disk and port explain an end that the log does not."""
    if found or not _ended(evidence) or evidence.exit_code == 0:
        return None
    if evidence.disk_full:
        return _because(Cause.DISK_FULL, f"no space left in {evidence.disk_full}", "likely")
    if evidence.port_busy and not evidence.was_ready and evidence.exit_code is not None:
        return _because(Cause.PORT_IN_USE, f"its port is taken by {evidence.port_busy}", "likely")
    return None


def _from_exit(evidence: Evidence, log: LogFacts) -> Diagnosis:
    """The last resort: the exit status."""
    code, signal = evidence.exit_code, evidence.signal
    if signal is None and code is not None and code > 128 and code - 128 in SIGNAL_NAMES:
        signal = code - 128  # a shell or a container's init tells a signal so
    if signal is not None:
        said = f"killed by signal {signal} ({SIGNAL_NAMES.get(signal, 'unnamed')})"
        if signal in CRASHES:
            return _because(Cause.SEGFAULT, said, "certain")
        return _because(Cause.KILLED, said, "certain" if signal != 9 else "likely")
    if code is None:
        return Diagnosis()
    ready = evidence.was_ready or log.ready
    if code == 0:
        if ready and log.shut_down and not log.fatal:
            return _because(Cause.CLEAN_EXIT, "exit code 0 after an orderly shutdown", "certain")
        # vLLM exits 0 when its engine dies (vllm-project/vllm#48966): unclear counts as a failure.
        return _because(Cause.UNKNOWN_EXIT, "exit code 0 without an orderly shutdown", "guess")
    if code == 2 and not ready:
        return _because(Cause.BAD_ARGUMENT, log.last_error or "exit code 2 before it was ready", "likely")
    said = log.exception or log.last_error or f"exit code {code}"
    return _because(Cause.UNKNOWN_EXIT, said, "guess")
