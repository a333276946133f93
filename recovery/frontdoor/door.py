"""The door itself: what comes in is checked and given to an exchange; what is late is dealt with in one sweep."""

import asyncio
import math
import os
import time
from collections.abc import Coroutine
from itertools import count
from time import perf_counter
from typing import Any
from urllib.parse import unquote

import orjson

from recovery.core.continuation import Kind
from recovery.core.routing import RetryBudget
from recovery.frontdoor import endings, setbacks, waiting
from recovery.frontdoor.accesslog import AccessLog
from recovery.frontdoor.client import Client
from recovery.frontdoor.exchange import Exchange
from recovery.frontdoor.fleet import Endpoint, Fleet, Pool
from recovery.frontdoor.keys import Account, Keys
from recovery.frontdoor.looks import Looks
from recovery.frontdoor.meters import Meters
from recovery.frontdoor.poison import Poison
from recovery.frontdoor.reports import Activity, NoReports, Reports
from recovery.frontdoor.request import Refusal, Request
from recovery.frontdoor.settings import DoorSettings
from recovery.frontdoor.upload import PREFIX_BYTES, Upload, as_served, model_of
from recovery.frontdoor.view import View
from recovery.frontdoor.wire import error_body

SWEEP_S = 0.2
METHODS = frozenset({b"GET", b"POST", b"PUT", b"PATCH", b"DELETE", b"HEAD", b"OPTIONS"})
KINDS: dict[bytes, Kind] = {b"/v1/chat/completions": "chat", b"/v1/completions": "completion"}
NO_KEY = "a valid API key is needed: Authorization: Bearer ..."
SMALL_BYTES = 64 * 1024
"""A body up to here is read even of a client that is not let in, so that its connection can stay."""


