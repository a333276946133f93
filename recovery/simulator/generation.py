"""Completions and chat: the tokens as they come, the answer in OpenAI's shape."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

from recovery.simulator.link import Link
from recovery.simulator.metrics import Metrics
from recovery.simulator.tokens import Decoder, decode
from recovery.simulator.wanted import Json, Wanted

ENGINE_DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


@dataclass(slots=True, eq=False)
class Choice:
    """One text in the making."""

    index: int
    id: str
    prompt: list[int]
    stops: tuple[str, ...]
    keep_stop: bool
    began: float
    decoder: Decoder = field(default_factory=Decoder)
    held: str = ""
    made: int = 0
    received: int = 0
    first: float = 0.0
    last: float = 0.0
    done: bool = False

    def feed(self, tokens: list[int], reason: str | None) -> tuple[str, list[int], str | None, str | None]:
        """Text, ids, finish reason and the stop string that ended it; text that may begin a stop string is held back."""
        self.made += len(tokens)
        if not self.stops:
            return self.decoder.feed(tokens), tokens, reason, None
        for count, token in enumerate(tokens, 1):
            self.held += self.decoder.feed([token])
            found = min(((at, stop) for stop in self.stops if (at := self.held.find(stop)) >= 0), default=None)
            if found:
                at, stop = found
                self.made -= len(tokens) - count
                return self.held[: at + (len(stop) if self.keep_stop else 0)], tokens[:count], "stop", stop
        kept = 0 if reason else max(map(len, self.stops)) - 1
        cut = max(0, len(self.held) - kept)
        text, self.held = self.held[:cut], self.held[cut:]
        return text, tokens, reason, None


Event = tuple[Choice, str, list[int], str | None, str | None]


class Sink:
    """Where the reports for one HTTP request arrive."""

    def __init__(self) -> None:
        self._items: deque[tuple[Choice, list[int], str | None]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._failure = ""

    def put(self, choice: Choice, tokens: list[int], reason: str | None) -> None:
        self._items.append((choice, tokens, reason))
        self._wake()

    def fail(self, how: str) -> None:
        """End it: `error` or `abort`."""
        self._failure = self._failure or how
        self._wake()

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> tuple[Choice, list[int], str | None] | str:
        """The next piece, or how it failed."""
        while not self._items:
            if self._failure:
                return self._failure
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._items.popleft()


class Requests:
    """The requests in flight, and the engine's reports on their way to them."""

    def __init__(self, link: Link, metrics: Metrics) -> None:
        self._link = link
        self._metrics = metrics
        self._live: dict[str, tuple[Sink, Choice]] = {}
        self._number = 0
        self._backlog: list[Json] | None = None
        link.on_report = self._report

    def __len__(self) -> int:
        return len(self._live)

    def next_number(self) -> int:
        self._number += 1
        return self._number

    @property
    def count(self) -> int:
        """Generation requests since the start."""
        return self._number

    def add(self, sink: Sink, choice: Choice, message: Json) -> None:
        self._live[choice.id] = (sink, choice)
        self._link.send({"t": "add", "id": choice.id, "prompt": choice.prompt, **message})

    def drop(self, choice: Choice, reason: str) -> None:
        """The request ended here: tell the engine if it did not know, and count it."""
        if self._live.pop(choice.id, None):
            self._link.send({"t": "abort", "id": choice.id})
            self._count(choice, reason)

    def fail_all(self, how: str) -> None:
        """Every request in flight ends with an error or an abort."""
        for sink, choice in list(self._live.values()):
            self._live.pop(choice.id, None)
            self._count(choice, how)
            sink.fail(how)

    def hold(self, held: bool) -> None:
        """While held, reports of the engine are not looked at: the whole server hangs."""
        if held:
            self._backlog = self._backlog if self._backlog is not None else []
            return
        backlog, self._backlog = self._backlog or [], None
        for report in backlog:
            self._report(report)

    def _count(self, choice: Choice, reason: str) -> None:
        self._metrics.request_finished(reason, choice.began, choice.first, time.monotonic(), len(choice.prompt), choice.made)

    def _report(self, report: Json) -> None:
        if self._backlog is not None:
            self._backlog.append(report)
            return
        metrics = self._metrics
        metrics.running, metrics.waiting, metrics.kv_usage = report["r"], report["w"], report["kv"]
        if not report["s"]:
            return
        metrics.iteration_tokens.observe(report["p"] + report["n"])
        metrics.prompt_tokens += report["p"]
        metrics.generation_tokens += report["n"]
        now = time.monotonic()
        for name, tokens, reason in report["o"]:
            found = self._live.get(name)
            if not found:
                continue
            sink, choice = found
            if choice.first:
                metrics.inter_token.observe((now - choice.last) / len(tokens))
            else:
                choice.first = now
                metrics.ttft.observe(now - choice.began)
            choice.last = now
            choice.received += len(tokens)
            sink.put(choice, tokens, reason)
            if reason:
                del self._live[name]
                metrics.request_finished(reason, choice.began, choice.first, now, len(choice.prompt), choice.received)


