"""
One request from its arrival to the end of its answer: sent, held, retried, continued, or refused.

No task per request and nothing shared but counters: every step is a callback on the loop thread. Until the first
event has been passed on (`started`), any failure begins anew on another replica; after it, the rest is asked for.
"""

import asyncio
import math
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import orjson

from recovery.core import breaker as breakers
from recovery.core.continuation import REASONS, Kind
from recovery.frontdoor.fleet import Endpoint, Pool, RunKey
from recovery.frontdoor.poison import fingerprint
from recovery.frontdoor.record import Record
from recovery.frontdoor.relay import AnswerRelay, ContinuedRelay, RecordingRelay, Relay, RetoldRelay
from recovery.frontdoor.reports import Happened
from recovery.frontdoor.resume import CannotResumeError, NothingLeftError, next_body
from recovery.frontdoor.upstream import Upstream, dial, idle_connection
from recovery.frontdoor.wire import error_body, error_event

if TYPE_CHECKING:
    from recovery.frontdoor.client import Client, Request
    from recovery.frontdoor.door import Door

Failure = Literal["refused", "broken", "error", "overloaded", "stall", "frozen"]
Answer = tuple[int, list[bytes], bytes]
SSE_LINES = [b"content-type: text/event-stream; charset=utf-8\r\n"]
FLOWING = (b"audio/", b"video/", b"application/octet-stream", b"application/x-ndjson")
"""Kinds of answers that are passed on as they come: nobody wants to wait for their end."""


