"""The keeper by itself: what it refuses, how it bounds the log, what it does when it cannot do what it should."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from recovery import keeper
from tests import helpers

SLEEP = ["sleep", "1000"]


def wait_until(look: Callable[[], Any], expected: Any = True) -> None:
    helpers.wait_until(look, expected, within_s=60)


class Place:
    """A directory for one keeper's run, and all that was started in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "run.log"
        self.marker = f"{folder}/1"
        self.started: list[subprocess.Popen[bytes]] = []

    def spec(self, argv: list[str], **more: Any) -> Path:
        """SPECFILE for a server of that command."""
        spec = {"version": 1, "token": 1, "marker": self.marker, "argv": argv, "log": str(self.log)}
        bounds = {"log_bytes": 1 << 20, "log_files": 4, "kill_deadline_s": 30.0}
        path = self.folder / "spec.json"
        path.write_text(json.dumps({**spec, **bounds, **more}))
        return path

    def start(self, spec: Path, script: list[str] | None = None) -> subprocess.Popen[bytes]:
        """A keeper with the marker in its environment, as `Processes` starts it."""
        command = [sys.executable, "-I", "-S", *(script or [keeper.__file__]), str(spec)]
        env = {**os.environ, "RECOVERY_RUN": self.marker, "SPT_NOENV": "1"}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=env)
        self.started.append(process)
        return process

    def up(self, argv: list[str], script: list[str] | None = None, **more: Any) -> tuple[subprocess.Popen[bytes], int]:
        """A keeper whose server runs, and the server's pid."""
        process = self.start(self.spec(argv, **more), script)
        assert answer(process) == {"ok": True}
        return process, self.read("run.json")["server_pid"]

    def read(self, name: str) -> dict[str, Any]:
        """One of the keeper's records."""
        return dict(json.loads((self.folder / name).read_text()))

    def carriers(self) -> list[keeper.Proc]:
        """All living processes of the run, keeper included."""
        return [proc for proc in keeper.process_table().values() if proc.alive and keeper.marker_of(proc.pid) == self.marker]

    def end(self) -> None:
        while living := self.carriers():
            for proc in living:
                keeper.send(proc.pid, proc.start, signal.SIGKILL)
            time.sleep(0.01)
        for process in self.started:
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def answer(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert process.stdout is not None
    return dict(json.loads(process.stdout.readline()))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    place.end()


# --- refusals ----------------------------------------------------------------------------------------------------


def test_a_second_keeper_is_refused(place: Place) -> None:
    first, server = place.up(SLEEP)
    second = place.start(place.folder / "spec.json")
    assert answer(second)["kind"] == "locked"
    assert second.wait(60) == keeper.EXIT_LOCKED == 75
    assert place.read("run.json")["server_pid"] == server and place.read("run.json")["keeper_pid"] == first.pid
    assert sorted(proc.pid for proc in place.carriers()) == sorted([first.pid, server])


def test_of_twenty_keepers_at_once_one_starts_a_server(place: Place) -> None:
    spec = place.spec(["sh", "-c", "echo started; exec sleep 1000"])
    twenty = [place.start(spec) for _ in range(20)]
    answers = [answer(process) for process in twenty]
    assert [said.get("kind") for said in answers].count("locked") == 19 and {"ok": True} in answers
    wait_until(place.log.read_text, "started\n")


def test_a_look_at_the_lock_does_not_turn_a_keeper_away(place: Place) -> None:
    """Somebody who looks whether run.lock is free holds it for a moment."""
    import fcntl

    fd = os.open(place.folder / "run.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_SH)
    locker = subprocess.Popen(["sleep", "0.03"], pass_fds=[fd])  # holds it 30 ms longer than this process
    os.close(fd)
    with locker:
        process = place.start(place.spec(SLEEP))
        assert answer(process) == {"ok": True}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot use the spec"),
        ("[]", "cannot use the spec"),
        ('{"version": 2}', "version 2, this keeper reads 1"),
        ('{"version": 1, "token": 1}', "marker"),
    ],
)
def test_a_spec_it_does_not_understand(place: Place, text: str, said: str) -> None:
    path = place.folder / "spec.json"
    path.write_text(text)
    process = place.start(path)
    assert said in answer(process)["error"]
    assert process.wait(60) == keeper.EXIT_SPEC


