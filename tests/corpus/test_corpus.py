"""
Every log of this folder is diagnosed as the folder it lies in says; `none` holds logs of servers that were well.

The first line of each is a JSON object: where it comes from (`source`) and what else is known of the run, by the names of
`Evidence`; `suggested` is what the message itself says would fit. The logs marked "recorded" were made by `record.py`.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recovery.core.causes import Cause
from recovery.core.diagnosis import Diagnosis, Evidence, diagnose, diagnose_file_lines, diagnose_text, has_cuda_oom
from recovery.core.log_lines import Kind, read

HERE = Path(__file__).parent
LOGS = sorted(HERE.glob("*/*.log"))
FROM_THE_EXIT_ALONE = {Cause.KILLED, Cause.STARTUP_TIMEOUT, Cause.UNKNOWN_EXIT, Cause.HOST_OOM, Cause.GPU_LOST, Cause.SEGFAULT}
"""Causes that a log need not show: the exit, the kernel or the driver tells them."""


def load(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    head, _, text = path.read_text().partition("\n")
    return json.loads(head), tuple(text.splitlines())


def evidence(facts: dict[str, Any], log: tuple[str, ...]) -> Evidence:
    known = {name: value for name, value in facts.items() if name in Evidence.model_fields}
    return Evidence(**known, log=log)


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


FAILURES = [path for path in LOGS if path.parent.name != "none"]
ORDINARY = [path for path in LOGS if path.parent.name == "none"]


def test_the_corpus_has_a_log_for_every_cause_that_a_log_can_tell():
    told_by_looks = {Cause.ENGINE_HANG, Cause.SERVER_HANG, Cause.CLEAN_EXIT}

    assert {path.parent.name for path in FAILURES} == {cause.value for cause in set(Cause) - told_by_looks}
    assert len(ORDINARY) >= 8


@pytest.mark.parametrize("path", FAILURES, ids=name)
def test_a_failure_has_the_cause_of_its_folder(path):
    facts, log = load(path)

    found = diagnose(evidence(facts, log))

    assert found.cause is not None and found.cause.value == path.parent.name, f"{found.evidence!r}"
    assert found.evidence and found.advice
    if "suggested" in facts:
        assert found.suggested == facts["suggested"]
    assert has_cuda_oom(log) is ("cuda_oom" in path.parent.name)


@pytest.mark.parametrize("path", FAILURES, ids=name)
def test_the_log_alone_is_enough_or_gives_nothing_wrong(path):
    _, log = load(path)
    cause = diagnose_text(log).cause

    if cause is None or cause.value != path.parent.name:
        assert Cause(path.parent.name) in FROM_THE_EXIT_ALONE


@pytest.mark.parametrize("path", ORDINARY, ids=name)
def test_an_ordinary_log_has_no_cause(path):
    facts, log = load(path)

    assert diagnose_text(log) == Diagnosis()
    assert diagnose(evidence(facts, log)).cause in (None, Cause.CLEAN_EXIT)
    assert not has_cuda_oom(log)


@pytest.mark.parametrize("path", ORDINARY, ids=name)
def test_an_ordinary_log_has_no_cause_wherever_it_is_cut(path):
    """From the top down to the shutdown, that is: who sees only its last lines cannot know that it was wanted."""
    _, log = load(path)
    end = next((number for number, line in enumerate(log) if "[shutdown]" in line), len(log))

    for cut in range(0, end, 7):
        assert diagnose_text(log[cut:]).cause is None
        assert diagnose_text(log[:cut]).cause is None


@pytest.mark.parametrize("path", FAILURES, ids=name)
@pytest.mark.parametrize("prefix", ["2026-11-24T19:20:16.123456789Z stdout F ", "Nov 24 19:20:16 gpu-7 vllm[42]: ", "vllm-1  | "])
def test_the_cause_is_the_same_through_every_kind_of_log_collector(path, prefix):
    facts, log = load(path)
    wrapped = tuple(prefix + line for line in log)

    assert diagnose(evidence(facts, wrapped)).cause == diagnose(evidence(facts, log)).cause


ORDINARY_LINES = sorted({line for path in ORDINARY for line in load(path)[1]})
PLAIN_LINES = [line for line in ORDINARY_LINES if not list(read([line])) and not line.startswith(("Traceback", "ERROR", "  File"))]
"""Ordinary lines that are no mark of the server's life, and that mean the same wherever they stand."""


@settings(max_examples=200)
@given(st.lists(st.sampled_from(PLAIN_LINES), max_size=60))
def test_ordinary_lines_in_any_order_never_make_a_cause(lines):
    assert diagnose_text(lines) == Diagnosis()
    assert not has_cuda_oom(lines)


@settings(max_examples=200)
@given(st.sampled_from(FAILURES), st.lists(st.sampled_from(PLAIN_LINES), max_size=30), st.data())
def test_ordinary_lines_around_and_between_never_change_a_cause(path, noise, data):
    """Between the records of a failure; a traceback without prefixes is one piece of text, and is left so."""
    facts, log = load(path)
    before = data.draw(st.integers(0, len(noise)))

    mixed = (*noise[:before], *log, *noise[before:])

    assert diagnose(evidence(facts, mixed)).cause == diagnose(evidence(facts, log)).cause


@settings(max_examples=300)
@given(st.text(max_size=400), st.sampled_from(["INFO", "DEBUG", "WARNING"]))
def test_no_text_of_a_record_below_error_is_an_error(text, level):
    line = f"(APIServer pid=7) {level} 11-24 21:03:47 [request_logger.py:55] Request cmpl-1 details: prompt: {text!r}"

    assert all(found.kind is not Kind.ERROR for found in read([line]))


def test_a_hundred_megabytes_are_read_in_one_pass(tmp_path):
    """About the speed no more is claimed than that it ends: the lines of a busy server, and the failure at the end."""
    size = int(os.environ.get("CORPUS_BIG_LOG_BYTES", 10 * 2**20))
    facts, failure = load(HERE / "cuda_oom_serving" / "oom-serving.log")
    busy = "".join(
        f'INFO:     127.0.0.1:{port} - "POST /v1/completions HTTP/1.1" 200 OK\n'
        f"(APIServer pid=7) INFO 11-24 21:03:47 [async_llm.py:578] Added request cmpl-{port}.\n"
        for port in range(30_000, 31_000)
    )
    log = tmp_path / "big.log"
    with log.open("w") as out:
        out.write("INFO:     Application startup complete.\n")
        for _ in range(size // len(busy)):
            out.write(busy)
        out.write("\n".join(failure[failure.index("INFO:     Application startup complete.") + 1 :]))

    began = time.process_time()
    with log.open() as lines:
        found = diagnose_file_lines(lines, exit_code=facts["exit_code"])
    print(f"{log.stat().st_size / 2**20:.0f} MB in {time.process_time() - began:.1f} s of CPU")

    assert found.cause is Cause.CUDA_OOM_SERVING
