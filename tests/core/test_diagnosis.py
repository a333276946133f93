"""
What the evidence beside the log does to a diagnosis, and how lines of any origin are read. Whole logs: tests/corpus.
"""

import io

import pytest

from recovery.core.causes import ADVICE, CUDA_OOM_ADVICE, RULES, Cause
from recovery.core.diagnosis import (
    Diagnosis,
    Evidence,
    GpuReading,
    ProbeFacts,
    diagnose,
    diagnose_file_lines,
    diagnose_text,
    engine_died,
    has_cuda_oom,
    scan,
)
from recovery.core.log_lines import Kind, read

READY = "INFO:     Application startup complete."
STATISTICS = "(APIServer pid=7) INFO 11-24 21:02:31 [loggers.py:335] Engine 000: Avg prompt throughput: 1.1 tokens/s"
OOM = (
    "(Worker pid=9) ERROR 11-24 21:07:21 [multiproc_executor.py:1063] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."
)
FATAL = "(EngineCore pid=8) ERROR 11-24 21:07:21 [core.py:1240] EngineCore encountered a fatal error."
DEAD = (
    "(APIServer pid=7) ERROR 11-24 21:07:22 [async_llm.py:699] vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue."
)
SHUTDOWN = "(APIServer pid=7) INFO 11-24 21:02:32 [launcher.py:254] [shutdown] API server: shutdown triggered"
SHUT_DOWN = "INFO:     Application shutdown complete."
NO_SPACE = "(Worker pid=9) ERROR 11-24 21:07:21 [x.py:1] OSError: [Errno 28] No space left on device"


def cause_of(*lines: str, **evidence: object) -> Cause | None:
    return diagnose(Evidence(log=lines, **evidence)).cause  # type: ignore[arg-type]


# --- the log alone


def test_the_first_error_wins_over_its_echoes():
    lines = [READY, OOM, FATAL, DEAD]

    found = diagnose_text(lines, exit_code=0)

    assert (found.cause, found.evidence, found.confidence) == (Cause.CUDA_OOM_SERVING, OOM, "certain")


def test_a_peers_collective_error_does_not_hide_the_oom_behind_it():
    nccl = "[rank1]:[E ProcessGroupNCCL.cpp:563] [Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=2)"

    assert cause_of(READY, nccl, OOM, FATAL) is Cause.CUDA_OOM_SERVING
    assert cause_of(READY, nccl, FATAL) is Cause.NCCL


def test_an_oom_before_readiness_is_an_oom_at_load():
    assert cause_of(OOM, exit_code=1) is Cause.CUDA_OOM_LOAD
    assert cause_of(OOM, exit_code=1, was_ready=True) is Cause.CUDA_OOM_SERVING


def test_an_excerpt_without_the_mark_of_readiness_tells_by_the_engines_words():
    assert cause_of(OOM, FATAL) is Cause.CUDA_OOM_SERVING
    assert cause_of(OOM, FATAL.replace("encountered a fatal error", "failed to start")) is Cause.CUDA_OOM_LOAD


def test_an_error_that_the_server_outlived_is_forgotten():
    assert cause_of(READY, NO_SPACE, STATISTICS, signal=9) is Cause.KILLED
    assert cause_of(READY, NO_SPACE, FATAL, STATISTICS, signal=9) is Cause.DISK_FULL


def test_an_access_line_tells_that_the_time_of_loading_was_over():
    access = 'INFO:     127.0.0.1:51596 - "POST /v1/completions HTTP/1.1" 400 Bad Request'
    unreachable = "aiohttp.client_exceptions.ClientConnectorDNSError: Cannot connect to host x:443 [Name or service not known]"

    assert cause_of(access, OOM) is Cause.CUDA_OOM_SERVING
    assert cause_of(READY, OOM, access, FATAL) is Cause.CUDA_OOM_SERVING
    assert cause_of(unreachable, access) is None
    assert cause_of(unreachable, exit_code=1) is Cause.NETWORK


def test_of_several_lives_in_one_file_only_the_last_counts():
    start = "INFO 11-24 21:02:31 [api_server.py:1043] vLLM API server version 0.8.5"

    assert cause_of(start, READY, OOM, FATAL, start, READY) is None
    assert not has_cuda_oom([start, READY, OOM, FATAL, start, READY])
    assert cause_of(start, READY, start, OOM) is Cause.CUDA_OOM_LOAD


