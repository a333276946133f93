"""`recovery drill` on the fleet that `make up` runs: every fault is caused, survived and told."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from recovery.cli.exits import Exit
from recovery.drill import DrillReport, Fault
from tests.api.live import PATIENCE_S, Live, free_ports, living
from tests.helpers import wait_until

EXAMPLE = Path(__file__).parents[2] / "examples/fleet.json"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """The example fleet as it is shipped, on ports of this test."""
    models = json.loads(EXAMPLE.read_text())["llmModels"]
    for model, port in zip(models.values(), free_ports(len(models)), strict=True):
        model["port_range"] = [port, port + 5]
    with living(models) as made:
        yield made


def drill(live: Live, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, to its end."""
    command = [sys.executable, "-m", "recovery.cli", "drill", *arguments]
    return subprocess.run(command, env=live.environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


@pytest.mark.parametrize("fault", list(Fault))
def test_every_drill_is_survived_and_told(live: Live, fault: Fault):
    path = "/api/llm/models/llama"
    wait_until(lambda: live.client.post(f"{path}/reset").status_code, 200, within_s=PATIENCE_S)
    wait_until(lambda: (live.model("llama")["is_healthy"], live.model("llama")["restart_count"]), (True, 0), within_s=PATIENCE_S)

    done = drill(live, "llama", "--fault", fault.value, "--json")

    assert done.returncode == Exit.OK, f"{done.stdout}\n{done.stderr}"
    report = DrillReport.model_validate_json(done.stdout)
    assert report.outcome == "recovered", report.lines()
    assert report.detected_s is not None and report.restarted_s is not None and report.ready_s is not None
    assert report.detected_s <= report.restarted_s <= report.ready_s
    told = [line.split()[2] for line in done.stderr.splitlines()]
    assert (told[0], told[-1]) == ("drill", "healthy")
    assert "drill" in [each["kind"] for each in live.client.get(f"{path}/events").json()["events"]]


def test_every_model_of_the_example_may_be_drilled():
    assert all(model["drill"] and "--admin" in model["args"] for model in json.loads(EXAMPLE.read_text())["llmModels"].values())
