"""How the server speaks to its engine: over a socket to the child process, or to one within itself (`--engine none`)."""

import abc
import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import orjson

from recovery.simulator import lines
from recovery.simulator.engine import Engine, EngineCrash, Message, log_load, log_load_error
from recovery.simulator.options import Options


class Link(abc.ABC):
    """
    One engine. `ready` is set when it has loaded; then `on_report` gets every step's report, `on_death` at most one call.

    `on_death`'s argument says whether the engine left on a SIGTERM of its own.
    """

    pid = 0

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = loop.create_future()
        self.dead: asyncio.Future[None] = loop.create_future()
        self.on_report: Callable[[Message], None] = lambda report: None
        self.on_death: Callable[[bool], None] = lambda on_request: None
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._questions = 0

    @abc.abstractmethod
    def send(self, message: Message) -> None:
        """Tell the engine something; it may answer."""

    @abc.abstractmethod
    def kill(self, number: int) -> None:
        """Send the engine a signal."""

    async def ask(self, what: str, value: Any = None) -> Any:
        """A round trip through the engine; it waits as long as the engine is stopped."""
        self._questions += 1
        number = self._questions
        future = self._asked[number] = asyncio.get_running_loop().create_future()
        self.send({"t": "ask", "id": number, "what": what, "value": value})
        return await future

    def _take(self, message: Message) -> None:
        if "u" in message:
            future = self._asked.pop(message["u"], None)
            if future and not future.done():
                future.set_result(message["v"])
        elif "ready" in message:
            self.ready.set_result(None)
        else:
            self.on_report(message)

    def _died(self, on_request: bool) -> None:
        if not self.dead.done():
            self.dead.set_result(None)
            self.on_death(on_request)


class ProcessLink(Link, asyncio.Protocol):
    """The engine is a child process; death is the end of its socket."""

    def __init__(self, pid: int) -> None:
        super().__init__()
        self.pid = pid
        self._received = b""
        self._transport: asyncio.Transport | None = None
        self._bye = False

    @classmethod
    async def connect(cls, pid: int, sock: socket.socket) -> "ProcessLink":
        sock.setblocking(False)
        _, link = await asyncio.get_running_loop().create_unix_connection(lambda: cls(pid), sock=sock)
        return link

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        *messages, self._received = (self._received + data).split(b"\n")
        for raw in messages:
            message = orjson.loads(raw)
            if "bye" in message:
                self._bye = True
            else:
                self._take(message)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        self._died(self._bye)

    def send(self, message: Message) -> None:
        if self._transport:
            self._transport.write(orjson.dumps(message) + b"\n")

    def kill(self, number: int) -> None:
        if not self.dead.done():
            os.kill(self.pid, number)


class LocalLink(Link):
    """The engine runs on the server's own loop: one process less, and nothing to stop or kill from outside."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self._engine = Engine(options.faults, options.max_num_seqs, options.fault_file)
        self._timer: asyncio.TimerHandle | None = None

    async def load(self, options: Options, error: str) -> None:
        """What the child does before it is ready."""
        begun = time.monotonic()
        for share, text in lines.LOADING:
            await asyncio.sleep(max(0.0, begun + share * options.load_s - time.monotonic()))
            if error and share >= 0.5:
                log_load_error(error, options)
                self._died(False)
                return
            log_load(text, options)
        self._take({"ready": True})

    def send(self, message: Message) -> None:
        if self.dead.done():
            return
        if answer := self._engine.handle(message, time.monotonic()):
            self._take(answer)
        self._plan()

    def kill(self, number: int) -> None:
        if number in (signal.SIGKILL, signal.SIGTERM) and not self.dead.done():
            if self._timer:
                self._timer.cancel()
            self._died(number == signal.SIGTERM)

    def _plan(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        now = time.monotonic()
        due = self._engine.due(now)
        if due is not None and not self.dead.done():
            self._timer = asyncio.get_running_loop().call_later(max(0.0, due - now), self._step)

    def _step(self) -> None:
        self._timer = None
        try:
            self._take(self._engine.step(time.monotonic()))
        except EngineCrash as crash:
            lines.say(lines.SERVE_ERRORS[str(crash)])
            self._died(False)
        else:
            self._plan()
