"""
Whether one part does its work: what the health checks of containers and units ask.

    python -m recovery.health PART        (or `recovery health PART`)

Ends with 0, or with 1 and one line that says why not. A check runs every minute beside every part, so it imports only
what its part needs: 0.07 s of CPU for a part that listens, 0.35 s for one that is known by its traces in Redis.
"""

import http.client
import os
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recovery.ports import Store

TIMEOUT_S = 3.0
TICK_FRESH_S = 15.0
"""As `/readyz` of the API has it."""
SERVED_FRESH_S = 30.0
"""A worker notes every 3 s that a task came through its queue; one that is up but deaf does not (CELERY-FACTS.md, section 7)."""
GROWTH_S = 2.5
"""Beat sends a tick every second."""

PORTS = {"api": ("RECOVERY_API_PORT", 8099), "door": ("RECOVERY_FRONT_PORT", 8000), "flower": ("RECOVERY_FLOWER_PORT", 5555)}
PATHS = {"api": "/readyz", "door": "/health", "flower": "/healthcheck"}


def listening(part: str) -> str | None:
    """None when a part that serves HTTP on this machine answers its own health path, else why not."""
    name, default = PORTS[part]
    return answers(part, int(os.environ.get(name) or default))


def answers(part: str, port: int) -> str | None:
    """None when that part answers its own health path on that port of this machine, else why not."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", PATHS[part])
        answer = connection.getresponse()
        body = answer.read(500).decode(errors="replace").strip()
        return None if answer.status == 200 else f"{part} answers {answer.status} on {PATHS[part]}: {body}"
    except (OSError, http.client.HTTPException) as error:
        return f"{part} does not answer on port {port}: {error}"
    finally:
        connection.close()


def host(store: "Store", name: str) -> str | None:
    """None when that GPU host's worker beats and takes tasks from its queue."""
    beat = store.hosts().get(name)
    if beat is None:
        return f"no heartbeat of host {name}: its worker does not run, or cannot reach Redis"
    served_at = float(beat.get("served_at", 0.0))
    if not served_at:
        return f"the worker of host {name} beats but has taken no task yet"
    silent_s = store.now() - served_at
    if silent_s > SERVED_FRESH_S:
        return f"the worker of host {name} beats but has taken no task for {silent_s:.0f} s"
    return None


def control(store: "Store", queue: str = "control") -> str | None:
    """None when ticks are carried out, or when none waits: then it is beat that is missing."""
    if ticks(store) or not store.queue_depths([queue])[queue]:
        return None
    return f"ticks wait in the queue {queue!r} and none is carried out"


def beat(store: "Store", wait: Callable[[float], object], queue: str = "control") -> str | None:
    """None when ticks arrive: carried out by a control worker, or, while there is none, waiting for it."""
    if ticks(store):
        return None
    before = store.queue_depths([queue])[queue]
    wait(GROWTH_S)
    if ticks(store) or store.queue_depths([queue])[queue] > before:
        return None
    return "no tick is sent"


def ticks(store: "Store") -> bool:
    """Whether a tick was carried out a moment ago."""
    at = store.get("tick")
    return at is not None and store.now() - float(at) < TICK_FRESH_S


IN_REDIS = ("host", "control", "beat")
PARTS = (*IN_REDIS, *PORTS)


def problem(part: str) -> str | None:
    """None when the part does its work, else why not; raises `RecoveryError` for settings or a Redis that cannot be used."""
    if part in PORTS:
        return listening(part)
    from recovery import wiring

    wired = wiring.build()
    try:
        match part:
            case "host":
                return host(wired.store, wired.settings.host)
            case "control":
                return control(wired.store)
            case _:
                return beat(wired.store, threading.Event().wait)
    finally:
        wired.store.close()


def main(arguments: list[str]) -> int:
    """Answer for the part named: 0 well, 1 not, 2 no such part."""
    if len(arguments) != 1 or arguments[0] not in PARTS:
        sys.stderr.write(f"usage: python -m recovery.health {'|'.join(PARTS)}\n")
        return 2
    from recovery.errors import RecoveryError

    try:
        why = problem(arguments[0])
    except RecoveryError as error:
        why = str(error)
    sys.stdout.write(f"{why or 'ok'}\n")
    return 0 if why is None else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
