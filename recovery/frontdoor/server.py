"""One front door as a process: sockets, signals, metrics, hand-over, drain."""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
from collections.abc import Callable
from wsgiref.simple_server import WSGIServer

import uvloop
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, start_http_server

from recovery.errors import ConfigError
from recovery.frontdoor.client import Client
from recovery.frontdoor.door import Door
from recovery.frontdoor.figures import Figures
from recovery.frontdoor.handover import Handover, Successor, take_over
from recovery.frontdoor.reports import Reports
from recovery.frontdoor.settings import DoorSettings
from recovery.frontdoor.view import Feeder, View

log = logging.getLogger(__name__)
BACKLOG = 4096
FIRST_WORD_S = 5.0
"""How long a door waits for the first word on its fleet before it opens; until then it would know no model."""


class Server:
    """A door with its sockets. `run` returns when it has drained after SIGTERM, SIGINT or a hand-over."""

    def __init__(self, settings: DoorSettings, feeder: Feeder, reports: Reports | None = None, figures: Figures | None = None) -> None:
        self._settings, self._feeder, self._reports, self._figures = settings, feeder, reports, figures
        self._stop: asyncio.Event | None = None
        self._hurry = False
        self._metrics: WSGIServer | None = None

    def run(self, ready: Callable[[int, int | None], None] | None = None) -> int:
        """Serve until told to stop; `ready` is called with the ports once they are open. Returns the exit code."""
        return uvloop.run(self._run(ready))

    async def _run(self, ready: Callable[[int, int | None], None] | None) -> int:
        settings, loop = self._settings, asyncio.get_running_loop()
        self._stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_stop)
        successor = take_over(settings.runtime_dir) if settings.runtime_dir is not None else None
        listener = successor.listener if successor is not None else self._listen()
        view = View()
        self._feeder.start(view)
        door = Door(settings, view, self._reports)
        until = loop.time() + FIRST_WORD_S
        while not view.known and loop.time() < until and not self._stop.is_set():
            await asyncio.sleep(0.02)  # whoever is replaced serves until we can
        server = await loop.create_server(lambda: Client(door), sock=listener, backlog=BACKLOG)
        handover = self._offer(successor, listener, server)
        metrics_port = self._serve_metrics(door)
        sweeping = loop.create_task(door.sweep())
        if self._figures is not None:
            self._figures.start(door.meters)
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 50)  # a request leaves no cycles: looking for some every 700 objects is a waste
        if ready is not None:
            ready(listener.getsockname()[1], metrics_port)
        await self._stop.wait()
        server.close()
        self._release_metrics()
        if handover is not None:
            handover.close()
        draining = loop.create_task(door.drain(settings.drain_timeout_s))
        while not draining.done() and not self._hurry:
            await asyncio.wait({draining}, timeout=0.1)
        self._feeder.stop()
        if self._figures is not None:
            self._figures.stop()
        sweeping.cancel()
        if not draining.done():
            draining.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await draining
            return 1
        return 0 if draining.result() else 1

    def _told_to_stop(self) -> None:
        assert self._stop is not None
        self._hurry = self._stop.is_set()  # the second time
        self._stop.set()

    def _listen(self) -> socket.socket:
        host, port = self._settings.host, self._settings.port
        try:
            family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            listener = socket.socket(family, kind, proto)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error}") from error
        return listener

    def _offer(self, successor: Successor | None, listener: socket.socket, server: asyncio.Server) -> Handover | None:
        if self._settings.runtime_dir is None:
            return None
        if successor is not None:
            successor.ready()

        def released() -> None:
            server.close()
            self._release_metrics()
            handover.close(unlink=False)  # the path is the successor's now
            assert self._stop is not None
            self._stop.set()

        handover = Handover(self._settings.runtime_dir, listener, released)
        handover.open()
        return handover

    def _serve_metrics(self, door: Door) -> int | None:
        if self._settings.metrics_port is None:
            return None
        registry = CollectorRegistry(auto_describe=False)
        registry.register(door.meters)
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        try:
            self._metrics, _ = start_http_server(self._settings.metrics_port, self._settings.metrics_host, registry)
        except OSError as error:
            raise ConfigError(f"cannot serve metrics on port {self._settings.metrics_port}: {error}") from error
        return int(self._metrics.server_port)

    def _release_metrics(self) -> None:
        if self._metrics is not None:
            self._metrics.shutdown()
            self._metrics.server_close()
            self._metrics = None


def announce(port: int, metrics_port: int | None) -> None:
    """Print where the door stands, in one line that a test or an operator can read."""
    metrics = f", metrics on {metrics_port}" if metrics_port is not None else ""
    sys.stdout.write(f"front door on {port}{metrics}\n")
    sys.stdout.flush()
