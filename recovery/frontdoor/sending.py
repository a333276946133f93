"""The way of a request to a replica: chosen, reached over a kept or a new connection, sent, the first time or again."""

from time import perf_counter
from typing import TYPE_CHECKING

from recovery.core import breaker as breakers
from recovery.frontdoor import endings, waiting
from recovery.frontdoor.fleet import Endpoint
from recovery.frontdoor.relay import ContinuedRelay
from recovery.frontdoor.resume import CannotResumeError, NothingLeftError, next_body
from recovery.frontdoor.upstream import Upstream, dial, idle_connection

if TYPE_CHECKING:
    from recovery.frontdoor.exchange import Exchange


def attempt(x: "Exchange") -> None:
    """Send to the best replica there is now, or wait for one."""
    if x.over:
        return
    door = x.door
    now = door.now()
    if x.crashes or x.pending:
        if len(x.crashes) >= 2:
            endings.refuse_poison(x)
            return
        if len(x.crashes) + len(x.pending) >= 2:
            waiting.hold(x, now)  # whether the last one was a crash is known in a moment
            return
    endpoint = x.pool.choose(now, x.visited)
    if endpoint is None:
        waiting.nobody(x, now)
        return
    if x.attempts:
        if x.attempts >= door.settings.max_attempts:
            endings.give_up(x)
            return
        wait_s = door.budget.retry(now)
        if wait_s > 0:
            x.timer = door.loop.call_later(wait_s, _send, x, endpoint)
            return
    _send(x, endpoint)


def _send(x: "Exchange", endpoint: Endpoint) -> None:
    x.timer = None
    if not endpoint.up:  # it was chosen a while ago
        x.attempt()
        return
    now = x.door.now()
    x.attempts += 1
    x.serial += 1
    if endpoint.busy == 0:
        endpoint.last_byte = now
    x.endpoint, x.run = endpoint, endpoint.run_key
    endpoint.busy += 1
    endpoint.used += 1
    if endpoint.breaker is not breakers.CLOSED:
        endpoint.breaker = breakers.passing(endpoint.breaker)
    if x.started:
        x.door.spawn(_resume(x, endpoint, x.serial))
    else:
        _connect(x, endpoint)


def _connect(x: "Exchange", endpoint: Endpoint) -> None:
    connection = idle_connection(endpoint, x.door.now() - x.door.settings.upstream_idle_s)
    if connection is not None:
        _go(x, connection)
    else:
        x.door.spawn(dial_and_go(x, endpoint, x.serial))


async def dial_and_go(x: "Exchange", endpoint: Endpoint, serial: int) -> None:
    """Send over a new connection, unless the request is elsewhere by then (its `serial` has moved on)."""
    try:
        connection = await dial(endpoint, x.door.loop, x.door.settings.connect_timeout_s)
    except OSError as error:
        if x.serial == serial:
            x.failed("refused", str(error))
        else:
            x.door.looks.suspect(endpoint, "cannot connect")
        return
    if x.serial == serial:
        _go(x, connection)
    else:
        connection.close()


async def _resume(x: "Exchange", endpoint: Endpoint, serial: int) -> None:
    """Build the request for the rest of the stream, then send it."""
    record = x.record
    assert record is not None
    try:
        path, payload = await next_body(record, endpoint, x.door.looks)
    except CannotResumeError as error:
        if x.serial == serial:
            x.leave()
            endings.cut(x, str(error))
        return
    except NothingLeftError:
        if x.serial == serial:
            x.leave()
            ContinuedRelay(x, x.door.settings.max_event_bytes, record).finish_for_length()
        return
    except OSError as error:
        if x.serial == serial:
            x.failed("refused", str(error))
        return
    if x.serial == serial:
        x.path, x.payload = path, payload
        x.continued += 1
        x.pool.meter.continued["text" if record.trouble == "no_ids" else "ids"] += 1
        _connect(x, endpoint)


def _go(x: "Exchange", connection: Upstream) -> None:
    x.connection = connection
    x.sent_at = x.last_at = perf_counter()
    connection.carry(x)
    x.write_request(connection, connection.endpoint)
