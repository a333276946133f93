"""
One request from its arrival to the end of its answer: sent, held, retried, continued, or refused.

No task per request and nothing shared but counters: every step is a callback on the loop thread. Until the first
event has been passed on (`started`), any failure begins anew on another replica; after it, the rest is asked for.
The way to a replica is in `sending`, what happens without one in `waiting`, after a failure in `setbacks`.
"""

import asyncio
from time import perf_counter
from typing import TYPE_CHECKING, Any

import orjson

from recovery.core import breaker as breakers
from recovery.core.continuation import Kind
from recovery.frontdoor import endings, sending, setbacks, waiting
from recovery.frontdoor.fleet import Endpoint, Pool, RunKey
from recovery.frontdoor.record import Record
from recovery.frontdoor.relay import AnswerRelay, ContinuedRelay, RecordingRelay, Relay, RetoldRelay
from recovery.frontdoor.upstream import Upstream

if TYPE_CHECKING:
    from recovery.frontdoor.client import Client
    from recovery.frontdoor.door import Door
    from recovery.frontdoor.request import Request

Answer = tuple[int, bytes, bytes]
"""Status, header lines, body."""
FLOWING = (b"audio/", b"video/", b"application/octet-stream", b"application/x-ndjson")
"""Kinds of answers that are passed on as they come: nobody wants to wait for their end."""


