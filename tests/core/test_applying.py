"""What a changed fleet file asks for: the fewest actions, in an order that keeps serving."""

import pytest

from recovery.core.applying import actions, in_force
from recovery.core.fleet import Fleet, digest, launch_digest
from recovery.core.fleet_file import load_fleet_text
from recovery.core.fleet_plan import plan
from recovery.core.instance import Desired, Instance
from recovery.core.states import State

BASE = """{"port_range": [9000, 9020], "llmModels": {
  "a": {"command": "serve", "args": ["--port", "{port}"%s], "endpoints": {"base_url": "http://localhost:{port}/v1"}, "replicas": %d%s},
  "b": {"command": "serve", "args": ["--port", "9100"], "endpoints": {"base_url": "http://localhost:9100/v1"}}
}}"""


def fleet_of(extra_args: str = "", replicas: int = 2, rules: str = "") -> Fleet:
    return load_fleet_text(BASE % (extra_args, replicas, rules), "h1")


def rows_of(fleet: Fleet) -> tuple[Instance, ...]:
    """The rows of a fleet in force: everything healthy, started as the file says."""
    rows = []
    for planned in plan(fleet):
        spec = fleet.models[planned.model]
        rows.append(
            Instance(
                id=planned.id,
                model=planned.model,
                replica=planned.replica,
                policy=spec.policy,
                placement=planned.placement,
                planned=planned.placement,
                spec_digest=digest(spec),
                wanted=launch_digest(spec),
                launched=launch_digest(spec),
                state=State.HEALTHY,
                desired=Desired.RUNNING,
                token=7,
                run=7,
            )
        )
    return tuple(rows)


def kinds(rows: tuple[Instance, ...], fleet: Fleet) -> list[tuple[str, str]]:
    return [(action.kind, action.instance) for action in actions(rows, fleet)]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        pytest.param(fleet_of(), [], id="nothing"),
        pytest.param(fleet_of(extra_args=', "--dtype", "auto"'), [("restart", "a-0"), ("restart", "a-1")], id="other arguments"),
        pytest.param(fleet_of(rules=', "max_restarts": 9'), [("rules", "a-0"), ("rules", "a-1")], id="only its rules"),
        pytest.param(fleet_of(replicas=3), [("rules", "a-0"), ("rules", "a-1"), ("add", "a-2")], id="one replica more"),
        pytest.param(fleet_of(replicas=1), [("rules", "a-0"), ("remove", "a-1")], id="one replica less"),
    ],
)
def test_only_what_changed_is_touched(changed: Fleet, expected: list[tuple[str, str]]) -> None:
    assert kinds(rows_of(fleet_of()), changed) == expected


def test_a_row_that_is_down_needs_no_restart_for_new_arguments() -> None:
    rows = tuple(row.evolve(state=State.STOPPED, desired=Desired.STOPPED, run=None) for row in rows_of(fleet_of()))

    assert kinds(rows, fleet_of(extra_args=', "-v"')) == [("rules", "a-0"), ("rules", "a-1")]


def test_removals_come_last_and_additions_before_restarts() -> None:
    rows = rows_of(fleet_of())
    without_b = Fleet.model_validate(
        fleet_of(extra_args=', "-v"', replicas=3)
        .model_copy(update={"llmModels": {"a": fleet_of(extra_args=', "-v"', replicas=3).llmModels["a"]}})
        .model_dump(exclude_unset=True)
    )

    assert kinds(rows, without_b) == [("add", "a-2"), ("restart", "a-0"), ("restart", "a-1"), ("remove", "b-0")]


def test_in_force_only_when_all_that_is_wanted_serves() -> None:
    rows = rows_of(fleet_of())
    loading = (rows[0].evolve(state=State.STARTING), *rows[1:])

    assert in_force(rows, fleet_of())
    assert not in_force(loading, fleet_of())
    assert not in_force(rows, fleet_of(replicas=3))