def test_a_spec_that_is_not_there(place: Place) -> None:
    process = place.start(place.folder / "missing.json")
    assert "No such file" in answer(process)["error"]


def test_a_command_that_does_not_exist(place: Place) -> None:
    process = place.start(place.spec(["no-such-command"]))
    assert answer(process) == {"error": "cannot execute no-such-command: No such file or directory", "kind": "spawn"}
    assert process.wait(60) == keeper.EXIT_SPAWN
    record = place.read("exit.json")
    assert record["spawn_error"] == "cannot execute no-such-command: No such file or directory"
    assert (record["code"], record["signal"], record["unknown"]) == (None, None, False)
    assert not (place.folder / "run.json").exists()


# --- what it parses ----------------------------------------------------------------------------------------------

TEXTS = ['{"a": [1, -2.5, true, false, null, "\\u00e4\\ud83d\\ude00 \\"x\\""]}', ' {"deep": {"er": [[], {}]}, "big": 1795553060411200}\n']


@pytest.mark.parametrize("text", TEXTS)
def test_its_short_cut_reads_what_json_reads(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert keeper.parse(text) == json.loads(text)
    monkeypatch.setitem(sys.modules, "_json", None)
    assert keeper.parse(text) == json.loads(text)


def test_a_name_with_brackets_does_not_move_the_columns() -> None:
    stat = b"7 (a) R (b) Z) S 5 6 4 0 -1 0 0 0 0 0 30 12 0 0 20 0 3 0 999 0 10 0"
    proc = keeper.Proc(7, stat)
    assert (proc.name, proc.state, proc.ppid, proc.session, proc.cpu_ticks) == ("a) R (b) Z", "S", 5, 4, 42)
    assert (proc.threads, proc.start, proc.rss_pages) == (3, 999, 10)


# --- the log -----------------------------------------------------------------------------------------------------


def test_the_log_is_bounded_and_keeps_head_and_tail(place: Place) -> None:
    """Ten times what is allowed is written, in bursts: the first and the last lines are there, the sum is bounded."""
    script = (
        "import sys, time\n"
        "n = 0\n"
        "for _ in range(40):\n"
        "    for _ in range(1000):\n"
        "        n += 1; print('line', n)\n"
        "    sys.stdout.flush(); time.sleep(0.1)\n"
        "print('last', flush=True)\n"
        "time.sleep(1000)\n"
    )
    place.up([sys.executable, "-c", script], log_bytes=40_000, log_files=3)
    wait_until(lambda: place.log.read_text().endswith("last\n") or "last" in _parts(place)[-1])
    wait_until(lambda: place.log.stat().st_size <= 40_000)
    wait_until(lambda: len(_parts(place)), 2)
    parts = _parts(place)
    assert parts[0].startswith("line 1\nline 2\n")
    assert len(parts[0]) <= 40_000 and len(parts[1]) <= 80_000
    assert "last\n" in parts[1] + place.log.read_text()


def _parts(place: Place) -> list[str]:
    return [place.log.with_name(f"run.log.{part}").read_text() for part in keeper.log_parts(str(place.log))] or [""]


def test_nothing_is_lost_when_a_log_is_cut(place: Place) -> None:
    """Two parts and the live file hold every line while they are enough for it."""
    text = "''.join(f'line {n}\\n' for n in range(9000)) + 'end\\n'"  # in one write: no cut can fall into the middle of it
    script = f"import os, time\nos.write(1, ({text}).encode())\ntime.sleep(1000)\n"
    place.up([sys.executable, "-c", script], log_bytes=50_000, log_files=4)
    wait_until(lambda: "".join(_parts(place)).endswith("end\n"))
    wait_until(lambda: place.log.stat().st_size, 0)
    assert "".join(_parts(place)).splitlines() == [*(f"line {n}" for n in range(9000)), "end"]


def test_a_log_that_cannot_be_rotated_is_cut(place: Place) -> None:
    """No room for the copy: the bound holds all the same, and the server and its keeper live on."""
    place.log.with_name("run.log.1").symlink_to("/dev/full")
    process, server = place.up(["sh", "-c", "seq 1 30000; exec sleep 1000"], log_bytes=10_000)
    wait_until(lambda: place.log.stat().st_size, 0)
    assert process.poll() is None and keeper.look_up(server) is not None


# --- deadlines ---------------------------------------------------------------------------------------------------


def test_a_server_past_its_deadline_is_ended(place: Place) -> None:
    """It may be renewed, and its loss or damage ends nothing."""
    deadline = place.folder / "deadline"
    process, server = place.up(["sh", "-c", "trap '' TERM; setsid sleep 1000 & exec sleep 1000"], deadline_file=str(deadline))
    for text in ("nonsense", str(boottime() + 1000)):
        deadline.write_text(text)
        _let_tick(process.pid)
        assert keeper.look_up(server) is not None and not (place.folder / "exit.json").exists()
    deadline.unlink()
    _let_tick(process.pid)
    assert keeper.look_up(server) is not None

    deadline.write_text(str(boottime() - 1))

    assert process.wait(60) == 0
    assert (place.read("exit.json")["reason"], place.read("exit.json")["signal"]) == ("lease expired", 9)
    assert place.carriers() == []


def boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _let_tick(pid: int) -> None:
    """Wait until the keeper has gone round its loop: each round is a voluntary switch, and more than one is a whole round."""

    def switches() -> int:
        line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("voluntary"))
        return int(line.split()[1])

    before = switches()
    wait_until(lambda: switches() >= before + 2)


