"""One connection to a replica, and how a pool of them is kept."""

import asyncio
from typing import TYPE_CHECKING, cast

import httptools

from recovery.frontdoor.wire import HOP_BY_HOP

if TYPE_CHECKING:
    from recovery.frontdoor.exchange import Exchange
    from recovery.frontdoor.fleet import Endpoint

MAX_HEAD_BYTES = 64 * 1024
MAX_IDLE = 512


class Upstream(asyncio.Protocol):
    """A connection to a replica: carries one request at a time, then waits in the replica's `idle` list."""

    __slots__ = (
        "_fields", "_head_bytes", "_loop", "_parser", "answered", "dead", "endpoint", "event_stream", "exchange", "framed",
        "idle_since", "keep", "lines", "media", "reused", "status", "transport", "writing_paused",
    )  # fmt: skip

    def __init__(self, endpoint: "Endpoint", loop: asyncio.AbstractEventLoop) -> None:
        self.endpoint, self._loop = endpoint, loop
        self.exchange: Exchange | None = None
        self._parser = httptools.HttpResponseParser(self)  # one for all answers: it begins anew after each
        self.dead = self.reused = self.answered = self.writing_paused = False
        self.idle_since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def carry(self, exchange: "Exchange") -> None:
        """Begin a request; its bytes follow by `write`."""
        self.exchange = exchange
        self.answered = False
        self._fresh_head()
        self.endpoint.live.add(self)

    def write(self, data: bytes) -> None:
        self.transport.write(data)

    def _fresh_head(self) -> None:
        self._fields: list[tuple[bytes, bytes]] = []
        self.lines = self.media = b""
        self.framed = self.event_stream = False
        self.keep = True
        self.status = self._head_bytes = 0

    def data_received(self, data: bytes) -> None:
        self.endpoint.last_byte = self._loop.time()
        exchange = self.exchange
        if exchange is None:  # an answer nobody asked for: nothing on this connection can be trusted
            self.close()
            return
        self.answered = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._give_up(f"malformed answer: {error}")
        else:
            if exchange.relay is not None and self.exchange is exchange:
                exchange.relay.flush()
            elif self.status == 0:
                self._head_bytes += len(data)
                if self._head_bytes > MAX_HEAD_BYTES:
                    self._give_up("answer's head too large")

    def _give_up(self, why: str) -> None:
        if self.exchange is not None:
            self.exchange.upstream_broke(self, why)
        self.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.status == 0:  # else it is a trailer
            self._fields.append((name, value))

    def _take_fields(self) -> None:
        lines: list[bytes] = []
        for name, value in self._fields:
            lower = name.lower()
            if lower == b"content-length":
                self.framed = True
            elif lower in HOP_BY_HOP:
                if lower == b"transfer-encoding":
                    self.framed = True
                elif lower == b"connection":
                    self.keep = b"close" not in value.lower()
            elif lower != b"x-request-id":
                lines += (lower, b": ", value, b"\r\n")
                if lower == b"content-type":
                    self.media = value
                    self.event_stream = b"text/event-stream" in value
        self.lines = b"".join(lines)

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._take_fields()
        if self.exchange is not None and self.status >= 200:
            self.exchange.answer_begins(self)

    def on_body(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:
            return
        if exchange.relay is not None:
            exchange.relay.feed(data)
        else:
            exchange.answer_data(data)

    def on_message_complete(self) -> None:
        if self.status < 200:  # 100 Continue and the like: the answer follows
            self._fresh_head()
            return
        if self.exchange is not None:
            self.exchange.answer_ends(self)

    def eof_received(self) -> None:
        """The transport closes itself; `connection_lost` says the rest."""

    def connection_lost(self, exc: Exception | None) -> None:
        self.dead = True
        self.endpoint.live.discard(self)
        if self in self.endpoint.idle:
            self.endpoint.idle.remove(self)
        exchange = self.exchange
        if exchange is None:
            return
        if exc is None and self.status and not self.framed:  # an answer without a length ends with the connection
            exchange.answer_ends(self)
        elif self.reused and not self.answered:
            exchange.stale_connection(self)
        else:
            exchange.upstream_broke(self, "connection lost")

    def pause_writing(self) -> None:
        self.writing_paused = True
        if self.exchange is not None:
            self.exchange.upstream_full(True)

    def resume_writing(self) -> None:
        self.writing_paused = False
        if self.exchange is not None:
            self.exchange.upstream_full(False)

    def let_go(self, reusable: bool) -> None:
        """End the request's hold on the connection: keep it for the next one, or close it."""
        self.exchange = None
        endpoint = self.endpoint
        endpoint.live.discard(self)
        if reusable and self.keep and self.framed and not self.dead and endpoint.up and len(endpoint.idle) < MAX_IDLE:
            self.reused, self.idle_since = True, self._loop.time()
            endpoint.idle.append(self)
        else:
            self.close()

    def abort(self) -> None:
        """Cut the connection: vLLM aborts a request whose client is gone."""
        self.exchange = None
        self.endpoint.live.discard(self)
        self.transport.abort()

    def close(self) -> None:
        self.transport.close()


def idle_connection(endpoint: "Endpoint", oldest: float) -> Upstream | None:
    """The warmest idle connection that has not waited since before `oldest`; older ones are closed."""
    while endpoint.idle:
        connection = endpoint.idle.pop()
        if connection.idle_since >= oldest and not connection.transport.is_closing():
            return connection
        connection.close()
    return None


async def dial(endpoint: "Endpoint", loop: asyncio.AbstractEventLoop, timeout_s: float) -> Upstream:
    """Open a connection; `OSError` (`TimeoutError` is one) when the replica can't be reached."""
    async with asyncio.timeout(timeout_s):
        _, protocol = await loop.create_connection(lambda: Upstream(endpoint, loop), endpoint.spec.host, endpoint.spec.port)
    return protocol
