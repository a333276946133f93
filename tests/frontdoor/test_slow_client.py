"""A client that reads slowly slows its replica down, and costs the door no memory."""

import json
import socket

import psutil

from tests.frontdoor.raw import Wire, post
from tests.frontdoor.world import World, expected_text
from tests.helpers import wait_until

TOKENS = 30_000
BODY = json.dumps({"model": "m", "prompt": "Hello", "max_tokens": TOKENS, "stream": True, "user": "u" * 20}).encode()


def test_nothing_piles_up_for_a_client_that_does_not_read(world: World) -> None:
    sims = world.sims(1, "--tokens-per-s", "0", "--max-model-len", "50000")
    door = world.door(sims)
    memory = psutil.Process(door.pid).memory_info
    before = memory().rss
    wires = [Wire(door.port) for _ in range(4)]
    try:
        for wire in wires:
            wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            wire.send(post("/v1/completions", BODY))
        events = "recovery_frontdoor_stream_events_total"
        last, same = -1.0, 0

        def stands_still() -> bool:
            nonlocal last, same
            now = door.metric(events)
            same, last = (same + 1 if now == last and now > 0 else 0), now
            return same >= 10

        wait_until(stands_still, within_s=60)
        assert memory().rss - before < 24 * 2**20
        wires[0].sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
        body = wires[0].rest(b"0\r\n\r\n")
        events_of = (json.loads(part.partition(b"\n\n")[0]) for part in body.split(b"data: ")[1:] if part.startswith(b"{"))
        assert "".join(choice["text"] for event in events_of for choice in event["choices"]) == expected_text("Hello", TOKENS)
    finally:
        for wire in wires:
            wire.sock.close()


def test_a_client_that_never_reads_again_is_cut_off(world: World) -> None:
    sims = world.sims(1, "--tokens-per-s", "0", "--max-model-len", "50000")
    door = world.door(sims, stalled_client_s=1.0)
    with Wire(door.port) as wire:
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.send(post("/v1/completions", BODY))
        wait_until(lambda: door.metric("recovery_frontdoor_client_gone_total"), 1.0, within_s=60)
    wait_until(lambda: door.metric("recovery_frontdoor_connections"), 0.0, within_s=30)
