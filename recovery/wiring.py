"""The one place where real adapters are made and put together."""

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recovery.adapters.gpu import Nvml
from recovery.adapters.kernel_log import KernelLog
from recovery.adapters.processes import Processes
from recovery.adapters.redis_store import RedisStore
from recovery.adapters.redis_url import RedisUrl
from recovery.adapters.webhook import HttpWebhook
from recovery.core.fleet import Fleet
from recovery.errors import ConfigError
from recovery.host.context import Clocks, HostContext
from recovery.host.repairs import Repairs
from recovery.host.service import HostService
from recovery.ports import Sender
from recovery.service import Service
from recovery.settings import Settings, load_fleet, load_settings

__all__ = ["FleetFile", "Wiring", "build", "host_service", "load_settings", "redis_url", "service"]

SOCKET_NAME = "redis.sock"


@dataclass(frozen=True)
class Wiring:
    """What a part of the fleet needs to do its work."""

    settings: Settings
    url: RedisUrl
    store: RedisStore


def redis_url(settings: Settings) -> RedisUrl:
    """Where Redis is: REDIS_URL, else the embedded one of this RECOVERY_HOME."""
    if settings.redis_url is not None:
        return RedisUrl.parse(settings.redis_url.get_secret_value())
    return RedisUrl.unix(settings.run_dir / SOCKET_NAME)


def build(settings: Settings | None = None) -> Wiring:
    """The wiring of this environment; opens no connection yet."""
    settings = settings or load_settings()
    url = redis_url(settings)
    return Wiring(settings, url, RedisStore(url, settings.key_prefix))


def service(wiring: Wiring, sender: Sender) -> Service:
    """The control side."""
    settings = wiring.settings
    fleet = FleetFile(settings) if settings.fleet is not None else None
    webhook = HttpWebhook(settings.webhook_url.get_secret_value()) if settings.webhook_url is not None else None
    return Service(wiring.store, sender, fleet, webhook)


def host_service(wiring: Wiring, sender: Sender, on_run: Callable[[str], None]) -> HostService:
    """The GPU host's side, with its processes under RECOVERY_HOME."""
    settings, host, kernel = wiring.settings, Processes(wiring.settings.home), KernelLog()
    here = HostContext(
        name=settings.host,
        store=wiring.store,
        sender=sender,
        host=host,
        fleet=FleetFile(settings),
        clocks=Clocks(wall=time.time, chance=random.random),
        operator_env=dict(os.environ),
        repairs=Repairs(host, Nvml(kernel=kernel), kernel, dict(os.environ), settings.home, wiring.store.load_all),
        on_run=on_run,
    )
    return HostService(here)


class FleetFile:
    """
    The fleet of the file, read again when the file changes.

    A file that was broken by an edit leaves the last good fleet in force; `problem` says what is wrong with it.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._seen: tuple[Any, ...] | None = None
        self._fleet: Fleet | None = None
        self.problem: str | None = None

    def __call__(self) -> Fleet:
        """Return the fleet in force; raise `ConfigError` when there has never been a good one."""
        path = self._settings.fleet
        if path is None:
            raise ConfigError("cannot load a fleet: set RECOVERY_FLEET or pass --fleet")
        seen = _stamp(path)
        if self._fleet is None or seen != self._seen:
            try:
                self._fleet, self.problem = load_fleet(path, self._settings.host), None
            except ConfigError as error:
                self.problem = str(error)
                if self._fleet is None:
                    raise
            self._seen = seen
        return self._fleet


def _stamp(path: Path) -> tuple[Any, ...] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return (stat.st_mtime_ns, stat.st_size, stat.st_ino)