def test_the_unknown_exception_is_the_evidence_when_no_rule_knows_it():
    lines = [
        "(EngineCore pid=8) ERROR 11-24 21:07:21 [core.py:1240] EngineCore failed to start.",
        "(EngineCore pid=8) ERROR 11-24 21:07:21 [core.py:1240] Traceback (most recent call last):",
        '(EngineCore pid=8) ERROR 11-24 21:07:21 [core.py:1240]   File "x.py", line 1, in f',
        "(EngineCore pid=8) ERROR 11-24 21:07:21 [core.py:1240] ZeroDivisionError: division by zero",
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}",
    ]

    found = diagnose_text(lines, exit_code=1)

    assert found.cause is Cause.ENGINE_DIED
    assert found.evidence.endswith("ZeroDivisionError: division by zero")


NEEDS_KV = "ValueError: To serve at least one request with the model's max seq len (8192), (0.03 GiB KV cache is needed)."
FREE = "ValueError: Free memory on device"
KV = {"max_model_len": 7344}


@pytest.mark.parametrize(
    ("line", "suggested"),
    [
        (f"{NEEDS_KV} Based on the available memory, the estimated maximum model length is 1792. Try", {"max_model_len": 1792}),
        (NEEDS_KV, {}),
        ("ValueError: The max seq len (32768) is larger than the maximum number of tokens that can be stored in KV cache (7344).", KV),
        ("ValueError: The max seq len (32768) is larger than the maximum number of tokens that can be stored in KV cache (7359).", KV),
        (f"{FREE} cuda:0 (36.75/121.63 GiB) on startup is less than desired GPU memory utilization", {"gpu_memory_utilization": 0.28}),
        (f"{FREE} (0.50/79.15 GiB) on startup is less than desired GPU memory utilization", {}),
        ("RuntimeError: CUDA out of memory occurred when warming up sampler with 256 dummy requests. Please", {"max_num_seqs": 128}),
    ],
)  # fmt: skip
def test_what_vllm_says_would_fit_is_handed_on(line, suggested):
    assert diagnose_text([line], exit_code=1).suggested == suggested


# --- beside the log


@pytest.mark.parametrize(
    ("evidence", "cause"),
    [
        ({}, None),
        ({"exit_code": 0}, Cause.UNKNOWN_EXIT),
        ({"exit_code": 0, "was_ready": True}, Cause.UNKNOWN_EXIT),
        ({"exit_code": 1}, Cause.UNKNOWN_EXIT),
        ({"exit_code": 2}, Cause.BAD_ARGUMENT),
        ({"exit_code": 2, "was_ready": True}, Cause.UNKNOWN_EXIT),
        ({"signal": 9}, Cause.KILLED),
        ({"signal": 15}, Cause.KILLED),
        ({"exit_code": 137}, Cause.KILLED),
        ({"signal": 11}, Cause.SEGFAULT),
        ({"exit_code": 134}, Cause.SEGFAULT),
        ({"signal": 9, "kernel_oom": True}, Cause.HOST_OOM),
        ({"exit_code": 0, "kernel_oom": True, "log": (READY, FATAL, DEAD)}, Cause.HOST_OOM),
        ({"exit_code": 0, "kernel_oom": True, "log": (READY, OOM, FATAL)}, Cause.CUDA_OOM_SERVING),
        ({"exit_code": 0, "xids": (13,), "log": (READY, OOM, FATAL)}, Cause.CUDA_OOM_SERVING),
        ({"exit_code": 0, "xids": (31, 79), "log": (READY, OOM, FATAL)}, Cause.GPU_LOST),
        ({"gpus": (GpuReading(index=1, lost=True),), "signal": 9}, Cause.GPU_LOST),
        ({"exit_code": 1, "disk_full": "/tmp"}, Cause.DISK_FULL),
        ({"exit_code": 1, "port_busy": "nginx (pid 7)"}, Cause.PORT_IN_USE),
        ({"exit_code": 1, "port_busy": "nginx (pid 7)", "log": (OOM,)}, Cause.CUDA_OOM_LOAD),
        ({"exit_code": 1, "port_busy": "nginx (pid 7)", "was_ready": True}, Cause.UNKNOWN_EXIT),
        ({"startup_timed_out": True}, Cause.STARTUP_TIMEOUT),
        ({"startup_timed_out": True, "signal": 9}, Cause.STARTUP_TIMEOUT),
        ({"startup_timed_out": True, "log": (NO_SPACE,)}, Cause.DISK_FULL),
        ({"probe": ProbeFacts(health_status=200)}, None),
        ({"probe": ProbeFacts(health_status=503)}, Cause.ENGINE_DIED),
        ({"probe": ProbeFacts(health_status=200, completion_timed_out=True, progress=False)}, Cause.ENGINE_HANG),
        ({"probe": ProbeFacts(health_status=200, completion_timed_out=True, progress=True)}, None),
        ({"probe": ProbeFacts(health_timed_out=True, progress=False)}, Cause.SERVER_HANG),
        ({"probe": ProbeFacts(health_timed_out=True, progress=True)}, None),
        ({"probe": ProbeFacts(completion_timed_out=True, progress=False), "signal": 9}, Cause.ENGINE_HANG),
        ({"stopping": True}, None),
        ({"stopping": True, "signal": 9}, Cause.CLEAN_EXIT),
        ({"stopping": True, "exit_code": 0, "log": (READY, SHUTDOWN, DEAD)}, Cause.CLEAN_EXIT),
    ],
)
def test_the_surest_evidence_decides(evidence, cause):
    assert diagnose(Evidence(**evidence)).cause == cause