class Exchange:
    """One request. `client_key` and `size` are what the hold queue looks at."""

    __slots__ = (
        "answer", "answered_by", "attempts", "body", "client", "client_key", "committed", "connection", "continued", "crashes",
        "deadline", "door", "ended", "endpoint", "fallbacks", "first_at", "flowing", "held_at", "held_s", "kept", "kind",
        "last_at", "over", "parts", "path", "payload", "pending", "pool", "record", "relay", "request", "run", "sent_at", "serial",
        "size", "stalled", "started", "status", "stream", "timer", "tokens", "visited",
    )  # fmt: skip

    def __init__(
        self, door: "Door", client: "Client", request: "Request", pool: Pool, kind: Kind | None, body: dict[str, Any] | None, payload: bytes
    ) -> None:
        self.door, self.client, self.request, self.pool, self.kind, self.body = door, client, request, pool, kind, body
        self.path, self.payload = request.target, payload
        self.client_key, self.size = client.key_name, len(payload)
        self.stream = bool(body is not None and body.get("stream"))
        self.record: Record | None = None
        self.relay: Relay | None = None
        self.endpoint: Endpoint | None = None
        self.connection: Upstream | None = None
        self.answer: Answer | None = None
        self.run: RunKey = ("", None, 0)
        self.visited: dict[Endpoint, tuple[int, float]] = {}
        self.crashes: set[RunKey] = set()
        self.pending: set[RunKey] = set()
        self.fallbacks: list[str] = []
        self.attempts = self.tokens = self.continued = self.serial = self.status = self.kept = 0
        self.started = self.committed = self.over = self.ended = self.stalled = self.flowing = False
        self.parts: list[bytes] = []
        self.deadline: float | None = None
        self.held_at = self.held_s = self.first_at = self.last_at = self.sent_at = 0.0
        self.timer: asyncio.TimerHandle | None = None
        self.answered_by = ""

    # --- choosing and sending ---

    def start(self) -> None:
        """Begin; the answer goes to the client by itself."""
        door = self.door
        door.live.add(self)
        door.budget.request()
        if door.poison.known:
            self.crashes |= door.poison.crashes(endings.mark(self), door.now())
        self.plan()
        sending.attempt(self)

    def plan(self) -> None:
        """Ask for token ids where a continuation may need them, and name the model as its servers do."""
        body = self.body
        if body is None:
            return
        name = self.pool.upstream_name(body.get("model"))
        if name is not None and name != body.get("model"):
            body["model"] = name
            self.payload = orjson.dumps(body)
        if not self.stream or self.kind is None:
            return
        record = Record(self.kind, body, self.door.settings.replay_max_tokens, self.pool.settings.reasoning)
        self.record = record
        if record.trouble is None and not record.wants_ids:
            if "return_token_ids" in body:
                self.payload = orjson.dumps({**body, "return_token_ids": True})
            else:
                self.payload = self.payload.rstrip()[:-1] + b',"return_token_ids":true}'

    def attempt(self) -> None:
        """Send to the best replica there is now, or wait for one."""
        sending.attempt(self)

    def write_request(self, connection: Upstream, endpoint: Endpoint) -> None:
        """Send the request's bytes."""
        request, attempts = self.request, self.attempts
        request_id = request.request_id if attempts == 1 else b"%b-%d" % (request.request_id, attempts)
        connection.transport.write(
            b"%b %b%b HTTP/1.1\r\n%bx-request-id: %b\r\n%bcontent-length: %d\r\n\r\n%b"
            % (request.method, endpoint.prefix, self.path, request.lines, request_id, endpoint.head, len(self.payload), self.payload)
        )

    def leave(self) -> Endpoint | None:
        """Stop being at a replica."""
        endpoint, self.endpoint, self.connection = self.endpoint, None, None
        self.serial += 1
        if endpoint is not None:
            endpoint.busy -= 1
            if endpoint.busy == 0 and not endpoint.spec.routable:
                self.door.drained(endpoint)
        return endpoint

    # --- the answer ---

    def answer_begins(self, connection: Upstream) -> None:
        """The replica's headers are there."""
        if connection.event_stream and connection.status == 200:
            self.relay = self._relay()
        elif connection.status < 400 and connection.media.startswith(FLOWING) and not self.started:
            self.flowing = True

    def _relay(self) -> Relay:
        limit, record = self.door.settings.max_event_bytes, self.record
        if self.started and record is not None:
            by_text = record.trouble == "no_ids" or record.prompt is None
            return (RetoldRelay if by_text else ContinuedRelay)(self, limit, record)
        if self.kind is None:
            return Relay(self, limit)
        if record is None or record.trouble is not None:
            return AnswerRelay(self, limit)
        return RecordingRelay(self, limit, record)

    def answer_data(self, data: bytes) -> None:
        """Bytes of the answer's body, unless they are for the relay."""
        self.parts.append(data)
        self.kept += len(data)
        if self.flowing or self.kept > self.door.settings.max_answer_bytes:
            self.flowing = True
            kept, self.parts = b"".join(self.parts), []
            if kept:
                self.pass_on(kept)

    def answer_ends(self, connection: Upstream) -> None:
        """The replica's answer is whole."""
        self.ended = True
        if self.relay is not None:
            self.relay.ends()
            return
        if self.flowing:
            self.complete(b"")
            return
        status, body = connection.status, b"".join(self.parts)
        answer = (status, connection.lines, body)
        if status == 503:
            self.failed("overloaded", "503", answer=answer)
        elif breakers.counts_against(status):
            self.failed("error", str(status), answer=answer)
        elif self.started:  # the rest of a stream was asked for, and refused
            self.success(connection)
            endings.cut(self, "refused")
        else:
            self.success(connection)
            self.deliver(answer)

    def deliver(self, answer: Answer) -> None:
        status, lines, body = answer
        self.status = status
        if self.committed:
            endings.end_with_error(self, status, body)
            return
        if status < 500:
            self.first_at = self.first_at or perf_counter()
        self.client.reply(status, lines + self.own_lines(), body)
        self.finish(answered=status < 500)

    def pass_on(self, data: bytes) -> None:
        """Give the client bytes of the body, before the first of them the head."""
        client = self.client
        if not self.started:
            self.started = True
            self.status = 200
            self.first_at = now = perf_counter()
            endpoint, connection = self.endpoint, self.connection
            if endpoint is not None:
                endpoint.meter.ttft.observe(now - self.request.began)
            if not self.committed and connection is not None:
                self.committed = True
                client.begin(connection.status, connection.lines + self.own_lines())
        client.send(data)
        if client.paused and self.connection is not None:
            self.connection.transport.pause_reading()

    def event_seen(self) -> None:
        """One event with content is about to be passed on."""
        now = perf_counter()
        if self.endpoint is not None:
            meter = self.endpoint.meter
            meter.tokens += 1
            if self.tokens:
                meter.inter_token.observe(now - self.last_at)
        self.tokens += 1
        self.last_at = now
        self.stalled = False

    def complete(self, last: bytes) -> None:
        """The answer is whole: pass on its last bytes and end it."""
        if last:
            self.pass_on(last)
        if not self.committed and self.connection is not None:
            self.committed = True
            self.client.begin(self.connection.status, self.connection.lines + self.own_lines())
        self.status = self.status or 200
        self.success(self.connection)
        self.client.end()
        self.finish(answered=True)

    def success(self, connection: Upstream | None) -> None:
        """End the stay at a replica that did its work."""
        endpoint = self.leave()
        if endpoint is not None:
            self.answered_by = endpoint.spec.instance
            endpoint.breaker = breakers.succeeded(endpoint.breaker)
        if connection is not None:
            if self.ended:
                connection.let_go(True)
            else:
                connection.abort()

    def own_lines(self) -> bytes:
        lines = b"x-request-id: %b\r\n" % self.request.request_id
        if self.fallbacks:
            lines += b"x-recovery-fallback: %b\r\n" % self.pool.name.encode("latin-1", "replace")
        return lines

    # --- failures ---

    def failed(self, failure: setbacks.Failure, why: str, body: bytes | None = None, answer: Answer | None = None) -> None:
        """The attempt has failed: try elsewhere."""
        setbacks.failed(self, failure, why, body, answer)

    def woken(self) -> None:
        """A replica may be there now: called by the queue this request was in."""
        waiting.woken(self)

    def stale_connection(self, connection: Upstream) -> None:
        """A kept connection had been closed by the replica before our request reached it: use a new one, nothing has failed."""
        endpoint = connection.endpoint
        self.connection = None
        if self.endpoint is endpoint and self.can_repeat():
            self.door.spawn(sending.dial_and_go(self, endpoint, self.serial))
        else:
            self.failed("broken", "connection lost")

    def upstream_broke(self, connection: Upstream, why: str) -> None:
        """The connection ended in the middle of the exchange."""
        self.failed("broken", why)

    def upstream_full(self, full: bool) -> None:
        """The replica reads more slowly than the client sends: of interest to uploads only."""

    def can_repeat(self) -> bool:
        """True while the whole request is still here to be sent again."""
        return True

    def crashed_at(self, run: RunKey) -> None:
        """That run has crashed while this request was in flight at it."""
        self.pending.discard(run)
        self.crashes.add(run)
        if self.over and self.status >= 500:
            self.door.poison.note(endings.mark(self), frozenset(self.crashes), self.door.now())

    def cleared_of(self, run: RunKey) -> None:
        """That run has not crashed."""
        self.pending.discard(run)

    def stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    # --- the client ---

    def client_full(self, full: bool) -> None:
        """The client reads more slowly than the replica sends, or has caught up."""
        connection = self.connection
        if connection is not None and not connection.transport.is_closing():
            if full:
                connection.transport.pause_reading()
            else:
                self.last_at = perf_counter()
                connection.transport.resume_reading()

    def abandon(self) -> None:
        """The client is gone: end the request at the replica too."""
        if self.over:
            return
        connection = self.connection
        endpoint = self.leave()
        if connection is not None:
            connection.abort()
        if endpoint is not None:
            endpoint.breaker = breakers.abandoned(endpoint.breaker)
        self.stop_timer()
        self.pool.held.remove(self)
        self.pool.meter.lost_clients += 1
        self.status = 499
        if self.crashes:
            self.door.poison.note(endings.mark(self), frozenset(self.crashes), self.door.now())
        self.finish(answered=False)

    def finish(self, answered: bool) -> None:
        if self.over:
            return
        self.over = True
        if self.timer is not None:
            self.stop_timer()
        self.relay = None  # it holds us
        door = self.door
        door.live.discard(self)
        if answered and (self.crashes or door.poison.known):
            door.poison.acquit(endings.mark(self))
        elif self.status == 502 and self.crashes:
            door.poison.note(endings.mark(self), frozenset(self.crashes), door.now())
        door.ended(self)
        self.client.exchange_over(self)
