"""
What the journal proves. The servers wrote it themselves, so it knows nothing of what the loop believes.

Instants are Unix seconds; everything ran on one machine.
"""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STOP_TAKES_S = 10.0
"""A start that was claimed before a stop may still execute within the claim's lease; the loop ends it again."""


@dataclass(frozen=True)
class Run:
    """One life of a server. `ended` None: it left no line, so it was killed, at an instant that only a later run bounds."""

    instance: str
    token: str
    began: float
    ended: float | None = None


@dataclass(frozen=True)
class Budget:
    """How often an instance may be started again before it has served for `stable_s`; `limit` 0: as often as it likes."""

    limit: int
    stable_s: float


def read(text: str) -> tuple[dict[str, Any], ...]:
    """The journal's lines. One that a kill or a full disk cut short is passed over."""
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return tuple(found)


def runs_of(lines: Iterable[Mapping[str, Any]]) -> tuple[Run, ...]:
    """Every run, in the order of their starts."""
    began: dict[tuple[str, str, int], float] = {}
    ended: dict[tuple[str, str, int], float] = {}
    for line in lines:
        key = (str(line["instance"]), str(line["token"]), int(line["pid"]))
        if line["event"] == "exec":
            began[key] = float(line["wall"])
        elif line["event"] == "exit":
            ended[key] = float(line["wall"])
    made = (Run(instance, token, at, ended.get((instance, token, pid))) for (instance, token, pid), at in began.items())
    return tuple(sorted(made, key=lambda run: run.began))


def overlaps(lines: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """
    Every time two runs of one instance lived at once.

    Of whoever was killed no line tells, but each part of a run holds a lock while it lives, which the next run tries.
    """
    found = [
        f"{line['instance']}: run {line['token']} was executed while the {line.get('part', 'server')} of {line.get('other', '?')} lived"
        for line in lines
        if line["event"] == "overlap"
    ]
    last: dict[str, Run] = {}
    for run in runs_of(lines):
        before = last.get(run.instance)
        if before is not None and before.ended is not None and before.ended > run.began:
            found.append(f"{run.instance}: run {run.token} was executed {before.ended - run.began:.3f} s before run {before.token} ended")
        last[run.instance] = run
    tokens = [(run.instance, run.token) for run in runs_of(lines)]
    twice = [each for each in dict.fromkeys(tokens) if tokens.count(each) > 1]
    found += [f"{instance}: token {token} was executed twice" for instance, token in twice]
    return tuple(found)


def budget_breaks(
    runs: Iterable[Run],
    budgets: Mapping[str, Budget],
    operator_starts: Sequence[tuple[str, float]] = (),
    kills: Sequence[tuple[str, int, float]] = (),
) -> tuple[str, ...]:
    """
    Every start beyond what the policy allows: restarts are forgiven only after a run that can have served `stable_s`.

    A run's life is bounded by its exit line, by the kill that is known of, or by the next run.
    """
    killed = {(instance, str(token)): at for instance, token, at in kills}
    by_instance: dict[str, list[Run]] = {}
    for run in runs:
        by_instance.setdefault(run.instance, []).append(run)
    found = []
    for instance, mine in by_instance.items():
        budget = budgets[instance]
        used = 0
        for before, run in itertools.pairwise(mine):
            ended = before.ended or killed.get((before.instance, before.token), run.began)
            if ended - before.began >= budget.stable_s:
                used = 0
            asked = any(name == instance and before.began < at <= run.began for name, at in operator_starts)
            used += not asked
            if budget.limit and used > budget.limit:
                found.append(f"{instance}: run {run.token} is automatic restart {used} of {budget.limit}")
    return tuple(found)


def unwanted_starts(runs: Iterable[Run], outages: Sequence[tuple[str, float, float | None]], models: Mapping[str, str]) -> tuple[str, ...]:
    """Every start of a model that the operator wanted down: `outages` are model, since, until (None: still)."""
    return tuple(
        f"{run.instance}: run {run.token} was executed {run.began - since:.1f} s after the operator had stopped {model}"
        for run in runs
        for model, since, until in outages
        if models[run.instance] == model and since + STOP_TAKES_S < run.began < (until if until is not None else float("inf"))
    )
