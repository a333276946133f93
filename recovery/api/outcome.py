"""
Whether a command has had its effect: a pure reading of the rows against the tokens that the command was given.

A row that is behind the command's token has not heard of it yet. A row that is ahead of it belongs to a newer command.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from recovery.core.commanding import Verb
from recovery.core.instance import Desired, Instance
from recovery.core.states import State

S = State
Result = Literal["waiting", "done", "failed", "superseded"]


@dataclass(frozen=True)
class Asked:
    """A command as it was accepted: the token per instance, and the runs that were alive before it."""

    verb: Verb
    tokens: Mapping[str, int]
    runs: Mapping[str, int | None]
    crash: bool = False

    @classmethod
    def of(cls, verb: Verb, answer: Mapping[str, Any], before: Sequence[Instance], *, crash: bool = False) -> "Asked":
        """The command that a public task accepted."""
        tokens = {str(each["instance"]): int(each["token"]) for each in answer.get("instances", ())}
        return cls(verb, tokens, {row.id: row.run for row in before}, crash)


@dataclass(frozen=True)
class Outcome:
    """What became of a command. `why` says it for a failure."""

    result: Result
    why: str = ""


def outcome(asked: Asked, rows: Sequence[Instance]) -> Outcome:
    """Return what became of the command, over all instances it was accepted for."""
    known = {row.id: row for row in rows}
    found = [_of_one(asked, each, known.get(each)) for each in asked.tokens]
    for result in ("failed", "superseded", "waiting"):
        for each in found:
            if each.result == result:
                return each
    return Outcome("done")


def _of_one(asked: Asked, instance: str, row: Instance | None) -> Outcome:
    if row is None:
        return Outcome("superseded", f"{instance} is no longer in the fleet")
    token = asked.tokens[instance]
    if row.token < token:
        return Outcome("waiting")
    if asked.crash:
        return _crashed(asked.runs.get(instance), row)
    match asked.verb:
        case Verb.STOP:
            return _stopped(row, token)
        case Verb.START | Verb.RESTART:
            return _serves(row, token)
        case _:
            return Outcome("done")


def _stopped(row: Instance, token: int) -> Outcome:
    if row.state in (S.STOPPED, S.COMPLETED):
        return Outcome("done")
    if row.desired is Desired.RUNNING and row.token > token:
        return Outcome("superseded", f"{row.id} was started again meanwhile")
    if row.state is S.FAILED:
        return Outcome("failed", f"{row.id}: {row.reason}")
    return Outcome("waiting")


def _serves(row: Instance, token: int) -> Outcome:
    if row.state is S.HEALTHY and row.intent is None and (row.run or 0) >= token:
        return Outcome("done")
    if row.state is S.FAILED:
        return Outcome("failed", f"{row.id}: {row.reason}")
    if row.state is S.COMPLETED:
        return Outcome("failed", f"{row.id} ended by itself: {row.reason}")
    if row.desired is Desired.STOPPED:
        return Outcome("superseded", f"{row.id} was stopped meanwhile")
    return Outcome("waiting")


def _crashed(run: int | None, row: Instance) -> Outcome:
    """Killed by force: over as soon as that run has ended and what follows is decided."""
    return Outcome("waiting") if run is not None and row.run == run and row.last_ended < run else Outcome("done")
