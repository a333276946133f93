"""The part manager with parts of its own: what dies comes back, what must end ends, nothing is doubled."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from recovery import parts
from recovery.adapters.processes import Processes
from recovery.errors import ConflictError
from recovery.parts import HomeLock, Manager, Part, PartRunner
from recovery.up import end_directly, remembered
from tests.helpers import wait_until

PATIENCE_S = 60.0
SLEEP = (sys.executable, "-c", "import time; print('up', flush=True); time.sleep(1000)")
STUBBORN = (sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(1000)")

Make = Callable[..., PartRunner]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def manager(said: list[str], tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(said.append)
    yield manager
    manager.stop(within_s=0.0)
    parts.end([found.process for found in parts.find(tmp_path)], 0.0)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(name: str, argv: tuple[str, ...] = SLEEP, **more: object) -> PartRunner:
        return PartRunner(Part(name, argv, **more), tmp_path, dict(os.environ), tmp_path / f"{name}.log")  # type: ignore[arg-type]

    return made


def _pid(manager: Manager, name: str, log: Path) -> int:
    """The pid of a part that has begun its work."""
    wait_until(lambda: manager.pids()[name] is not None and log.read_text().endswith("up\n"), within_s=PATIENCE_S)
    pid = manager.pids()[name]
    assert pid is not None
    return pid


def test_a_part_that_dies_comes_back(manager: Manager, make: Make, said: list[str], tmp_path: Path) -> None:
    manager.start([make("one")])
    old = _pid(manager, "one", tmp_path / "one.log")
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: manager.pids()["one"], lambda pid: pid not in (None, old), within_s=PATIENCE_S)
    assert said == [f"one (pid {old}) ended by signal 9; starting it again in 0.2 s"]


def test_a_part_that_cannot_be_started_is_tried_ever_more_seldom(manager: Manager, make: Make, said: list[str]) -> None:
    manager.start([make("one", (sys.executable, "-c", "raise SystemExit(3)")), make("two", ("/nonexistent",))])
    for name, text in (("one", "exit code 3"), ("two", "/nonexistent")):
        wait_until(lambda name=name: len([line for line in said if line.startswith(name)]), lambda seen: seen >= 3, within_s=PATIENCE_S)
        lines = [line for line in said if line.startswith(name)]
        assert all(text in line for line in lines)
        assert [line.rpartition(" in ")[2] for line in lines[:3]] == ["0.2 s", "0.4 s", "0.8 s"]


def test_a_part_that_ignores_sigterm_is_killed(manager: Manager, make: Make, tmp_path: Path) -> None:
    manager.start([make("one", STUBBORN)])
    pid = _pid(manager, "one", tmp_path / "one.log")
    manager.stop(within_s=0.2)
    assert not psutil.pid_exists(pid)
    assert parts.find(tmp_path) == ()


def test_parts_are_found_by_their_marker_and_a_model_is_none(manager: Manager, make: Make, tmp_path: Path) -> None:
    """
    A process of a run that has inherited the marker must survive `down --keep-models`.
    """
    runner = make("one")
    model = PartRunner(Part("one", SLEEP, {"RECOVERY_RUN": "x"}), tmp_path, dict(os.environ), tmp_path / "model.log").start()
    try:
        manager.start([runner])
        pid = _pid(manager, "one", tmp_path / "one.log")
        wait_until(lambda: (tmp_path / "model.log").read_text() == "up\n", within_s=PATIENCE_S)
        assert [(found.part, found.process.pid) for found in parts.find(tmp_path)] == [("one", pid)]
        assert parts.find(tmp_path / "other") == ()
    finally:
        model.stop(0.0)


def test_a_single_part_ends_what_a_killed_manager_left_of_it(make: Make, manager: Manager, tmp_path: Path) -> None:
    """Never two workers of one host: the lock lives as long as the old one."""
    old = make("one", single=True).start()
    wait_until(lambda: (tmp_path / "one.log").read_text(), within_s=PATIENCE_S)
    manager.start([make("one", single=True)])
    old.wait()
    wait_until(
        lambda: [found.process.pid for found in parts.find(tmp_path)], lambda pids: pids == [manager.pids()["one"]], within_s=PATIENCE_S
    )


def test_the_home_has_one_manager(tmp_path: Path) -> None:
    first, second = HomeLock(tmp_path), HomeLock(tmp_path)
    assert second.holder() is None
    first.take("up")
    with pytest.raises(ConflictError, match=rf"`recovery up` \(pid {os.getpid()}\)"):
        second.take("up")
    holder = second.holder()
    assert holder is not None and holder.pid == os.getpid()
    first.release()
    second.take("host")
    second.release()


def test_a_log_is_turned_and_its_writer_goes_on(manager: Manager, make: Make, tmp_path: Path) -> None:
    writer = "import time\nwhile True:\n    print('x' * 999, flush=True)\n    time.sleep(0.001)"
    manager.start([make("one", (sys.executable, "-c", writer))])
    log = tmp_path / "one.log"
    for _ in range(5):
        wait_until(lambda: log.stat().st_size, lambda size: size > 20_000, within_s=PATIENCE_S)
        parts.rotate(tmp_path, max_bytes=10_000, kept=3)
        assert set(log.read_bytes()[:1]) <= {ord("x")}  # no hole of zeros: it appends
    assert sorted(path.name for path in tmp_path.glob("one.log*")) == ["one.log", "one.log.1", "one.log.2", "one.log.3"]


def test_models_end_without_worker_or_redis_and_are_remembered(tmp_path: Path) -> None:
    """
    SIGTERM first, SIGKILL for the one that does not listen; a stopped one takes no SIGTERM either.
    """
    host = Processes(tmp_path)
    bounds = {"kill_deadline_s": 10.0, "log_bytes": 1 << 20, "log_files": 2}
    runs = {name: host.spawn(name, 1, list(argv), dict(os.environ), **bounds) for name, argv in (("a-0", SLEEP), ("b-0", STUBBORN))}  # type: ignore[arg-type]
    for name in runs:
        wait_until(lambda name=name: host.tail(name, 1, 1), ["up"], within_s=PATIENCE_S)
    os.kill(runs["b-0"].server_pid, signal.SIGSTOP)

    assert end_directly(tmp_path, lambda _text: None, grace_s=0.5) == 2

    views = {name: host.look(name) for name in runs}
    assert not any(view.server_alive or view.keeper_alive or view.strays for view in views.values())
    ends = {name: view.exit.signal for name, view in views.items() if view.exit is not None}
    assert ends == {"a-0": signal.SIGTERM, "b-0": signal.SIGKILL}
    assert remembered(tmp_path) == ("a-0", "b-0")
