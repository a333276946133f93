"""
A replica's event stream on its way to the client: whole events only, each looked at once.

A stream is complete only with a finish reason: `[DONE]` alone proves nothing, and `abort` or an error event with
a 5xx code means the replica failed (VLLM-FACTS, e).
"""

from typing import TYPE_CHECKING, Any

import orjson

from recovery.core.continuation import expected_choices
from recovery.frontdoor.record import Record

if TYPE_CHECKING:
    from recovery.frontdoor.exchange import Exchange

DONE = b"data: [DONE]\n\n"
FAILED_FINISH = ("abort", "error")


class Relay:
    """Splits a body into events and passes them on. This one takes them as they are: streams of unknown make."""

    __slots__ = ("_limit", "_tail", "exchange", "finished", "out", "over")

    def __init__(self, exchange: "Exchange", max_event_bytes: int) -> None:
        self.exchange, self._limit = exchange, max_event_bytes
        self._tail = bytearray()
        self.out: list[bytes] = []
        self.finished = self.over = False

    def feed(self, data: bytes) -> None:
        """Take bytes of the body."""
        tail = self._tail
        if 0 < data.find(b"\n\n") == len(data) - 2 and not tail and b"\r" not in data:
            if not self.over:  # one whole event, as nearly every read brings
                self._event(data[:-2])
            return
        if tail or b"\r" in data:
            start = max(0, len(tail) - 1)
            tail += data
            if b"\r" in data or (start < len(tail) and tail[start] == 13):
                tail[:], start = tail.replace(b"\r\n", b"\n"), 0
            whole = tail.rfind(b"\n\n", start)
            if whole >= 0:
                data = bytes(tail[:whole])
                del tail[: whole + 2]
        else:
            whole = data.rfind(b"\n\n")
            if whole + 2 != len(data):
                tail += data[whole + 2 :] if whole >= 0 else data
            data = data[:whole]
        if whole < 0:
            if len(tail) > self._limit:
                self._fail("event too large")
            return
        for event in data.split(b"\n\n"):
            if event and not self.over:
                self._event(event)

    def _event(self, event: bytes) -> None:
        self.out.append(event + b"\n\n")

    def flush(self) -> None:
        """Pass on what has gathered; the first time, this is the answer's beginning."""
        if self.out and not self.over:
            data = b"".join(self.out)
            self.out.clear()
            self.exchange.pass_on(data)

    def ends(self) -> None:
        """The replica has ended the body in order: for a stream of unknown make that is all there is to know."""
        self.flush()
        self._complete()

    def _complete(self, last: bytes = b"") -> None:
        self.over = True
        self.out.append(last)
        data = b"".join(self.out)
        self.out.clear()
        self.exchange.complete(data)

    def _fail(self, why: str, answer: bytes | None = None) -> None:
        if self.exchange.started:
            self.flush()  # events before the failure are recorded as passed on
        self.over = True
        self.out.clear()
        self.exchange.failed("error", why, answer)


class AnswerRelay(Relay):
    """Chat and completion streams: watched for finish reasons and failures, events passed on as they are."""

    __slots__ = ("_done", "_expected", "_finishes", "_waiting")

    def __init__(self, exchange: "Exchange", max_event_bytes: int) -> None:
        super().__init__(exchange, max_event_bytes)
        self._expected, self._finishes = expected_choices(exchange.body or {}), 0
        self._done = False
        self._waiting: list[bytes] = []
        """Events without content (a role, ids of a character that is still pending): they go with the next that has some."""

    def _event(self, event: bytes) -> None:
        if event.startswith(b"data: "):
            payload = event[6:]
        elif event.startswith(b"data:"):
            payload = event[5:]
        else:
            self.out.append(event + b"\n\n")
            return
        if payload == b"[DONE]":
            self._done = True
            return
        try:
            answer = orjson.loads(payload)
            choices = answer.get("choices")
        except (orjson.JSONDecodeError, AttributeError):
            self.out.append(event + b"\n\n")
            return
        if not choices and "error" in answer:
            self._error(event, payload, answer["error"])
            return
        for choice in choices or ():
            reason = choice.get("finish_reason")
            if reason is not None:
                if reason in FAILED_FINISH:
                    self._fail(f"finish_reason {reason}")
                    return
                self._finishes += 1
                self.finished = self._finishes >= self._expected
        self._answer(event, answer, choices)

    def _error(self, event: bytes, payload: bytes, error: Any) -> None:
        code = error.get("code") if isinstance(error, dict) else None
        if isinstance(code, int) and 400 <= code < 500:  # the client's fault, found late: the answer is complete
            self.finished = True
            self.out.append(event + b"\n\n")
        else:
            self._fail("error event", payload)

    def _answer(self, event: bytes, answer: dict[str, Any], choices: list[dict[str, Any]] | None) -> None:
        self._pass(event + b"\n\n", not choices or self.exchange.started or any(map(_carries, choices)))

    def _pass(self, event: bytes, carries: bool) -> None:
        if not carries:
            self._waiting.append(event)
            return
        if self._waiting:
            self.out += self._waiting
            self._waiting.clear()
        self.out.append(event)
        self.exchange.event_seen()

    def ends(self) -> None:
        if self.over:
            return
        if self.finished or (self._done and self._finishes and self._expected > 1):
            self.out += self._waiting
            self._complete(DONE if self._done else b"")
        else:
            self._fail("ended without a finish reason")


