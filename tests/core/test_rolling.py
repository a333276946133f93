"""A rolling restart, step by step: order, waiting, a second replica first, and what stops it."""

from recovery.core.fleet import Placement, Policy
from recovery.core.instance import Desired, Instance, Intent, LastFailure
from recovery.core.rolling import Roll, RollStep, next_step
from recovery.core.states import State

NOW = 1000.0


def row(replica: int, state: State = State.HEALTHY, **fields: object) -> Instance:
    made = Instance(
        id=f"m-{replica}", model="m", replica=replica, policy=Policy(), placement=Placement(host="h1", port=9000 + replica),
        desired=Desired.RUNNING, state=state, token=5, run=5 if state is State.HEALTHY else None,
    )  # fmt: skip
    return made.evolve(**fields)


def roll(**fields: object) -> Roll:
    return Roll(model="m", id="m-1", started_at=NOW, order=("m-0", "m-1")).evolve(**fields)


def step(made: Roll, *rows: Instance) -> RollStep:
    return next_step(made, rows, NOW + 1)


def test_one_after_another() -> None:
    """The first is restarted; the second only when the first serves with the new run; then it is done."""
    first = step(roll(), row(0), row(1))
    assert (first.kind, first.instance) == ("restart", "m-0")
    told = first.roll.evolve(token=9)
    assert step(told, row(0, State.RESTARTING), row(1)).kind == "wait"
    assert step(told, row(0, run=5), row(1)).kind == "wait", "it still serves with the old run"
    second = step(told, row(0, run=9, token=9), row(1))
    assert (second.kind, second.instance, second.roll.done) == ("restart", "m-1", ("m-0",))
    last = step(second.roll.evolve(token=9), row(0, run=9, token=9), row(1, run=9, token=9))
    assert (last.kind, last.roll.state) == ("finish", "done")


def test_nobody_is_taken_away_while_another_is_down() -> None:
    """A replica that fails beside the roll makes it wait; one that is down for good does not."""
    assert step(roll(), row(0), row(1, State.UNHEALTHY)).kind == "wait"
    assert step(roll(), row(0), row(1, State.FAILED)).kind == "restart"


def test_the_same_rows_give_the_same_step() -> None:
    """Two control workers that tick at once decide the same."""
    rows = (row(0), row(1))
    assert next_step(roll(), rows, NOW + 1) == next_step(roll(), rows, NOW + 1)


def test_it_stops_at_the_first_failure() -> None:
    """The others keep the version that works."""
    under_way = roll(current="m-0", token=9, since=NOW)
    failed = row(0, State.RESTARTING, last_failure=LastFailure(cause="exit", at=NOW + 0.5))
    ended = step(under_way, failed, row(1))
    assert (ended.kind, ended.roll.state) == ("finish", "failed")
    assert step(under_way, row(0, State.FAILED), row(1)).roll.state == "failed"
    assert step(under_way, row(0, State.STOPPED), row(1)).roll.state == "failed"
    assert step(under_way, row(1)).roll.state == "failed", "it left the fleet"


def test_a_failure_before_the_roll_is_no_failure_of_it() -> None:
    earlier = row(0, State.STARTING, last_failure=LastFailure(cause="exit", at=NOW - 5))
    assert step(roll(current="m-0", token=9, since=NOW), earlier, row(1)).kind == "wait"


def test_a_single_replica_gets_a_second_one_first() -> None:
    """It comes up, then the first is restarted, then the second goes, then the roll is over."""
    single = roll(order=("m-0",), surge=Placement(host="h1", port=9010, replica=1), surge_id="m-1")
    begun = step(single, row(0))
    assert (begun.kind, begun.instance) == ("surge", "m-1")
    assert step(begun.roll, row(0), row(1, State.STARTING)).kind == "wait"
    restarted = step(begun.roll, row(0), row(1))
    assert (restarted.kind, restarted.instance) == ("restart", "m-0")
    dropped = step(restarted.roll.evolve(token=9), row(0, run=9, token=9), row(1))
    assert (dropped.kind, dropped.instance) == ("drop_surge", "m-1")
    finished = step(dropped.roll, row(0, run=9, token=9), row(1, State.STOPPING))
    assert (finished.kind, finished.roll.state) == ("finish", "done")


def test_a_second_replica_that_does_not_come_up_stops_it_before_anything_is_taken_away() -> None:
    single = roll(order=("m-0",), surge=Placement(host="h1", port=9010, replica=1), surge_id="m-1", since=NOW)
    ended = step(single, row(0), row(1, State.RESTARTING, last_failure=LastFailure(cause="oom", at=NOW + 1)))
    assert (ended.kind, ended.instance) == ("drop_surge", "m-1")


def test_a_replica_on_its_way_out_does_not_count_as_serving() -> None:
    assert step(roll(current="m-0", token=5, since=NOW), row(0, intent=Intent.CRASH), row(1)).kind == "wait"
