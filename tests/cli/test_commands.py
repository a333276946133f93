"""The commands, as real processes against one installation that runs; exit codes are part of what is promised."""

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from recovery.cli import asking, run
from recovery.cli.exits import Exit
from tests.cli.installation import PATIENCE_S, ROOT, Installation, installation
from tests.helpers import wait_until

Said = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Installation]:
    """Models a and b, both serving when a test begins; it leaves them so."""
    with installation("a", "b") as made:
        yield made.up()


@pytest.fixture(autouse=True)
def both_serve(fleet: Installation) -> None:
    fleet.serves("a")
    fleet.serves("b")


def _says(done: subprocess.CompletedProcess[str], code: Exit, *words: str) -> None:
    """It ended with that code and one clear error, never with a traceback."""
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), f"{done.stdout}\n{done.stderr}"
    assert done.stderr.startswith("error: "), done.stderr
    for word in words:
        assert word in done.stderr


def test_status_shows_every_instance(fleet: Installation) -> None:
    view = json.loads(fleet.ok("status", "--json"))
    assert {model["id"]: (model["state"], model["is_healthy"]) for model in view["models"]} == dict.fromkeys("ab", ("healthy", True))
    table = fleet.ok("status")
    assert "a-0" in table and "b-0" in table
    assert "b-0" not in fleet.ok("status", "a")


def test_restart_waits_until_another_run_serves(fleet: Installation) -> None:
    before = fleet.server("a")
    said = fleet.ok("restart", "a", "--wait")
    assert fleet.server("a") not in (None, before)
    assert said.splitlines()[-1].endswith("a-0 healthy: serving")


def test_what_is_stopped_stays_down_until_it_is_started(fleet: Installation) -> None:
    """
    `stop --force` kills at once and the death is not repaired; a dead model is started, a live one left alone.
    """
    fleet.ok("stop", "a", "--force")
    assert (fleet.state("a"), fleet.server("a")) == ("stopped", None)
    row = fleet.wired.store.load("a-0")
    assert row is not None and row.due is None  # nothing is going to start it

    fleet.ok("start", "a")
    pid = fleet.serves("a")
    fleet.ok("start", "a")
    assert fleet.server("a") == pid


def test_check_and_reset(fleet: Installation) -> None:
    assert fleet.ok("check", "a").startswith("a-0: healthy, answered")
    os.kill(fleet.server("a") or 0, signal.SIGKILL)
    fleet.serves("a", but=fleet.server("a"))
    wait_until(lambda: fleet.wired.store.load("a-0").used, 1, within_s=PATIENCE_S)  # type: ignore[union-attr]
    fleet.ok("reset", "a")
    assert fleet.wired.store.load("a-0").used == 0  # type: ignore[union-attr]

    fleet.ok("stop", "b")
    done = fleet.run("check", "b")
    fleet.ok("start", "b")
    _says(done, Exit.REFUSED, "nothing to look at")


def test_a_death_leaves_an_incident_and_a_history(fleet: Installation) -> None:
    killed = fleet.server("b")
    os.kill(killed or 0, signal.SIGKILL)
    fleet.serves("b", but=killed)
    wait_until(lambda: json.loads(fleet.ok("incidents", "b", "--json"))[0]["outcome"], "recovered", within_s=PATIENCE_S)
    newest = json.loads(fleet.ok("incidents", "b", "--json"))[0]
    assert newest["cause"] == "killed" and newest["id"] in fleet.ok("incidents")
    assert "killed by signal 9" in fleet.ok("incident", newest["id"])
    assert "killed by signal 9" in fleet.ok("events", "b")
    assert fleet.wired.store.events("b", 100)[-1]["text"] in fleet.ok("events", "b", "-n", "1")


def test_logs_of_this_run_and_of_the_one_before(fleet: Installation) -> None:
    fleet.ok("restart", "a", "--wait")
    now, before = fleet.ok("logs", "a"), fleet.ok("logs", "a-0", "--run", "-1")
    assert f"pid={fleet.server('a')})" in now and f"pid={fleet.server('a')})" not in before
    assert len(fleet.ok("logs", "a", "--lines", "3").splitlines()) == 3
    done = fleet.run("logs", "a", "--run", "17")
    _says(done, Exit.REFUSED, "no log of run 17")


