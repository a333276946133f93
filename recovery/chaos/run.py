"""One run: up, faults, a time to come to rest, judgement, down."""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from recovery.chaos import judge
from recovery.chaos.deeds import Back, Deeds
from recovery.chaos.plan import Kind, Planned, plan
from recovery.chaos.report import Done, Report
from recovery.chaos.watch import Watch
from recovery.chaos.world import DOOMED, MOUNTED, World
from recovery.core.commanding import Command, Verb
from recovery.core.fleet_plan import plan as fleet_plan
from recovery.core.states import State
from recovery.parts import Say

UP_S = 120.0
SETTLE_S = 30.0
"""A fault that waits for all to be well waits this long; then the next one comes all the same."""
REST_S = 120.0
"""Time to come to rest after the last fault. Nothing needs more than the longest wait of the fleet file and of the loop together."""
SLACK_BYTES = 16 << 20
DESCRIPTORS = 250
OUTSIDE = frozenset(kind for kind in Kind if kind.value.startswith(("server", "engine", "keeper", "restart", "stop", "log")))
"""Faults that leave the loop alone: all is well when the servers are. For the others the loop must have shown life since."""


def run(seconds: float, seed: int, say: Say, *, kinds: Sequence[Kind] = (), keep: bool = False) -> Report:
    """Break an installation of its own for `seconds` and judge what came of it. The folder stays when something broke, or with `keep`."""
    home = Path(tempfile.mkdtemp(prefix="recovery-chaos-"))
    world = World(home, lambda text: None)
    report = Report(seed, seconds, str(home))
    try:
        _Run(world, report, say).go(kinds)
    finally:
        world.down()
        if report.held and not keep:
            shutil.rmtree(home, ignore_errors=True)
    return report


