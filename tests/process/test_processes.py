"""The host's processes, with real ones: what dies, what must not, what is known afterwards."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from recovery import keeper, parts
from recovery.adapters import keepers
from recovery.adapters.processes import Processes
from recovery.core.host import ExitRecord, HostRecord, HostView, RunRecord
from recovery.errors import DiskError, LeaseHeldError, SchemaError, SpawnError
from tests import helpers

A = "model-0"
SLEEP = ["sleep", "1000"]


def wait_until(look: Callable[[], Any], expected: Any = True) -> None:
    helpers.wait_until(look, expected, within_s=60)


def alive(pid: int) -> bool:
    proc = keeper.look_up(pid)
    return proc is not None and proc.alive


class Host(Processes):
    """`Processes` with the arguments that these tests do not care about filled in."""

    def up(self, argv: list[str], token: int = 1, instance: str = A, **more: Any) -> RunRecord:
        defaults: dict[str, Any] = {"kill_deadline_s": 30.0, "log_bytes": 1 << 20, "log_files": 4}
        env = more.pop("env", dict(os.environ))
        return self.spawn(instance, token, argv, env, **{**defaults, **more})

    @property
    def spare(self) -> subprocess.Popen[bytes] | None:
        return self._keepers._spare

    def over(self, instance: str = A) -> HostView:
        """The view once the keeper has finished."""
        wait_until(lambda: self.look(instance).keeper_alive or self.look(instance).locked, False)
        return self.look(instance)

    def says(self, text: str, token: int = 1, instance: str = A) -> None:
        """Wait until the server has printed a line with that text."""
        wait_until(lambda: any(text in line for line in self.tail(instance, token, 100)))

    def end_all(self) -> None:
        for instance in self.instances():
            wait_until(lambda i=instance: self._ended(i))
            spec = self.disk.folder(instance) / "spec.json"
            if spec.exists():  # what a killed keeper leaves for the next start to sweep
                keeper.remove_tree(json.loads(spec.read_text())["tmpdir"])

    def _ended(self, instance: str) -> bool:
        view = self.look(instance)
        self.end_strays(instance)
        if view.run is not None:
            self.kill(instance, view.run.token)
        return not (view.strays or view.locked or view.keeper_alive or view.server_alive)


@pytest.fixture
def host(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Host]:
    host = Host(tmp_path / "home")
    if getattr(request, "param", None) == "ahead":
        host.stay_ahead()
    yield host
    host.end_all()
    if host.spare is not None:
        with host.spare as spare:
            spare.communicate(timeout=60)  # it ends with whoever started it


COLD_AND_AHEAD = pytest.mark.parametrize("host", ["cold", "ahead"], indirect=True)
"""With a keeper that is started for the run, and with one that had been waiting."""


# --- how a run ends ----------------------------------------------------------------------------------------------


def test_a_killed_server_leaves_nothing_behind(host: Host) -> None:
    """
    A child in a session of its own, a daemon forked twice, one that also lost its marker, and a plain child.
    """
    family = (
        "setsid sleep 1001 & (setsid sleep 1002 & exec true); (env -i setsid sleep 1003 & exec true); sleep 1004 & echo up; exec sleep 1005"
    )
    run = host.up(["sh", "-c", family])
    host.says("up")
    wait_until(lambda: {proc.name for proc in host.members(A, 1)}, {"sleep"})
    pids = {proc.pid for proc in host.members(A, 1)}
    assert len(pids) == 5 and run.server_pid in pids

    os.kill(run.server_pid, signal.SIGKILL)

    view = host.over()
    assert view.exit is not None and (view.exit.token, view.exit.code, view.exit.signal) == (1, None, 9)
    assert not view.exit.unknown
    assert view.gone is not None and (view.gone.killed, view.gone.left) == (4, ())
    assert [pid for pid in pids if alive(pid)] == []
    assert view.strays == () and not view.locked and not view.server_alive


@pytest.mark.parametrize("code", [0, 3, 137])
def test_the_exit_code_is_the_servers(host: Host, code: int) -> None:
    host.up(["sh", "-c", f"exit {code}"])
    exit_record = host.over().exit
    assert exit_record is not None and (exit_record.code, exit_record.signal, exit_record.unknown) == (code, None, False)


def test_a_server_that_ignores_sigterm_is_killed(host: Host) -> None:
    script = "trap 'echo heard' TERM; echo up; while :; do sleep 0.05; done"
    run = host.up(["sh", "-c", script])
    host.says("up")
    assert host.terminate(A, 1)
    host.says("heard")
    assert alive(run.server_pid) and host.look(A).server_alive

    assert run.server_pid in {proc.pid for proc in host.kill(A, 1)}

    assert (record := host.over().exit) is not None and record.signal == signal.SIGKILL


def test_sigterm_goes_to_that_run_only(host: Host) -> None:
    host.up(SLEEP, token=7)
    assert not host.terminate(A, 6)
    assert host.kill(A, 6) == ()
    assert host.look(A).server_alive
    assert host.terminate(A, 7)
    assert (record := host.over().exit) is not None and record.signal == signal.SIGTERM
    assert not host.terminate(A, 7)


def test_a_frozen_server_is_killed(host: Host) -> None:
    run = host.up(SLEEP)
    os.kill(run.server_pid, signal.SIGSTOP)
    wait_until(lambda: keeper.look_up(run.server_pid).state, "T")
    host.kill(A, 1)
    assert (record := host.over().exit) is not None and record.signal == signal.SIGKILL


def test_a_server_whose_main_thread_has_ended_still_lives(host: Host) -> None:
    """A thread stuck in a driver holds the GPU though /proc calls the process a zombie."""
    script = (
        "import ctypes, threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\nctypes.CDLL(None).pthread_exit(None)\n"
    )
    run = host.up([sys.executable, "-c", script])
    wait_until(lambda: keeper.look_up(run.server_pid).state, "Z")
    view = host.look(A)
    assert view.server_alive and view.exit is None
    assert [proc.pid for proc in host.members(A, 1)] == [run.server_pid]
    host.kill(A, 1)
    assert (record := host.over().exit) is not None and record.signal == signal.SIGKILL


# --- keepers that die, keepers that do not -----------------------------------------------------------------------


@COLD_AND_AHEAD
def test_a_server_outlives_its_keeper_and_is_adopted(host: Host) -> None:
    run = host.up(["sh", "-c", "setsid sleep 1001 & echo up; exec sleep 1000"])
    host.says("up")
    os.kill(run.keeper_pid, signal.SIGKILL)
    wait_until(lambda: host.look(A).keeper_alive, False)
    view = host.look(A)
    assert view.server_alive and not view.locked and view.exit is None and view.ended(9.0) is None
    assert host.keeper_pidfd(A) is None

    adopted = host.adopt(A)

    assert adopted.adopted and adopted.keeper_pid != run.keeper_pid
    assert (adopted.token, adopted.server_pid, adopted.server_start, adopted.at) == (
        1,
        run.server_pid,
        run.server_start,
        pytest.approx(run.at, abs=0.1),
    )
    assert host.look(A).keeper_alive
    with pytest.raises(LeaseHeldError):
        host.adopt(A)
    with pytest.raises(LeaseHeldError):
        host.up(SLEEP, token=2)
    pids = {proc.pid for proc in host.members(A, 1)}
    assert len(pids) == 2

    os.kill(run.server_pid, signal.SIGKILL)

    record = host.over().exit
    assert record is not None and (record.token, record.unknown, record.code, record.signal) == (1, True, None, None)
    assert [pid for pid in pids if alive(pid)] == []


def test_keeper_and_server_killed_is_an_end_nobody_saw(host: Host) -> None:
    """What is left is found by its session (marker lost) and by its marker (session left)."""
    run = host.up(["sh", "-c", "(env -i sleep 1001 &); (setsid sleep 1002 &); echo up; exec sleep 1000"])
    host.says("up")
    wait_until(lambda: sorted(proc.name for proc in host.members(A, 1)), ["sleep"] * 3)
    os.kill(run.keeper_pid, signal.SIGKILL)
    os.kill(run.server_pid, signal.SIGKILL)
    wait_until(lambda: host.look(A).server_alive or host.look(A).keeper_alive, False)

    view = host.look(A)
    assert view.ended(5.0) == ExitRecord(token=1, at=5.0, unknown=True, reason="keeper gone, nobody saw the server end")
    assert len(view.strays) == 2
    with pytest.raises(SpawnError, match="cannot adopt"):
        host.adopt(A)
    assert len(host.end_strays(A)) == 2
    wait_until(lambda: host.look(A).strays, ())
    host.up(SLEEP, token=2)
    assert host.look(A).ended(5.0) is None


@COLD_AND_AHEAD
def test_strays_of_an_older_run_are_told_from_the_live_one(host: Host) -> None:
    """A carrier of an old marker is a stray beside the live run, and ending it does not touch that run."""
    env = {**os.environ, "RECOVERY_RUN": host.disk.marker(A, 1)}
    old = subprocess.Popen(SLEEP, env=env)
    try:
        run = host.up(SLEEP, token=2)
        wait_until(lambda: [proc.pid for proc in host.look(A).strays], [old.pid])
        assert [proc.pid for proc in host.end_strays(A)] == [old.pid]
        assert old.wait() == -signal.SIGKILL
        assert alive(run.server_pid) and host.look(A).strays == ()
    finally:
        old.kill()
        old.wait()


def test_a_keeper_ignores_the_signals_of_a_terminal_and_of_init(host: Host) -> None:
    run = host.up(SLEEP)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        os.kill(run.keeper_pid, number)
    assert host.look(A).server_alive
    os.kill(run.server_pid, signal.SIGKILL)
    assert (record := host.over().exit) is not None and record.signal == signal.SIGKILL  # it was there to see it


def test_a_stopped_keeper_can_be_ended(host: Host) -> None:
    run = host.up(SLEEP)
    os.kill(run.keeper_pid, signal.SIGSTOP)
    os.kill(run.server_pid, signal.SIGKILL)
    wait_until(lambda: host.look(A).server_alive, False)
    assert host.look(A).locked and host.look(A).keeper_alive
    assert not host.end_keeper(A, 2)
    assert host.end_keeper(A, 1)
    assert (record := host.over().ended(5.0)) is not None and record.unknown


def test_keeper_pidfd_fires_when_the_record_is_there(host: Host) -> None:
    import select

    run = host.up(SLEEP)
    fd = host.keeper_pidfd(A)
    assert fd is not None
    try:
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        assert poller.poll(0) == []
        os.kill(run.server_pid, signal.SIGKILL)
        assert poller.poll(60_000)
        view = host.look(A)
        assert view.exit is not None and view.exit.token == 1 and not view.keeper_alive
    finally:
        os.close(fd)


# --- strangers ---------------------------------------------------------------------------------------------------


def test_a_number_used_again_is_nobody_of_ours(host: Host) -> None:
    """A stranger that got the pid, the session and the keeper's number of a dead run is neither seen nor signalled."""
    run = host.up(SLEEP)
    os.kill(run.server_pid, signal.SIGKILL)
    host.over()
    stranger = subprocess.Popen(SLEEP, start_new_session=True)
    try:
        start = keeper.look_up(stranger.pid).start
        forged = run.model_copy(update={"keeper_pid": stranger.pid, "server_pid": stranger.pid, "session": stranger.pid})
        assert forged.server_start != start
        (host.disk.folder(A) / "run.json").write_text(forged.model_dump_json())

        view = host.look(A)
        assert not view.server_alive and not view.keeper_alive and view.strays == ()
        assert not host.terminate(A, 1) and host.kill(A, 1) == () and host.end_strays(A) == ()
        assert not host.end_keeper(A, 1) and host.keeper_pidfd(A) is None
        assert not keeper.send(stranger.pid, start - 1, signal.SIGKILL)
        assert stranger.poll() is None

        # the same with the right start time: now it is the run's, which shows that the guard is what held
        (host.disk.folder(A) / "run.json").write_text(forged.model_copy(update={"server_start": start}).model_dump_json())
        assert host.look(A).server_alive
    finally:
        stranger.kill()
        stranger.wait()