# --- when it cannot do what it should ----------------------------------------------------------------------------

POWERLESS = f"import sys; sys.path.insert(0, {str(Path(keeper.__file__).parent)!r}); import keeper; keeper.send = lambda *_: False; "


def test_what_will_not_die_is_named(place: Place) -> None:
    """A keeper whose signals have no effect, as on a process stuck in the kernel, gives up in time and says who is left."""
    script = ["-c", POWERLESS + "sys.exit(keeper.main(sys.argv))"]
    process, server = place.up(["sh", "-c", "setsid sleep 1000 & exec sleep 1000"], script, kill_deadline_s=0.3)
    wait_until(lambda: len([proc for proc in place.carriers() if proc.name == "sleep"]), 2)
    (stray,) = [proc for proc in place.carriers() if proc.name == "sleep" and proc.pid != server]
    os.kill(server, signal.SIGKILL)

    assert process.wait(60) == 0
    assert place.read("exit.json")["signal"] == 9
    gone = place.read("gone.json")
    assert gone["left"] == [{"pid": stray.pid, "start": stray.start, "name": "sleep", "state": "S"}]
    assert gone["killed"] == 0
    assert [proc.pid for proc in place.carriers()] == [stray.pid]
    third = place.start(place.spec(SLEEP, token=2))  # and the lock is free
    assert answer(third) == {"ok": True}


def test_a_disk_that_fills_up_costs_neither_the_exit_code_nor_the_strays(place: Place) -> None:
    """On a file system of 256 KiB that is filled to the last byte while the server runs."""
    disk = place.folder / "disk"
    disk.mkdir()
    place.spec(["sh", "-c", f"setsid sleep 1000 & cat /dev/zero > {disk}/fill; kill -9 $$"], log=str(disk / "run.log"))
    inside = (
        f"mount -t tmpfs -o size=256k tmpfs {disk} && cp {place.folder}/spec.json {disk} && cd {disk} && "
        f"{sys.executable} -I -S {keeper.__file__} spec.json; df --output=avail {disk} >&2; cp {disk}/*.json {place.folder}"
    )
    command = ["unshare", "-m", *([] if os.geteuid() == 0 else ["-r"]), "sh", "-c", inside]
    done = subprocess.run(command, env={**os.environ, "RECOVERY_RUN": place.marker}, capture_output=True, text=True, timeout=120)
    assert done.stdout == '{"ok": true}\n', done.stderr
    assert done.stderr.splitlines()[-1].strip() == "0"
    assert place.read("exit.json")["signal"] == 9
    assert place.read("gone.json")["killed"] >= 1 and place.read("gone.json")["left"] == []
    assert place.carriers() == []