class _Run:
    def __init__(self, world: World, report: Report, say: Say) -> None:
        self._world, self._report, self._say = world, report, say
        self._deeds = Deeds(world)
        self._watch = Watch(world)
        self._backs: list[tuple[float, Done, Back]] = []
        self._began, self._told = time.monotonic(), ""

    def go(self, kinds: Sequence[Kind]) -> None:
        self._world.up()
        self._watch.start()
        try:
            if not self._wait(lambda: self._watch.last is not None, UP_S):
                self._report.final = f"the fleet did not come up: {self._watch.why_not}"
                return
            possible = [kind for kind in self._deeds.possible() if not kinds or kind in kinds]
            self._report.not_possible = tuple(kind for kind in Kind if kind not in self._deeds.possible())
            self._break(possible)
            self._rest()
        finally:
            self._watch.stop()
        self._judge()

    def _break(self, kinds: Sequence[Kind]) -> None:
        until = time.monotonic() + self._report.seconds
        for planned in plan(self._report.seed, kinds):
            if time.monotonic() >= until:
                return
            done = self._do(planned)
            if done is None:
                continue
            self._wait(lambda: time.monotonic() >= until, planned.pause_s)
            if planned.settle:
                self._wait(functools.partial(_over, done, until), planned.hold_s + SETTLE_S)

    def _do(self, planned: Planned) -> Done | None:
        at = time.time()
        made = self._deeds.do(planned)
        if made is None:
            return None
        target, back = made
        done = Done(planned.kind, target, at)
        self._report.faults.append(done)
        self._tell(f"{planned.kind.value}: {target}")
        if back is None:
            done.lifted = time.time()
        else:
            self._backs.append((time.monotonic() + planned.hold_s, done, back))
        return done

    def _rest(self) -> None:
        for _, done, back in self._backs:
            self._lift(done, back)
        self._backs = []
        self._tell("no more faults; waiting until all is well")
        if not self._wait(self._all_converged, REST_S):
            self._reset_spent()
            if not self._wait(self._all_converged, REST_S):
                self._report.final = self._watch.why_not or "the loop shows no life"

    def _reset_spent(self) -> None:
        """A model whose budget is spent waits for a human, who is played here; the judge counts from outside whether it was spent."""
        for row in self._world.store.load_all():
            if row.state is State.FAILED and row.model != DOOMED and row.budget_spent:
                self._deeds.operator_starts.append((row.id, time.time()))
                self._world.service.command(row.model, Command(verb=Verb.RESET, by="chaos"))

    def _all_converged(self) -> bool:
        return all(done.converged is not None for done in self._report.faults) and self._watch.last is not None

    def _wait(self, until: Callable[[], bool], within_s: float) -> bool:
        """Go on with everything that has its time, until that is true."""
        end = time.monotonic() + within_s
        while True:
            for entry in [entry for entry in self._backs if time.monotonic() >= entry[0]]:
                self._backs.remove(entry)
                self._lift(entry[1], entry[2])
            self._note_converged()
            self._tell_why_not()
            if until():
                return True
            if time.monotonic() >= end:
                return False
            time.sleep(0.05)

    def _tell(self, text: str) -> None:
        self._say(f"{time.monotonic() - self._began:7.1f} s  {text}")

    def _tell_why_not(self) -> None:
        """What keeps all from being well, whenever that changes: the story of the run, for whoever asks why it took so long."""
        why = self._watch.why_not
        if why != self._told:
            self._told = why
            self._tell(f"          {why or 'all is well'}")

    def _lift(self, done: Done, back: Back) -> None:
        back()
        self._tell(f"      over: {done.kind.value}")
        done.lifted = time.time()

    def _note_converged(self) -> None:
        well = self._watch.last
        if well is None:
            return
        for done in self._report.faults:
            if done.converged is None and done.lifted is not None:
                shown = well.at if done.kind in OUTSIDE else min(well.at, well.tick, well.served)
                if shown > done.lifted:
                    done.converged = time.time()

    def _judge(self) -> None:
        report, deeds, world = self._report, self._deeds, self._world
        lines = judge.read(world.journal.read_text(errors="replace"))
        runs = judge.runs_of(lines)
        planned = fleet_plan(world.fleet)
        specs = {each.id: world.fleet.models[each.model] for each in planned}
        budgets = {name: judge.Budget(spec.max_restarts, spec.stable_s) for name, spec in specs.items()}
        report.execs = len(runs)
        report.repairs = len(runs) - len(planned)
        report.overlaps = judge.overlaps(lines)
        report.budget_breaks = judge.budget_breaks(runs, budgets, deeds.operator_starts, deeds.kills)
        outages = [(outage.model, outage.since, outage.until) for outage in deeds.outages]
        report.unwanted = judge.unwanted_starts(runs, outages, {each.id: each.model for each in planned})
        never = [done for done in report.faults if done.converged is None]
        report.lost = tuple(f"never well again after: {done.kind.value} ({done.target})" for done in never)
        if not any(run.instance == f"{DOOMED}-0" for run in runs):
            report.lost += (f"{DOOMED} was never started",)
        self._sizes()

    def _sizes(self) -> None:
        growing = []
        for name, size in self._watch.sizes.items():
            self._report.sizes[name] = (max(memory for _, memory in size.memory), size.descriptors)
            if not size.levels_off(SLACK_BYTES):
                growing.append(f"the memory of {name} does not level off")
            if size.descriptors > DESCRIPTORS:
                growing.append(f"{name} has {size.descriptors} descriptors open")
        self._report.growing = tuple(growing)


def _over(done: Done, until: float) -> bool:
    return done.converged is not None or time.monotonic() >= until


def with_own_disk(arguments: Sequence[str]) -> list[str] | None:
    """The command that runs us where we may mount a small disk: in a mount namespace of our own. None where that cannot be had."""
    if os.environ.get(MOUNTED):
        return None
    unshare = shutil.which("unshare")
    if unshare is None:
        return None
    options = ["-m"] if os.geteuid() == 0 else ["-r", "-m"]
    tried = subprocess.run([unshare, *options, "mount", "-t", "tmpfs", "none", "/mnt"], check=False, capture_output=True)
    if tried.returncode != 0:
        return None
    return [unshare, *options, sys.executable, "-m", "recovery.chaos", *arguments]
