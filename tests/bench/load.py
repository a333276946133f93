"""Load on a proxy from raw connections: closed loops for requests a second, open streams for the delay of each token."""

import asyncio
import re
import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

import uvloop

STAMP = re.compile(rb'"text":" (\d+)"')


def request(body: bytes, port: int) -> bytes:
    """A request as the official client would send it, with the headers that matter."""
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\naccept: application/json\r\nuser-agent: bench\r\n"
        f"content-type: application/json\r\nauthorization: Bearer bench-key\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@dataclass
class Result:
    """What one load saw. Times are seconds."""

    seconds: float = 0.0
    requests: int = 0
    errors: int = 0
    latencies: list[float] = field(default_factory=list)
    """Of a whole answer, or of the first event of a stream."""
    delays: "array[float]" = field(default_factory=lambda: array("d"))
    """From a token's making to its arrival here."""
    tokens: int = 0

    def quantile(self, values: Iterable[float], q: float) -> float:
        """The q-quantile in seconds, 0 for none."""
        ordered = sorted(values)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0


class Loop(asyncio.Protocol):
    """One connection that sends a request as soon as the last answer is whole."""

    def __init__(self, wire: bytes, result: Result, until: float, streaming: bool, done: "asyncio.Future[None]") -> None:
        self._wire, self._result, self._until, self._streaming, self._done = wire, result, until, streaming, done
        self._buffer = b""
        self._sent = self._first = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def _send(self) -> None:
        self._buffer, self._first = b"", 0.0
        self._sent = time.perf_counter()
        self._transport.write(self._wire)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        buffer = self._buffer
        if self._streaming:
            if not self._first and b"data: " in buffer:
                self._first = time.perf_counter()
                self._result.latencies.append(self._first - self._sent)
            if not buffer.endswith(b"0\r\n\r\n"):
                return
        else:
            head = buffer.find(b"\r\n\r\n")
            if head < 0:
                return
            lower = buffer[:head].lower()
            at = lower.find(b"content-length: ")
            if at >= 0:
                length = int(lower[at + 16 :].split(b"\r", 1)[0])
                if len(buffer) < head + 4 + length:
                    return
            elif not buffer.endswith(b"0\r\n\r\n"):
                return
            self._result.latencies.append(time.perf_counter() - self._sent)
        self._result.requests += 1
        self._result.errors += not buffer.startswith(b"HTTP/1.1 200")
        if time.perf_counter() < self._until:
            self._send()
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            if time.perf_counter() < self._until:
                self._result.errors += 1
            self._done.set_result(None)


class Stream(asyncio.Protocol):
    """One connection with one long stream."""

    def __init__(self, wire: bytes, result: Result, done: "asyncio.Future[None]") -> None:
        self._wire, self._result, self._done = wire, result, done
        self._tail = b""
        self.whole = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._wire)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        if self._tail:
            data = self._tail + data
        end = data.rfind(b"\n\n") + 2
        self._tail = data[end:] if end >= 2 else data
        for stamp in STAMP.findall(data[:end] if end >= 2 else b""):
            self._result.delays.append((now - int(stamp)) / 1e9)
            self._result.tokens += 1
        if data.endswith(b"0\r\n\r\n"):
            self.whole = True
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._result.requests += 1
        self._result.errors += not self.whole
        if not self._done.done():
            self._done.set_result(None)


async def _loops(port: int, clients: int, seconds: float, body: bytes, streaming: bool) -> Result:
    loop, result = asyncio.get_running_loop(), Result()
    began = time.perf_counter()
    ends = [loop.create_future() for _ in range(clients)]
    wire = request(body, port)
    for end in ends:
        await loop.create_connection(lambda end=end: Loop(wire, result, began + seconds, streaming, end), "127.0.0.1", port)  # type: ignore[misc]
    await asyncio.gather(*ends)
    result.seconds = time.perf_counter() - began
    return result


async def _streams(port: int, count: int, tokens: int) -> Result:
    loop, result = asyncio.get_running_loop(), Result()
    began = time.perf_counter()
    wire = request(b'{"model":"m","prompt":"Hello","max_tokens":%d,"stream":true,"temperature":0}' % tokens, port)
    ends = [loop.create_future() for _ in range(count)]
    for number, end in enumerate(ends):
        await loop.create_connection(lambda end=end: Stream(wire, result, end), "127.0.0.1", port)  # type: ignore[misc]
        if number % 20 == 19:
            await asyncio.sleep(0.01)
    await asyncio.gather(*ends)
    result.seconds = time.perf_counter() - began
    return result


def closed_loop(port: int, clients: int, seconds: float) -> Result:
    """`clients` connections, each with one request in flight, for `seconds`."""
    return uvloop.run(_loops(port, clients, seconds, b'{"model":"m","prompt":"Hello","max_tokens":60,"temperature":0}', False))


def first_events(port: int, clients: int, seconds: float) -> Result:
    """The same with short streams; latencies are those of the first event."""
    return uvloop.run(_loops(port, clients, seconds, b'{"model":"m","prompt":"Hello","max_tokens":1,"stream":true,"temperature":0}', True))


def open_streams(port: int, count: int, tokens: int) -> Result:
    """`count` streams at once of `tokens` tokens each; delays are per token."""
    return uvloop.run(_streams(port, count, tokens))