def test_a_run_of_another_boot_is_over(host: Host) -> None:
    run = host.up(SLEEP)
    (host.disk.folder(A) / "run.json").write_text(run.model_copy(update={"boot_id": "another"}).model_dump_json())
    view = host.look(A)
    assert view.rebooted() and not view.server_alive and not view.keeper_alive
    assert (record := view.ended(5.0)) is not None and record.reason == "host rebooted"
    assert not host.terminate(A, 1) and host.keeper_pidfd(A) is None
    (host.disk.folder(A) / "run.json").write_text(run.model_dump_json())


def test_other_instances_and_other_homes_are_left_alone(host: Host, tmp_path: Path) -> None:
    other = Host(tmp_path / "other")
    try:
        mine, beside, elsewhere = host.up(SLEEP), host.up(SLEEP, instance="model-1"), other.up(SLEEP)
        assert host.end_strays(A) == ()
        assert alive(mine.server_pid)
        host.kill(A, 1)
        host.over()
        assert not alive(mine.server_pid) and alive(beside.server_pid) and alive(elsewhere.server_pid)
    finally:
        other.end_all()


# --- starts that fail --------------------------------------------------------------------------------------------


@COLD_AND_AHEAD
def test_a_command_that_does_not_exist_says_so(host: Host) -> None:
    with pytest.raises(SpawnError, match=r"cannot execute no-such-command: No such file.*fleet file"):
        host.up(["no-such-command"], token=5)
    view = host.over()
    assert view.run is None and view.exit is not None and view.exit.token == 5
    assert view.exit.spawn_error == "cannot execute no-such-command: No such file or directory"
    assert not Path(json.loads((host.disk.folder(A) / "spec.json").read_text())["tmpdir"]).exists()


