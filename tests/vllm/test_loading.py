"""Real servers that cannot load as they are told to: each comes up smaller, or is left for a human, at once."""

import os
import signal

import psutil
import pytest

from tests.helpers import wait_until
from tests.loop.fleet import gone
from tests.vllm.supervised import Servers, serves_alone


def test_an_oom_at_load_gets_a_smaller_context(fleet: Servers) -> None:
    """
    Served degraded with half the context, and shown so with the cause.
    """
    one = fleet.vllm("oom", "--max-model-len", "2048", env={"FAULT_LOAD": "oom if max_model_len>1024"})
    one.serves()

    incident = one.recovered()
    assert incident.cause == "cuda_oom_load"
    assert [(step.flag, step.value, step.cause) for step in one.row.overrides] == [("--max-model-len", "1024", "cuda_oom_load")]
    assert one.row.degraded_since is not None and one.row.used == 1
    serves_alone(one)


def test_a_kv_cache_too_small_takes_the_number_of_the_message(fleet: Servers) -> None:
    one = fleet.vllm("kv", "--max-model-len", "8192", "--kv-cache-memory-bytes", "8000000", env={"VLLM_CPU_KVCACHE_SPACE": ""})
    one.serves()

    incident = one.recovered()
    assert incident.cause == "kv_cache_too_small"
    (step,) = one.row.overrides
    assert step.flag == "--max-model-len" and f"estimated maximum model length is {step.value}" in str(incident.evidence)
    assert step.value in psutil.Process(one.pid).cmdline()
    serves_alone(one)


@pytest.mark.parametrize(
    ("name", "flags", "model", "cause", "says"),
    [
        ("flag", ("--no-such-flag", "1"), "tiny-model", "bad_argument", "unrecognized arguments: --no-such-flag"),
        ("gone", (), "/models/no/such", "model_not_found", "/models/no/such"),
    ],
)
def test_what_fails_for_certain_is_not_tried_again(
    fleet: Servers, name: str, flags: tuple[str, ...], model: str, cause: str, says: str
) -> None:
    """
    FAILED at once, by its flag and its reason; no restart is counted.
    """
    one = fleet.vllm(name, *flags, model=model)

    row = one.reaches("failed")

    assert row.last_exit is not None and row.last_exit.cause == cause
    assert says in row.reason and "not started again" in row.reason
    assert (row.used, row.restarts_total, one.server) == (0, 0, None)
    (incident,) = one.incidents()
    assert (incident.cause, incident.outcome) == (cause, "failed")
    assert [event["kind"] for event in one.events].count("spawned") == 1


def test_a_sigterm_from_outside_while_it_loads(fleet: Servers) -> None:
    """
    Lost or not, in the end there is one server, and it serves.
    """
    one = fleet.vllm("term")
    server = one.loads()

    os.kill(server, signal.SIGTERM)

    one.serves()
    if one.pid != server:
        wait_until(lambda: gone(server), within_s=60)
        assert one.recovered().cause == "killed"
    serves_alone(one)
