"""
A stand-in replica that costs next to nothing, so that a proxy in front of it is what is measured.

`python -m tests.bench.stub --port N --rate 20`: answers at once, or streams `max_tokens` events at `rate` a second.
Each event carries the monotonic clock (one clock for all processes of a machine), so a client knows its delay.
"""

import argparse
import asyncio
import time
from collections import deque
from typing import cast

import httptools
import orjson
import uvloop

ANSWER = orjson.dumps(
    {
        "id": "cmpl-0",
        "object": "text_completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "text": " word" * 60, "logprobs": None, "finish_reason": "length", "stop_reason": None}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 60, "total_tokens": 65},
    }
)
JSON_HEAD = b"HTTP/1.1 200 OK\r\nserver: stub\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
WHOLE = JSON_HEAD % len(ANSWER) + ANSWER
MODELS = orjson.dumps({"object": "list", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "vllm", "max_model_len": 8192}]})
BUCKETS = "".join(
    f'vllm:{name}_seconds_bucket{{engine="0",le="{bound}",model_name="m"}} {bound}.0\n' for name in ("ttft", "e2e") for bound in range(350)
)
METRICS = f'# TYPE vllm:iteration_tokens_total histogram\n{BUCKETS}vllm:iteration_tokens_total_count{{engine="0"}} 5.0\n'.encode()
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nserver: stub\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = b'data: {"id":"cmpl-0","object":"text_completion","created":1,"model":"m","choices":[{"index":0,"text":" %d","logprobs":null,'
EVENT += b'"finish_reason":%b,"stop_reason":null,"prompt_token_ids":%b,"token_ids":%b}]}\n\n'
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
PHASES = 10


class Stub(asyncio.Protocol):
    """One connection."""

    __slots__ = ("_body", "_parser", "_target", "ids", "left", "made", "transport", "wheel")

    def __init__(self, wheel: "Wheel") -> None:
        self.wheel = wheel
        self._parser = httptools.HttpRequestParser(self)
        self._body, self._target = b"", b""
        self.left = self.made = 0
        self.ids = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.left = 0

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._body, self._target = b"", b""

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        if not self._body:
            answer = {b"/v1/models": MODELS, b"/metrics": METRICS}.get(self._target, b"{}")
            self.transport.write(JSON_HEAD % len(answer) + answer)
        elif b'"stream":true' not in self._body and b'"stream": true' not in self._body:
            self.transport.write(WHOLE)
        else:
            body = orjson.loads(self._body)
            self.ids, self.left, self.made = bool(body.get("return_token_ids")), int(body["max_tokens"]), 0
            self.transport.write(STREAM_HEAD + self.event())
            if self.left:
                self.wheel.add(self)

    def event(self) -> bytes:
        """The next event, stamped with the time."""
        self.left -= 1
        self.made += 1
        finish = b"null" if self.left else b'"length"'
        prompt = b"[1,2,3,4,5]" if self.ids and self.made == 1 else b"null"
        event = EVENT % (time.monotonic_ns(), finish, prompt, b"[%d]" % self.made if self.ids else b"null")
        return b"%x\r\n%b\r\n" % (len(event), event) + (b"" if self.left else DONE)


class Wheel:
    """Gives every stream its turn once per period, spread over `PHASES` ticks."""

    def __init__(self, rate: float) -> None:
        self._period_s = 1.0 / rate
        self._phases: list[list[Stub]] = [[] for _ in range(PHASES)]
        self._next: deque[int] = deque(range(PHASES))

    def add(self, stream: Stub) -> None:
        self._phases[self._next[-1]].append(stream)
        self._next.rotate(1)

    async def turn(self) -> None:
        """Run for ever."""
        loop = asyncio.get_running_loop()
        due, phase = loop.time(), 0
        while True:
            due += self._period_s / PHASES
            await asyncio.sleep(max(0.0, due - loop.time()))
            alive = []
            for stream in self._phases[phase]:
                if stream.left > 0:
                    stream.transport.write(stream.event())
                    alive.append(stream)
            self._phases[phase] = alive
            phase = (phase + 1) % PHASES


async def serve(port: int, rate: float) -> None:
    """Serve until killed."""
    wheel = Wheel(rate)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Stub(wheel), "127.0.0.1", port, backlog=4096)
    turning = loop.create_task(wheel.turn())
    async with server:
        await asyncio.gather(server.serve_forever(), turning)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rate", type=float, default=20.0)
    given = parser.parse_args()
    uvloop.run(serve(given.port, given.rate))
