"""
`python -m recovery.deploy.flower [--address=ADDRESS]`: Flower as this project runs it, on loopback unless told otherwise.

Flower serves its `/metrics` to anybody, password or not (CELERY-FACTS.md, section 1); here it wants the password too. An
address beyond loopback is refused without a password of one's own.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

from recovery import wiring
from recovery.errors import ConfigError
from recovery.part_list import flower
from recovery.settings import Settings, is_loopback, load_settings

OPTION = "--address="
MAX_TASKS = 5000
"""Flower keeps every task in memory, 100000 by default (CELERY-FACTS.md, section 1)."""


def command(settings: Settings, arguments: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Celery's command line with that address, and what goes into the environment; `ConfigError` where a password is missing."""
    address = next((word.removeprefix(OPTION) for word in arguments if word.startswith(OPTION)), "127.0.0.1")
    if not is_loopback(address) and settings.flower_password is None:
        raise ConfigError(f"cannot open Flower on {address} without a password: set RECOVERY_FLOWER_PASSWORD")
    options = (f"--port={settings.flower_port}", f"{OPTION}{address}", f"--max_tasks={MAX_TASKS}", "--persistent=False")
    return ("celery", "-A", "workers.app", "flower", *options), dict(flower(settings).part.env)


def guard_metrics() -> None:
    """Let Flower's figures, which name every worker and task, be read with the password only."""
    from flower import urls
    from flower.views.monitor import Metrics
    from tornado.web import authenticated

    class GuardedMetrics(Metrics):  # type: ignore[misc]
        @authenticated
        async def get(self) -> None:
            await super().get()

    handlers: list[Any] = urls.handlers
    handlers[:] = [(r"/metrics", GuardedMetrics) if isinstance(each, tuple) and each[0] == "/metrics" else each for each in handlers]


def main() -> int:
    """Serve until SIGTERM; 2 for settings that cannot be used."""
    try:
        settings = load_settings()
        words, environ = command(settings, sys.argv[1:])
        wiring.redis_url(settings)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    os.environ.update(environ)
    guard_metrics()
    sys.argv = list(words)
    from celery.__main__ import main as celery

    celery()
    return 0


if __name__ == "__main__":
    sys.exit(main())
