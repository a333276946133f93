"""
Changes without downtime, on a whole installation under load: rolls, a changed fleet file, one that is taken back,
and a death while Redis is away. Sixteen clients ask through the front door; not one request may fail or lose a token.
"""

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from recovery.core.instance import Instance
from tests.cli.installation import Installation, free_ports, installation
from tests.frontdoor.world import Load
from tests.helpers import wait_until

PATIENCE_S = 120.0


@dataclass(frozen=True)
class Through:
    """Where the load's clients ask."""

    url: str


def entry(*extra: str, **more: Any) -> dict[str, Any]:
    """A simulated model that answers to the name the clients ask for."""
    arguments = ["-m", "recovery.simulator", "--engine", "none", "--host", "{host}", "--port", "{port}", "--load-s", "0.3"]
    return {
        "command": "python",
        "args": [*arguments, "--served-model-name", "m", "--tokens-per-s", "200", *extra],
        "endpoints": {"base_url": "http://{host}:{port}/v1"},
        "restart_policy": "on-failure",
        "restart_delay": 0.2,
        "health_check_interval": 2,
        "health_confirm_interval": 0.5,
        "stop_grace_s": 5,
        "drain_timeout_s": 20,
        "validate_s": 0.5,
        **more,
    }


def write(made: Installation, model: dict[str, Any]) -> None:
    first, *_, last = sorted(made.spare)
    made.fleet.write_text(json.dumps({"port_range": [first, last], "llmModels": {"m": model}}))


@pytest.fixture(scope="module")
def whole() -> Iterator[Installation]:
    """Two replicas behind the front door of one installation."""
    with installation() as made:
        made.spare = range(ports := free_ports(1)[0] + 1, ports + 12)  # type: ignore[attr-defined]
        write(made, entry(replicas=2))
        made.environ["RECOVERY_FLEET"] = str(made.fleet)
        made.up()
        yield made


def under_load(made: Installation, work: Callable[[], None], *, tokens: int = 60) -> Load:
    """Do `work` while sixteen clients stream; it begins when all of them have begun."""
    load = Load(Through(f"http://127.0.0.1:{made.front}"), streaming=True, chat=True, tokens=tokens)  # type: ignore[arg-type]

    async def run() -> None:
        async with load:
            await load.finished(16)
            await asyncio.to_thread(work)
            await load.finished(16)

    asyncio.run(run())
    return load


def rows(made: Installation) -> dict[str, Instance]:
    return {row.id: row for row in made.wired.store.load_all()}


def runs(made: Installation) -> dict[str, int | None]:
    return {name: row.run for name, row in rows(made).items()}


def test_a_roll_restarts_every_replica_and_fails_no_request(whole: Installation) -> None:
    before = runs(whole)

    load = under_load(whole, lambda: whole.ok("roll", "m") and None)

    assert load.failures() == []
    after = runs(whole)
    assert after.keys() == before.keys() and all(after[name] != before[name] for name in before)
    assert all(row.used == 0 and row.manual >= 1 for row in rows(whole).values()), "a roll uses no budget"


def test_a_changed_file_is_shown_first_and_then_brought_into_force_without_a_failure(whole: Installation) -> None:
    changed = whole.folder / "changed.json"
    first, *_, last = sorted(whole.spare)  # type: ignore[attr-defined]
    changed.write_text(json.dumps({"port_range": [first, last], "llmModels": {"m": entry("--max-model-len", "4096", replicas=3)}}))
    before = runs(whole)

    shown = whole.ok("apply", str(changed), "--dry-run")
    assert [line.split()[:2] for line in shown.splitlines()[1:]] == [["add", "m-2"], ["restart", "m-0"], ["restart", "m-1"]]
    assert runs(whole) == before, "a dry run changes nothing"
    load = under_load(whole, lambda: whole.ok("apply", str(changed)) and None)

    assert load.failures() == []
    now = rows(whole)
    assert sorted(now) == ["m-0", "m-1", "m-2"]
    assert all(row.launched == row.wanted and row.state.value == "healthy" for row in now.values())
    assert whole.ok("apply", str(changed)).startswith("nothing to do")


def test_a_file_whose_replicas_do_not_come_up_is_taken_back_and_nobody_notices(whole: Installation) -> None:
    kept = whole.fleet.read_text()
    bad = whole.folder / "bad.json"
    model = json.loads(kept)["llmModels"]["m"]
    model["args"] += ["--load-error", "oom"]
    bad.write_text(json.dumps({**json.loads(kept), "llmModels": {"m": {**model, "remedies": False, "max_restarts": 1}}}))
    outcome: list[Any] = []

    load = under_load(whole, lambda: outcome.append(whole.run("apply", str(bad))))

    assert load.failures() == []
    assert outcome[0].returncode == 1 and "the earlier fleet file is in force again" in outcome[0].stderr
    assert whole.fleet.read_text() == kept
    wait_until(lambda: {row.state.value for row in rows(whole).values()}, {"healthy"}, within_s=PATIENCE_S)


def test_a_replica_that_dies_while_redis_is_away_costs_no_request(whole: Installation) -> None:
    redis = whole.redis_pid()
    assert redis is not None
    view = whole.host.look("m-0")
    assert view.run is not None
    victim = view.run.server_pid

    def work() -> None:
        os.kill(redis, signal.SIGSTOP)
        os.kill(victim, signal.SIGKILL)

    try:
        load = under_load(whole, work)
    finally:
        os.kill(redis, signal.SIGCONT)

    assert load.failures() == []
    wait_until(lambda: (rows(whole)["m-0"].state.value, rows(whole)["m-0"].restarts_total > 0), ("healthy", True), within_s=PATIENCE_S)


def test_one_replica_is_rolled_behind_a_second_one_that_goes_again() -> None:
    with installation() as made:
        made.spare = range(ports := free_ports(1)[0] + 1, ports + 8)  # type: ignore[attr-defined]
        write(made, entry())
        made.environ["RECOVERY_FLEET"] = str(made.fleet)
        made.up()
        before = runs(made)

        load = under_load(made, lambda: made.ok("roll", "m") and None)

        assert load.failures() == []
        wait_until(lambda: list(rows(made)), ["m-0"], within_s=PATIENCE_S)
        assert runs(made)["m-0"] != before["m-0"]
        kinds = [event["text"] for event in made.wired.store.events("m", 200)]
        assert any("a second replica first" in text for text in kinds)
