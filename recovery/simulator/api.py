"""The endpoints, as vLLM 0.32 answers them."""

import array
import asyncio
import base64
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any
from urllib.parse import parse_qs

import orjson

from recovery.simulator import lines
from recovery.simulator.faults import ENGINE_FAULTS, FAULT_NAMES, Faults
from recovery.simulator.generation import ENGINE_DEAD, Failed, Generation, Requests
from recovery.simulator.http import Exchange, status_line
from recovery.simulator.link import Link
from recovery.simulator.metrics import Metrics
from recovery.simulator.options import Options
from recovery.simulator.tokens import decode, encode, fold, render_chat
from recovery.simulator.wanted import ApiError, Json, read_request

VERSION = "0.32.0"
DONE = b"data: [DONE]\n\n"
EMBEDDING_SIZE = 8
SCHEDULE_AFTER_SHUTDOWN = "cannot schedule new futures after shutdown"
BUSY = "The engine is currently busy and cannot accept new requests. Please try again later."

Act = Callable[[Json], None]


def embed(text: str | list[int]) -> list[float]:
    """The embedding of a text or of its ids: numbers in [-1, 1) that depend on them alone."""
    tokens = encode(text) if isinstance(text, str) else text
    number = fold(tokens)[0]
    return [((number >> (8 * place)) & 255) / 128 - 1 for place in range(EMBEDDING_SIZE)]


