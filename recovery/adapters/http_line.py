"""
One HTTP/1.1 connection for the few requests of a look, one after another.

A general client costs 0.9 ms of CPU a request, which a hundred servers looked at by one host would feel; this one a tenth.
What a probe has no use for is missing: redirects, proxies, cookies, compression, streaming.
"""

import asyncio
import base64
import functools
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import httptools

LONGEST_BODY = 4_000_000
PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Response:
    """What came back."""

    status: int
    body: bytes


class RefusedError(OSError):
    """Nobody took the connection: refused, unreachable, or a name that means nothing."""


class BrokenError(OSError):
    """A connection that was taken and then went wrong: cut, no HTTP, more than a probe reads."""


class Line(asyncio.Protocol):
    """A connection to one server, opened by its first request; the caller limits the time of each. Used by one task at a time."""

    def __init__(self, root: str, headers: Mapping[str, str] | None = None) -> None:
        parts = urlsplit(root)
        self._host, self._port = parts.hostname or "", parts.port or PORTS[parts.scheme]
        self._tls, self._path = parts.scheme == "https", parts.path.rstrip("/")
        name = f"[{self._host}]" if ":" in self._host else self._host
        own = {"host": f"{name}:{self._port}", "accept": "*/*", "user-agent": "recovery"}
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            own["authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        self._head = "".join(f"{name}: {value}\r\n" for name, value in {**own, **(headers or {})}.items())
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Response] | None = None
        self._body = bytearray()
        self._parser: Any = None
        self._sized = self._unsized = False

    @property
    def usable(self) -> bool:
        """Whether another request can be made on it."""
        return self._answer is None and (self._transport is None or not self._transport.is_closing())

    async def ask(self, method: str, path: str, body: bytes | None = None) -> Response:
        """Make a request and return the whole response; raise `RefusedError` or `BrokenError`."""
        if self._transport is None:
            await self._open()
        transport = self._transport
        assert transport is not None
        sized = "" if body is None else f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._answer = answer
        self._body.clear()
        self._unsized = False
        self._parser = httptools.HttpResponseParser(self)
        transport.write(f"{method} {self._path}{path} HTTP/1.1\r\n{self._head}{sized}\r\n".encode() + (body or b""))
        try:
            return await answer
        except asyncio.CancelledError:
            transport.abort()
            raise

    def close(self) -> None:
        """Give the connection up."""
        if self._transport is not None:
            self._transport.abort()

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: self, self._host, self._port, ssl=_tls() if self._tls else None)
        except ssl.SSLError as error:
            raise BrokenError(f"TLS: {error.reason or error}") from error
        except OSError as error:
            raise RefusedError(str(error)) from error

    # --- what the event loop and the parser tell ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection stands."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        """Some of a response has come."""
        if self._answer is None:
            self.close()  # nobody has asked for this
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"no HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone; a response without a length ends with it."""
        if self._answer is not None and self._unsized and exc is None:
            self.on_message_complete()
        else:
            self._fail("the connection was closed" if exc is None else str(exc))

    def on_message_begin(self) -> None:
        """The parser begins a response."""
        self._sized = self._unsized = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """The parser has read a header."""
        self._sized |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        """The parser has read the last header."""
        self._unsized = not self._sized

    def on_body(self, data: bytes) -> None:
        """The parser has read a piece of the body."""
        self._body += data
        if len(self._body) > LONGEST_BODY:
            self._fail(f"more than {LONGEST_BODY} bytes")

    def on_message_complete(self) -> None:
        """The response is whole."""
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():
            answer.set_result(Response(int(self._parser.get_status_code()), bytes(self._body)))
        if not self._parser.should_keep_alive():
            self.close()

    def _fail(self, why: str) -> None:
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():
            answer.set_exception(BrokenError(why))
        self.close()


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()
