"""When an instance of a silent host may be started elsewhere, and where."""

import pytest

from recovery.core import leasing
from recovery.core.fleet import Fleet
from recovery.core.fleet_file import load_fleet_text
from recovery.core.fleet_plan import plan
from recovery.core.instance import Desired, Instance
from recovery.core.states import State

FLEET = """{"port_range": [9100, 9103], "addresses": {"h2": "10.0.0.2"}, "llmModels": {
  "m": {"command": "x", "args": ["--port", "{port}"], "endpoints": {"base_url": "http://{host}:{port}/v1"}, "hosts": ["h1", "h2", "h3"],
        "reschedule": true, "lease_s": 120, "kill_deadline_s": 30, "restart_policy": "on-failure"}}}"""
WAIT_S = 120 + 30 + leasing.MARGIN_S


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    return load_fleet_text(FLEET, "h1")


def row_of(fleet: Fleet, **changes: object) -> Instance:
    planned = plan(fleet)[0]
    row = Instance(
        id="m-0", model="m", policy=fleet.models["m"].policy, placement=planned.placement, planned=planned.placement,
        desired=Desired.RUNNING, state=State.HEALTHY, token=7, run=7, leased=True, entered_at=1000.0,
    )  # fmt: skip
    return row.evolve(**changes)


def test_nothing_is_moved_before_its_lease_is_over_for_certain(fleet: Fleet) -> None:
    """Not at the end of the lease, but later than a keeper can need to end the server."""
    row = row_of(fleet)
    assert [leasing.may_move(row, silent) for silent in (0.0, 120.0, WAIT_S - 0.1, WAIT_S)] == [False, False, False, True]


@pytest.mark.parametrize(
    "changes",
    [
        {"leased": False},
        {"desired": Desired.STOPPED},
        {"state": State.FAILED, "run": None},
        {"state": State.STOPPING},
        {"state": State.RECYCLING, "gives_up": True},
    ],
)
def test_what_may_be_alive_or_is_not_wanted_stays(fleet: Fleet, changes: dict[str, object]) -> None:
    """A run without a lease may live for ever on a host that nobody hears."""
    assert not leasing.may_move(row_of(fleet, **changes), 1e6)
    unmoved = row_of(fleet)
    assert not leasing.may_move(unmoved.evolve(policy=unmoved.policy.model_copy(update={"reschedule": False})), 1e6)


def test_silence_is_counted_from_the_last_heartbeat(fleet: Fleet) -> None:
    """And where Redis has none, from the row's last change: a Redis that was wiped must not make a host look lost at once."""
    row = row_of(fleet)
    assert leasing.silent_s(row, {"h1": {"age_s": 3.5}}, 5000.0) == 3.5
    assert leasing.silent_s(row, {}, 1010.0) == 10.0


def test_the_new_home_is_the_emptiest_living_host_of_the_list(fleet: Fleet) -> None:
    """At a port that nobody has there, with that host's own address."""
    row, planned = row_of(fleet), plan(fleet)[0]
    neighbour = row.evolve(id="n-0", model="n", placement=row.placement.model_copy(update={"host": "h3", "port": 9100}))
    found = leasing.new_home(row, planned, fleet, [row, neighbour], ["h1", "h2", "h3"])
    assert found is not None
    assert (found.host, found.port, found.address) == ("h2", 9100, "10.0.0.2")
    second = leasing.new_home(row, planned, fleet, [row, neighbour], ["h3"])
    assert second is not None
    assert (second.host, second.port) == ("h3", 9101)
    assert leasing.new_home(row, planned, fleet, [row], ["h1"]) is None


def test_a_move_costs_no_budget_and_shuts_the_old_host_out(fleet: Fleet) -> None:
    """A new token, and everything up to the old one has ended: whatever the old host reports later changes nothing."""
    row, planned = row_of(fleet, used=2, attempt=2), plan(fleet)[0]
    home = leasing.new_home(row, planned, fleet, [row], ["h2"])
    assert home is not None
    after = leasing.moved_away(row, planned, home, WAIT_S, 9000.0).after
    assert (after.state, after.placement.host, after.run, after.leased) == (State.RESTARTING, "h2", None, False)
    assert after.token > row.token
    assert after.last_ended == row.token
    assert (after.used, after.attempt, after.restarts_total) == (2, 2, 1)
    assert after.planned == planned.placement, "or the next start would take it back to where the file wants it"
    assert after.not_before == 9000.0
