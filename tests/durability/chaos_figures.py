"""
`make chaos-long`: 15 minutes of chaos with each of three seeds, and their figures into docs/figures/chaos.json.

`make readme` makes the tables of the README and of docs/reliability.md from that file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.control_plane import commit, machine

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs/figures/chaos.json"
SEEDS = (11, 12, 13)
SECONDS = 900


def run(seed: int) -> dict[str, Any]:
    """One run of the command; what it printed. Its story goes to our stderr."""
    command = [sys.executable, "-m", "recovery.cli", "chaos", "--seconds", str(SECONDS), "--seed", str(seed), "--json"]
    with tempfile.TemporaryFile("w+") as out:
        subprocess.run(command, cwd=ROOT, stdout=out, check=False)
        out.seek(0)
        told: dict[str, Any] = json.load(out)
    return told


def main() -> int:
    """Run them, or take what runs have printed; 1 when one did not hold, and then nothing is written."""
    parser = argparse.ArgumentParser(description="Chaos with several seeds, and its figures.")
    parser.add_argument("--seed", type=int, action="append", help="instead of 11, 12 and 13")
    parser.add_argument("--take", type=Path, nargs="+", default=[], help="take what `recovery chaos --json` has printed instead")
    parser.add_argument("--of", default=commit(), help="the commit that this was of [default: the present one]")
    given = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in given.take] or [run(seed) for seed in given.seed or SEEDS]
    for each in runs:
        sys.stdout.write(f"seed {each['seed']}: {'everything held' if each['held'] else each['broken']}\n")
    if not all(each["held"] for each in runs):
        return 1
    FIGURES.write_text(json.dumps({"machine": machine(), "commit": given.of, "runs": runs}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
