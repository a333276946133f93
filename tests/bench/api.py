"""
What the management API costs: `python -m tests.bench.api [--json FILE] [--seconds S]`.

Requests per second and p99 of `GET /api/llm/models` at 10, 100 and 1000 instances (eight connections, kept alive), the
time of a scrape, and the weight of the status page. The API is a process of its own on a Redis of its own; rows change
as often as a fleet of that size looks at its servers (every 30 s). Nothing here is a test; what is printed is what was seen.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

import recovery
from recovery.adapters.redis_store import RedisStore
from recovery.core.change import Commit
from recovery.core.fleet import Placement, Policy
from recovery.core.instance import Desired, Instance, ProbeMemory
from recovery.core.states import State
from tests.api.live import free_ports
from tests.helpers import RedisServer, wait_until

SIZES = (10, 100, 1000)
CONNECTIONS = 8
SCRAPES = 20
SECONDS = 8.0
PER_MODEL = 4
LOOK_EVERY_S = 30.0
STATIC = Path(recovery.__file__).parent / "api" / "page" / "static"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="per size")
    asked = parser.parse_args()
    figures = everything(asked.seconds)
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=1) + "\n")


def everything(seconds: float = SECONDS) -> dict[str, Any]:
    """All figures, printed as they come."""
    figures: dict[str, Any] = {"sizes": {}}
    for size in SIZES:
        with installed(size) as url:
            figures["sizes"][str(size)] = found = {name: round(value, 2) for name, value in (load(url, seconds) | scrapes(url)).items()}
            if size == SIZES[0]:
                figures["page"] = page(url)
        print(
            f"{size:5} instances: {found['per_s']:7.0f} requests/s, p50 {found['p50_ms']:6.2f} ms, p99 {found['p99_ms']:6.2f} ms, "
            f"{found['bytes'] / 1024:7.1f} KiB each; a scrape {found['scrape_ms']:6.1f} ms, {found['scrape_bytes'] / 1024:.0f} KiB"
        )
    print(f"the page: {figures['page']['bytes'] / 1024:.1f} KiB in {figures['page']['files']} files, uncompressed, nothing from elsewhere")
    return figures


@contextmanager
def installed(size: int) -> Iterator[str]:
    """An API over a fleet of that size, whose rows change as they would."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        redis = RedisServer(Path(folder)).start()
        port, *others = free_ports(4)
        environment = {
            **os.environ,
            "REDIS_URL": redis.url.secret,
            "RECOVERY_HOME": folder,
            "RECOVERY_API_PORT": str(port),
            "RECOVERY_FRONT_PORT": str(others[0]),
            "RECOVERY_FLOWER_PORT": str(others[1]),
            "RECOVERY_FRONT_METRICS_PORT": str(others[2]),
            "RECOVERY_LOG_LEVEL": "WARNING",
        }
        store = RedisStore(redis.url)
        fill(store, size)
        api = subprocess.Popen([sys.executable, "-m", "recovery.api"], env=environment)
        end = threading.Event()
        life = threading.Thread(target=live, args=(store, size, end), daemon=True)
        life.start()
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until(lambda: len(httpx.get(f"{url}/api/llm/models", timeout=60).json()["models"]), -(-size // PER_MODEL), within_s=120)
            yield url
        finally:
            end.set()
            life.join(30)
            api.terminate()
            api.wait(timeout=30)
            store.close()
            redis.stop()


def fill(store: RedisStore, size: int) -> None:
    """Rows as a fleet has them: four replicas a model, eight a host."""
    now = store.now()
    for number in range(size):
        model, replica = f"model-{number // PER_MODEL:03}", number % PER_MODEL
        row = Instance(
            id=f"{model}-{replica}",
            model=model,
            replica=replica,
            state=State.HEALTHY,
            desired=Desired.RUNNING,
            reason="serving",
            token=7,
            run=7,
            spawned_at=now,
            ready_at=now,
            policy=Policy(restart_policy="on-failure"),
            placement=Placement(host=f"host-{number // 8:03}", port=8000 + number % 8),
            probe=ProbeMemory(last_at=now, duration_s=0.01),
        )
        store.commit(Commit(after=row, expected_version=0))


def live(store: RedisStore, size: int, end: threading.Event) -> None:
    """One look after another, each server every 30 s, and the hosts' heartbeats."""
    ids = store.ids()
    number = 0
    while not end.wait(LOOK_EVERY_S / size):
        row = store.load(ids[number % size])
        assert row is not None
        store.commit(Commit(after=row.evolve(probe=row.probe.evolve(last_at=store.now())), expected_version=row.version))
        if number % max(1, size // 8) == 0:
            for host in range(-(-size // 8)):
                store.beat(f"host-{host:03}", {"wall": store.now(), "gpus": []}, 30.0)
        number += 1


def load(url: str, seconds: float) -> dict[str, float]:
    """Ask for the list as fast as it comes, over a few connections."""
    took, size, wall = asyncio.run(_load(url, seconds))
    ordered = sorted(took)
    return {
        "per_s": len(took) / wall,
        "p50_ms": 1000 * statistics.median(ordered),
        "p99_ms": 1000 * ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))],
        "bytes": size,
    }


async def _load(url: str, seconds: float) -> tuple[list[float], int, float]:
    port = int(url.rsplit(":", 1)[1])
    began = time.monotonic()
    took: list[float] = []
    size = 0

    async def one() -> None:
        nonlocal size
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
        while time.monotonic() - began < seconds:
            asked = time.monotonic()
            writer.write(b"GET /api/llm/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            size = int(next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")).split(b":")[1])
            await reader.readexactly(size)
            took.append(time.monotonic() - asked)
        writer.close()

    await asyncio.gather(*(one() for _ in range(CONNECTIONS)))
    return took, size, time.monotonic() - began


def scrapes(url: str) -> dict[str, float]:
    """The median time of a scrape, and its size."""
    took = []
    with httpx.Client(timeout=60) as client:
        for _ in range(SCRAPES):
            began = time.monotonic()
            answer = client.get(f"{url}/metrics")
            took.append(time.monotonic() - began)
            assert answer.status_code == 200
    return {"scrape_ms": 1000 * statistics.median(took), "scrape_bytes": len(answer.content)}


def page(url: str) -> dict[str, int]:
    """What a browser fetches to show the page."""
    paths = ["/", *(f"/static/{file.name}" for file in sorted(STATIC.iterdir()))]
    with httpx.Client(timeout=60) as client:
        return {"bytes": sum(len(client.get(url + path).content) for path in paths), "files": len(paths)}


if __name__ == "__main__":
    main()