class Door:
    """One front door on one event loop."""

    def __init__(self, settings: DoorSettings, view: View, reports: Reports | None = None) -> None:
        self.settings, self.view = settings, view
        self.loop = asyncio.get_running_loop()
        self.now = self.loop.time
        self.reports: Reports = reports or NoReports()
        self.meters = Meters()
        self.fleet = Fleet(settings, self.meters, self.now, self.reports.happened)
        self.looks = Looks(self.fleet, settings, self.spawn)
        self.looks.froze = self._froze
        self.budget = RetryBudget(settings.retry_ratio, settings.retry_floor_per_s, settings.retry_burst, self.now())
        self.poison = Poison(settings.poison_ttl_s)
        self.keys = Keys(settings.keys_file, self.now()) if settings.keys_file is not None else None
        self.access_log = AccessLog(settings.access_log) if settings.access_log is not None else None
        self.live: set[Exchange] = set()
        self.clients: set[Client] = set()
        self.draining = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._ids = count(1)
        self._id_prefix = os.urandom(8).hex().encode()
        self._began = int(time.time())
        self._next_second = self._next_report = 0.0
        self.fleet.follow(view)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something in the background and keep hold of it."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- clients ---

    def joined(self, client: Client) -> None:
        """A connection has come in."""
        self.clients.add(client)
        self.meters.connections += 1
        if len(self.clients) > self.settings.max_connections:
            self.meters.refused[503] += 1
            client.answer_now(503, error_body(503, "too many connections"), (b"retry-after: 1\r\n",))

    def left(self, client: Client) -> None:
        """A connection has gone."""
        self.clients.discard(client)
        self.meters.connections -= 1

    def admit_head(self, client: Client, request: Request) -> Refusal | None:
        """Judge a request by its headers; what is refused here costs the connection."""
        if request.method not in METHODS:
            return Refusal(405, "method not allowed")
        request.upload = request.media != b"" and b"json" not in request.media and request.path.startswith(b"/v1/")
        limit = self.settings.max_upload_bytes if request.upload else self.settings.max_body_bytes
        if request.length > limit:
            return Refusal(413, f"request body above {limit} bytes")
        small = request.length <= SMALL_BYTES and not request.chunked
        if not small and self.keys is not None and self.keys.find(request.authorization) is None:
            return Refusal(401, NO_KEY)
        if not request.request_id:
            request.request_id = b"%b-%x" % (self._id_prefix, next(self._ids))
        return None

    def admit_body(self, client: Client, request: Request) -> Refusal | None:
        """Judge a body as it grows, and send a large one on before it is whole."""
        if not request.upload:
            limit = self.settings.max_body_bytes
            return Refusal(413, f"request body above {limit} bytes") if request.received > limit else None
        if request.received >= PREFIX_BYTES and client.active is None:
            try:
                self._begin_upload(client, request)
            except Refusal as refusal:
                return refusal
        return None

    def _begin_upload(self, client: Client, request: Request) -> None:
        client.active_request = request
        account = self._account(client, request)
        try:
            pool = self._pool(model_of(request, b"".join(request.parts)), account)
        except Refusal:
            if account is not None:
                account.done()
            raise
        upload = Upload(self, client, request, pool)
        client.account = account
        client.start_body(request, upload, upload)
        upload.start()

    def serve(self, client: Client, request: Request) -> None:
        """Answer one whole request."""
        try:
            self._route(client, request)
        except Refusal as refusal:
            self.meters.refused[refusal.status] += 1
            client.answer_now(refusal.status, refusal.body, refusal.lines, head=request.method == b"HEAD")

    def _route(self, client: Client, request: Request) -> None:
        method, path = request.method, request.path
        head = method == b"HEAD"
        if method == b"OPTIONS":
            client.answer_now(204, b"", (b"allow: GET, POST, HEAD, OPTIONS\r\n",))
        elif path == b"/health" and (head or method == b"GET"):
            client.answer_now(200, b'{"status":"ok"}', head=head)
        elif not path.startswith(b"/v1/"):
            raise Refusal(404, f"no such path: {path.decode('latin-1')}")
        else:
            account = self._account(client, request)
            exchange = None
            try:
                if path == b"/v1/models" or path.startswith(b"/v1/models/"):
                    if not head and method != b"GET":
                        raise Refusal(405, "method not allowed")
                    client.answer_now(200, self._models(path[11:], account), head=head)
                elif head:
                    raise Refusal(405, "method not allowed")
                else:
                    exchange = self._exchange(client, request, account)
            finally:
                if account is not None and exchange is None:
                    account.done()
            if exchange is not None:
                client.account = account
                client.answering(exchange)
                exchange.start()

    def _exchange(self, client: Client, request: Request, account: Account | None) -> Exchange:
        kind, body, payload = KINDS.get(request.path) if request.method == b"POST" else None, None, request.body
        if request.upload or not request.body:
            if kind is not None:
                raise Refusal(400, "a JSON body is needed")
            pool = self._pool(model_of(request, payload), account)
            payload = as_served(request, pool, payload)
        else:
            try:
                body = orjson.loads(request.body)
            except orjson.JSONDecodeError as error:
                raise Refusal(400, f"the body is not JSON: {error}") from error
            if not isinstance(body, dict):
                raise Refusal(400, "the body is not a JSON object")
            model = body.get("model")
            if model is not None and not isinstance(model, str):
                raise Refusal(400, "model is not a string", param="model")
            pool = self._pool(model, account)
        return Exchange(self, client, request, pool, kind, body, payload)

    def _pool(self, model: str | None, account: Account | None) -> Pool:
        if not self.view.known:
            raise Refusal(503, "the fleet is not known yet", "starting", lines=(b"retry-after: 1\r\n",))
        if model is None:
            if len(self.fleet.pools) != 1:
                raise Refusal(400, "model is needed: this fleet has several (in the body, as a form field, or ?model=)", param="model")
            pool = next(iter(self.fleet.pools.values()))
        else:
            found = self.fleet.by_name.get(model)
            if found is None:
                raise Refusal(404, f"The model `{model}` does not exist.", "model_not_found", "model")
            pool = found
        if account is not None and account.entry.models and not {*account.entry.models}.intersection((pool.name, model)):
            raise Refusal(403, f"this key may not use {pool.name}", "model_not_allowed", "model")
        return pool

    def _account(self, client: Client, request: Request) -> Account | None:
        """Return who asks, None where no keys are needed."""
        if self.keys is None:
            return None
        account = self.keys.find(request.authorization)
        if account is None:
            raise Refusal(401, NO_KEY, "invalid_api_key", lines=(b"www-authenticate: Bearer\r\n",))
        wait_s = account.admit(self.now())
        if wait_s is not None:
            lines = (b"retry-after: %d\r\n" % max(1, math.ceil(wait_s)),)
            raise Refusal(429, f"over the limit of {account.entry.name}", "rate_limit_exceeded", lines=lines)
        client.key_name = account.entry.name
        return account

    def _models(self, name: bytes, account: Account | None) -> bytes:
        allowed = set(account.entry.models) if account is not None else set()
        cards = {
            model: {"id": model, "object": "model", "created": self._began, "owned_by": "vllm", **pool.cards.get(model, {})}
            for pool in self.fleet.pools.values()
            for model in pool.names
            if (model == pool.name or self.fleet.by_name.get(model) is pool) and (not allowed or allowed.intersection((model, pool.name)))
        }
        if not name:
            return orjson.dumps({"object": "list", "data": list(cards.values())})
        wanted = unquote(name.decode("latin-1"))
        if wanted not in cards:
            raise Refusal(404, f"The model `{wanted}` does not exist.", "model_not_found", "model")
        return orjson.dumps(cards[wanted])

    # --- exchanges ---

    def ended(self, exchange: Exchange) -> None:
        """Count a request that has ended."""
        meter = exchange.pool.meter.replica(exchange.answered_by)
        meter.codes[exchange.status] += 1
        meter.e2e.observe(perf_counter() - exchange.request.began)
        client = exchange.client
        if client.account is not None:
            client.account.done()
            client.account = None
        if self.access_log is not None:
            self.access_log.note(exchange)

    def _froze(self, endpoint: Endpoint) -> None:
        for connection in list(endpoint.live):
            if connection.exchange is not None:
                setbacks.freeze(connection.exchange, endpoint)

    def drained(self, endpoint: Endpoint) -> None:
        """The last request has left a replica that is out of routing: whoever waits to stop it should know at once."""
        self.reports.activity([self._activity(endpoint, self.now())])

    def _activity(self, endpoint: Endpoint, now: float) -> Activity:
        silent_s = max(0.0, now - endpoint.last_byte) if endpoint.busy else 0.0
        stalled = sum(1 for c in endpoint.live if c.exchange is not None and c.exchange.stalled)
        return Activity(endpoint.spec.instance, endpoint.spec.run, endpoint.busy, endpoint.meter.tokens, silent_s, stalled)

    # --- time ---

    async def sweep(self) -> None:
        """Look after everything that is late, until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = self.now()
            self._sweep_streams(now)
            self.looks.sweep(now)
            for pool in self.fleet.pools.values():
                pool.meter.holding = len(pool.held)
                if len(pool.held) and (pool.hopeless() or next(pool.usable(now), None) is not None):
                    pool.wake()
            if now >= self._next_second:
                self._next_second = now + 1.0
                self._sweep_second(now)
            if now >= self._next_report:
                self._next_report = now + self.settings.report_interval_s
                for endpoint in self.fleet.endpoints():
                    endpoint.meter.in_flight = endpoint.busy
                self.reports.activity([self._activity(endpoint, now) for endpoint in self.fleet.endpoints()])

    def _sweep_streams(self, now: float) -> None:
        clock = perf_counter()
        comments_s = self.settings.hold_comments_s
        for exchange in list(self.live):
            if exchange.connection is None:
                if comments_s and exchange.stream and exchange.endpoint is None and clock - exchange.last_at >= comments_s:
                    exchange.last_at = clock
                    waiting.comment(exchange)
            elif exchange.stream and not exchange.client.paused:
                settings = exchange.pool.settings
                limit_s = settings.inter_token_timeout_s if exchange.started else settings.first_event_timeout_s
                if clock - exchange.last_at > limit_s:
                    setbacks.stall(exchange, now)

    def _sweep_second(self, now: float) -> None:
        for client in list(self.clients):
            client.overdue(now)
        oldest = now - self.settings.upstream_idle_s
        for endpoint in self.fleet.endpoints():
            while endpoint.idle and endpoint.idle[0].idle_since < oldest:
                endpoint.idle.pop(0).close()
        self._bound_replay()
        if self.keys is not None:
            self.keys.refresh(now)
        if self.access_log is not None:
            self.access_log.flush()

    def _bound_replay(self) -> None:
        """Keep what is kept for continuations within its total, at the cost of the longest streams."""
        records = [e.record for e in self.live if e.record is not None and e.record.recording]
        total = sum(record.size for record in records)
        if total > self.settings.replay_total_tokens:
            for record in sorted(records, key=lambda record: -record.size):
                total -= record.size
                record.forget("too_long")
                if total <= self.settings.replay_total_tokens:
                    return

    async def drain(self, timeout_s: float, linger_s: float = 2.0) -> bool:
        """
        Finish what is in flight; True when everything was finished in time.

        Each answer from now on closes its connection. Idle connections stay for `linger_s`, since a client may just be
        sending on one. At the deadline streams end with an error event.
        """
        self.draining = True
        began = self.now()
        while self.now() - began < timeout_s and (self.live or (self.clients and self.now() - began < linger_s)):
            await asyncio.sleep(0.05)
        finished = not self.live
        for exchange in list(self.live):
            endings.end_for_shutdown(exchange)
        for client in list(self.clients):
            client.transport.close()
        for endpoint in self.fleet.endpoints():
            endpoint.close_idle()
        if self.access_log is not None:
            self.access_log.flush()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.sleep(0.05)  # what was just written goes out
        return finished
