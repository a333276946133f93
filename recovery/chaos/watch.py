"""Whether all is well, asked from outside, and how large the parts are."""

import contextlib
import http.client
import json
import threading
import time
from dataclasses import dataclass, field

import psutil

from recovery.chaos.world import World
from recovery.core.states import State

LOOK_S = 0.2
SAMPLE_S = 2.0
ANSWER_S = 3.0
TICK_FRESH_S, HEARTBEAT_FRESH_S = 4.0, 9.0


@dataclass(frozen=True)
class Well:
    """A moment at which all was well. Everything was looked at after `at`; the loop's own signs of life are as old as they say."""

    at: float
    tick: float
    served: float


@dataclass
class Size:
    """What a part was seen to use: the largest, and every sample of its memory (seconds since the start, bytes)."""

    descriptors: int = 0
    memory: list[tuple[float, int]] = field(default_factory=list)

    def add(self, at: float, memory: int, descriptors: int = 0) -> None:
        self.descriptors = max(self.descriptors, descriptors)
        self.memory.append((at, memory))

    def levels_off(self, slack: int) -> bool:
        """Whether the last quarter is not much above the second one. The first one, in which everything fills up, does not count."""
        quarter = len(self.memory) // 4
        if quarter < 8:
            return True  # too short to tell
        middle = sorted(memory for _, memory in self.memory[quarter : 2 * quarter])
        last = sorted(memory for _, memory in self.memory[-quarter:])
        return last[len(last) // 2] <= middle[len(middle) // 2] * 1.25 + slack


class Watch:
    """Looks at the world in threads of its own until `stop`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._last: Well | None = None
        self.why_not = "not looked yet"
        self.sizes: dict[str, Size] = {}
        self._began = time.time()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._look_forever, self._sample_forever)]

    def start(self) -> None:
        """Begin to look."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop looking."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def last(self) -> Well | None:
        """The last moment at which all was well."""
        with self._lock:
            return self._last

    def _look_forever(self) -> None:
        while not self._stop.wait(LOOK_S):
            began = time.time()
            try:
                self.why_not, tick, served = self._why_not()
            except Exception as error:  # the world is broken on purpose
                self.why_not = f"{type(error).__name__}: {error}"
                continue
            if not self.why_not:
                with self._lock:
                    self._last = Well(began, tick, served)

    def _why_not(self) -> tuple[str, float, float]:
        world = self._world
        down = [name for name, pid in world.manager.pids().items() if pid is None]
        if down:
            return f"{', '.join(down)} down", 0, 0
        now, tick = world.store.now(), float(world.store.get("tick") or 0)
        heartbeat = world.store.hosts().get(world.settings.host, {})
        served = float(heartbeat.get("served_at", 0))
        if now - tick > TICK_FRESH_S:
            return "no tick", 0, 0
        if now - served > HEARTBEAT_FRESH_S:
            return "the host worker takes no tasks", 0, 0
        rows = {row.id: row for row in world.store.load_all()}
        for name in world.wanted():
            row = rows.get(name)
            if row is None or row.state is not State.HEALTHY or row.intent is not None:
                return f"{name} is {row.state.value if row else 'unknown'}: {row.reason if row else ''}", 0, 0
            if row.placement.port is None or not answers(row.placement.port):
                return f"{name} does not answer", 0, 0
        return "", tick, served

    def _sample_forever(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            at = time.time() - self._began
            for name, pid in self._world.part_pids().items():
                with contextlib.suppress(psutil.Error):
                    process = psutil.Process(pid)
                    self.sizes.setdefault(name, Size()).add(at, process.memory_info().rss, process.num_fds())
            with contextlib.suppress(Exception):
                self.sizes.setdefault("redis used_memory", Size()).add(at, int(self._world.store.info()["used_memory"]))


def answers(port: int) -> bool:
    """Whether that server completes one token."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
    try:
        body = json.dumps({"prompt": "x", "max_tokens": 1})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
