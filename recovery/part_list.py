"""
The parts an installation is made of. The one place to add another: a name, a command line, and when it counts as ready.
"""

import importlib.util
import os
import secrets
import select
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from recovery.adapters import embedded_redis
from recovery.errors import ConfigError, StoreUnavailableError
from recovery.parts import Part
from recovery.ports import Store
from recovery.queues import host_queue
from recovery.settings import Settings

FLOWER_USER = "recovery"
TICK_FRESH_S = 5.0
LONGEST_DRAIN_S = 75.0
"""The front door gives work in flight 60 s (`DoorSettings.drain_timeout_s`)."""

Ready = Callable[[], bool]


@dataclass(frozen=True)
class Listed:
    """A part with what the outside is told of it. `port` is where it listens, `ready` whether it does its work."""

    part: Part
    ready: Ready = field(repr=False)
    ports: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Where it listens: the setting's name, address and port."""
    url: str | None = None


def all_parts(settings: Settings, store: Store) -> tuple[Listed, ...]:
    """Every part of `recovery up` except Redis, in the order in which they are shown."""
    made = (host(settings, store), control(settings, store), beat(settings, store), api(settings), door(settings), flower(settings))
    return tuple(each for each in made if _exists(each.part))


def host(settings: Settings, store: Store) -> Listed:
    """The worker of this GPU host."""
    queue, node, began = host_queue(settings.host), f"gpu@{settings.host}", time.time()
    return Listed(Part("host", _worker(queue, node, threads=8), single=True), lambda: _beats(store, settings.host, began))


def control(settings: Settings, store: Store) -> Listed:
    """The worker that delivers what is due and takes commands."""
    return Listed(Part("control", _worker("control", f"control@{settings.host}", threads=4)), lambda: _ticks(store))


def beat(settings: Settings, store: Store) -> Listed:
    """The clock."""
    return Listed(Part("beat", _celery("beat", "-s", str(settings.home / "beat"))), lambda: _ticks(store))


def api(settings: Settings) -> Listed:
    """The management API and the status page."""
    where = (settings.api_host, settings.api_port)
    return Listed(
        Part("api", (sys.executable, "-m", "recovery.api")),
        lambda: listens(*where),
        {"RECOVERY_API_PORT": where},
        f"http://{_shown(settings.api_host)}:{settings.api_port}",
    )


def door(settings: Settings) -> Listed:
    """The front door, which serves `/v1`."""
    where = (settings.front_host, settings.front_port)
    return Listed(
        Part("door", (sys.executable, "-m", "recovery.door"), stop_s=LONGEST_DRAIN_S, hurry=True, hands_over=True),
        lambda: listens(*where),
        {"RECOVERY_FRONT_PORT": where, "RECOVERY_FRONT_METRICS_PORT": ("127.0.0.1", settings.front_metrics_port)},
        f"http://{_shown(settings.front_host)}:{settings.front_port}/v1",
    )


def flower(settings: Settings) -> Listed:
    """Flower on loopback, its figures too behind a password that no process list shows."""
    where = ("127.0.0.1", settings.flower_port)
    secret = {"FLOWER_BASIC_AUTH": f"{FLOWER_USER}:{flower_password(settings)}"}
    return Listed(
        Part("flower", (sys.executable, "-m", "recovery.deploy.flower"), secret),
        lambda: listens(*where),
        {"RECOVERY_FLOWER_PORT": where},
        f"http://127.0.0.1:{settings.flower_port}",
    )


def flower_password_file(settings: Settings) -> Path:
    """Where the generated password is kept."""
    return settings.home / "flower-password"


def flower_password(settings: Settings) -> str:
    """RECOVERY_FLOWER_PASSWORD, else the one kept under the home with mode 0600, made when there is none."""
    if settings.flower_password is not None:
        given = settings.flower_password.get_secret_value()
        if "," in given or ":" in given:
            raise ConfigError("cannot use RECOVERY_FLOWER_PASSWORD: Flower splits it at commas and colons; choose one without")
        return given
    path = flower_password_file(settings)
    try:
        if not path.exists():
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(fd, "w") as file:
                file.write(secrets.token_urlsafe(24))
        return path.read_text().strip()
    except OSError as error:
        raise ConfigError(f"cannot keep Flower's password in {path}: {error.strerror}; set RECOVERY_FLOWER_PASSWORD") from None


class RedisRunner:
    """The embedded Redis as a part; one that an earlier manager left is adopted, never doubled."""

    name = "redis"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def start(self) -> "RedisChild":
        """Start or adopt it; returns when it answers."""
        return RedisChild(embedded_redis.start(self._settings.home, self._settings.run_dir))


class RedisChild:
    """The embedded Redis that runs."""

    def __init__(self, server: embedded_redis.EmbeddedRedis) -> None:
        self.server, self.pid = server, server.pid

    def wait(self) -> int | None:
        """Block until it has ended; it may not be our child, so nobody knows how."""
        try:
            fd = os.pidfd_open(self.pid)
        except OSError:  # it has ended, or a sandbox that knows no pidfds
            while self.server.alive:
                time.sleep(0.1)
            return None
        try:
            while self.server.alive:  # asked after the open: from here on the descriptor means this very process
                select.select([fd], [], [], 60.0)
        finally:
            os.close(fd)
        return None

    def stop(self, within_s: float | None = None) -> None:
        """End it; it saves everything first."""
        embedded_redis.stop(self.server)


def listens(address: str, port: int) -> bool:
    """Whether something accepts connections there."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
    try:
        with socket.create_connection((reached, port), timeout=0.5):
            return True
    except OSError:
        return False


def _celery(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "celery", "-A", "workers.app", *arguments)


def _worker(queue: str, node: str, threads: int) -> tuple[str, ...]:
    manners = ("-P", "threads", "-c", str(threads), "--without-gossip", "--without-mingle")
    return _celery("worker", "-Q", queue, "-n", node, *manners)


def _exists(part: Part) -> bool:
    """Whether the module of a `python -m` part is installed."""
    return part.argv[1:2] != ("-m",) or importlib.util.find_spec(_main_of(part.argv[2])) is not None


def _main_of(module: str) -> str:
    spec = importlib.util.find_spec(module)
    return f"{module}.__main__" if spec is not None and spec.submodule_search_locations is not None else module


def _beats(store: Store, name: str, since: float) -> bool:
    """Whether a heartbeat has come since then by this machine's clock: an older worker's is still there for a while."""
    try:
        return float(store.hosts().get(name, {}).get("wall", 0.0)) >= since
    except StoreUnavailableError:
        return False


def _ticks(store: Store) -> bool:
    try:
        at = store.get("tick")
        return at is not None and store.now() - float(at) < TICK_FRESH_S
    except StoreUnavailableError:
        return False


def _shown(address: str) -> str:
    """An address to click on: the wildcard stands for this machine."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
    return f"[{shown}]" if ":" in shown else shown