class RecordingRelay(AnswerRelay):
    """Streams that may be continued: the ids the door asked for are kept, and taken out unless the client wants them."""

    __slots__ = ("record",)

    def __init__(self, exchange: "Exchange", max_event_bytes: int, record: Record) -> None:
        super().__init__(exchange, max_event_bytes)
        self.record = record

    def _answer(self, event: bytes, answer: dict[str, Any], choices: list[dict[str, Any]] | None) -> None:
        record = self.record
        if not choices:
            self._pass(event + b"\n\n", True)
            return
        choice = choices[0]
        chat = record.kind == "chat"
        holder = answer if chat else choice
        if record.id is None:
            record.open(answer, holder.get("prompt_token_ids"))
        ids = choice.get("token_ids")
        if chat:
            delta = choice.get("delta") or {}
            carries = record.watch_delta(delta)
            text = delta.get("content") or ""
        else:
            text = choice.get("text") or ""
            carries = bool(text)
        if record.recording:
            record.note(ids, text)
        if not record.wants_ids:
            holder.pop("prompt_token_ids", None)
            choice.pop("token_ids", None)
            event = b"data: %b\n\n" % orjson.dumps(answer)
        else:
            event += b"\n\n"
        self._pass(event, carries or choice.get("finish_reason") is not None)


class ContinuedRelay(AnswerRelay):
    """The rest of a stream from `/v1/completions`, made to look as if it had never been cut."""

    __slots__ = ("record",)

    def __init__(self, exchange: "Exchange", max_event_bytes: int, record: Record) -> None:
        super().__init__(exchange, max_event_bytes)
        self.record = record

    def _answer(self, event: bytes, answer: dict[str, Any], choices: list[dict[str, Any]] | None) -> None:
        record = self.record
        if not choices:
            if answer.get("usage"):
                answer["usage"] = record.usage(answer["usage"])
            self._pass(b"data: " + orjson.dumps(self._dressed(answer, [])) + b"\n\n", True)
            return
        choice = choices[0]
        ids, text, reason = choice.get("token_ids"), choice.get("text") or "", choice.get("finish_reason")
        if ids is None and text:
            self.record.forget("no_ids")
        stop = None
        if record.scanner is not None:
            text, stop = record.scanner.feed(text, reason is not None)
        if record.recording:
            record.note(ids, text)
        if stop is not None:
            reason = "stop"
        shown = self._choice(text, reason, stop if stop is not None else choice.get("stop_reason"), ids)
        if answer.get("usage"):
            answer["usage"] = record.usage(answer["usage"])
        self._pass(b"data: " + orjson.dumps(self._dressed(answer, [shown])) + b"\n\n", bool(text) or reason is not None)
        if stop is not None:
            self.finish_early()

    def finish_early(self) -> None:
        """End the answer here: a stop string was met, or no token is left. The replica is cut off by `complete`."""
        self.finished = True
        options = self.record.body.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage"):
            usage = self._dressed({"usage": self.record.usage({})}, [])
            self.out.append(b"data: " + orjson.dumps(usage) + b"\n\n")
        self._complete(DONE)

    def finish_for_length(self) -> None:
        """End the answer of a stream that was cut after its last token."""
        self.out.append(b"data: " + orjson.dumps(self._dressed({}, [self._choice("", "length", None, [])])) + b"\n\n")
        self.finish_early()

    def _choice(self, text: str, reason: str | None, stop: Any, ids: list[int] | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0}
        if self.record.kind == "chat":
            choice["delta"] = {"content": text}
        else:
            choice["text"] = text
        choice |= {"logprobs": None, "finish_reason": reason}
        if reason is not None or self.record.kind == "completion":
            choice["stop_reason"] = stop
        if self.record.wants_ids:
            choice["token_ids"] = [*self.record.unsent, *(ids or ())]
            self.record.unsent = []
        return choice

    def _dressed(self, answer: dict[str, Any], choices: list[dict[str, Any]]) -> dict[str, Any]:
        record = self.record
        kind = "chat.completion.chunk" if record.kind == "chat" else "text_completion"
        own = {"id": record.id, "object": kind, "created": record.created, "model": record.model, "choices": choices}
        return {**own, **{k: v for k, v in answer.items() if k not in own and k != "prompt_token_ids"}}


class RetoldRelay(AnswerRelay):
    """The rest of a stream that was continued by text: the same kind of events, under the first answer's name."""

    __slots__ = ("record",)

    def __init__(self, exchange: "Exchange", max_event_bytes: int, record: Record) -> None:
        super().__init__(exchange, max_event_bytes)
        self.record = record

    def _answer(self, event: bytes, answer: dict[str, Any], choices: list[dict[str, Any]] | None) -> None:
        record = self.record
        answer |= {"id": record.id, "created": record.created, "model": record.model}
        for choice in choices or ():
            delta = choice.get("delta")
            text = delta.get("content") if isinstance(delta, dict) else choice.get("text")
            if text:
                record.text += text.encode("utf-8", "surrogatepass")
                record.events += 1
            if isinstance(delta, dict):
                delta.pop("role", None)
        carries = not choices or any(map(_carries, choices))
        self._pass(b"data: " + orjson.dumps(answer) + b"\n\n", carries)


def _carries(choice: dict[str, Any]) -> bool:
    if choice.get("text") or choice.get("finish_reason") is not None:
        return True
    delta = choice.get("delta")
    return isinstance(delta, dict) and any(value for name, value in delta.items() if name != "role")
