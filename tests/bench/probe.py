"""
What a look at one server costs this side: `python -m tests.bench.probe`, or `probe` in `make bench`.

CPU of the asking process per look (`/health`, `/v1/models`, `/metrics`), with 1 and with 50 looks in flight: ours, httpx through
one shared client, and as the floor the same bytes over a bare blocking socket. All take turns
in one process, against one stand-in server in another that answers at once with 40 kB of metrics.
"""

import asyncio
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import uvloop

from recovery.adapters.http_probe import HttpProber, Target
from tests.bench.frontdoor import free_port
from tests.core.making import memory, row
from tests.helpers import wait_until

PATHS = ("/health", "/v1/models", "/metrics")
IN_FLIGHT = (1, 50)
ROUNDS = 40
LOOKS = 100
"""In each round of each contestant."""
Look = Callable[[], Awaitable[None]]


def everything() -> dict[str, Any]:
    """CPU µs per look by contestant and number in flight."""
    port = free_port()
    server = subprocess.Popen([sys.executable, "-m", "tests.bench.stub", "--port", str(port)], stdin=subprocess.DEVNULL)
    try:
        wait_until(lambda: _listens(port), within_s=60)
        return {"unit": "CPU us per look of three requests", "looks_per_round": LOOKS, "contestants": uvloop.run(_measured(port))}
    finally:
        server.kill()
        server.wait()


async def _measured(port: int) -> dict[str, dict[str, dict[str, float]]]:
    root = f"http://127.0.0.1:{port}"
    prober, instance, target = HttpProber(), row(probe=memory(steps=1.0)), Target(root=root)

    async def ours() -> None:
        look = await prober.look(instance, target)
        if (look.health, look.models, look.steps) != ("ok", "ok", 5.0):
            raise SystemExit(f"not the look that was meant: {look}")

    async def floor() -> None:
        with socket.create_connection(("127.0.0.1", port)) as line:
            for path in PATHS:
                _ask(line, path)

    async with httpx.AsyncClient(trust_env=False, limits=httpx.Limits(max_connections=None, max_keepalive_connections=50)) as shared:

        async def shared_client() -> None:
            for path in PATHS:
                (await shared.get(root + path)).raise_for_status()

        looks: dict[str, Look] = {
            "bare socket": floor,
            "vllm-recovery": ours,
            "httpx": shared_client,
        }
        took: dict[str, dict[int, list[float]]] = {name: {count: [] for count in IN_FLIGHT} for name in looks}
        for _ in range(ROUNDS):
            for name, look in looks.items():
                for count in IN_FLIGHT:
                    took[name][count].append(await _round(look, count))
    return {name: {str(count): _summary(values) for count, values in by_count.items()} for name, by_count in took.items()}


async def _round(look: Look, count: int) -> float:
    began = time.process_time()
    for _ in range(0, LOOKS, count):
        await asyncio.gather(*(look() for _ in range(count)))
    return (time.process_time() - began) / LOOKS * 1e6


def _ask(line: socket.socket, path: str) -> None:
    line.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    answer = line.recv(65536)
    head, _, body = answer.partition(b"\r\n\r\n")
    left = int(head.lower().split(b"content-length: ")[1].split(b"\r")[0]) - len(body)
    while left > 0:
        left -= len(line.recv(65536))


def _summary(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=20)
    return {"n": len(values), "median": round(cuts[9], 1), "p95": round(cuts[18], 1)}


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    sys.stdout.write(json.dumps(everything(), indent=1) + "\n")
