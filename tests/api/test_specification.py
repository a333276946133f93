"""
The specification's own examples, as written there, with curl and jq, against a running fleet.

Only the address differs: its port 8099 is the port of this test's installation.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from recovery.core.view import STATUS_FIELDS
from tests.api.live import PATIENCE_S, Live, free_ports, living, simulated
from tests.helpers import wait_until


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """One fleet for this module: `vllm` as in the specification, and one that must not be drilled."""
    missing = [name for name in ("curl", "jq") if shutil.which(name) is None]
    if missing:
        pytest.fail(f"{missing} missing: apt-get install curl jq") if os.environ.get("CI") else pytest.skip(f"{missing} not installed")
    one, two = free_ports(2)
    with living({"vllm": simulated(one), "other": simulated(two, drill=False)}) as made:
        yield made


@pytest.fixture
def fresh(live: Live) -> Live:
    """The fleet with every model healthy and its budget whole."""
    for model in live.models():
        path = f"/api/llm/models/{model['id']}"
        if not model["is_healthy"]:
            wait_until(lambda path=path: live.client.post(f"{path}/start").status_code, 200, within_s=PATIENCE_S)
        if model["restart_count"]:
            wait_until(lambda path=path: live.client.post(f"{path}/reset").status_code, 200, within_s=PATIENCE_S)  # ten a minute
    wait_until(lambda: [(each["is_healthy"], each["restart_count"]) for each in live.models()], [(True, 0)] * 2, within_s=PATIENCE_S)
    return live


def sh(live: Live, text: str) -> str:
    """Run a line of the specification in bash."""
    line = text.replace("http://localhost:8099", live.url)
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def told(live: Live, text: str) -> Any:
    """The same, its answer read as JSON."""
    return json.loads(sh(live, text))


def test_the_status_examples(fresh: Live):
    listed = told(fresh, "curl -s http://localhost:8099/api/llm/models")
    assert listed["total"] == 2
    shown = told(fresh, "curl -s http://localhost:8099/llm/models/vllm")
    assert tuple(shown)[: len(STATUS_FIELDS)] == STATUS_FIELDS
    assert (shown["is_running"], shown["is_healthy"], shown["health_message"], shown["restart_policy"]) == (True, True, None, "on-failure")
    assert isinstance(shown["uptime_seconds"], float)
    assert isinstance(shown["last_health_check_time"], float)
    assert told(fresh, "curl -s http://localhost:8099/llm/models/vllm | jq '.has_cuda_oom'") is False


def test_the_restart_and_stop_examples(fresh: Live):
    answer = told(fresh, "curl -s -X POST http://localhost:8099/api/llm/models/vllm/restart")
    assert answer["message"] == "LLM model 'vllm' restarted successfully"
    assert answer["restart_count"] == 1
    assert 0 <= answer["uptime_seconds"] < PATIENCE_S

    answer = told(fresh, 'curl -s -X POST "http://localhost:8099/api/llm/models/vllm/stop?force=false"')
    assert answer["message"] == "LLM model 'vllm' stopped gracefully"
    assert fresh.model("vllm")["is_running"] is False


def test_the_log_examples(fresh: Live):
    answer = told(fresh, 'curl -s "http://localhost:8099/api/llm/models/vllm/logs?lines=2"')
    assert answer["model_id"] == "vllm"
    assert answer["returned_lines"] == len(answer["lines"]) == 2
    assert answer["total_lines"] >= 2
    assert all(line.endswith("\n") for line in answer["lines"])
    assert sh(fresh, "curl -s http://localhost:8099/llm/models/vllm/logs?lines=100 | jq -r '.lines[]' | grep -c INFO").strip() != "0"


def test_the_health_check_examples(fresh: Live):
    before = fresh.model("vllm")["last_health_check_time"]
    answer = told(fresh, "curl -s -X POST http://localhost:8099/llm/models/vllm/health-check")
    assert list(answer)[:6] == [
        "model_id",
        "is_healthy",
        "health_message",
        "consecutive_health_failures",
        "last_health_check_time",
        "has_cuda_oom",
    ]
    assert answer["is_healthy"] is True
    assert answer["last_health_check_time"] > before


def test_the_cron_example_in_its_working_form(fresh: Live):
    cron = "curl -sf http://localhost:8099/llm/models/vllm | jq -e '.is_healthy' > /dev/null || echo 'vLLM unhealthy!'"
    assert sh(fresh, cron) == ""
    sh(fresh, "curl -s -X POST http://localhost:8099/llm/models/vllm/stop")
    assert sh(fresh, cron) == "vLLM unhealthy!\n"


def test_recovery_test_five(fresh: Live):
    """Stop by force is a crash, and the policy brings it back."""
    sh(fresh, 'curl -s -X POST "http://localhost:8099/llm/models/vllm/stop?force=true"')

    wait_until(lambda: fresh.model("vllm")["is_healthy"], True, within_s=PATIENCE_S)
    assert told(fresh, "curl -s http://localhost:8099/llm/models/vllm | jq '.restart_count'") == 1


def test_a_spent_budget_is_refused_in_the_specifications_words(fresh: Live):
    for count in range(1, 4):
        fresh.server("vllm-0").kill()
        wait_until(lambda: (fresh.model("vllm")["restart_count"], fresh.model("vllm")["is_healthy"]), (count, True), within_s=PATIENCE_S)

    answer = told(fresh, "curl -s -X POST http://localhost:8099/api/llm/models/vllm/restart")

    assert answer == {"detail": "Cannot restart model 'vllm': restart policy is 'no' or max restarts (3) reached"}


def test_the_metrics_examples(fresh: Live):
    text = sh(fresh, "curl -s http://localhost:8099/metrics")

    assert 'fluidmcp_server_status{server="vllm"} 1.0' in text
    assert 'fluidmcp_server_restarts_total{server="vllm"}' in text
    assert 'fluidmcp_server_uptime_seconds{server="vllm"}' in text


def test_killing_the_api_in_the_middle_of_a_restart_changes_nothing(fresh: Live):
    answer = fresh.client.post("/api/llm/models/vllm/restart?wait=false").json()
    fresh.part("recovery.api").kill()

    wait_until(lambda: fresh.client.get(answer["link"]).json().get("outcome"), "done", within_s=PATIENCE_S)
    assert fresh.model("vllm")["restart_count"] == 1