def test_a_command_that_is_not_executable_says_so(host: Host, tmp_path: Path) -> None:
    (tmp_path / "server").write_text("text")
    with pytest.raises(SpawnError, match="Permission denied"):
        host.up([str(tmp_path / "server")])
    host.up(SLEEP, token=2)  # and the next start is not disturbed


def test_a_log_that_cannot_be_opened_starts_nothing(host: Host) -> None:
    host.disk.prepare(A)
    host.log_path(A, 1).mkdir()
    with pytest.raises(DiskError, match=r"cannot write to .*/runs/1\.log: Is a directory"):
        host.up(SLEEP)
    assert host.over().strays == () and host.look(A).run is None


def test_a_full_disk_starts_nothing(host: Host) -> None:
    (host.disk.prepare(A) / ".run.json.tmp").symlink_to("/dev/full")
    with pytest.raises(DiskError, match="No space left on device"):
        host.up(SLEEP)
    assert host.over().strays == () and host.look(A).run is None


def test_a_server_that_cannot_be_recorded_is_ended_again(host: Host) -> None:
    (host.disk.prepare(A) / "run.json").mkdir()
    with pytest.raises(DiskError, match=r"cannot record the run in .*/run\.json"):
        host.up(["sh", "-c", "echo up; setsid sleep 1000 & exec sleep 1000"])
    assert host.over().strays == ()


