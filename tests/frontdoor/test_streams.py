"""
A thousand streams at once: every token arrives, and memory stays level.

`FRONTDOOR_STREAM_S` makes each wave longer (600 for the long run); `FRONTDOOR_WAVES` says how many.
"""

import os
import sys

import psutil

from tests.bench.load import open_streams
from tests.frontdoor.world import Door, Part, World, free_port
from tests.helpers import wait_until

STREAMS = 1000
SECONDS = float(os.environ.get("FRONTDOOR_STREAM_S", "6"))
WAVES = int(os.environ.get("FRONTDOOR_WAVES", "2"))
RATE = 20


def test_a_thousand_streams(world: World) -> None:
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

    tokens, memory = int(RATE * SECONDS), []
    for _ in range(WAVES):
        result = open_streams(door.port, STREAMS, tokens)
        assert (result.errors, result.requests, result.tokens) == (0, STREAMS, STREAMS * tokens)
        memory.append(psutil.Process(door.pid).memory_info().rss / 2**20)
    sys.stdout.write(
        f"delay p50 {result.quantile(result.delays, 0.5) * 1e3:.1f} ms, p99 {result.quantile(result.delays, 0.99) * 1e3:.1f} ms\n"
    )
    assert memory[-1] - memory[0] < 16, memory  # MiB
    assert memory[-1] < 256, memory
