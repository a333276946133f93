"""Each part does its work over TLS with the user of its role, and is denied what is not its work."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from recovery import wiring
from recovery.adapters.processes import Processes
from recovery.deploy import access
from recovery.errors import ConfigError, StoreUnavailableError
from recovery.settings import load_settings
from recovery.up import end_directly
from tests.cli.installation import ROOT, free_ports, model
from tests.deploy.tls_redis import TlsRedis
from tests.helpers import wait_until
from workers.app import make_app

PATIENCE_S = 120.0
PARTS = ("host", "control", "beat", "api", "door", "flower")
TOKEN = "test-token"


class World:
    """The parts as processes, each with its own user, and a fleet of one model."""

    def __init__(self, server: TlsRedis) -> None:
        self.server, self.folder = server, server.folder
        self.api, self.front, self.flower, self.metrics, port = free_ports(5)
        served = model(port)
        served["args"] += ["--served-model-name", "a"]
        (self.folder / "fleet.json").write_text(json.dumps({"llmModels": {"a": served}}))
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RECOVERY_", "FMCP_"))}
        self._environ = {
            **kept,
            "RECOVERY_HOST": "here",
            "RECOVERY_FLEET": str(self.folder / "fleet.json"),
            "RECOVERY_API_PORT": str(self.api),
            "RECOVERY_FRONT_PORT": str(self.front),
            "RECOVERY_FLOWER_PORT": str(self.flower),
            "RECOVERY_FRONT_METRICS_PORT": str(self.metrics),
            "RECOVERY_FLOWER_PASSWORD": "secret",
            "FMCP_BEARER_TOKEN": TOKEN,
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.host = Processes(self.folder / "host")

    def environ(self, role: str) -> dict[str, str]:
        """The environment of a part; a home of its own, as on a machine of its own."""
        home = self.folder / role
        return {**self._environ, "REDIS_URL": self.server.url(role), "RECOVERY_HOME": str(home), "RECOVERY_RUN_DIR": str(home / "run")}

    def start(self) -> None:
        """Start every part."""
        for part in PARTS:
            with (self.folder / f"{part}.out").open("wb") as out:
                self.processes[part] = subprocess.Popen(
                    [sys.executable, "-m", "recovery.cli", part],
                    env=self.environ(part),
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )

    def cli(self, *words: str, role: str = "admin") -> subprocess.CompletedProcess[str]:
        """A command with a role's user."""
        command = [sys.executable, "-m", "recovery.cli", *words]
        return subprocess.run(command, env=self.environ(role), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)

    def ok(self, *words: str, role: str = "admin") -> str:
        """What a command says that must succeed."""
        done = self.cli(*words, role=role)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def pid(self) -> int | None:
        """The server's pid, once it serves."""
        states = json.loads(self.ok("status", "--json"))["models"][0]["instances"]
        view = self.host.look("a-0")
        serves = [each["state"] for each in states] == ["healthy"]
        return view.run.server_pid if serves and view.run is not None and view.server_alive else None

    def serves(self, but: int | None = None) -> int:
        """Wait until it serves, with another pid than `but`."""
        found = wait_until(self.pid, lambda seen: seen is not None and seen != but, within_s=PATIENCE_S)
        assert found is not None
        return found

    def close(self) -> None:
        """End everything, by pid."""
        for process in self.processes.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    if "RECOVERY_RUN" not in child.environ():
                        child.kill()
            process.kill()
            process.wait(PATIENCE_S)
        end_directly(self.folder / "host", lambda _text: None, grace_s=0.0)


@pytest.fixture(scope="module")
def server() -> Iterator[TlsRedis]:
    """A Redis for this file."""
    with TlsRedis() as made:
        yield made
    shutil.rmtree(made.folder, ignore_errors=True)