class Failed(Exception):
    """The engine died (`error`) or the server was told to stop (`abort`)."""


class Generation:
    """The choices of one request, being generated."""

    def __init__(self, wanted: Wanted, requests: Requests) -> None:
        self.wanted = wanted
        self.number = requests.next_number()
        self._requests = requests
        self._sink = Sink()
        self.id = f"{'chatcmpl' if wanted.chat else 'cmpl'}-{self.number:08x}{time.time_ns() & 0xFFFFFFFF:08x}"
        self.created = int(time.time())
        now = time.monotonic()
        self.choices = [
            Choice(index * wanted.n + number, f"{self.id}-{index * wanted.n + number}", prompt, wanted.stops, wanted.keep_stop, now)
            for index, prompt in enumerate(wanted.prompts)
            for number in range(wanted.n)
        ]

    def start(self) -> None:
        """Hand every choice to the engine."""
        for choice in self.choices:
            self._requests.add(self._sink, choice, {**self.wanted.engine, "choice": choice.index % self.wanted.n})

    def stop(self) -> None:
        """Whatever still runs is of no use to anybody."""
        for choice in self.choices:
            self._requests.drop(choice, "abort")

    async def events(self) -> AsyncIterator[Event]:
        """Each piece of each choice, until all are done; `Failed` when the engine or the server ends first."""
        left = len(self.choices)
        while left:
            item = await self._sink.get()
            if isinstance(item, str):
                raise Failed(item)
            choice, tokens, reason = item
            if choice.done:
                continue
            text, tokens, reason, stop = choice.feed(tokens, reason)
            if reason:
                choice.done = True
                left -= 1
                self._requests.drop(choice, reason)
            yield choice, text, tokens, reason, stop

    @property
    def made(self) -> int:
        """Tokens so far, over all choices."""
        return sum(choice.made for choice in self.choices)

    def usage(self) -> Json:
        prompt = sum(map(len, self.wanted.prompts))
        return {"prompt_tokens": prompt, "total_tokens": prompt + self.made, "completion_tokens": self.made, "prompt_tokens_details": None}

    def chunks(self, event: Event, first: bool) -> Iterator[Json]:
        """The stream's chunks for one piece."""
        yield from self._chat_chunks(event, first) if self.wanted.chat else self._text_chunks(event, first)

    def _text_chunks(self, event: Event, first: bool) -> Iterator[Json]:
        choice, text, tokens, reason, stop = event
        if first and self.wanted.echo:
            text, tokens = decode(choice.prompt) + text, [*choice.prompt, *tokens]
        row: Json = {"index": choice.index, "text": text, "logprobs": None, "finish_reason": reason, "stop_reason": stop}
        row["prompt_token_ids"] = choice.prompt if first and self.wanted.token_ids else None
        row["token_ids"] = tokens if self.wanted.token_ids else None
        yield self._chunk([row])

    def _chat_chunks(self, event: Event, first: bool) -> Iterator[Json]:
        choice, text, tokens, reason, stop = event
        if first:
            chunk = self._chunk([self._delta(choice, {"role": "assistant", "content": None if self.wanted.tool else ""})])
            chunk["prompt_token_ids"] = choice.prompt if self.wanted.token_ids else None
            yield chunk
        delta: Json = {"content": text}
        if self.wanted.tool:
            call: Json = {"index": 0, "function": {"arguments": text}}
            if first:
                call = {
                    "id": self._call_id(choice),
                    "type": "function",
                    "index": 0,
                    "function": {"name": self.wanted.tool, "arguments": ""},
                }
                yield self._chunk([self._delta(choice, {"tool_calls": [call]})])
                call = {"index": 0, "function": {"arguments": self._opening() + text}}
            if reason:
                call["function"]["arguments"] += '"}'
                reason = "tool_calls"
            delta = {"tool_calls": [call]}
        row = self._delta(choice, delta)
        row |= {"finish_reason": reason, "stop_reason": stop, "token_ids": tokens if self.wanted.token_ids else None}
        yield self._chunk([row])

    def usage_chunk(self) -> Json:
        """The last chunk with `include_usage`."""
        return {**self._chunk([]), "usage": self.usage()}

    def abort_chunk(self) -> Json:
        """How a stream ends at SIGTERM, unless it gets an error event."""
        rows = [{"index": choice.index, "finish_reason": "abort"} for choice in self.choices if not choice.done]
        key: Json = {"delta": {"content": ""}} if self.wanted.chat else {"text": ""}
        return self._chunk([{**row, **key, "logprobs": None, "stop_reason": None} for row in rows])

    def answer(self, events: Sequence[Event]) -> Json:
        """The whole answer of a request that does not stream."""
        rows = []
        for choice in self.choices:
            mine = [event for event in events if event[0] is choice]
            text = "".join(event[1] for event in mine)
            tokens = [token for event in mine for token in event[2]]
            row: Json = {"index": choice.index, "logprobs": None, "finish_reason": mine[-1][3], "stop_reason": mine[-1][4]}
            row["token_ids"] = tokens if self.wanted.token_ids else None
            if self.wanted.chat:
                row["message"] = {"role": "assistant", "content": text, "refusal": None, "tool_calls": []}
                if self.wanted.tool:
                    function = {"name": self.wanted.tool, "arguments": f'{self._opening()}{text}"}}'}
                    row["message"] |= {
                        "content": None,
                        "tool_calls": [{"id": self._call_id(choice), "type": "function", "function": function}],
                    }
                    row["finish_reason"] = "tool_calls"
            else:
                row["text"] = (decode(choice.prompt) if self.wanted.echo else "") + text
                row["prompt_token_ids"] = choice.prompt if self.wanted.token_ids else None
            rows.append(row)
        kind = "chat.completion" if self.wanted.chat else "text_completion"
        body: Json = {"id": self.id, "object": kind, "created": self.created, "model": self.wanted.model, "choices": rows}
        if self.wanted.chat:
            body["prompt_token_ids"] = self.wanted.prompts[0] if self.wanted.token_ids else None
        return {**body, "usage": self.usage()}

    def _chunk(self, rows: list[Json]) -> Json:
        kind = "chat.completion.chunk" if self.wanted.chat else "text_completion"
        usage = self.usage() if self.wanted.usage_each else None
        return {"id": self.id, "object": kind, "created": self.created, "model": self.wanted.model, "choices": rows, "usage": usage}

    def _delta(self, choice: Choice, delta: Json) -> Json:
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None, "token_ids": None}

    def _call_id(self, choice: Choice) -> str:
        return f"chatcmpl-tool-{self.number:08x}{choice.index:04x}"

    def _opening(self) -> str:
        return f'{{"{self.wanted.tool_field}": "'
