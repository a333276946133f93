"""The 90 seconds of chaos that belong to every change: the command itself, with the seed of `make chaos`."""

import json
import subprocess
import sys

import pytest

from recovery.chaos.plan import Kind
from tests.cli.installation import ROOT

SECONDS, SEED = 90, 7


@pytest.mark.timeout(900)
def test_90_seconds_of_chaos() -> None:
    """No server runs twice, no repair is lost, no budget is exceeded, and all is well after the last fault. A failure names the folder."""
    command = [sys.executable, "-m", "recovery.cli", "chaos", "--seconds", str(SECONDS), "--seed", str(SEED), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800, check=False)

    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    told = json.loads(done.stdout)
    assert (told["held"], told["seed"], told["broken"]) == (True, SEED, [])
    assert told["overlaps"] == told["lost_repairs"] == told["budget_breaks"] == told["unwanted_starts"] == 0
    assert told["repairs"] > 0 and set(told["faults"]) <= set(Kind)
