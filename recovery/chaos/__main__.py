"""`python -m recovery.chaos`: what `recovery chaos` executes, in a mount namespace of its own where that can be had."""

import argparse
import json
import os
import random
import sys
from collections.abc import Sequence

from recovery.chaos.plan import Kind
from recovery.chaos.run import run, with_own_disk
from recovery.chaos.world import MOUNTED

SEEDS = 1_000_000


def main(arguments: Sequence[str]) -> int:
    """Run it; 0 when everything held, 1 when not."""
    parser = argparse.ArgumentParser(prog="recovery chaos", description="Break an installation of its own and judge what came of it.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--only", action="append", default=[], choices=[kind.name.lower() for kind in Kind])
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    if (command := with_own_disk(arguments)) is not None:
        os.execve(command[0], command, {**os.environ, MOUNTED: "1"})
    seed = given.seed if given.seed is not None else random.randrange(SEEDS)
    kinds = [Kind[name.upper()] for name in given.only]
    report = run(given.seconds, seed, lambda text: print(text, file=sys.stderr, flush=True), kinds=kinds, keep=given.keep)
    print(json.dumps(report.as_dict(), indent=2) if given.json else "\n".join(report.lines()))
    return 0 if report.held else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
