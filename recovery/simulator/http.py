"""HTTP/1.1 on a raw asyncio protocol: keep-alive, pipelining in order, chunked streams."""

import asyncio
import traceback
from collections import deque
from collections.abc import Awaitable, Callable
from http import HTTPStatus

import httptools

MAX_BODY = 64 << 20
_STATUS = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}


def status_line(status: int) -> str:
    """`404 Not Found`."""
    return _STATUS.get(status, f"{status} Unknown")


class Exchange:
    """One request and the way to answer it."""

    def __init__(self, connection: "Connection") -> None:
        self._connection = connection
        self.method = ""
        self.path = ""
        self.query = ""
        self.version = "1.1"
        self.headers: dict[str, str] = {}
        self.body = b""
        self.keep_alive = True
        self.status = 0
        self.peer = connection.peer

    def reply(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        """Send a whole answer."""
        self.status = status
        head = f"HTTP/1.1 {status_line(status)}\r\nserver: uvicorn\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n"
        self._connection.write(f"{head}{self._closing()}\r\n".encode() + (b"" if self.method == "HEAD" else body))

    def start_stream(self) -> None:
        """Begin an answer of server-sent events; HTTP/1.0 clients get it unchunked."""
        self.status = 200
        if self.version != "1.1":
            self.keep_alive = False
        framing = "transfer-encoding: chunked\r\n" if self.version == "1.1" else ""
        head = f"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n{framing}{self._closing()}\r\n"
        self._connection.write(head.encode())

    def send(self, data: bytes) -> None:
        """Send a piece of the stream."""
        self._connection.write(b"%x\r\n%b\r\n" % (len(data), data) if self.version == "1.1" else data)

    async def drain(self) -> None:
        """Wait until the client has taken what was sent."""
        await self._connection.writable.wait()

    def finish(self) -> None:
        """End the stream."""
        if self.version == "1.1":
            self._connection.write(b"0\r\n\r\n")

    def cut(self) -> None:
        """Reset the connection in the middle."""
        self.keep_alive = False
        self._connection.abort()

    def _closing(self) -> str:
        return "" if self.keep_alive else "connection: close\r\n"


Handler = Callable[[Exchange], Awaitable[None]]


class Connection(asyncio.Protocol):
    """One client. Its requests are answered one after another; a disconnect cancels the one in work."""

    def __init__(self, handler: Handler, open_connections: set["Connection"]) -> None:
        self._handler = handler
        self._open = open_connections
        self._parser = httptools.HttpRequestParser(self)
        self._exchange: Exchange | None = None
        self._url = b""
        self._body: list[bytes] = []
        self._size = 0
        self._queue: deque[Exchange] = deque()
        self._task: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport | None = None
        self.peer = "-"
        self.writable = asyncio.Event()
        self.writable.set()

    @property
    def busy(self) -> bool:
        return self._task is not None

    # asyncio's side
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        name = transport.get_extra_info("peername")
        self.peer = f"{name[0]}:{name[1]}" if name else "-"
        self._open.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._open.discard(self)
        self.writable.set()
        if self._task:
            self._task.cancel()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass
        except httptools.HttpParserError:
            body = b"Invalid HTTP request received."
            head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.write(head.encode() + body)
            self.close()

    # httptools' side
    def on_message_begin(self) -> None:
        self._exchange = Exchange(self)
        self._url, self._body, self._size = b"", [], 0

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._exchange:
            self._exchange.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if self._exchange and self._exchange.headers.get("expect", "").lower() == "100-continue":
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._size += len(body)
        if self._size > MAX_BODY:
            self.abort()
        else:
            self._body.append(body)

    def on_message_complete(self) -> None:
        exchange = self._exchange
        assert exchange is not None
        path, _, query = self._url.decode("latin-1").partition("?")
        exchange.method = self._parser.get_method().decode("latin-1")
        exchange.path, exchange.query = path, query
        exchange.version = self._parser.get_http_version()
        exchange.keep_alive = self._parser.should_keep_alive()
        exchange.body = b"".join(self._body)
        self._queue.append(exchange)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        try:
            while self._queue and self._transport:
                exchange = self._queue.popleft()
                try:
                    await self._handler(exchange)
                except Exception:  # a fault of the simulator's own: as loud as a server's, and the process lives
                    traceback.print_exc()
                    self.abort()
                    return
                if not exchange.keep_alive:
                    self.close()
                    return
        finally:
            self._task = None

    # the exchange's side
    def write(self, data: bytes) -> None:
        if self._transport:
            self._transport.write(data)

    def close(self) -> None:
        if self._transport:
            self._transport.close()

    def abort(self) -> None:
        if self._transport:
            self._transport.abort()
