"""
`make mutants`: breaks one rule after another in a copy of the project, and shows which test catches each.

A break that no test catches is a rule that nobody would notice losing. Each break names the tests that are to catch it, so
that a round takes minutes; what is printed is the first one that did.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
COPIED = ("recovery", "workers", "tests", "examples", "beat_schedule.py", "pyproject.toml", "README.md")
LIMIT_S = 900


@dataclass(frozen=True)
class Mutant:
    """One break: in `file` the text `whole` becomes `broken`; `tests` are the ones to ask."""

    name: str
    file: str
    whole: str
    broken: str
    tests: tuple[str, ...]


CONTRACT, WALK, CUTS = "tests/contract/test_rows.py", "tests/durability/test_walk.py", "tests/durability/test_cuts.py"
FOUND = "tests/durability/test_found.py"

MUTANTS = (
    Mutant(
        "a commit does not look at the version",
        "recovery/adapters/lua/commit.lua",
        "if stored_version ~= expected then",
        "if false then",
        (CONTRACT,),
    ),
    Mutant(
        "a commit may lower the token",
        "recovery/adapters/lua/commit.lua",
        "if stored[2] and higher(stored[2], token) then",
        "if false then",
        (CONTRACT,),
    ),
    Mutant(
        "an old message's token is claimed",
        "recovery/adapters/lua/claim.lua",
        "if stored_token ~= token then",
        "if false then",
        (CONTRACT,),
    ),
    Mutant(
        "a stopped instance can be claimed",
        "recovery/adapters/lua/claim.lua",
        "if desired ~= 'running' then",
        "if false then",
        (CONTRACT,),
    ),
    Mutant(
        "a lease does not keep others off",
        "recovery/adapters/lua/claim.lua",
        "if tonumber(lease_until) > now then",
        "if false then",
        (CONTRACT,),
    ),
    Mutant(
        "what is delivered is not pushed on",
        "recovery/adapters/lua/pop_due.lua",
        "now + tonumber(ARGV[1])",
        "now",
        ("tests/contract",),
    ),
    Mutant(
        "the step lock locks nothing",
        "recovery/adapters/host_disk.py",
        "fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n            except",
        "pass\n            except",
        ("tests/process/test_processes.py",),
    ),
    Mutant(
        "the run lock locks nothing",
        "recovery/keeper.py",
        "fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n            return True",
        "return True",
        ("tests/process/test_keeper.py",),
    ),
    Mutant(
        "the keeper kills no strays",
        "recovery/keeper.py",
        "killed |= {proc.pid for proc in left if send(proc.pid, proc.start, signal.SIGKILL)}",
        "killed |= set()",
        ("tests/process/test_keeper.py", "tests/process/test_processes.py"),
    ),
    Mutant(
        "a number used again is taken for the server",
        "recovery/keeper.py",
        "if now is None or now.start != start:\n            return False",
        "if now is None:\n            return False",
        ("tests/process/test_processes.py",),
    ),
    Mutant(
        "a start does not wait for strays of an older run",
        "recovery/core/stepping.py",
        "if view.strays:\n        return Verdict",
        "if False:\n        return Verdict",
        ("tests/core/test_stepping.py",),
    ),
    Mutant(
        "a run that was started already is started once more",
        "recovery/core/stepping.py",
        "if record is not None and record.token == row.token:",
        "if False:",
        (CUTS, WALK),
    ),
    Mutant(
        "an end counts again and again",
        "recovery/core/failing.py",
        "if not row.last_ended < seen.token <= row.token:\n        return None",
        "if seen.token > row.token:\n        return None",
        ("tests/core/test_failing.py",),
    ),
    Mutant(
        "the budget has no end",
        "recovery/core/failing.py",
        "if row.budget_spent:\n        return f",
        "if False:\n        return f",
        ("tests/core/test_failing.py", WALK),
    ),
    Mutant(
        "a Redis that forgot grants a new budget",
        "recovery/core/joining.py",
        'for name in ("used", "attempt", "manual"):',
        'for name in ("attempt", "manual"):',
        ("tests/core/test_joining.py", WALK),
    ),
    Mutant(
        "restarts are forgiven at once",
        "recovery/core/looking.py",
        "or now - row.entered_at < stable_s:",
        "or now - row.entered_at < 0:",
        ("tests/core/test_looking.py", WALK),
    ),
    Mutant(
        "restarts are never forgiven",
        "recovery/core/looking.py",
        "or now - row.entered_at < stable_s:",
        "or row.entered_at:",
        ("tests/core/test_looking.py",),
    ),
    Mutant(
        "late looks are not dropped",
        "workers/tasks.py",
        "<= STALE_LOOK_S",
        "<= 1e9",
        ("tests/durability/test_stale.py",),
    ),
    Mutant(
        "a stop that only the host knows is forgotten",
        "recovery/core/joining.py",
        "if record.token <= row.token or record.desired == row.desired.value:",
        "if True:",
        (FOUND,),
    ),
    Mutant(
        "decisions are made on rows that are behind the disk",
        "recovery/host/context.py",
        "behind = row.token < self.met.get(instance_id, 0)",
        "behind = False",
        (FOUND,),
    ),
    Mutant(
        "the disk does not learn of a start before it is made",
        "recovery/host/starts.py",
        "self._here.write(row.id, joining.recorded(row, self._here.host.read_record(row.id), started_at=self._here.clocks.wall()))",
        "self._here.host.read_record(row.id)",
        (CUTS, WALK),
    ),
    Mutant(
        "a server whose keeper died gets no new one",
        "recovery/host/ends.py",
        "                    self._here.host.adopt(instance_id)\n                    self._here.lives",
        "                    self._here.lives",
        (CUTS,),
    ),
    Mutant(
        "a lost host's models are started elsewhere at once",
        "recovery/core/leasing.py",
        "and silent_s >= wait_s(row.policy)",
        "and silent_s >= 0",
        ("tests/core/test_leasing.py",),
    ),
    Mutant(
        "a lease that is over is renewed",
        "recovery/adapters/processes.py",
        "if self.boot_clock() >= present:",
        "if False:",
        ("tests/durability/test_lease.py",),
    ),
    Mutant(
        "nobody waits while the brake is on",
        "recovery/core/braking.py",
        "if under_way < max(1, 2 * repaired):",
        "if True:",
        ("tests/core/test_braking.py",),
    ),
    Mutant(
        "a token that is spent is waited for",
        "recovery/core/failing.py",
        "if not row.gives_up and row.token <= row.last_ended:",
        "if False:",
        (FOUND,),
    ),
    Mutant(
        "a row of a newer version hides all others",
        "recovery/adapters/redis_store.py",
        "            except SchemaError as error:\n                refused[instance_id] = str(error)",
        "            except SchemaError:\n                raise",
        (CONTRACT,),
    ),
    Mutant(
        "a deaf worker is never found",
        "recovery/core/watching.py",
        'for {silent_s:.0f} s" if silent_s > DEAF_S else None',
        'for {silent_s:.0f} s" if silent_s > 1e9 else None',
        ("tests/core/test_watching.py",),
    ),
    Mutant(
        "a rolling restart goes on past a part that did not come back",
        "recovery/part_restarts.py",
        "            if why is not None:\n",
        "            if False:\n",
        ("tests/cli/test_workers.py",),
    ),
)


def copy_of(folder: Path) -> Path:
    """The project, as it is now, somewhere else."""
    for name in COPIED:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
        elif source.exists():
            shutil.copy2(source, target)
    return folder


def broken(copy: Path, mutant: Mutant) -> str:
    """Break the copy; the text of the file before."""
    path = copy / mutant.file
    text = path.read_text()
    if text.count(mutant.whole) != 1:
        raise SystemExit(f"cannot break {mutant.file} ({mutant.name}): its text is there {text.count(mutant.whole)} times, not once")
    path.write_text(text.replace(mutant.whole, mutant.broken))
    return text


def caught_by(copy: Path, mutant: Mutant) -> str | None:
    """The first test that fails, or None when all pass."""
    environ = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "RECOVERY_WALKS_ASIS": "1"}
    for tests in mutant.tests:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", "-rfE", tests]
        done = subprocess.run(command, cwd=copy, env=environ, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        if done.returncode not in (0, 1):
            raise SystemExit(f"cannot ask {tests}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        if done.returncode == 1:
            found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
            return found[1] if found else tests
    return None


def main() -> int:
    """Break, ask, mend, for each; 1 when one was not caught."""
    parser = argparse.ArgumentParser(description="Break one rule after another and show which test catches it.")
    parser.add_argument("--only", default="", help="part of a break's name")
    only = parser.parse_args().only
    chosen = [mutant for mutant in MUTANTS if only in mutant.name]
    survived = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        copy = copy_of(Path(name))
        for mutant in chosen:
            whole = broken(copy, mutant)
            try:
                caught = caught_by(copy, mutant)
            finally:
                (copy / mutant.file).write_text(whole)
            print(f"{'caught  ' if caught else 'SURVIVED'}  {mutant.name:<58} {caught or ''}", flush=True)
            if caught is None:
                survived.append(mutant.name)
    print(f"{len(chosen) - len(survived)} of {len(chosen)} breaks were caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
