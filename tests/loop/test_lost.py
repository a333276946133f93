"""Messages, clocks and memories that fail: each restart has two ways to happen, and either is enough."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.loop.fleet import Fleet, Model, fleet_of
from tests.loop.plane import Plane, plane, wait_until

SHIM = Path(__file__).parent / "shim"


@pytest.fixture(scope="module", name="plane")
def _plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    """A plane whose host worker can be told to lose its messages."""
    lose = tmp_path_factory.mktemp("lose") / "lose"
    with plane(of={"host": {"PYTHONPATH": str(SHIM), "LOSE": str(lose)}}) as made:
        yield made


def lose_file(plane: Plane) -> Path:
    """While this file is there the host's messages are lost; it counts them."""
    return Path(plane.of["host"]["LOSE"])


@contextmanager
def losing(plane: Plane) -> Iterator[Path]:
    """While this lasts no message of a restart is sent by the host."""
    lose = lose_file(plane)
    lose.write_text("")
    try:
        yield lose
    finally:
        lose.unlink()


@contextmanager
def without(plane: Plane, part: str) -> Iterator[None]:
    """While this lasts a part is down."""
    plane.end(part)
    try:
        yield
    finally:
        plane.start(part)


def linked(fleet: Fleet, name: str, **keys: Any) -> tuple[Model, Path]:
    """A model whose program is a link, that can be taken away."""
    link = fleet.plane.folder / f"python-{name}"
    link.write_text(f'#!/bin/sh\nunset LD_PRELOAD\nexec {sys.executable} "$@"\n')
    link.chmod(0o700)
    return fleet.model(name, command=str(link), **keys), link


def test_the_sweep_alone_recovers(fleet: Fleet) -> None:
    """
    Every message of a restart and of its retries is lost: the rows are delivered again by the tick.
    """
    one, program = linked(fleet, "swept", max_restarts=0, max_restart_delay=0.5)
    pid = one.serves()
    hidden = program.with_suffix(".hidden")

    with losing(fleet.plane) as lost:
        program.rename(hidden)
        one.kill()
        one.until(lambda row: row.used >= 3)
        hidden.rename(program)
        one.serves(but=pid)
        assert lost.read_text().count("recovery.restart_instance") >= 3
        assert one.overlaps == [] and one.starts == 2

        one.command("stop")
        one.reaches("stopped")


def test_the_delayed_job_and_its_retries_alone_recover(fleet: Fleet) -> None:
    """
    No clock, so no sweep: the job runs at its time, and tries again itself after starts that failed, under one id.
    """
    one, program = linked(fleet, "job", max_restarts=0, max_restart_delay=0.5)
    pid = one.serves()
    hidden = program.with_suffix(".hidden")

    with without(fleet.plane, "beat"):
        program.rename(hidden)
        one.kill()
        one.until(lambda row: row.used >= 3)
        hidden.rename(program)
        wait_until(one.answers)
        row = one.row
        assert (one.server != pid, one.starts, one.overlaps, row.state.value) == (True, 2, [], "starting")  # nobody looks without a clock

    one.serves()
    results = [fleet.plane.app.AsyncResult(task) for task in tasks(one)]
    assert [result.state for result in results] == ["SUCCESS"]
    assert results[0].result["outcome"] == "started"


def tasks(one: Model) -> list[str]:
    """The Celery tasks of its last incident's steps that were delayed jobs."""
    incident = one.plane.store.incidents(one.id, 1)[0]
    return [step["task"] for step in incident.steps if "task" in step]


def test_fifty_restarts_then_redis_is_wiped_then_kill_9(fleet: Fleet) -> None:
    """
    What the host's disk remembers is enough: nothing is restarted for the wipe, the death is repaired, the count goes on.
    """
    folder = fleet.plane.folder
    program = folder / "fails-fifty-times"
    program.write_text(
        f'#!/bin/sh\ncd {folder}\necho run >>fifty.runs\n[ $(wc -l <fifty.runs) -gt 50 ] || exit 7\ncd -\nexec {sys.executable} "$@"\n'
    )
    program.chmod(0o700)
    one = fleet.model("fifty", command=str(program), max_restarts=0, restart_delay=0, remedies=False)
    wait_until(lambda: one.state == "healthy", within_s=150)
    pid, token = one.pid, one.row.token
    assert one.row.restarts_total == 50

    with fleet.plane.redis.client() as client:
        client.flushall()

    assert one.serves() == pid
    one.kill()
    one.serves(but=pid)
    row = one.row
    assert (row.restarts_total, row.used, one.starts, one.overlaps) == (51, 51, 2, [])
    assert row.token > token