def test_exit_0_is_clean_only_after_readiness_an_orderly_shutdown_and_no_engine_death():
    assert cause_of(READY, SHUTDOWN, SHUT_DOWN, exit_code=0) is Cause.CLEAN_EXIT
    assert cause_of(SHUTDOWN, SHUT_DOWN, exit_code=0) is Cause.UNKNOWN_EXIT
    assert cause_of(READY, exit_code=0) is Cause.UNKNOWN_EXIT
    assert cause_of(READY, FATAL, DEAD, SHUTDOWN, SHUT_DOWN, exit_code=0) is Cause.ENGINE_DIED
    assert cause_of(READY, SHUTDOWN, DEAD, SHUT_DOWN, exit_code=0) is Cause.CLEAN_EXIT
    assert engine_died([READY, FATAL, DEAD]) and not engine_died([READY, SHUTDOWN, DEAD, SHUT_DOWN])


def test_every_cause_has_advice_and_configuration_errors_are_not_retried():
    assert set(ADVICE) == set(Cause)
    assert not diagnose_text(["vllm: error: unrecognized arguments: --no-such-flag 1"], exit_code=2).retry
    assert diagnose_text([], exit_code=1).retry
    assert all(line in diagnose_text([OOM]).advice for line in CUDA_OOM_ADVICE)


# --- which lines are errors

MESSAGE = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.mark.parametrize(
    "line",
    [
        f"ERROR 07-12 10:11:12 engine.py:165] {MESSAGE}",
        f"ERROR 04-09 05:39:54 [core.py:390] {MESSAGE}",
        f"(EngineCore_DP0 pid=65064) ERROR 01-08 11:19:33 [core.py:866] {MESSAGE}",
        f"(VllmWorker rank=0 pid=2764) ERROR 03-20 16:54:38 [multiproc_executor.py:375] {MESSAGE}",
        f"\x1b[36m(RayWorkerWrapper pid=4009, ip=10.0.0.7)\x1b[0m ERROR 03-20 16:54:38 [worker_base.py:1] {MESSAGE}",
        f"2024-12-19 21:40:35 ERROR 56542 [async_llm_engine.py:64] {MESSAGE}\r\n",
        f"2026-02-24T20:21:58.123456789Z stderr F (EngineCore pid=1) ERROR 02-24 20:21:58 [core.py:1] {MESSAGE}",
        f"[2026-02-24T20:21:58Z] (EngineCore_DP0 pid=6940) {MESSAGE}",
        f"Nov 24 19:20:16 gpu-7 vllm[4242]: ERROR 11-24 19:20:16 [core.py:1] {MESSAGE}",
        f"vllm-1  | ERROR 11-24 19:20:16 [core.py:1] {MESSAGE}",
        f"│ ERROR 09-27 06:46:46 engine.py:157] {MESSAGE}                │",
        f"[rank0]: {MESSAGE}",
        f"CRITICAL 11-24 19:20:16 [launcher.py:98] {MESSAGE}",
        f'{{"log":"ERROR 11-24 19:20:16 [core.py:1] {MESSAGE}\\n","stream":"stdout","time":"2026-11-24T19:20:16Z"}}',
        MESSAGE,
    ],
)  # fmt: skip
def test_an_error_is_read_whatever_stands_before_it(line):
    [found] = read([line])

    assert (found.kind, found.text) == (Kind.ERROR, MESSAGE)
    assert diagnose_text([line]).cause is Cause.CUDA_OOM_LOAD


