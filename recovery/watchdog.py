"""Watches the parts of this machine: what runs without doing its work is started again, and that is said."""

import logging
import threading
import time
from collections.abc import Callable

from recovery.core.watching import Traces, idle_parts
from recovery.errors import StoreUnavailableError
from recovery.ports import Store
from recovery.queues import CONTROL_QUEUE

log = logging.getLogger(__name__)

LOOK_S = 5.0
AGAIN_S = 60.0
"""A part that was started again is given this long to do its work."""


def traces(store: Store, queue: str = CONTROL_QUEUE) -> Traces:
    """What the parts have left behind in Redis, now."""
    return Traces(now=store.now(), tick_at=store.get("tick"), control_waiting=store.queue_depths([queue])[queue], hosts=store.known_hosts())


class Watchdog:
    """One thread. `recycle` ends a part that its manager then starts again; a part it does not manage is only told of."""

    def __init__(
        self, store: Store, host: str, managed: frozenset[str], recycle: Callable[[str], None], say: Callable[[str], None]
    ) -> None:
        self._store, self._host, self._managed, self._recycle, self._say = store, host, managed, recycle, say
        self._done: dict[str, float] = {}
        self._began = time.monotonic()

    def run(self, ending: threading.Event) -> None:
        """Look every 5 s until told to end."""
        while not ending.wait(LOOK_S):
            try:
                self.look()
            except StoreUnavailableError as error:
                log.debug("the watchdog sees nothing: %s", error)
            except Exception:
                log.exception("the watchdog could not look")

    def spare(self, part: str) -> None:
        """This part is being restarted: give it its time."""
        self._done[part] = time.monotonic()

    def look(self) -> tuple[str, ...]:
        """Start again what does not do its work; return the names."""
        acted = []
        for part, why in idle_parts(traces(self._store), self._host).items():
            now = time.monotonic()
            if part not in self._managed or now - self._done.get(part, self._began - AGAIN_S / 2) < AGAIN_S:
                continue
            self._done[part] = now
            self._say(f"{part} runs but does not do its work ({why}); starting it again")
            self._recycle(part)
            acted.append(part)
        return tuple(acted)
