"""
A thousand streams at once, 20 tokens a second each: every token arrives, and memory stays level.

`FRONTDOOR_STREAM_S` says how long they last (`make soak-frontdoor`: ten minutes).
"""

import os
import sys
import threading
import time

import psutil
import pytest

from tests.bench.load import open_streams
from tests.frontdoor.world import Door, Part, World, free_port
from tests.helpers import wait_until

STREAMS = 1000
SECONDS = float(os.environ.get("FRONTDOOR_STREAM_S", "30"))
RATE = 20
ID_BYTES = 4 * 9 / 8
"""An id that is kept for a continuation, with what an array takes in reserve when it grows."""
WARM_S = min(60.0, SECONDS / 3)
MIB = 2**20


class Memory:
    """The resident memory of a process, looked at every half second for as long as the block lasts."""

    def __init__(self, pid: int) -> None:
        self._process, self._over = psutil.Process(pid), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._looks: list[tuple[float, int]] = []

    def _look(self) -> None:
        began = time.monotonic()
        while not self._over.wait(0.5):
            self._looks.append((time.monotonic() - began, self._process.memory_info().rss))

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def at(self, seconds: float) -> float:
        """MiB at that time, or at the last look before the end."""
        looks = [rss for when, rss in self._looks if when <= seconds]
        return looks[-1] / MIB


@pytest.mark.timeout(180 + 3 * SECONDS)
def test_a_thousand_streams(world: World) -> None:
    """
    What may grow while they last are the ids that a continuation would need, four bytes each; nothing else.
    """
    stubs = []
    for number in range(2):
        stub, port = Part(world.folder / f"stub-{number}.out"), free_port()
        world.parts.append(stub)
        stub.spawn("tests.bench.stub", "--port", str(port), "--rate", str(RATE))
        stubs.append({"instance": f"m-{number}", "model": "m", "host": "127.0.0.1", "port": port})
    door = Door(world.folder)
    world.parts.append(door)
    door.tell([{"name": "m", "replicas": stubs}])
    door.start(access_log=world.folder / "access.log")
    wait_until(lambda: open_streams(door.port, 1, 1).tokens, 1, within_s=60)

    tokens = int(RATE * SECONDS)
    with Memory(door.pid) as memory:
        result = open_streams(door.port, STREAMS, tokens)

    p50, p99 = (result.quantile(result.delays, q) * 1e3 for q in (0.5, 0.99))
    end = result.seconds - 1  # a slow machine takes longer
    marks = sorted({WARM_S, *(mark for mark in (60.0, 300.0) if mark < SECONDS), end})
    told = ", ".join(f"{memory.at(mark):.0f} MiB after {mark:.0f} s" for mark in marks)
    sys.stdout.write(f"{result.tokens} tokens in {result.seconds:.0f} s, delay p50 {p50:.1f} ms, p99 {p99:.1f} ms; {told}\n")
    assert (result.errors, result.requests, result.tokens) == (0, STREAMS, STREAMS * tokens)
    ids = ID_BYTES * STREAMS * tokens / MIB
    assert memory.at(end) - memory.at(WARM_S) < ids + 8, told
    assert memory.at(end) < 128 + ids, told