class Api:
    """Everything a client can ask. `act` carries out what POST /admin/fault orders at once (a crash, an exit)."""

    def __init__(self, options: Options, link: Link, metrics: Metrics, started: float, act: Act) -> None:
        self._options = options
        self._link = link
        self._metrics = metrics
        self._started = started
        self._act = act
        self._asleep = 0
        self._unhung = asyncio.Event()
        self.requests = Requests(link, metrics)
        self.errored = False
        self.draining = False
        self.load = 0
        dev = os.environ.get("VLLM_SERVER_DEV_MODE") == "1"
        self._routes: dict[str, tuple[str, Callable[[Exchange], Awaitable[None]]]] = {
            "/health": ("GET", self._health),
            "/ping": ("GET POST", self._health),
            "/version": ("GET", self._version),
            "/v1/models": ("GET", self._models),
            "/metrics": ("GET", self._show_metrics),
            "/load": ("GET", self._show_load),
            "/v1/completions": ("POST", self._completions),
            "/v1/chat/completions": ("POST", self._chat),
            "/v1/embeddings": ("POST", self._embeddings),
            "/tokenize": ("POST", self._tokenize),
            "/detokenize": ("POST", self._detokenize),
        }
        if dev:
            self._routes |= {
                "/sleep": ("POST", self._sleep),
                "/wake_up": ("POST", self._control),
                "/pause": ("POST", self._control),
                "/resume": ("POST", self._control),
                "/is_sleeping": ("GET", self._ask_state),
                "/is_paused": ("GET", self._ask_state),
            }
        if options.admin:
            self._routes |= {"/admin/state": ("GET", self._admin_state), "/admin/fault": ("POST", self._admin_fault)}

    @property
    def _faults(self) -> Faults:
        return self._options.faults

    async def handle(self, exchange: Exchange) -> None:
        """Answer one request."""
        began = time.monotonic()
        while self._faults.hang and not exchange.path.startswith("/admin/"):
            self._unhung.clear()
            await self._unhung.wait()
        methods, route = self._routes.get(exchange.path, ("", self._missing))
        tracked = exchange.path.startswith("/v1/") and exchange.method == "POST"
        self.load += tracked
        try:
            if exchange.method not in methods.split() and methods:
                _reply(exchange, 405, {"detail": "Method Not Allowed"})
            elif exchange.path.startswith("/v1") and not self._authorized(exchange):
                _reply(exchange, 401, {"error": "Unauthorized"})
            else:
                await route(exchange)
        except ApiError as error:
            _reply(exchange, error.code, error.body)
        finally:
            self.load -= tracked
        self._record(exchange, time.monotonic() - began)

    def changed(self) -> None:
        """Faults were changed: wake what a hang held, tell the engine."""
        self.requests.hold(self._faults.hang)
        if not self._faults.hang:
            self._unhung.set()
        values = asdict(self._faults)
        self._link.send({"t": "faults", "values": {name: values[name] for name in ENGINE_FAULTS}})

    def _authorized(self, exchange: Exchange) -> bool:
        keys = self._options.api_key
        return not keys or exchange.headers.get("authorization", "") in [f"Bearer {key}" for key in keys]

    def _record(self, exchange: Exchange, seconds: float) -> None:
        handler = exchange.path if exchange.path in self._routes else "none"
        key = (handler, exchange.method, f"{exchange.status // 100}xx")
        self._metrics.http[key] = self._metrics.http.get(key, 0) + 1
        self._metrics.http_duration.observe(seconds)
        if self._options.disable_uvicorn_access_log or exchange.path in self._options.disable_access_log_for_endpoints:
            return
        line = f'{exchange.peer} - "{exchange.method} {exchange.path} HTTP/{exchange.version}" {status_line(exchange.status)}'
        lines.write(lines.STDOUT, f"({lines.API} pid={os.getpid()}) INFO:     {line}")

    async def _missing(self, exchange: Exchange) -> None:
        _reply(exchange, 404, {"detail": "Not Found"})

    def _flapped(self) -> bool:
        period = self._faults.flap_s
        return period > 0 and int((time.monotonic() - self._started) / period) % 2 == 1

    async def _health(self, exchange: Exchange) -> None:
        delay = self._faults.busy_health_s if self._faults.busy else self._faults.health_delay_s
        if delay:
            await asyncio.sleep(delay)
        status = 503 if self.errored or self._flapped() else self._faults.health_status or 200
        exchange.reply(status, b"")

    async def _version(self, exchange: Exchange) -> None:
        _reply(exchange, 200, {"version": VERSION})

    async def _models(self, exchange: Exchange) -> None:
        if self._flapped():
            raise ApiError(503, "Service unavailable")
        options = self._options
        card = {"object": "model", "created": int(time.time()), "owned_by": "vllm", "root": options.model, "parent": None}
        cards = [{"id": name, **card, "max_model_len": options.max_model_len, "permission": []} for name in options.names]
        _reply(exchange, 200, {"object": "list", "data": cards})

    async def _show_metrics(self, exchange: Exchange) -> None:
        self._metrics.asleep = self._asleep
        exchange.reply(200, self._metrics.render().encode(), "text/plain; version=1.0.0; charset=utf-8")

    async def _show_load(self, exchange: Exchange) -> None:
        _reply(exchange, 200, {"server_load": self.load if self._options.enable_server_load_tracking else 0})

    async def _sleep(self, exchange: Exchange) -> None:
        level = int(parse_qs(exchange.query).get("level", ["1"])[0])
        await self._link.ask("sleep", level)
        self._asleep = level
        exchange.reply(200, b"")

    async def _control(self, exchange: Exchange) -> None:
        what = exchange.path.removeprefix("/")
        await self._link.ask(what)
        if what == "wake_up":
            self._asleep = 0
        exchange.reply(200, b"")

    async def _ask_state(self, exchange: Exchange) -> None:
        state = await self._link.ask("state")
        name = exchange.path.removeprefix("/")
        _reply(exchange, 200, {name: state[name.removeprefix("is_")]})

    async def _tokenize(self, exchange: Exchange) -> None:
        body = _body(exchange)
        self._check_model(body)
        text = render_chat(body["messages"]) if isinstance(body.get("messages"), list) else str(body.get("prompt", ""))
        tokens = encode(text)
        answer = {"count": len(tokens), "max_model_len": self._options.max_model_len, "tokens": tokens, "token_strs": None}
        _reply(exchange, 200, answer)

    async def _detokenize(self, exchange: Exchange) -> None:
        body = _body(exchange)
        self._check_model(body)
        try:
            _reply(exchange, 200, {"prompt": decode(body["tokens"])})
        except (KeyError, TypeError, IndexError):
            raise ApiError(400, "Input should be a valid list of token ids", param="tokens") from None

    async def _embeddings(self, exchange: Exchange) -> None:
        body = _body(exchange)
        self._check_model(body)
        self._check_serving()
        given = body.get("input")
        inputs: list[Any] = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
        if not all(isinstance(item, str | list) and item for item in inputs):
            raise ApiError(400, "Input should be a non-empty string or list", param="input")
        rows = []
        for index, item in enumerate(inputs):
            vector: list[float] | str = embed(item)
            if body.get("encoding_format") == "base64":
                vector = base64.b64encode(array.array("f", vector).tobytes()).decode()
            rows.append({"index": index, "object": "embedding", "embedding": vector})
        count = sum(len(encode(item) if isinstance(item, str) else item) for item in inputs)
        usage = {"prompt_tokens": count, "total_tokens": count, "completion_tokens": 0, "prompt_tokens_details": None}
        answer = {"id": f"embd-{self.requests.next_number():08x}", "object": "list", "created": int(time.time()), "data": rows}
        _reply(exchange, 200, {**answer, "model": body.get("model") or self._options.name, "usage": usage})

    async def _completions(self, exchange: Exchange) -> None:
        await self._generate(exchange, chat=False)

    async def _chat(self, exchange: Exchange) -> None:
        await self._generate(exchange, chat=True)

    def _check_model(self, body: Json) -> None:
        name = body.get("model")
        if name is not None and name not in self._options.names:
            raise ApiError(404, f"The model `{name}` does not exist.", param="model")

    def _check_serving(self) -> None:
        if self._faults.completion_status:
            raise ApiError(self._faults.completion_status, "A fault was asked for.")
        if self.draining:
            raise ApiError(500, SCHEDULE_AFTER_SHUTDOWN)
        if self.errored:
            raise ApiError(500, ENGINE_DEAD)
        limit = self._options.max_num_queued_reqs
        if limit and len(self.requests) >= limit + self._options.max_num_seqs:
            self._metrics.rejections += 1
            raise ApiError(503, BUSY)

    async def _generate(self, exchange: Exchange, chat: bool) -> None:
        body = _body(exchange)
        self._check_model(body)
        body["model"] = body.get("model") or self._options.name
        try:
            wanted = read_request(body, chat, self._options.max_model_len, self._options.default_max_tokens)
        except (TypeError, KeyError, AttributeError, IndexError, ValueError) as error:
            raise ApiError(400, f"Invalid request: {error!r}") from None
        self._check_serving()
        poison = self._faults.poison
        generation = Generation(wanted, self.requests)
        try:
            generation.start()
            if poison and any(poison in decode(prompt) for prompt in wanted.prompts):
                self._link.send({"t": "crash", "kind": "segv"})
            if wanted.stream:
                await self._stream(exchange, generation)
            else:
                await self._collect(exchange, generation)
        finally:
            generation.stop()

    async def _collect(self, exchange: Exchange, generation: Generation) -> None:
        try:
            events = [event async for event in generation.events()]
        except Failed:
            raise ApiError(500, ENGINE_DEAD) from None
        _reply(exchange, 200, generation.answer(events))

    async def _stream(self, exchange: Exchange, generation: Generation) -> None:
        exchange.start_stream()
        seen: set[int] = set()
        try:
            async for event in generation.events():
                index = event[0].index
                first = index not in seen
                seen.add(index)
                exchange.send(b"".join(_sse(chunk) for chunk in generation.chunks(event, first)))
                await exchange.drain()
                if await self._misbehave(exchange, generation):
                    return
            if generation.wanted.include_usage:
                exchange.send(_sse(generation.usage_chunk()))
        except Failed as failure:
            aborted = str(failure) == "abort" and generation.number % 2 == 0  # vLLM does either; a race there, in turn here
            exchange.send(_sse(generation.abort_chunk() if aborted else ApiError(500, ENGINE_DEAD).body))
        exchange.send(DONE)
        exchange.finish()

    async def _misbehave(self, exchange: Exchange, generation: Generation) -> bool:
        """Stall, cut or break this stream if its turn has come; True when it is over."""
        faults = self._faults
        made = generation.made
        stall = 0 < faults.stall_after_tokens <= made
        cut = 0 < faults.cut_after_tokens <= made
        broken = 0 < faults.error_after_tokens <= made
        if not (stall or cut or broken):
            return False
        if faults.fault_streams == 1:
            faults.stall_after_tokens = faults.cut_after_tokens = faults.error_after_tokens = 0
        faults.fault_streams = max(0, faults.fault_streams - 1)
        if stall:
            await asyncio.Event().wait()
        if cut:
            exchange.cut()
        else:
            exchange.send(_sse(ApiError(500, ENGINE_DEAD).body) + DONE)
            exchange.finish()
        return True

    async def _admin_state(self, exchange: Exchange) -> None:
        options = {name: value for name, value in vars(self._options).items() if name not in {"faults", *FAULT_NAMES} and value is not None}
        state = {
            "pid": os.getpid(),
            "engine_pid": self._link.pid,
            "options": {**options, "api_key": ["..." for _ in self._options.api_key]},
            "faults": asdict(self._faults),
            "requests": self.requests.count,
            "in_flight": len(self.requests),
            "errored": self.errored,
        }
        _reply(exchange, 200, state)

    async def _admin_fault(self, exchange: Exchange) -> None:
        body = _body(exchange)
        actions = {name: body.pop(name) for name in list(body) if name not in FAULT_NAMES}
        try:
            self._faults.change(body)
            self.changed()
            if actions:
                self._act(actions)
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        _reply(exchange, 200, asdict(self._faults))


def _reply(exchange: Exchange, status: int, body: Any) -> None:
    exchange.reply(status, orjson.dumps(body))


def _sse(chunk: Json) -> bytes:
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def _body(exchange: Exchange) -> Json:
    try:
        body = orjson.loads(exchange.body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"JSON decode error: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "Input should be a valid dictionary")
    return body
