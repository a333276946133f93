"""The fleet brake: when it goes on, who waits while it is on, and the limits on simultaneous loads."""

import pytest

from recovery.core import braking
from recovery.core.braking import Brake
from recovery.core.fleet import FleetKeys, Placement, Policy
from recovery.core.instance import Desired, Instance, LastFailure
from recovery.core.states import State

LIMITS = FleetKeys(max_loads_per_host=2, max_loads_fleet=3, brake_failures=3, brake_window_s=60)
NOW = 1000.0


def row(
    number: int, state: State = State.RESTARTING, *, cause: str | None = "cuda_driver", at: float = NOW - 5, **fields: object
) -> Instance:
    made = Instance(
        id=f"m{number}-0", model=f"m{number}", policy=Policy(), placement=Placement(host="h1", port=9000 + number),
        desired=Desired.RUNNING, state=state, last_failure=LastFailure(cause=cause, at=at) if cause else None,
    )  # fmt: skip
    return made.evolve(**fields)


def on_host(made: Instance, host: str) -> Instance:
    return made.evolve(placement=made.placement.model_copy(update={"host": host}))


BRAKE = Brake(cause="cuda_driver", since=NOW - 1, instances=("m0-0", "m1-0", "m2-0"))


def test_it_goes_on_when_enough_fail_with_one_cause_in_the_window() -> None:
    """Two are not enough for a limit of three; the third puts it on, and it names all three."""
    rows = [row(0), row(1), row(2)]
    assert braking.should_brake(rows[:2], "cuda_driver", LIMITS, None, NOW) is None
    put_on = braking.should_brake(rows, "cuda_driver", LIMITS, None, NOW)
    assert put_on is not None
    assert put_on.instances == ("m0-0", "m1-0", "m2-0")


def test_other_causes_and_old_failures_do_not_count() -> None:
    """What failed for another reason, or longer ago than the window, says nothing about a common cause."""
    rows = [row(0), row(1), row(2, cause="oom"), row(3, at=NOW - 61), row(4, cause=None)]
    assert braking.should_brake(rows, "cuda_driver", LIMITS, None, NOW) is None


def test_brake_failures_0_means_no_brake() -> None:
    off = LIMITS.model_copy(update={"brake_failures": 0})
    assert braking.should_brake([row(number) for number in range(9)], "cuda_driver", off, None, NOW) is None


def test_one_that_is_on_stays_and_one_just_released_does_not_come_back_at_once() -> None:
    """An operator who released it is not overruled within the window; after it, new failures count again."""
    rows = [row(number) for number in range(3)]
    assert braking.should_brake(rows, "cuda_driver", LIMITS, BRAKE, NOW) is None
    assert braking.should_brake(rows, "cuda_driver", LIMITS, BRAKE.evolve(released_at=NOW - 59), NOW) is None
    assert braking.should_brake(rows, "cuda_driver", LIMITS, BRAKE.evolve(released_at=NOW - 61), NOW) is not None


def test_one_repair_first_then_waves_that_double() -> None:
    """Nobody repaired: one at a time. One repaired: two at a time."""
    roomy = LIMITS.model_copy(update={"max_loads_per_host": 99, "max_loads_fleet": 99})
    waiting, loading = row(0), row(1, State.STARTING)
    assert braking.why_wait(waiting, [waiting], roomy, BRAKE, NOW) is None
    assert "one repair first" in (braking.why_wait(waiting, [waiting, loading], roomy, BRAKE, NOW) or "")
    repaired = row(2, State.HEALTHY, ready_at=NOW)
    assert braking.why_wait(waiting, [waiting, loading, repaired], roomy, BRAKE, NOW) is None
    both = [waiting, loading, row(3, State.STARTING), repaired]
    assert "1 repaired, 2 at a time" in (braking.why_wait(waiting, both, roomy, BRAKE, NOW) or "")


def test_who_served_before_the_brake_is_no_sign_that_repairs_work() -> None:
    roomy = LIMITS.model_copy(update={"max_loads_per_host": 99, "max_loads_fleet": 99})
    old = row(2, State.HEALTHY, ready_at=BRAKE.since - 1)
    assert braking.why_wait(row(0), [row(0), row(1, State.STARTING), old], roomy, BRAKE, NOW) is not None


def test_it_holds_back_only_its_cause_and_only_while_it_is_on() -> None:
    """A model that failed for another reason is repaired as ever."""
    roomy = LIMITS.model_copy(update={"max_loads_per_host": 99, "max_loads_fleet": 99})
    loading = row(1, State.STARTING)
    assert braking.why_wait(row(0, cause="oom"), [loading], roomy, BRAKE, NOW) is None
    assert braking.why_wait(row(0, cause=None), [loading], roomy, BRAKE, NOW) is None
    assert braking.why_wait(row(0), [loading], roomy, BRAKE.evolve(released_at=NOW), NOW) is None


@pytest.mark.parametrize("brake", [None, BRAKE], ids=["no brake", "brake"])
def test_loads_are_limited_per_host_and_in_the_fleet(brake: Brake | None) -> None:
    """A claimed start counts as a load; one that only waits for its time does not."""
    mine = row(0, cause=None)
    loading = [row(1, State.STARTING, cause=None), row(2, cause=None, lease_until=NOW + 1)]
    assert "max_loads_per_host 2" in (braking.why_wait(mine, loading, LIMITS, brake, NOW) or "")
    assert braking.why_wait(mine, [loading[0], row(3, cause=None)], LIMITS, brake, NOW) is None
    elsewhere = [on_host(row(number, State.STARTING, cause=None), f"g{number}") for number in range(1, 4)]
    assert "max_loads_fleet 3" in (braking.why_wait(mine, elsewhere, LIMITS, brake, NOW) or "")
    assert braking.why_wait(mine, elsewhere[:2], LIMITS, brake, NOW) is None


def test_it_is_over_when_nothing_is_left_to_repair() -> None:
    """What was repaired or given up does not keep it on."""
    assert not braking.over([row(0)], BRAKE)
    assert not braking.over([row(0, State.RECYCLING)], BRAKE)
    assert braking.over([row(0, State.HEALTHY), row(1, State.FAILED), row(2, cause="oom")], BRAKE)