def ask(url: str, method: str = "GET", body: Any = None, **headers: str) -> Any:
    """The JSON that a URL answers."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json", **headers}, method=method)
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        text = answer.read()
        return json.loads(text) if text.startswith((b"{", b"[")) else text


def test_each_part_does_its_work_with_its_user(server: TlsRedis) -> None:
    """
    A model comes up, heals after kill -9, is steered by API, Flower and command line, and serves; Redis denied nothing.
    """
    world = World(server)
    try:
        world.start()
        pid = world.serves()
        for part in PARTS:
            wait_until(lambda part=part: world.cli("health", part, role=part), lambda seen: seen.returncode == 0, within_s=PATIENCE_S)

        os.kill(pid, signal.SIGKILL)
        pid = world.serves(but=pid)

        api, auth = f"http://127.0.0.1:{world.api}", {"authorization": f"Bearer {TOKEN}"}
        assert ask(f"{api}/api/session", "POST", **auth)["role"] == "admin"
        assert ask(f"{api}/api/llm/models", **auth)["total"] == 1
        wait_until(lambda: ask(f"{api}/api/llm/models/a/logs?lines=5", **auth)["returned_lines"], within_s=PATIENCE_S)
        assert ask(f"{api}/api/llm/models/a/events", **auth)
        assert b"fluidmcp_server_status" in ask(f"{api}/metrics", **auth)
        assert "restarted successfully" in ask(f"{api}/api/llm/models/a/restart?override=true", "POST", **auth)["message"]
        pid = world.serves(but=pid)

        said = ask(f"http://127.0.0.1:{world.front}/v1/completions", "POST", {"model": "a", "prompt": "x", "max_tokens": 2})
        assert said["choices"]

        flower, basic = f"http://127.0.0.1:{world.flower}", {"authorization": "Basic cmVjb3Zlcnk6c2VjcmV0"}
        wait_until(lambda: set(ask(f"{flower}/api/workers?refresh=1", **basic)), {"gpu@here", "control@here"}, within_s=PATIENCE_S)
        assert ask(f"{flower}/api/queues/length", **basic)
        sent = ask(f"{flower}/api/task/async-apply/recovery.restart", "POST", {"args": ["a"]}, **basic)["task-id"]
        wait_until(lambda: ask(f"{flower}/api/task/result/{sent}", **basic)["state"], "SUCCESS", within_s=PATIENCE_S)
        pid = world.serves(but=pid)

        assert "restart" in world.ok("events", "a")
        world.ok("logs", "a-0")
        world.ok("stop", "a", "--wait")
        world.ok("start", "a", "--wait")
        assert server.client("admin").bgsave()
        assert denials(server) == []
    except BaseException:
        print(denials(server), *(f"{part}: {(world.folder / f'{part}.out').read_text()[-1500:]}" for part in PARTS), sep="\n")
        raise
    finally:
        world.close()


def denials(server: TlsRedis) -> list[tuple[str, str, str]]:
    """Who was denied what."""
    log: Any = server.client("admin").execute_command("ACL LOG", 100)
    pairs = (dict(zip(each[::2], each[1::2], strict=True)) if isinstance(each, list) else each for each in log)
    return [tuple(_text(each.get(key, each.get(key.encode()))) for key in ("username", "reason", "object")) for each in pairs]  # type: ignore[misc]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


ROW = "recovery:row:a-0"
DENIED = {
    "beat": ["GET recovery:value:brake", f"HGETALL {ROW}", f"DEL {ROW}", "LPUSH gpu.here x", "RPOP control", "EVAL return(1) 0"],
    "control": ["FLUSHALL", "CONFIG GET *", "KEYS *", "SHUTDOWN NOSAVE", "ACL LIST", "SET other x", "CLIENT KILL ID 1", "SLOWLOG RESET"],
    "host": ["FLUSHDB", "CONFIG SET maxmemory 1", "KEYS *", "MONITOR", "ACL SETUSER host", "GET other", "REPLICAOF NO ONE"],
    "api": [
        f"HSET {ROW} state failed",
        f"DEL {ROW}",
        "ZADD recovery:due:here 1 a-0",
        "SMEMBERS other",
        "FLUSHALL",
        "KEYS *",
        "RPOP gpu.here",
    ],
    "door": [
        f"HSET {ROW} state failed",
        "LPUSH gpu.here x",
        "GET celery-task-meta-1",
        "ZADD recovery:due:here 1 a-0",
        "FLUSHALL",
        "KEYS *",
    ],
    "flower": [f"HGETALL {ROW}", "GET recovery:value:tick", "SMEMBERS recovery:rows", "FLUSHALL", "CONFIG GET *", "KEYS *"],
    "admin": ["FLUSHALL", "SHUTDOWN NOSAVE", "CONFIG SET dir /tmp", "ACL SETUSER x", "MODULE LIST", "REPLICAOF NO ONE"],
}


@pytest.mark.parametrize(("role", "command"), [(role, command) for role, commands in DENIED.items() for command in commands])
def test_a_part_is_denied_what_is_not_its_work(server: TlsRedis, role: str, command: str) -> None:
    with pytest.raises(redis.exceptions.NoPermissionError), server.client(role) as client:
        client.execute_command(*command.split(" "))


def test_nobody_without_a_password_a_known_authority_or_tls_gets_in(server: TlsRedis, tmp_path: Path) -> None:
    def looked(url: str) -> str:
        wired = wiring.build(load_settings({"REDIS_URL": url, "RECOVERY_HOME": str(tmp_path)}))
        try:
            with pytest.raises(StoreUnavailableError) as told:
                wired.store.now()
            return str(told.value)
        finally:
            wired.store.close()

    assert "user and password" in looked(server.url("beat", password="wrong"))
    assert "user and password" in looked(server.url("default", password="x"))
    assert "certificate" in looked(server.url("beat").split("?")[0]).lower()
    assert "cannot reach" in looked(server.url("beat").replace("rediss://", "redis://").split("?")[0])


def test_rules_can_be_printed_again_and_hold_no_password(tmp_path: Path) -> None:
    """
    The file of passwords is made with mode 0600 and kept; a role that it lacks is added; what is not a role is refused.
    """
    file = tmp_path / "passwords"
    first = access.passwords(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert access.passwords(file) == first
    text = access.rules(first, "mine")
    assert not [password for password in first.values() if password in text]
    assert "@" not in text.replace("+@", "").replace("-@", "") and "~mine:*" in text
    file.write_text("beat=known\n")
    assert access.passwords(file)["beat"] == "known" and set(access.passwords(file)) == set(access.ROLES)
    file.write_text("root=x\n")
    with pytest.raises(ConfigError, match="root"):
        access.passwords(file)


def test_the_warning_of_insecure_ssl_is_of_the_masked_address_only(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """
    A worker that is asked for its configuration logs it; nothing is connected to, and the connections do check the certificate.
    """
    monkeypatch.setenv("REDIS_URL", "rediss://host:geheim@127.0.0.1:6380/0?ssl_ca_certs=/etc/ca.crt")
    app = make_app()
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))

    shown = app.conf.table(censored=True)

    assert "defaulting to insecure SSL behaviour" in caplog.text
    assert "geheim" not in shown["broker_url"] and "geheim" not in caplog.text
    caplog.clear()
    opened = app.connection_for_write()
    assert opened.ssl == {"ssl_cert_reqs": "required", "ssl_ca_certs": "/etc/ca.crt"}
    assert caplog.text == ""