def test_logs_follow_into_the_next_run(fleet: Installation) -> None:
    command = [sys.executable, "-m", "recovery.cli", "logs", "b", "-f", "--lines", "1"]
    seen = fleet.folder / "follow.out"
    with seen.open("wb") as out:
        process = subprocess.Popen(command, env=fleet.environ, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        wait_until(lambda: seen.stat().st_size > 0, within_s=PATIENCE_S)
        killed = fleet.server("b")
        os.kill(killed or 0, signal.SIGKILL)
        pid = fleet.serves("b", but=killed)
        wait_until(lambda: f"(APIServer pid={pid})" in seen.read_text() and "--- run" in seen.read_text(), within_s=PATIENCE_S)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == Exit.INTERRUPTED
    finally:
        process.kill()
        process.wait(PATIENCE_S)


def test_an_unknown_model_has_its_own_exit_code(fleet: Installation, monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    for name, value in fleet.environ.items():
        monkeypatch.setenv(name, value)
    asking.wired.cache_clear()
    for command in ("status", "start", "stop", "restart", "check", "reset", "logs", "events", "incidents"):
        assert (command, run([command, "nope"])) == (command, Exit.UNKNOWN_MODEL)
        assert "there are: a, b" in capsys.readouterr().err
    assert run(["incident", "nope"]) == Exit.UNKNOWN_MODEL
    asking.wired.cache_clear()


def test_a_second_up_on_one_home_is_refused(fleet: Installation) -> None:
    assert fleet.process is not None
    parts = fleet.part_pids()
    _says(fleet.run("up", "--fleet", str(fleet.fleet)), Exit.REFUSED, f"pid {fleet.process.pid}", str(fleet.home), "recovery down")
    assert fleet.part_pids() == parts


@pytest.mark.parametrize("part", ["control", "host"])
def test_a_part_that_dies_comes_back(fleet: Installation, part: str) -> None:
    """The models do not notice."""
    servers, old = fleet.servers(), fleet.part_pids()[part]
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: fleet.part_pids().get(part), lambda pid: pid not in (None, old), within_s=PATIENCE_S)
    fleet.ok("check", "a")
    assert fleet.servers() == servers
    assert f"{part} (pid {old}) ended by signal 9" in fleet.said


def test_flower_stands_behind_a_password_that_no_process_list_shows(fleet: Installation) -> None:
    """
    Its figures, which name every worker and task, stand behind it too; Flower's own would be open to anybody.
    """
    file = fleet.home / "flower-password"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    password = file.read_text()
    assert not any(password in word for word in fleet.parts()["flower"].cmdline())
    with httpx.Client(trust_env=False, timeout=PATIENCE_S) as client:
        for path in ("/", "/api/workers", "/metrics"):
            url = f"http://127.0.0.1:{fleet.flower}{path}"
            assert client.get(url).status_code == 401, path
            assert client.get(url, auth=("recovery", password)).status_code == 200, path


def test_a_control_worker_that_does_not_answer_is_a_timeout(fleet: Installation) -> None:
    control = fleet.parts()["control"]
    control.suspend()
    try:
        _says(fleet.run("reset", "a"), Exit.TIMED_OUT, "control worker")
    finally:
        control.resume()
    fleet.ok("check", "a")  # and it has caught up


def test_a_host_that_is_away_is_said_so(fleet: Installation) -> None:
    """
    A command for it is noted; its log is what it left in Redis.
    """
    host = fleet.parts()["host"]
    host.suspend()
    try:
        wait_until(fleet.wired.store.hosts, {}, within_s=PATIENCE_S)
        assert "host away" in fleet.ok("status")
        _says(fleet.run("restart", "a", "--wait"), Exit.AWAY, "here", "carried out when it is back")
        fleet.wired.store.put("logtail:a-0", {"lines": ["one\n", "two\n"], "run": 1, "runs": [1], "at": 0.0}, 60.0)
        assert fleet.ok("logs", "a", "-n", "1") == "two\n"
    finally:
        host.resume()
    fleet.serves("a")


def test_redis_frozen_is_an_error_and_never_a_hang(fleet: Installation) -> None:
    redis = fleet.redis_pid()
    assert redis is not None
    os.kill(redis, signal.SIGSTOP)
    try:
        for command in (["status"], ["restart", "a"]):
            _says(fleet.run(*command), Exit.AWAY, "does not answer")
    finally:
        os.kill(redis, signal.SIGCONT)


def test_redis_killed_comes_back_with_everything(fleet: Installation) -> None:
    servers, redis = fleet.servers(), fleet.redis_pid()
    os.kill(redis or 0, signal.SIGKILL)
    wait_until(fleet.redis_pid, lambda pid: pid not in (None, redis), within_s=PATIENCE_S)
    wait_until(lambda: fleet.run("check", "a").returncode, Exit.OK, within_s=PATIENCE_S)
    assert fleet.servers() == servers