class Exchange:
    """One request. `client_key` and `size` are what the hold queue looks at."""

    __slots__ = (
        "_deadline",
        "_held_at",
        "_kept",
        "_parts",
        "_pending",
        "_serial",
        "_timer",
        "answer",
        "answered_by",
        "attempts",
        "body",
        "client",
        "client_key",
        "committed",
        "connection",
        "continued",
        "crashes",
        "door",
        "ended",
        "endpoint",
        "fallbacks",
        "first_at",
        "flowing",
        "held_s",
        "kind",
        "last_at",
        "over",
        "path",
        "payload",
        "pool",
        "record",
        "relay",
        "request",
        "run",
        "sent_at",
        "size",
        "stalled",
        "started",
        "status",
        "stream",
        "tokens",
        "visited",
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
        self.run: RunKey = ("", "")
        self.visited: dict[Endpoint, tuple[int, float]] = {}
        self.crashes: set[RunKey] = set()
        self._pending: set[RunKey] = set()
        self.fallbacks: list[str] = []
        self.attempts = self.tokens = self.continued = self._serial = self.status = self._kept = 0
        self.started = self.committed = self.over = self.ended = self.stalled = self.flowing = False
        self._parts: list[bytes] = []
        self._deadline: float | None = None
        self._held_at = self.held_s = self.first_at = self.last_at = self.sent_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.answered_by = ""

    # --- choosing and sending ---

    def start(self) -> None:
        """Begin; the answer goes to the client by itself."""
        door = self.door
        door.live.add(self)
        door.budget.request()
        if len(door.poison):
            self.crashes |= door.poison.crashes(self._mark(), door.now())
        self._plan()
        self.attempt()

    def _plan(self) -> None:
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
        if self.over:
            return
        door = self.door
        if len(self.crashes) >= 2:
            self._refuse_poison()
            return
        now = door.now()
        if len(self.crashes) + len(self._pending) >= 2:
            self._hold(now)  # whether the last one was a crash is known in a moment
            return
        endpoint = self.pool.choose(now, self.visited)
        if endpoint is None:
            self._nobody(now)
            return
        if self.attempts:
            if self.attempts >= door.settings.max_attempts:
                self._give_up()
                return
            wait_s = door.budget.retry(now)
            if wait_s > 0:
                self._timer = door.loop.call_later(wait_s, self._send, endpoint)
                return
        self._send(endpoint)

    def _send(self, endpoint: Endpoint) -> None:
        self._timer = None
        if not endpoint.up:  # it was chosen a while ago
            self.attempt()
            return
        now = self.door.now()
        self.attempts += 1
        self._serial += 1
        if endpoint.busy == 0:
            endpoint.last_byte = now
        self.endpoint, self.run = endpoint, endpoint.run_key
        endpoint.busy += 1
        endpoint.used += 1
        if endpoint.breaker is not breakers.CLOSED:
            endpoint.breaker = breakers.passing(endpoint.breaker)
        if self.started:
            self.door.spawn(self._resume(endpoint, self._serial))
        else:
            self._connect(endpoint)

    def _connect(self, endpoint: Endpoint) -> None:
        connection = idle_connection(endpoint, self.door.now() - self.door.settings.upstream_idle_s)
        if connection is not None:
            self._go(connection)
        else:
            self.door.spawn(self._dial(endpoint, self._serial))

    async def _dial(self, endpoint: Endpoint, serial: int) -> None:
        try:
            connection = await dial(endpoint, self.door.loop, self.door.settings.connect_timeout_s)
        except OSError as error:
            if self._serial == serial:
                self.failed("refused", str(error))
            else:
                self.door.looks.suspect(endpoint, "cannot connect")
            return
        if self._serial == serial:
            self._go(connection)
        else:
            connection.close()

    async def _resume(self, endpoint: Endpoint, serial: int) -> None:
        """Build the request for the rest of the stream, then send it."""
        record = self.record
        assert record is not None
        try:
            path, payload = await next_body(record, endpoint, self.door.looks)
        except CannotResumeError as error:
            if self._serial == serial:
                self._leave()
                self.cut(str(error))
            return
        except NothingLeftError:
            if self._serial == serial:
                self._leave()
                ContinuedRelay(self, self.door.settings.max_event_bytes, record).finish_for_length()
            return
        except OSError as error:
            if self._serial == serial:
                self.failed("refused", str(error))
            return
        if self._serial == serial:
            self.path, self.payload = path, payload
            self.continued += 1
            self.pool.meter.continued["text" if record.trouble == "no_ids" else "ids"] += 1
            self._connect(endpoint)

    def _go(self, connection: Upstream) -> None:
        endpoint = connection.endpoint
        self.connection = connection
        self.sent_at = self.last_at = perf_counter()
        connection.carry(self)
        self.write_request(connection, endpoint)

    def write_request(self, connection: Upstream, endpoint: Endpoint) -> None:
        """Send the request's bytes."""
        request, attempts = self.request, self.attempts
        request_id = request.request_id if attempts == 1 else b"%b-%d" % (request.request_id, attempts)
        start = (request.method, b" ", endpoint.prefix, self.path, b" HTTP/1.1\r\n", *request.lines)
        end = (b"x-request-id: ", request_id, b"\r\n", endpoint.head, b"content-length: %d\r\n\r\n" % len(self.payload), self.payload)
        connection.write(b"".join((*start, *end)))

    def _leave(self) -> Endpoint | None:
        """Stop being at a replica."""
        endpoint, self.endpoint, self.connection = self.endpoint, None, None
        self._serial += 1
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
        """Bytes of the answer's body."""
        if self.relay is not None:
            self.relay.feed(data)
            return
        self._parts.append(data)
        self._kept += len(data)
        if self.flowing or self._kept > self.door.settings.max_answer_bytes:
            self.flowing = True
            kept, self._parts = b"".join(self._parts), []
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
        status, body = connection.status, b"".join(self._parts)
        answer = (status, connection.lines, body)
        if status == 503:
            self.failed("overloaded", "503", answer=answer)
        elif breakers.counts_against(status):
            self.failed("error", str(status), answer=answer)
        elif self.started:  # the rest of a stream was asked for, and refused
            self._success(connection)
            self.cut("refused")
        else:
            self._success(connection)
            self._deliver(answer)

    def _deliver(self, answer: Answer) -> None:
        status, lines, body = answer
        self.status = status
        if self.committed:
            self._end_with_error(status, body)
            return
        if status < 500:
            self.first_at = self.first_at or perf_counter()
        self.client.reply(status, [*lines, *self._own_lines()], body)
        self._finish(answered=status < 500)

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
                client.begin(connection.status, [*connection.lines, *self._own_lines()])
        client.send(data)
        if client.paused and self.connection is not None:
            self.connection.transport.pause_reading()

    def event_seen(self) -> None:
        """One event with content is about to be passed on."""
        now = perf_counter()
        endpoint = self.endpoint
        if endpoint is not None:
            endpoint.meter.tokens += 1
            if self.tokens:
                endpoint.meter.inter_token.observe(now - self.last_at)
        self.tokens += 1
        self.last_at = now
        self.stalled = False

    def complete(self, last: bytes) -> None:
        """The answer is whole: pass on its last bytes and end it."""
        if last:
            self.pass_on(last)
        if not self.committed and self.connection is not None:
            self.committed = True
            self.client.begin(self.connection.status, [*self.connection.lines, *self._own_lines()])
        self.status = self.status or 200
        self._success(self.connection)
        self.client.end()
        self._finish(answered=True)

    def _success(self, connection: Upstream | None) -> None:
        """End the stay at a replica that did its work."""
        endpoint = self._leave()
        if endpoint is not None:
            self.answered_by = endpoint.spec.instance
            endpoint.breaker = breakers.succeeded(endpoint.breaker)
        if connection is not None:
            if self.ended:
                connection.let_go(True)
            else:
                connection.abort()

    def _own_lines(self) -> list[bytes]:
        lines = [b"x-request-id: %b\r\n" % self.request.request_id]
        if self.fallbacks:
            lines.append(b"x-recovery-fallback: %b\r\n" % self.pool.name.encode("latin-1", "replace"))
        return lines

    # --- failures ---

    def stale_connection(self, connection: Upstream) -> None:
        """A kept connection had been closed by the replica before our request reached it: use a new one, nothing has failed."""
        endpoint = connection.endpoint
        self.connection = None
        if self.endpoint is endpoint and self.can_repeat():
            self.door.spawn(self._dial(endpoint, self._serial))
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

    def failed(self, failure: Failure, why: str, answer_body: bytes | None = None, answer: Answer | None = None) -> None:
        """The attempt has failed: note it against the replica, and try elsewhere."""
        door, connection = self.door, self.connection
        stayed_s = perf_counter() - self.sent_at if connection is not None else 0.0
        endpoint = self._leave()
        if endpoint is None or self.over:
            return
        now = door.now()
        if connection is not None:
            if self.ended:
                connection.let_go(True)
            elif not connection.dead:
                connection.abort()
        until = math.inf if failure in ("overloaded", "stall") or (failure == "error" and not self.started) else now
        self.visited[endpoint] = (endpoint.epoch, until)
        if failure == "refused":
            self.attempts -= 1
            door.looks.suspect(endpoint, why)
        elif failure in ("broken", "error"):
            self._may_be_a_crash(endpoint, failure, stayed_s)
            door.looks.suspect(endpoint, why)
        if failure not in ("refused", "overloaded", "frozen"):
            endpoint.breaker = breakers.failed(endpoint.breaker, now, door.settings.breaker)
        elif endpoint.breaker is not breakers.CLOSED:
            endpoint.breaker = breakers.abandoned(endpoint.breaker)
        if answer_body is not None:
            answer = (500, [b"content-type: application/json\r\n"], answer_body)
        self.answer = answer or self.answer
        self.pool.meter.retried[failure] += 1
        self.relay, self._parts, self._kept, self.ended = None, [], 0, False
        self._again(failure)

    def _again(self, failure: Failure) -> None:
        """Try the request, or the rest of it, elsewhere."""
        if self.flowing and self.started:
            self.client.abort()  # half of a body without events: nothing can mend that but the client's own retry
            return
        if not self.can_repeat():
            self._end_with_error(502, error_body(502, f"the replica failed ({failure}) and the body was too large to keep"))
            return
        record = self.record
        if self.started:
            trouble = (record.trouble if record is not None else "unknown") or None
            if trouble == "no_ids" and self.pool.settings.allow_text_continuation:
                trouble = None
            if trouble is not None:
                self.cut(trouble)
                return
        elif record is not None and self.body is not None and self.kind is not None:
            self.record = Record(self.kind, self.body, self.door.settings.replay_max_tokens, self.pool.settings.reasoning)
        self.attempt()

    def _may_be_a_crash(self, endpoint: Endpoint, failure: Failure, stayed_s: float) -> None:
        """
        Remember which run the request was at, until a look has told whether that run crashed.

        A replica that vanished within `poison_min_s` of getting the request was not killed by it; one that the
        view had already taken out was stopped on purpose.
        """
        said_so = failure == "error"
        if endpoint.spec.routable and self.run == endpoint.run_key and (said_so or stayed_s >= self.door.settings.poison_min_s):
            self._pending.add(self.run)
            endpoint.awaiting.append((self, self.run))

    def crashed_at(self, run: RunKey) -> None:
        """That run has crashed while this request was in flight at it."""
        self._pending.discard(run)
        self.crashes.add(run)
        if self.over and self.status >= 500:
            self.door.poison.note(self._mark(), frozenset(self.crashes), self.door.now())

    def cleared_of(self, run: RunKey) -> None:
        """That run has not crashed."""
        self._pending.discard(run)

    def stall(self, now: float) -> None:
        """The stream is silent for too long: continue it elsewhere if there is an elsewhere, and say so once."""
        endpoint = self.endpoint
        if endpoint is None:
            return
        if not self.stalled:
            self.stalled = True
            endpoint.meter.stalls += 1
            self.door.reports.happened(Happened("stall", self.pool.name, endpoint.spec.instance, endpoint.spec.run))
        if self._elsewhere(endpoint, now):
            self.failed("stall", "silent")

    def freeze(self, endpoint: Endpoint) -> None:
        """The whole replica is silent: move if there is an elsewhere, else wait until it thaws or dies."""
        if self.endpoint is endpoint and self._elsewhere(endpoint, self.door.now()):
            self.failed("frozen", "replica frozen")

    def _elsewhere(self, endpoint: Endpoint, now: float) -> bool:
        if self.started and (self.record is None or self.record.trouble not in (None, "no_ids")):
            return False  # nobody could go on with it: waiting is the better chance
        return self.can_repeat() and any(e is not endpoint for e in self.pool.usable(now))

    # --- waiting, and giving up ---

    def _nobody(self, now: float) -> None:
        """No replica to send to: wait, hand over to the fallback model, or give up."""
        if not self.started and self.answer is not None and next(self.pool.usable(now), None) is not None:
            self._give_up()
        elif self.pool.hopeless():
            self._fall_back()
        else:
            self._hold(now)

    def _hold(self, now: float) -> None:
        settings = self.pool.settings
        if self._deadline is None:
            self._deadline = now + settings.hold_timeout_s - self.held_s
            if self.held_s == 0.0:
                self.pool.meter.held += 1
        left_s = self._deadline - now
        held = self.pool.held
        if left_s <= 0:
            self._refuse("hold_timeout", f"no replica of {self.pool.name} became ready within {settings.hold_timeout_s:g} s")
            return
        if not held.add(self):
            victim = held.surplus(self.client_key)
            if victim is not None:
                victim.refuse_for_room()
            if victim is None or not held.add(self):
                self.refuse_for_room()
                return
        self._held_at = now
        self._timer = self.door.loop.call_later(left_s, self._expire)

    def refuse_for_room(self) -> None:
        """Refuse: the queue is full."""
        self._stop_timer()
        self._refuse("hold_full", f"too many requests wait for a replica of {self.pool.name}")

    def _expire(self) -> None:
        self._timer = None
        if self.pool.held.remove(self):
            timeout_s = self.pool.settings.hold_timeout_s
            self._refuse("hold_timeout", f"no replica of {self.pool.name} became ready within {timeout_s:g} s")

    def woken(self) -> None:
        """Look again (taken out of the queue by the caller)."""
        self._stop_timer()
        now = self.door.now()
        self.held_s += now - self._held_at
        self.attempt()
        if self.endpoint is not None:
            self._deadline = None

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def comment(self) -> None:
        """Tell a waiting stream's client that it is still being served. Commits the 200."""
        if not self.committed:
            self.committed = True
            self.client.begin(200, [*SSE_LINES, *self._own_lines()])
        self.client.send(b": waiting for a replica\n\n")

    def _fall_back(self) -> None:
        name = self.pool.settings.fallback
        pool = self.door.fleet.by_name.get(name) if name is not None else None
        if self.started and pool is not None:
            self.cut("model")
        elif pool is None or pool is self.pool or pool.name in self.fallbacks or self.body is None:
            self._refuse("failed", f"all replicas of {self.pool.name} are failed", hopeless=True)
        else:
            self.fallbacks.append(self.pool.name)
            self.pool.meter.fallback[pool.name] += 1
            self.door.reports.happened(Happened("fallback", self.pool.name, data={"by": pool.name}))
            self.pool, self.visited, self.answer = pool, {}, None
            self.body["model"] = pool.names[0]
            self.body.pop("return_token_ids", None) if self.record is not None and not self.record.wants_ids else None
            self.payload = orjson.dumps(self.body)
            self._plan()
            self.attempt()

    def _refuse(self, reason: str, message: str, hopeless: bool = False) -> None:
        self.pool.meter.refused[reason] += 1
        retry_s = None if hopeless else self.pool.retry_after_s()
        lines = [] if retry_s is None else [b"retry-after: %d\r\n" % retry_s]
        self._end_with_error(503, error_body(503, message, code=reason), lines)

    def _give_up(self) -> None:
        """No replica is left to try: pass on what the last one said."""
        if self.started:
            self._end_with_error(502, error_body(502, "every replica failed"))
        elif self.answer is not None:
            status, lines, body = self.answer
            if status == 503 and not any(line.startswith(b"retry-after:") for line in lines):
                lines = [*lines, b"retry-after: 1\r\n"]
            self._deliver((status, lines, body))
        else:
            self._end_with_error(502, error_body(502, "every replica failed"))

    def _refuse_poison(self) -> None:
        mark, now = self._mark(), self.door.now()
        self.door.poison.note(mark, frozenset(self.crashes), now)
        self.pool.meter.poisoned += 1
        runs = sorted(f"{instance}:{run}" for instance, run in self.crashes)
        self.door.reports.happened(Happened("poison", self.pool.name, data={"request": mark.hex(), "runs": runs}))
        message = "this request was in flight when two servers crashed, so it is not sent to a third"
        self._end_with_error(422, error_body(422, message, code="poison_request"))

    def cut(self, reason: str) -> None:
        """End a stream that can't be continued, with an error event that says why."""
        self.pool.meter.cut[reason] += 1
        message = f"the replica failed in mid-stream, and the answer cannot be continued: {REASONS.get(reason, reason)}"
        self._end_with_error(502, error_body(502, message, code=f"stream_cut_{reason}"))

    def _end_with_error(self, status: int, body: bytes, lines: list[bytes] | None = None) -> None:
        self.status = status
        if self.committed:
            error = orjson.loads(body).get("error", {}) if body[:1] == b"{" else {}
            self.client.send(error_event(status, str(error.get("message", "failed")), error.get("code")))
            self.client.end()
        else:
            kind = b"content-type: application/json\r\n"
            self.client.reply(status, [kind, *(lines or ()), *self._own_lines()], body)
        self._finish(answered=False)

    def end_for_shutdown(self) -> None:
        """End the answer now: the door's time to drain is over."""
        connection = self.connection
        self._leave()
        if connection is not None:
            connection.abort()
        self.pool.held.remove(self)
        self._end_with_error(503, error_body(503, "the front door is shutting down"), [b"retry-after: 1\r\n"])

    def _mark(self) -> bytes:
        return fingerprint(self.request.target, self.request.body)

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
        endpoint = self._leave()
        if connection is not None:
            connection.abort()
        if endpoint is not None:
            endpoint.breaker = breakers.abandoned(endpoint.breaker)
        self._stop_timer()
        self.pool.held.remove(self)
        self.pool.meter.lost_clients += 1
        self.status = 499
        if self.crashes:
            self.door.poison.note(self._mark(), frozenset(self.crashes), self.door.now())
        self._finish(answered=False)

    def _finish(self, answered: bool) -> None:
        if self.over:
            return
        self.over = True
        self._stop_timer()
        door = self.door
        door.live.discard(self)
        if answered and (self.crashes or len(door.poison)):
            door.poison.acquit(self._mark())
        elif self.status == 502 and self.crashes:
            door.poison.note(self._mark(), frozenset(self.crashes), door.now())
        door.ended(self)
        self.client.exchange_over(self)
