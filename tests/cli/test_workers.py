"""`recovery workers restart`: all parts new, one after another, and nothing happens to the models."""

import os
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from recovery import part_restarts, parts
from recovery.adapters.memory_store import MemoryStore
from recovery.errors import ConflictError
from recovery.part_list import Listed
from recovery.part_restarts import Progress, Restarter
from recovery.parts import Manager, Part, PartRunner
from tests.cli.installation import PARTS, PATIENCE_S, Installation, installation
from tests.helpers import RedisServer, wait_until

SLEEP = (sys.executable, "-c", "import time; time.sleep(1000)")


class Asking(threading.Thread):
    """Somebody who uses the front door all the time; `refused` holds what went wrong."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._url, self._end = f"http://127.0.0.1:{port}/v1/models", threading.Event()
        self.answers, self.refused = 0, list[str]()

    def run(self) -> None:
        while not self._end.wait(0.02):
            try:
                with urllib.request.urlopen(self._url, timeout=30) as answer:
                    self.answers += answer.status == 200
            except OSError as error:
                self.refused.append(str(error))

    def __enter__(self) -> "Asking":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join()


def restarts(one: Installation) -> list[int]:
    return [row.restarts_total for row in one.wired.store.load_all()]


def test_every_part_is_new_and_no_model_has_noticed() -> None:
    """One after another, each after the one before works again; no connection to the front door is refused meanwhile."""
    with installation("a", "b") as one:
        one.up()
        old, redis = one.part_pids(), one.redis_pid()
        servers = {name: one.serves(name) for name in one.models}

        with Asking(one.front) as asking:
            wait_until(lambda: asking.answers > 0, within_s=PATIENCE_S)
            said = one.ok("workers", "restart").splitlines()

        assert [line.split()[1] for line in said[:-1]] == [name for name in part_restarts.ORDER if name in old]
        assert said[-1] == "all parts are new; the models were not touched"
        wait_until(lambda: set(one.part_pids().values()) & set(old.values()), set(), within_s=PATIENCE_S)  # the old door finishes its work
        assert set(one.part_pids()) == set(old) >= PARTS
        assert (one.servers(), restarts(one), one.redis_pid()) == (servers, [0, 0], redis)
        assert asking.refused == []

        only = one.part_pids()
        one.ok("workers", "restart", "control")
        assert {name for name, pid in one.part_pids().items() if pid != only[name]} == {"control"}
        refused = one.run("workers", "restart", "contrl")
        assert (refused.returncode, "no contrl here" in refused.stderr) == (1, True), refused.stderr
        assert one.run("down").returncode == 0
        one.nothing_left()
        gone = one.run("workers", "restart")
        assert (gone.returncode, "no `recovery up`" in gone.stderr) == (1, True), gone.stderr


def test_a_host_by_itself_restarts_its_worker(own_redis: RedisServer) -> None:
    """The part manager of `recovery host` knows the command too."""
    with installation("a", REDIS_URL=f"unix://{own_redis.socket}") as one:
        for name in ("control", "beat", "host"):
            one.begin(name)
        server = one.serves("a")
        old = one.part_pids()

        assert one.ok("workers", "restart").splitlines()[0] == "1/1  host does its work again"

        assert {name for name, pid in one.part_pids().items() if pid != old[name]} == {"host"}
        assert (one.server("a"), restarts(one)) == (server, [0])


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(lambda _text: None)
    yield manager
    manager.stop(within_s=0.0)
    parts.end([found.process for found in parts.find(tmp_path)], 0.0)


def _restarter(home: Path, manager: Manager, **ready: bool) -> Restarter:
    listed = [Listed(Part(name, SLEEP), lambda well=well: well) for name, well in ready.items()]
    manager.start(PartRunner(each.part, home, dict(os.environ), home / "log") for each in listed)
    wait_until(lambda: None in manager.pids().values(), False, within_s=PATIENCE_S)
    return Restarter(home, listed, manager, MemoryStore(), "here", say=lambda _text: None, within_s=3.0)


def test_it_stops_at_the_first_that_does_not_come_back(manager: Manager, tmp_path: Path) -> None:
    restarter = _restarter(tmp_path, manager, one=True, two=False, three=True)
    old = manager.pids()

    told = restarter.restart("id", (), threading.Event())

    assert (told.state, told.done, told.current) == ("failed", ("one",), "two")
    assert told.reason.startswith("two has not come back within 3 s") and told.reason.endswith("left as they are: three")
    assert part_restarts.progress(tmp_path) == told
    assert {name for name, pid in manager.pids().items() if pid != old[name]} == {"one", "two"}


def test_what_is_asked_for_is_carried_out_and_only_once(manager: Manager, tmp_path: Path) -> None:
    """What was asked of a manager that is gone is forgotten; a second request waits for the first to be taken up."""
    part_restarts.ask(tmp_path, ())
    restarter, ending = _restarter(tmp_path, manager, one=True), threading.Event()
    ident = part_restarts.ask(tmp_path, ("one",))
    with pytest.raises(ConflictError, match="just been asked for"):
        part_restarts.ask(tmp_path, ())
    thread = threading.Thread(target=restarter.run, args=(ending,))
    thread.start()
    try:
        wait_until(
            lambda: part_restarts.progress(tmp_path),
            lambda seen: seen is not None and seen.state != "running",
            within_s=PATIENCE_S,
        )
    finally:
        ending.set()
        thread.join()
    reason = "all do their work again"
    assert part_restarts.progress(tmp_path) == Progress(ident, os.getpid(), ("one",), "done", ("one",), None, reason)
    part_restarts.withdraw(tmp_path, part_restarts.ask(tmp_path, ()))
    assert {path.name for path in tmp_path.iterdir()} == {"log", part_restarts.PROGRESS}
