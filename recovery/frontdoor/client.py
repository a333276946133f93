"""One client's connection: HTTP/1.1 taken apart strictly, bounded in every direction, answered in order."""

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Protocol, cast

import httptools

from recovery.frontdoor.keys import Account
from recovery.frontdoor.request import Body, Refusal, Request
from recovery.frontdoor.wire import CONTINUE, LAST_CHUNK, response, status_line

if TYPE_CHECKING:
    from recovery.frontdoor.door import Door

LINGER_S = 1.0
CLOSE = b"connection: close\r\n"


class Served(Protocol):
    """Whatever answers a request: an exchange or an upload."""

    def client_full(self, full: bool) -> None: ...

    def abandon(self) -> None: ...


class Client(asyncio.Protocol):
    """One connection. Requests are answered one by one, in order; what is pipelined waits, within bounds."""

    __slots__ = (
        "_ahead", "_closing", "_door", "_head_began", "_head_bytes", "_parser", "_pending_head", "_reading", "_refusal", "_request",
        "_todo", "account", "active", "active_request", "dead", "key_name", "paused", "paused_at", "peer", "raw_answer", "since",
        "transport",
    )  # fmt: skip

    def __init__(self, door: "Door") -> None:
        self._door = door
        self._parser = httptools.HttpRequestParser(self)
        self._request: Request | None = None
        self._todo: deque[Request | Refusal] = deque()
        self._ahead = bytearray()
        self._refusal: Refusal | None = None
        self._pending_head = b""
        self._head_bytes = 0
        self._closing = self.dead = self.paused = self.raw_answer = False
        self._reading = True
        self.active: Served | None = None
        self.active_request: Request | None = None
        self.account: Account | None = None
        self.key_name = self.peer = ""
        self.paused_at = self._head_began = 0.0

    # --- the transport ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self.peer = self.key_name = peer[0] if isinstance(peer, tuple) else "local"
        self.since = self._door.now()
        self._door.joined(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.dead = True
        self._door.left(self)
        if self.active is not None:
            self.active.abandon()

    def pause_writing(self) -> None:
        self.paused, self.paused_at = True, self._door.now()
        if self.active is not None:
            self.active.client_full(True)

    def resume_writing(self) -> None:
        self.paused = False
        if self.active is not None:
            self.active.client_full(False)

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        if self._ahead or (self.active is not None and (self._request is None or self._request.sink is None)):
            self._ahead += data  # pipelined: read when the answer is out, and after what came before it
            if len(self._ahead) > self._door.settings.max_ahead_bytes:
                self.hold_reading(True)
            return
        self._read(data)

    def _read(self, data: bytes) -> None:
        request = self._request
        if request is None and self._head_began == 0.0:
            self._head_began = self._door.now()
        in_head = request is not None and not request.headed
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(Refusal(400, "cannot upgrade a connection"))
        except httptools.HttpParserError as error:
            cause = error.__context__
            refusal = self._refusal or (cause if isinstance(cause, Refusal) else None)
            self._refuse(refusal or Refusal(400, f"malformed request: {error}"))
        else:
            if in_head and self._request is request and request is not None and not request.headed:
                self._head_bytes += len(data)
                if self._head_bytes > 2 * (self._door.settings.max_header_bytes + self._door.settings.max_url_bytes):
                    self._refuse(Refusal(431, "request headers too large"))

    def hold_reading(self, hold: bool) -> None:
        """Stop or go on reading from the client."""
        if hold == self._reading and not self.transport.is_closing():
            self._reading = not hold
            if hold:
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()

    # --- the parser ---

    def on_message_begin(self) -> None:
        self._request = Request()
        if not self._head_began:
            self._head_began = self._door.now()
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        request = self._request
        assert request is not None
        request.target += url
        if len(request.target) > self._door.settings.max_url_bytes:
            self._reject(414, "URL too long")

    def on_header(self, name: bytes, value: bytes) -> None:
        request = self._request
        assert request is not None
        if not request.headed:  # else it is a trailer: no use for any
            request.fields.append((name, value))

    def on_headers_complete(self) -> None:
        request = self._request
        assert request is not None
        self._head_began = 0.0
        self.since = self._door.now()
        parser, settings = self._parser, self._door.settings
        request.method = parser.get_method()
        refusal = (
            request.take_fields(settings.max_headers, settings.max_header_bytes)
            or request.complete_head(parser.get_http_version(), parser.should_upgrade(), parser.should_keep_alive())
            or self._door.admit_head(self, request)
        )
        if refusal is not None:
            self._raise(refusal)
        if request.expects and self.active is None and not self._todo:
            self.transport.write(CONTINUE)

    def on_body(self, data: bytes) -> None:
        request = self._request
        if request is None:
            return
        request.received += len(data)
        if request.sink is not None:
            request.sink.body_data(data)
            return
        request.parts.append(data)
        if request.upload or request.chunked:
            refusal = self._door.admit_body(self, request)
            if refusal is not None:
                self._raise(refusal)

    def on_message_complete(self) -> None:
        request = self._request
        assert request is not None
        self._request = None
        request.whole = True
        if request.sink is not None:
            request.sink.body_ends()
            return
        request.body = b"".join(request.parts)
        request.parts = []
        if self.active is None and not self._todo:
            self._serve(request)
        else:
            self._todo.append(request)

    def _reject(self, status: int, message: str) -> None:
        self._raise(Refusal(status, message))

    def _raise(self, refusal: Refusal) -> None:
        self._refusal = refusal
        raise refusal

    # --- answering ---

    def _refuse(self, refusal: Refusal) -> None:
        """The rest of what comes is not to be trusted: answer what is complete, then this, then close."""
        self._request = None
        self._closing = True
        self._ahead.clear()
        self._todo.append(refusal)
        if self.active is None:
            self._next()
        elif isinstance(self.active_request, Request) and not self.active_request.whole:
            self.abort()  # the body of the request being answered is broken off

    def _next(self) -> None:
        while self.active is None and not self.dead:
            if self._todo:
                request = self._todo.popleft()
                if isinstance(request, Refusal):
                    self._door.meters.refused[request.status] += 1
                    self.transport.write(response(request.status, request.body, close=True))
                    self._linger()
                    return
                self._serve(request)
            elif self._ahead and not self._closing:
                data, self._ahead = bytes(self._ahead), bytearray()
                self.hold_reading(False)
                self._read(data)
                if not self._todo:
                    return
            else:
                return

    def _linger(self) -> None:
        """Close so that the answer arrives: what the client still sends is read and dropped for a moment, or a reset would overtake it."""
        self._closing = True
        self.hold_reading(False)
        if self.transport.can_write_eof() and not self.transport.is_closing():
            self.transport.write_eof()
        self._door.loop.call_later(LINGER_S, self.transport.close)

    def _serve(self, request: Request) -> None:
        self.active_request = request
        self._door.serve(self, request)

    def start_body(self, request: Request, served: Served, sink: Body) -> None:
        """Have a request answered whose body is still coming."""
        self.active, self.active_request, request.sink = served, request, sink

    def answering(self, served: Served) -> None:
        """Note who answers the request."""
        self.active = served

    def reply(self, status: int, lines: bytes, body: bytes) -> None:
        """Send a whole answer."""
        close = CLOSE if self._must_close() else b""
        self._write(b"%b%bcontent-length: %d\r\n%b\r\n%b" % (status_line(status), lines, len(body), close, body))

    def begin(self, status: int, lines: bytes) -> None:
        """Begin an answer whose length is unknown; the head goes out with the first bytes."""
        request = self.active_request
        self.raw_answer = request is not None and request.http10
        if self.raw_answer:
            assert request is not None
            request.close = True
        framing = b"" if self.raw_answer else b"transfer-encoding: chunked\r\n"
        self._pending_head = b"".join((status_line(status), lines, framing, CLOSE if self._must_close() else b"", b"\r\n"))

    def send(self, data: bytes) -> None:
        """Send bytes of such an answer; empty ones only send the head."""
        head, self._pending_head = self._pending_head, b""
        framed = b"%b%x\r\n%b\r\n" % (head, len(data), data) if data and not self.raw_answer else head + data
        if framed and not self.dead:
            self.transport.write(framed)

    def end(self) -> None:
        """End such an answer."""
        head, self._pending_head = self._pending_head, b""
        self._write(head if self.raw_answer else head + LAST_CHUNK)

    def _write(self, data: bytes) -> None:
        if data and not self.dead:
            self.transport.write(data)

    def _must_close(self) -> bool:
        request = self.active_request
        if self._door.draining and request is not None:
            request.close = True
        return request is None or request.close

    def abort(self) -> None:
        """Cut the connection: the only way to say that a half-sent body is no answer."""
        self.transport.abort()

    def exchange_over(self, served: Served) -> None:
        """The answer is out: go on with what the client has sent meanwhile, or close."""
        if self.active is not served:
            return
        request, self.active, self.active_request = self.active_request, None, None
        self.since = self._door.now()
        if request is not None and (request.close or not request.whole):
            self._closing = True
            self.transport.close()
        elif not self.dead and (self._todo or self._ahead):
            self._door.loop.call_soon(self._next)

    def answer_now(self, status: int, body: bytes, lines: tuple[bytes, ...] = (), head: bool = False) -> None:
        """Answer at once, without a replica."""
        request = self.active_request
        close = self._must_close()
        self._write(response(status, body, headers=b"".join(lines), close=close, head=head))
        self.active_request = None
        self.since = self._door.now()
        if close or (request is not None and not request.whole):
            self._linger()

    # --- time-outs ---

    def overdue(self, now: float) -> None:
        """Close the connection if the client takes too long over something; called a few times a second."""
        settings = self._door.settings
        if self.paused and now - self.paused_at > settings.stalled_client_s:
            self.abort()
        elif self._head_began and now - self._head_began > settings.header_timeout_s:
            self._late("request headers did not arrive in time")
        elif self._request is not None and not self._head_began:
            if self._reading and now - self.since > settings.body_timeout_s + self._request.received / 10_000:
                self._late("request body did not arrive in time")
        elif self.active is None and not self._todo and now - self.since > settings.idle_timeout_s:
            self.transport.close()

    def _late(self, message: str) -> None:
        if self.active is None:
            self._refuse(Refusal(408, message))
        elif self.active_request is not None and not self.active_request.whole:
            self.abort()