def test_a_disk_that_refuses_every_record_does_not_save_the_strays(place: Place) -> None:
    process, server = place.up(["sh", "-c", "setsid sleep 1000 & exec sleep 1000"])
    wait_until(lambda: len(place.carriers()), 3)
    for name in ("exit.json", "gone.json"):
        (place.folder / name).mkdir()
    os.kill(server, signal.SIGKILL)
    assert process.wait(60) == keeper.EXIT_DISK
    assert place.carriers() == []


def test_without_pidfds_it_works_the_same(place: Place) -> None:
    """As on a kernel before 5.3, or in a sandbox that does not know the call."""
    script = ["-c", POWERLESS.replace("keeper.send = lambda *_: False; ", "del keeper.os.pidfd_open; sys.exit(keeper.main(sys.argv))")]
    process, server = place.up(["sh", "-c", "setsid sleep 1000 & exec sleep 1000"], script)
    wait_until(lambda: len(place.carriers()), 3)
    os.kill(server, signal.SIGKILL)
    assert process.wait(60) == 0
    assert place.read("exit.json")["signal"] == 9 and place.carriers() == []


def test_the_server_gets_none_of_the_callers_descriptors(place: Place) -> None:
    """NVML, for one, opens devices that every child would inherit."""
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    spec = place.spec(["sh", "-c", "ls -l /proc/self/fd; echo done; exec sleep 1000"])
    command = [sys.executable, "-I", "-S", keeper.__file__, str(spec)]
    env = {**os.environ, "RECOVERY_RUN": place.marker}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=env, close_fds=False)
    place.started.append(process)
    os.close(writer)
    assert answer(process) == {"ok": True}
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b""  # the end of the file: nobody holds the other end, neither keeper nor server
    wait_until(lambda: place.log.read_text().endswith("done\n"))
    assert "pipe:" not in place.log.read_text()


def test_an_adopted_server_that_nobody_reaps_has_ended(place: Place) -> None:
    """A container whose first process does not collect its orphans leaves them zombies for ever."""
    server = subprocess.Popen(SLEEP, env={**os.environ, "RECOVERY_RUN": place.marker}, start_new_session=True)
    try:
        proc = keeper.look_up(server.pid)
        assert proc is not None
        process = place.start(place.spec([], mode="adopt", server_pid=server.pid, server_start=proc.start))
        assert answer(process) == {"ok": True}
        os.kill(server.pid, signal.SIGKILL)
        assert process.wait(60) == 0
        assert place.read("exit.json")["unknown"] is True
    finally:
        server.kill()
        server.wait()


def test_orphans_of_a_run_do_not_stay_zombies(place: Place) -> None:
    process, _ = place.up(["sh", "-c", "for i in 1 2 3; do (sleep 0.2 & exec true); done; echo up; exec sleep 1000"])
    wait_until(place.log.read_text, "up\n")
    wait_until(lambda: len([proc for proc in keeper.process_table().values() if proc.ppid == process.pid]), 1)


def test_adopting_what_has_just_ended_records_an_unknown_end(place: Place) -> None:
    """And does not take the stranger who has its number by now for the server."""
    stranger = subprocess.Popen(SLEEP, start_new_session=True)
    try:
        process = place.start(place.spec([], mode="adopt", server_pid=stranger.pid, server_start=1))
        assert answer(process)["kind"] == "gone"
        assert process.wait(60) == 0
        record = place.read("exit.json")
        assert record["unknown"] is True and record["code"] is None and record["signal"] is None
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_an_adopting_keeper_goes_on_bounding_the_log(place: Place) -> None:
    go = place.folder / "go"
    bounds = {"log_bytes": 10_000, "log_files": 3}
    first, server = place.up(["sh", "-c", f"while [ ! -e {go} ]; do sleep 0.05; done; seq 1 30000; exec sleep 1000"], **bounds)
    first.kill()
    first.wait()
    start = place.read("run.json")["server_start"]
    again = place.start(place.spec([], mode="adopt", server_pid=server, server_start=start, **bounds))
    assert answer(again) == {"ok": True}
    assert place.read("run.json")["adopted"] is True
    go.touch()
    wait_until(lambda: _parts(place)[-1].endswith("30000\n"))
    wait_until(lambda: place.log.stat().st_size, 0)
    wait_until(lambda: [len(part) for part in _parts(place)], [10_000, 10_000])
    assert keeper.look_up(server) is not None
