"""The record of an outage, from the failure to the end of its validation."""

from typing import Any

import pytest

from recovery.core.change import Incident
from recovery.core.commanding import Command, Verb, on_command
from recovery.core.decision import Decision
from recovery.core.failing import ExitSeen, Remedy, liveness_lost, on_exit
from recovery.core.incidents import MAX_STEPS, follow
from recovery.core.instance import Instance
from recovery.core.looking import on_look
from recovery.core.states import State
from recovery.core.stepping import on_spawned
from tests.core.making import NOW, TOKEN, bad, look, row

S = State


class Story:
    """A row and its incident, taken from decision to decision as the committer does."""

    def __init__(self, before: Instance) -> None:
        self.row, self.now = before, NOW
        self.incident: Incident | None = None
        self.closings = 0

    def takes(self, decision: Any, task: str | None = None) -> None:
        """Commit a decision."""
        assert isinstance(decision, Decision)
        current = self.incident if self.incident is not None and self.row.incident == self.incident.id else None
        done, written = follow(self.row, decision, current, self.now, task)
        self.closings += sum(count.name == "recovery_incidents_closed_total" for count in done.counts)
        self.row, self.incident = done.after, written or self.incident

    def fails(self, cause: str = "killed") -> None:
        self.takes(on_exit(self.row, ExitSeen(token=self.row.run or 0, at=self.now, signal=9, cause=cause), self.now, 0.0), "task-1")

    def starts(self) -> None:
        self.now = max(self.now, self.row.not_before)
        self.takes(on_spawned(self.row, self.row.token, self.now))

    def looks(self, seconds: float, **what: Any) -> None:
        self.now += seconds
        self.takes(on_look(self.row, look(run=self.row.run, **{"steps": self.now, **what}), self.now, 0.0))

    def commands(self, verb: Verb, **options: Any) -> None:
        self.takes(on_command(self.row, Command(verb=verb, **options), self.now))

    @property
    def steps(self) -> list[str]:
        assert self.incident is not None
        return [step["kind"] for step in self.incident.steps]


def test_an_outage_from_end_to_end() -> None:
    """
    Opened with the failure, one entry per step with its task, closed when the repaired server has kept serving.
    """
    story = Story(row())

    story.fails()
    assert story.incident is not None and story.row.incident == story.incident.id == f"m-0-{TOKEN}"
    assert (story.incident.cause, story.incident.closed_at, story.incident.failed_at) == ("killed", None, NOW)
    assert story.steps == ["failed", "restart"] and story.incident.steps[1]["task"] == "task-1"

    story.starts()
    story.looks(4)
    assert (story.incident.started_at, story.incident.ready_at, story.incident.closed_at) == (NOW + 5, NOW + 9, None)
    assert story.steps == ["failed", "restart", "started", "ready"]

    story.looks(30)
    assert (story.incident.outcome, story.incident.closed_at, story.incident.validated_at) == ("recovered", NOW + 39, NOW + 39)
    assert (story.row.incident, story.closings) == (None, 1)

    story.looks(30)
    assert story.closings == 1


def test_a_second_failure_goes_on_with_the_same_incident() -> None:
    story = Story(row())
    story.fails()
    first = story.incident
    story.starts()
    story.fails("cuda_oom_load")
    assert story.incident is not None and first is not None and story.incident.id == first.id
    assert story.incident.cause == "killed", "the first cause is the incident's"
    assert story.steps == ["failed", "restart", "started", "failed", "restart"]


def test_a_failure_during_validation_goes_on_too() -> None:
    story = Story(row())
    story.fails()
    story.starts()
    story.looks(1)
    story.fails()
    assert story.incident is not None and story.incident.closed_at is None and story.closings == 0


def test_a_failure_after_it_was_closed_opens_another() -> None:
    story = Story(row())
    story.fails()
    story.starts()
    story.looks(1)
    story.looks(30)
    first = story.incident
    story.fails()
    assert first is not None and story.incident is not None
    assert story.incident.id != first.id and story.row.incident == story.incident.id


def test_unhealthy_for_a_moment_is_no_incident() -> None:
    story = Story(row())
    story.takes(on_look(story.row, bad(), NOW, 0.0))
    assert story.row.state is S.UNHEALTHY and story.incident is None
    story.looks(2)
    assert story.incident is None


def test_a_spent_budget_closes_it_as_failed_and_a_start_opens_it_again() -> None:
    story = Story(row(rules={"max_restarts": 1}))
    story.fails()
    story.starts()
    story.fails()
    assert story.incident is not None
    assert (story.row.state, story.incident.outcome, story.closings) == (S.FAILED, "failed", 1)
    assert story.row.incident == story.incident.id, "the row still says why it is down"

    story.commands(Verb.RESET)
    story.starts()
    assert (story.incident.closed_at, story.incident.outcome) == (None, None)
    story.looks(1)
    story.looks(30)
    assert story.incident.outcome == "recovered"


def test_the_operator_ends_it() -> None:
    story = Story(row())
    story.fails()
    story.commands(Verb.STOP)
    story.takes(Decision(after=story.row.evolve(state=S.STOPPED), reason="nothing of it is left"))
    assert story.incident is not None and (story.incident.outcome, story.row.incident) == ("stopped", None)


def test_an_operator_command_opens_none() -> None:
    for verb in Verb:
        story = Story(row())
        story.commands(verb)
        assert story.incident is None


def test_an_orderly_end_opens_none() -> None:
    story = Story(row())
    story.takes(on_exit(story.row, ExitSeen(token=TOKEN, at=NOW, code=0, clean=True), NOW, 0.0))
    assert story.incident is None


def test_a_hang_is_opened_once() -> None:
    """
    The end that follows the kill belongs to it.
    """
    story = Story(row())
    story.takes(liveness_lost(story.row, cause="engine_hang", text="no progress", evidence="", remedy=Remedy(), now=NOW, u=0.0), "task-2")
    story.takes(on_exit(story.row, ExitSeen(token=TOKEN, at=NOW, signal=9, cause="killed"), NOW, 0.0))
    assert story.incident is not None and story.incident.cause == "engine_hang"
    assert story.steps.count("failed") == 1


def test_its_steps_are_bounded_and_the_first_ones_stay() -> None:
    story = Story(row(rules={"max_restarts": 0}))
    for _ in range(40):
        story.fails()
        story.starts()
    assert story.incident is not None and len(story.incident.steps) == MAX_STEPS
    assert story.steps[:3] == ["failed", "restart", "started"]
    assert story.incident.steps[-1]["attempt"] == 40


@pytest.mark.parametrize("state", State)
def test_a_decision_without_failure_writes_nothing(state: State) -> None:
    before = row(state)
    decision, incident = follow(before, Decision(after=before, reason="nothing"), None, NOW)
    assert incident is None and decision.after == before