def test_a_home_that_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    host = Host(tmp_path / "home")
    with pytest.raises(DiskError, match="cannot make"):
        host.up(SLEEP)
    assert host.look(A).record == HostRecord()


def test_a_keeper_that_says_nothing_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "python"
    slow.write_text(f"#!/bin/sh\nsleep 1001 &\necho $$ > {tmp_path}/pid\nexec sleep 1000\n")
    slow.chmod(0o700)
    monkeypatch.setattr(keepers, "ANSWER_S", 3.0)
    host = Host(tmp_path / "home", python=str(slow))
    with pytest.raises(SpawnError, match="did not answer"):
        host.up(SLEEP)
    assert not alive(int((tmp_path / "pid").read_text()))
    wait_until(lambda: host.look(A).strays, ())
    host.end_all()


@COLD_AND_AHEAD
def test_a_working_directory_that_is_missing(host: Host, tmp_path: Path) -> None:
    with pytest.raises(SpawnError, match="missing"):
        host.up(SLEEP, cwd=tmp_path / "missing")


# --- keepers ahead of time ---------------------------------------------------------------------------------------


def ahead(host: Host) -> subprocess.Popen[bytes]:
    host.stay_ahead()
    assert host.spare is not None
    return host.spare


def test_a_keeper_that_waits_is_no_part_of_the_fleet(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else `recovery down --keep-models` would end it with the worker, and the worker's successor would find two of itself."""
    monkeypatch.setenv(parts.MARKER, f"{tmp_path}:host")
    ahead(host)
    host.up(SLEEP)
    assert parts.find(tmp_path) == ()


def test_the_keeper_that_waits_takes_the_next_run_and_is_replaced(host: Host) -> None:
    first = ahead(host)
    run = host.up(SLEEP)
    assert run.keeper_pid == first.pid
    second = host.spare
    assert second is not None and second.pid != first.pid
    assert host.up(SLEEP, instance="other-0").keeper_pid == second.pid
    os.kill(run.server_pid, signal.SIGKILL)
    assert host.over().exit is not None


def test_a_keeper_that_waits_ends_with_whoever_started_it(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from recovery.adapters.processes import Processes\n"
        "host = Processes(Path(sys.argv[1])); host.stay_ahead(); print(host._keepers._spare.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, check=False)
    assert done.returncode == -signal.SIGKILL
    wait_until(lambda: alive(int(done.stdout)), False)


def test_a_start_does_without_the_keeper_that_died_waiting(host: Host) -> None:
    first = ahead(host)
    first.kill()
    wait_until(lambda: alive(first.pid), False)
    assert host.up(SLEEP).keeper_pid != first.pid
    assert host.spare is not None and host.spare.pid != first.pid


def test_a_keeper_that_waits_and_does_not_read_is_given_up(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keepers, "ANSWER_S", 0.2)
    first = ahead(host)
    os.kill(first.pid, signal.SIGSTOP)
    with pytest.raises(SpawnError, match="did not answer"):
        host.up(SLEEP)
    assert not alive(first.pid)
    monkeypatch.undo()
    assert host.up(SLEEP, token=2).token == 2


def test_an_environment_larger_than_a_pipe(host: Host) -> None:
    first = ahead(host)
    run = host.up(["sh", "-c", "echo ${#LARGE}; exec sleep 1000"], env={**os.environ, "LARGE": "x" * keepers.ORDER_BYTES})
    assert run.keeper_pid != first.pid
    host.says(str(keepers.ORDER_BYTES))


# --- what the server is given ------------------------------------------------------------------------------------


@COLD_AND_AHEAD
def test_the_servers_surroundings(host: Host, tmp_path: Path) -> None:
    """Its own environment with the marker, clean signals and descriptors, a session of its own, the wanted directory."""
    script = (
        "env; grep Sig /proc/self/status; ls -l /proc/self/fd; pwd; cut -d' ' -f6 /proc/self/stat; "
        'echo "pid $$"; echo >&2 done; exec sleep 1000'
    )
    leak = os.open("/dev/zero", os.O_RDONLY)
    os.set_inheritable(leak, True)
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        run = host.up(["sh", "-c", script], env={"HF_TOKEN": "secret", "PATH": os.environ["PATH"]}, cwd=tmp_path)
    finally:
        signal.signal(signal.SIGUSR1, before)
        os.close(leak)
    host.says("done")
    lines = host.tail(A, 1, 1000)
    text = "\n".join(lines)
    assert {f"RECOVERY_RUN={run.marker}", "SPT_NOENV=1", "HF_TOKEN=secret", f"TMPDIR={run.tmpdir}"} <= set(lines)
    assert run.marker == f"{host.disk.home}/{A}/1"
    signals = {line[:6]: int(line[8:], 16) for line in lines if line.startswith("Sig")}
    internal = 3 << 31  # glibc's own 32 and 33, which its posix_spawn always leaves ignored
    assert signals["SigIgn"] & ~internal == 0 and signals["SigBlk"] == 0
    assert "/dev/zero" not in text and "run.lock" not in text
    assert str(tmp_path) in lines
    assert f"pid {run.server_pid}" in lines and str(run.server_pid) in lines  # the second is its session
    assert keeper.marker_of(run.server_pid) == run.marker


def test_temporary_files_are_swept(host: Host) -> None:
    """With the keeper there, and, when it was killed, before the next start."""
    script = 'mkdir "$TMPDIR/d"; ln -s /etc "$TMPDIR/d/etc"; echo x > "$TMPDIR/d/f"; echo up; exec sleep 1000'
    run = host.up(["sh", "-c", script])
    host.says("up")
    assert run.tmpdir is not None and (Path(run.tmpdir) / "d" / "f").exists()
    assert len(run.tmpdir) <= keepers.TMPDIR_LONGEST
    os.kill(run.server_pid, signal.SIGKILL)
    host.over()
    assert not Path(run.tmpdir).exists() and Path("/etc/passwd").exists()

    run = host.up(["sh", "-c", script], token=2)
    host.says("up", token=2)
    os.kill(run.keeper_pid, signal.SIGKILL)
    os.kill(run.server_pid, signal.SIGKILL)
    wait_until(lambda: host.look(A).server_alive or host.look(A).keeper_alive, False)
    host.up(SLEEP, token=3)
    assert run.tmpdir is not None and not Path(run.tmpdir).exists()


def test_shared_memory_of_a_killed_run_is_swept(host: Host) -> None:
    script = (
        "import os, sys, time, subprocess\n"
        "fd = os.open('/dev/shm/psm_recoverytest_%d' % os.getpid(), os.O_RDWR | os.O_CREAT)\n"
        "subprocess.Popen(['sleep', '1000'], pass_fds=[fd], start_new_session=True)\n"
        "print('up', flush=True)\n"
        "time.sleep(1000)\n"
    )
    run = host.up([sys.executable, "-c", script])
    host.says("up")
    ring = Path(f"/dev/shm/psm_recoverytest_{run.server_pid}")
    stranger = Path(f"/dev/shm/psm_recoverytest_stranger_{os.getpid()}")
    stranger.touch()
    try:
        assert ring.exists()
        os.kill(run.server_pid, signal.SIGKILL)
        host.over()
        assert not ring.exists() and stranger.exists()
    finally:
        stranger.unlink()
        ring.unlink(missing_ok=True)


# --- records and locks -------------------------------------------------------------------------------------------


def test_the_host_record_comes_back_as_it_was(host: Host) -> None:
    record = HostRecord(token=1795553060411200, desired="stopped", last_ended=3, starts=(1.5, 2.5), overrides=({"flag": "--x"},))
    host.write_record("org/model..:7b-0", record)
    host.write_record("..", record)
    assert host.read_record("org/model..:7b-0") == record
    assert host.instances() == ("..", "org/model..:7b-0")
    assert sorted(path.parent.name for path in host.disk.home.glob("instances/*/host.json")) == ["%2E.", "org%2Fmodel..%3A7b-0"]
    assert host.read_record("never seen") == HostRecord()


def test_a_damaged_record_starts_nothing(host: Host) -> None:
    host.write_record(A, HostRecord(token=3))
    path = host.disk.folder(A) / "host.json"
    for text in ("", "[1]", '{"token": "x"}'):
        path.write_text(text)
        with pytest.raises(DiskError, match=r"cannot read .*host\.json"):
            host.look(A)
    path.write_text('{"schema": 2, "token": 3}')
    with pytest.raises(SchemaError):
        host.read_record(A)
    path.unlink()


def test_a_record_of_the_keeper_that_makes_no_sense_is_as_good_as_none(host: Host) -> None:
    folder = host.disk.prepare(A)
    for name in ("run.json", "exit.json", "gone.json"):
        (folder / name).write_text('{"schema": 1')
    view = host.look(A)
    assert (view.run, view.exit, view.gone) == (None, None, None)


def test_one_step_at_a_time(host: Host) -> None:
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with host.step_lock(A):
            held.set()
            release.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(60)
        with pytest.raises(LeaseHeldError), host.step_lock(A):
            pass
        with host.step_lock("model-1"):
            pass
    finally:
        release.set()
        thread.join()
    with pytest.raises(ZeroDivisionError), host.step_lock(A):
        raise ZeroDivisionError
    with host.step_lock(A):
        pass


# --- ports and work ----------------------------------------------------------------------------------------------

LISTEN = (
    "import socket, sys, time; s = socket.create_server(('127.0.0.1', 0)); print('port', s.getsockname()[1], flush=True); time.sleep(1000)"
)


def test_who_listens(host: Host) -> None:
    import socket

    run = host.up([sys.executable, "-c", LISTEN])
    host.up(SLEEP, instance="model-1")
    host.says("port")
    port = int(host.tail(A, 1, 1)[0].split()[1])
    assert host.listens(A, port) and not host.listens("model-1", port) and not host.listens("never seen", port)
    holder = host.port_holder(port)
    assert holder is not None and (holder.pid, holder.ours, holder.instance) == (run.server_pid, True, A)

    with socket.create_server(("::1", 0), family=socket.AF_INET6) as own:
        mine = own.getsockname()[1]
        holder = host.port_holder(mine)
        assert holder is not None and (holder.pid, holder.ours) == (os.getpid(), False)
        assert not host.listens(A, mine)
        client = socket.create_connection(("::1", mine))
        served, _ = own.accept()
    with client, served:  # a connection that outlives its listener holds nothing
        assert host.port_holder(mine) is None


def test_the_cpu_time_of_the_whole_tree(host: Host) -> None:
    host.up(["sh", "-c", "sh -c 'while :; do :; done' & exec sleep 1000"])
    wait_until(lambda: host.cpu_seconds(A) > 0.2)
    assert host.cpu_seconds("never seen") == 0
    assert host.disk_free() > 0


# --- logs --------------------------------------------------------------------------------------------------------


def test_logs_are_kept_for_the_last_runs_and_the_protected_one(host: Host) -> None:
    for token in range(1, 7):
        host.up(["sh", "-c", f"echo run {token}"], token=token, keep_logs=3)
        host.over()
        if token == 2:
            host.protect(A, 2)
    assert host.runs(A) == (2, 4, 5, 6)
    assert host.tail(A, 2, 10) == ["run 2"]
    host.protect(A, 4)
    host.up(["true"], token=7, keep_logs=3)
    host.over()
    assert host.runs(A) == (4, 5, 6, 7)


def test_reading_a_log(host: Host) -> None:
    host.up(["sh", "-c", "seq 1 20000"])
    host.over()
    assert host.tail(A, 1, 3) == ["19998", "19999", "20000"]
    assert host.tail(A, 1, 0) == [] and host.tail(A, 99, 5) == []
    assert len(host.tail(A, 1, 100_000)) == 20000
    whole = host.read_log(A, 1, 1 << 20)
    assert whole.splitlines() == [str(n) for n in range(1, 20001)]
    short = host.read_log(A, 1, 1000)
    assert short.startswith("1\n2\n") and short.endswith("19999\n20000\n") and "bytes left out" in short
    assert len(short) < 1100
