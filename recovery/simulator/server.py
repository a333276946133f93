"""The life of a simulated server: load, serve, and every way to end."""

import asyncio
import errno
import os
import signal
import socket
import time
from typing import Any, NoReturn

from recovery.simulator import lines
from recovery.simulator.api import Api
from recovery.simulator.http import Connection
from recovery.simulator.journal import Journal
from recovery.simulator.link import Link, LocalLink, ProcessLink
from recovery.simulator.metrics import Metrics, process_start_time
from recovery.simulator.options import Options

ENGINE_STOP_S = 5.0
"""vLLM SIGKILLs an engine that has not obeyed SIGTERM after so long (measured: 5.3 s with a stopped engine)."""


class Simulator:
    """One server process. Its methods that end it do not return."""

    def __init__(self, options: Options, journal: Journal, listener: socket.socket) -> None:
        self._options = options
        self._journal = journal
        self._listener = listener
        self._started = time.monotonic()
        self._connections: set[Connection] = set()
        self._server: asyncio.Server | None = None
        self._link: Link | None = None
        self._api: Api | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._lost_sigterm = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, child: tuple[int, socket.socket] | None, error: str) -> None:
        """Load, listen, and live until something ends it."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        link: Link = await ProcessLink.connect(*child) if child else LocalLink(self._options)
        self._link = link
        link.on_death = self._engine_died
        metrics = Metrics(self._options.name, process_start_time())
        self._api = Api(self._options, link, metrics, self._started, self._act)
        self._set_timers()
        if isinstance(link, LocalLink):
            self._spawn(link.load(self._options, error))
        await link.ready
        if self._options.faults.hang:
            self._api.changed()
        await self._listen()
        await loop.create_future()

    async def _listen(self) -> None:
        api = self._api
        assert api is not None
        try:
            self._server = await asyncio.get_running_loop().create_server(
                lambda: Connection(api.handle, self._connections), sock=self._listener, backlog=2048
            )
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            # Another server bound the same port while neither listened: like vLLM, this one lives on and serves nothing.
        lines.say(lines.SERVING, url=f"http://{self._options.host}:{self._options.port}", pid=os.getpid())

    # what ends it, or makes it worse, later
    def _set_timers(self) -> None:
        options = self._options
        at = self._after
        at(options.crash_after, {"crash": {"signal": options.signal} if options.signal else {"exit_code": options.exit_code}})
        at(options.exit_after, {"exit": True})
        at(options.kill_engine_after, {"kill_engine": int(signal.SIGKILL)})
        at(options.serve_error_after, {"serve_error": options.serve_error})
        at(options.hang_after, {"hang": True})
        at(options.engine_hang_after, {"engine_hang": True})

    def _after(self, seconds: float, order: dict[str, Any]) -> None:
        if seconds >= 0:
            asyncio.get_running_loop().call_later(seconds, self._obey, order)

    def _obey(self, order: dict[str, Any]) -> None:
        faults = {name: value for name, value in order.items() if name in ("hang", "engine_hang")}
        if faults:
            self._options.faults.change(faults)
            if self._api:
                self._api.changed()
        else:
            self._act(order)

    def _act(self, order: dict[str, Any]) -> None:
        """
        Carry out what /admin/fault orders; `ValueError` for an order that does not exist.

        `{"crash": {"exit_code": 3}}`, `{"crash": {"signal": 11}}`, `{"exit": true}`, `{"kill_engine": 9}`, `{"serve_error": "oom"}`,
        `{"say": "text", "stream": "stderr"}`, each with `"after_s"` to do it later.
        """
        order = dict(order)
        after = order.pop("after_s", None)
        known = {"crash", "exit", "kill_engine", "serve_error", "say", "stream"}
        if not order.keys() <= known:
            raise ValueError(f"cannot do {sorted(order.keys() - known)}: known orders are {sorted(known)}")
        if order.get("serve_error", "oom") not in lines.SERVE_ERRORS:
            raise ValueError(f"cannot fail with {order['serve_error']!r}: known are {sorted(lines.SERVE_ERRORS)}")
        # Never at once: the answer goes out first.
        asyncio.get_running_loop().call_later(0.02 if after is None else float(after), self._act_now, order)

    def _act_now(self, order: dict[str, Any]) -> None:
        if "say" in order:
            lines.write(lines.STDERR if order.get("stream") == "stderr" else lines.STDOUT, str(order["say"]))
        if "kill_engine" in order and self._link:
            self._link.kill(int(order["kill_engine"]))
        if "serve_error" in order and self._link:
            self._link.send({"t": "crash", "kind": order["serve_error"]})
        if "crash" in order:
            crash = order["crash"]
            if crash.get("signal"):
                self._die(int(crash["signal"]))
            self._leave(int(crash.get("exit_code", 1)))
        if order.get("exit"):
            self._stop()

    # signals
    def _signalled(self, number: int) -> None:
        if self._options.faults.ignore_sigterm and number == signal.SIGTERM:
            return
        if self._server is not None:
            self._stop()
        elif number == signal.SIGTERM and self._options.lose_sigterm and not self._lost_sigterm:
            self._lost_sigterm = True
        else:
            interrupted = self._lost_sigterm or number == signal.SIGINT
            if interrupted:
                lines.fail(lines.STDERR, lines.API, "KeyboardInterrupt: terminated")
            if self._link:
                self._link.kill(signal.SIGKILL)
            self._die(signal.SIGINT if interrupted else number)

    def _stop(self) -> None:
        """Begin an orderly end; a second request changes nothing."""
        if self._stopping is None:
            self._stopping = asyncio.get_running_loop().create_task(self._shut_down())

    async def _shut_down(self) -> None:
        api, link = self._api, self._link
        assert api is not None and link is not None
        drain_s = self._options.shutdown_timeout
        if drain_s > 0 and not api.errored:
            api.draining = True
            deadline = time.monotonic() + drain_s
            while len(api.requests) and time.monotonic() < deadline:
                await asyncio.sleep(0.02)
            lines.say(lines.ENGINE_DEAD)  # vLLM prints it at the end of an orderly drain too
        if self._server:
            self._server.close()
        lines.say(lines.SHUTTING_DOWN)
        streams = len(api.requests)
        if streams and self._options.faults.stuck_shutdown:
            link.kill(signal.SIGKILL)
            lines.say(lines.WAITING_FOR_CONNECTIONS)
            await asyncio.get_running_loop().create_future()
        api.draining = True
        api.requests.fail_all("abort")
        link.kill(signal.SIGTERM)
        try:
            await asyncio.wait_for(asyncio.shield(link.dead), ENGINE_STOP_S)
        except TimeoutError:
            link.kill(signal.SIGKILL)
            await link.dead
        await self._close_connections()
        lines.say(lines.SHUT_DOWN, pid=os.getpid())
        self._leave(0)

    async def _close_connections(self) -> None:
        """Let answers in work go out, then close."""
        deadline = time.monotonic() + 1.0
        while any(connection.busy for connection in self._connections) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        for connection in list(self._connections):
            connection.close()
        await asyncio.sleep(0)

    # the engine's death
    def _engine_died(self, on_request: bool) -> None:
        if self._stopping:
            return
        if self._link is None or not self._link.ready.done():
            failed = "{'EngineCore': 1}" if isinstance(self._link, ProcessLink) else "{}"
            lines.fail(lines.STDERR, lines.API, lines.ENGINE_INIT_FAILED.replace("{failed}", failed))
            self._leave(1)
        if self._api:
            self._api.errored = True
        self._spawn(self._mourn(on_request))

    async def _mourn(self, on_request: bool) -> None:
        api = self._api
        assert api is not None
        if on_request:  # a SIGTERM to the whole group reaches the engine first: ours is on its way
            await asyncio.sleep(0.1)
            if self._stopping:
                return
        lines.say(lines.ENGINE_DEAD)
        api.requests.fail_all("error")
        if os.environ.get("VLLM_KEEP_ALIVE_ON_ENGINE_DEATH") == "1":
            return
        await asyncio.sleep(self._options.death_s)
        if self._stopping:
            return
        if self._server:
            self._server.close()
        lines.say(lines.SHUTTING_DOWN)
        await self._close_connections()
        lines.say(lines.SHUT_DOWN, pid=os.getpid())
        self._leave(0)

    # the end
    def _leave(self, code: int) -> NoReturn:
        """Exit with a code; the engine goes too, as a Python process ends its children."""
        if self._link and self._link.pid:
            self._link.kill(signal.SIGKILL)
        self._journal.end(code=code)
        lines.flush()
        os._exit(code)

    def _die(self, number: int) -> NoReturn:
        """End by a signal of our own; the engine is left behind, as vLLM's is."""
        self._journal.end(signal=number)
        lines.flush()
        signal.signal(number, signal.SIG_DFL) if number not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), number)
        os._exit(128 + number)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