@pytest.mark.parametrize(
    "line",
    [
        f"INFO 11-24 21:03:47 [logger.py:41] Received request cmpl-1: prompt: '{MESSAGE}', params: SamplingParams(n=1)",
        f"(APIServer pid=7) DEBUG 11-24 21:03:47 [request_logger.py:65] Request cmpl-1 details: prompt: '{MESSAGE}'",
        f"(APIServer pid=7) INFO 11-24 21:03:47 [request_logger.py:65] {MESSAGE}",
        f"(APIServer pid=7) ERROR 11-24 21:03:47 [serving.py:1] Error with model error=ErrorInfo(message='no model {MESSAGE}')",
        f"(EngineCore pid=8) ERROR 11-24 21:03:47 [dump_input.py:72] Dumping input data for V1 LLM engine with config: prompt='{MESSAGE}'",
        f"WARNING 11-24 21:03:47 [x.py:1] {MESSAGE}",
        "INFO 11-24 21:03:47 [gpu_worker.py:1] If OOM'ed, check the difference of initial free memory",
        "WARNING 11-24 21:01:52 [system_utils.py:255] Found ulimit of 20000 and failed: `OSError: [Errno 24] Too many open files`",
        f"    raise {MESSAGE}",
        "CUDA out of memory, said the model",
    ],
)  # fmt: skip
def test_words_that_are_no_event_are_left_out(line):
    assert list(read([line])) == []
    assert diagnose_text([READY, line, STATISTICS]) == Diagnosis()
    assert not has_cuda_oom([READY, line])


def test_the_traceback_of_a_bad_request_is_left_out():
    head = "(APIServer pid=7) ERROR 11-24 21:03:47 [serving_chat.py:200]"
    lines = [f"{head} Error in preprocessing prompt inputs", f"{head} Traceback (most recent call last):", f"{head} {MESSAGE}"]

    assert list(read(lines)) == []
    assert len(list(read([*lines, "(APIServer pid=7) ERROR 11-24 21:03:48 [core.py:1] OSError: other"]))) == 1


def test_source_lines_of_a_traceback_are_no_events_and_its_message_is():
    lines = [
        "Traceback (most recent call last):",
        '  File "kv_cache_utils.py", line 700, in check',
        '    raise ValueError("No available memory for the cache blocks. "',
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
        "  Value error, User-specified max_model_len (100000) is greater than the derived max_model_len (max_position_embeddings=8192 or",
    ]

    found = diagnose_text(lines, exit_code=1)

    assert (found.cause, found.suggested) == (Cause.CONFIG_ERROR, {"max_model_len": 8192})
    assert [line.text for line in read(lines)] == [lines[3], lines[4].strip()]


def test_a_native_warning_after_an_exception_is_no_part_of_it():
    log = (
        "Traceback (most recent call last):",
        '  File "/venv/lib/core.py", line 1, in run',
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
        "[W1124 21:02:16.512303746 ProcessGroupNCCL.cpp:1250] Warning: WARNING: process group has NOT been destroyed",
    )

    assert diagnose_text(log).cause is Cause.ENGINE_DIED


def test_tracebacks_of_two_processes_may_interleave():
    lines = [
        "(Worker_TP0 pid=1) Traceback (most recent call last):",
        "(Worker_TP1 pid=2) Traceback (most recent call last):",
        '(Worker_TP0 pid=1)   File "a.py", line 1, in f',
        '(Worker_TP1 pid=2)   File "a.py", line 1, in f',
        f"(Worker_TP1 pid=2) {MESSAGE}",
        "(Worker_TP0 pid=1) RuntimeError: NCCL error: unhandled cuda error",
    ]

    assert [line.text for line in read(lines)] == [MESSAGE, "RuntimeError: NCCL error: unhandled cuda error"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("RuntimeError: CUDA OUT OF MEMORY", True),
        ("RuntimeError: cudaError 2", True),
        ("RuntimeError: cudaErrorMemoryAllocation", True),
        ("RuntimeError: CUDA error: out of memory", True),
        ("RuntimeError: cudaErrorIllegalAddress", False),
        ("torch.AcceleratorError: CUDA error: an illegal memory access was encountered", False),
        ("ValueError: lower max_num_seqs to avoid OOM", False),
    ],
)
def test_has_cuda_oom_follows_the_specifications_patterns(text, expected):
    assert has_cuda_oom([text]) is expected
    assert has_cuda_oom([f"INFO 11-24 21:03:47 [logger.py:41] {text}"]) is False


def test_a_file_is_read_as_a_stream():
    def endless():
        yield "INFO 11-24 21:02:31 [api_server.py:1043] vLLM API server version 0.8.5"
        yield from ('INFO:     127.0.0.1:51596 - "POST /v1/completions HTTP/1.1" 200 OK\n' for _ in range(100_000))
        yield OOM

    assert diagnose_file_lines(endless(), exit_code=0).cause is Cause.CUDA_OOM_SERVING
    assert diagnose_file_lines(io.StringIO(f"{READY}\n{OOM}\n{FATAL}\n")).cause is Cause.CUDA_OOM_SERVING


def test_nothing_is_a_rule_without_a_cause_or_matches_everything():
    for rule in RULES:
        assert not rule.pattern.search("")
        assert not rule.pattern.search("ValueError: something else entirely")
    assert scan([]).rule is None