def test_a_wiped_redis_undoes_no_stop_and_grants_no_budget(fleet: Fleet) -> None:
    stopped = fleet.model("wiped-stopped", join=False)
    spent = fleet.model("wiped-spent", max_restarts=1, join=False)
    done = fleet.model("wiped-done", join=False)
    lives = fleet.model("wiped-lives")
    stopped.serves()
    pid = spent.serves()
    kept = lives.serves()
    done.serves()
    stopped.command("stop")
    done.fault(exit=True)
    spent.kill()
    spent.serves(but=pid)
    spent.kill()
    spent.reaches("failed")
    stopped.reaches("stopped")
    done.reaches("completed")

    with fleet.plane.redis.client() as client:
        client.flushall()

    assert lives.serves() == kept
    fleet.plane.ticked(2)
    assert [one.state for one in (stopped, spent, done, lives)] == ["stopped", "failed", "completed", "healthy"]
    assert [one.starts for one in (stopped, spent, done, lives)] == [1, 2, 1, 1]
    assert stopped.row.desired.value == "stopped" and spent.row.used == 1


def test_redis_restarts_while_a_job_waits(fleet: Fleet) -> None:
    """
    A worker that holds a delayed job lives through a restart of Redis, and the restart happens.
    """
    one = fleet.model("redis-away", restart_delay=4, max_restart_delay=4)
    pid = one.serves()
    one.kill()
    one.reaches("restarting")

    fleet.plane.redis.restart()

    one.serves(but=pid)
    assert fleet.plane.alive("host") and fleet.plane.alive("control")
    assert (one.starts, one.row.used, one.overlaps) == (2, 1, [])


@pytest.mark.parametrize("refusal", ["maxmemory", "MISCONF"])
def test_redis_refuses_writes(fleet: Fleet, refusal: str) -> None:
    """
    A named error that says what to do; the servers serve on; what died meanwhile is repaired when Redis takes writes again.
    """
    one = fleet.model(f"refused-{refusal.lower()}", join=False)
    other = fleet.model(f"beside-{refusal.lower()}")
    first, kept = one.serves(), other.serves()
    plane = fleet.plane
    before = len(plane.log_file("host").read_text())

    with refusing(plane, refusal):
        one.kill()
        wait_until(lambda: refusal in plane.log_file("host").read_text()[before:])
        said = plane.run(sys.executable, "-m", "recovery.cli", "stop", other.id)
        assert said.returncode != 0 and "Traceback" not in said.stderr
        assert refusal.lower() in (said.stdout + said.stderr).lower(), said
        assert other.answers()
        assert plane.alive("host") and plane.alive("control")

    one.serves(but=first)
    assert other.serves() == kept
    assert (one.row.used, one.starts, other.starts) == (1, 2, 1)


@contextmanager
def refusing(plane: Plane, how: str) -> Iterator[None]:
    """While this lasts Redis refuses writes: out of memory, or unable to save."""
    trap = plane.folder / "dump.rdb"
    with plane.redis.client() as client:
        try:
            if how == "maxmemory":
                client.config_set("maxmemory", "1")
            else:
                trap.mkdir()
                client.config_set("save", "3600 1000000")
                client.bgsave()
                wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"], "err")
            yield
        finally:
            if how == "maxmemory":
                client.config_set("maxmemory", "0")
            else:
                trap.rmdir()
                client.config_set("save", "")


@pytest.mark.parametrize("part", ["host", "control"])
def test_a_clock_ten_seconds_ahead_loses_no_tick(part: str) -> None:
    """
    Whichever worker's clock runs ahead: what is due is delivered, the death repaired once, the stop done, nothing thrown away.
    """
    with plane(of={part: ahead()}) as made, fleet_of(made) as fleet:
        # The keeper's clock is the host's; the server shall not be slowed by the preloaded library.
        one, _ = linked(fleet, "ahead", restart_delay=1)
        pid = one.serves()
        made.ticked(3)
        one.looked(2)

        one.kill()
        pid = one.serves(but=pid)
        one.kill(signal.SIGSTOP)
        one.serves(but=pid)
        assert (one.row.used, one.starts, one.overlaps) == (2, 3, [])
        one.command("stop")
        one.reaches("stopped")

        beat = made.store.hosts()["loop"]
        assert (beat["wall"] - (made.store.now() - beat["age_s"]) > 5) == (part == "host")
        for name in ("host", "control"):
            assert "revoked" not in made.log_file(name).read_text()


def ahead() -> dict[str, str]:
    """The environment of a process whose clock is 10 s ahead; only waiting goes on by the true one."""
    asked = subprocess.run(["faketime", "-f", "+10s", "sh", "-c", "echo $LD_PRELOAD"], capture_output=True, text=True, check=True)
    return {"LD_PRELOAD": asked.stdout.strip(), "FAKETIME": "+10s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
