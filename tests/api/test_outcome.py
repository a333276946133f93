"""Whether a command has had its effect, read off the rows against its tokens."""

from typing import Any

import pytest

from recovery.api.outcome import Asked, outcome
from recovery.core.commanding import Verb
from recovery.core.fleet import Placement, Policy
from recovery.core.instance import Desired, Instance, Intent
from recovery.core.states import State

TOKEN = 20


def row(replica: int = 0, **changes: Any) -> Instance:
    """An instance that serves with the command's token."""
    serving = {"state": State.HEALTHY, "desired": Desired.RUNNING, "token": TOKEN, "run": TOKEN, "reason": "why"}
    return Instance(id=f"m-{replica}", model="m", replica=replica, policy=Policy(), placement=Placement(host="h"), **{**serving, **changes})


def asked(verb: Verb, *, crash: bool = False, replicas: int = 1) -> Asked:
    """A command that was given TOKEN for each replica, when run 10 was alive."""
    return Asked(verb, {f"m-{n}": TOKEN for n in range(replicas)}, {f"m-{n}": 10 for n in range(replicas)}, crash)


STOPPED: dict[str, Any] = {"state": State.STOPPED, "desired": Desired.STOPPED, "run": None}


@pytest.mark.parametrize(
    ("verb", "changes", "result"),
    [
        (Verb.RESTART, {}, "done"),
        (Verb.RESTART, {"run": TOKEN - 1}, "waiting"),
        (Verb.RESTART, {"intent": Intent.GRACEFUL}, "waiting"),
        (Verb.RESTART, {"state": State.RESTARTING, "run": None, "token": TOKEN + 5}, "waiting"),
        (Verb.RESTART, {"token": TOKEN + 5, "run": TOKEN + 5}, "done"),
        (Verb.RESTART, {"state": State.FAILED, "run": None}, "failed"),
        (Verb.RESTART, {"state": State.FAILED, "run": None, "token": TOKEN - 1}, "waiting"),
        (Verb.RESTART, {"state": State.COMPLETED, "run": None}, "failed"),
        (Verb.RESTART, {**STOPPED, "token": TOKEN + 1}, "superseded"),
        (Verb.START, {"state": State.STARTING}, "waiting"),
        (Verb.STOP, STOPPED, "done"),
        (Verb.STOP, {**STOPPED, "token": TOKEN - 1}, "waiting"),
        (Verb.STOP, {"state": State.STOPPING, "desired": Desired.STOPPED}, "waiting"),
        (Verb.STOP, {"state": State.FAILED, "desired": Desired.STOPPED}, "failed"),
        (Verb.STOP, {"token": TOKEN + 1}, "superseded"),
    ],
)
def test_one_instance(verb: Verb, changes: dict[str, Any], result: str):
    assert outcome(asked(verb), [row(**changes)]).result == result


@pytest.mark.parametrize(
    ("changes", "result"),
    [
        ({"run": 10}, "waiting"),
        ({"run": None, "last_ended": 10, "state": State.RESTARTING}, "done"),
        ({"run": 11, "last_ended": 10, "state": State.STARTING}, "done"),
        ({"run": None, "last_ended": 10, "state": State.FAILED}, "done"),
    ],
)
def test_a_kill_is_over_when_that_run_has_ended(changes: dict[str, Any], result: str):
    assert outcome(asked(Verb.STOP, crash=True), [row(**changes)]).result == result


def test_of_several_instances_the_worst_decides_and_one_that_is_gone_is_no_success():
    two = asked(Verb.RESTART, replicas=2)

    assert outcome(two, [row(), row(1)]).result == "done"
    assert outcome(two, [row(), row(1, run=1)]).result == "waiting"
    assert outcome(two, [row(run=1), row(1, state=State.FAILED)]).result == "failed"
    assert outcome(two, [row()]).result == "superseded"
