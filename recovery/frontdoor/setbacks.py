"""What a failure at a replica means for the request, and for the replica."""

import math
from time import perf_counter
from typing import TYPE_CHECKING, Literal

from recovery.core import breaker as breakers
from recovery.frontdoor import endings
from recovery.frontdoor.fleet import Endpoint
from recovery.frontdoor.record import Record
from recovery.frontdoor.reports import Happened
from recovery.frontdoor.wire import error_body

if TYPE_CHECKING:
    from recovery.frontdoor.exchange import Answer, Exchange

Failure = Literal["refused", "broken", "error", "overloaded", "stall", "frozen"]
"""
`refused`: never arrived. `broken`: the connection ended. `error`: the replica said 5xx or sent an error event.
`overloaded`: vLLM's 503, its queue is full. `stall`: a stream fell silent. `frozen`: the whole replica did.
"""


def failed(x: "Exchange", failure: Failure, why: str, answer_body: bytes | None = None, answer: "Answer | None" = None) -> None:
    """The attempt has failed: note it against the replica, and try elsewhere."""
    door, connection = x.door, x.connection
    stayed_s = perf_counter() - x.sent_at if connection is not None else 0.0
    endpoint = x.leave()
    if endpoint is None or x.over:
        return
    now = door.now()
    if connection is not None:
        if x.ended:
            connection.let_go(True)
        elif not connection.dead:
            connection.abort()
    until = math.inf if failure in ("overloaded", "stall") or (failure == "error" and not x.started) else now
    x.visited[endpoint] = (endpoint.epoch, until)
    if failure == "refused":
        x.attempts -= 1
        door.looks.suspect(endpoint, why)
    elif failure in ("broken", "error"):
        _may_be_a_crash(x, endpoint, failure, stayed_s)
        door.looks.suspect(endpoint, why)
    if failure not in ("refused", "overloaded", "frozen"):
        endpoint.breaker = breakers.failed(endpoint.breaker, now, door.settings.breaker)
    elif endpoint.breaker is not breakers.CLOSED:
        endpoint.breaker = breakers.abandoned(endpoint.breaker)
    if answer_body is not None:
        answer = (500, b"content-type: application/json\r\n", answer_body)
    x.answer = answer or x.answer
    x.pool.meter.retried[failure] += 1
    x.relay, x.parts, x.kept, x.ended = None, [], 0, False
    _again(x, failure)


def _again(x: "Exchange", failure: Failure) -> None:
    """Try the request, or the rest of it, elsewhere."""
    if x.flowing and x.started:
        x.client.abort()  # half of a body without events: nothing can mend that but the client's own retry
        return
    if not x.can_repeat():
        endings.end_with_error(x, 502, error_body(502, f"the replica failed ({failure}) and the body was too large to keep"))
        return
    record = x.record
    if x.started:
        trouble = (record.trouble if record is not None else "unknown") or None
        if trouble == "no_ids" and x.pool.settings.allow_text_continuation:
            trouble = None
        if trouble is not None:
            endings.cut(x, trouble)
            return
    elif record is not None and x.body is not None and x.kind is not None:
        x.record = Record(x.kind, x.body, x.door.settings.replay_max_tokens, x.pool.settings.reasoning)
    x.attempt()


def _may_be_a_crash(x: "Exchange", endpoint: Endpoint, failure: Failure, stayed_s: float) -> None:
    """
    Remember which run the request was at, until a look has told whether that run crashed.

    A replica that vanished within `poison_min_s` of getting the request was not killed by it; one that the
    view had already taken out was stopped on purpose.
    """
    said_so = failure == "error"
    if endpoint.spec.routable and x.run == endpoint.run_key and (said_so or stayed_s >= x.door.settings.poison_min_s):
        x.pending.add(x.run)
        endpoint.awaiting.append((x, x.run))


def stall(x: "Exchange", now: float) -> None:
    """The stream is silent for too long: continue it elsewhere if there is an elsewhere, and say so once."""
    endpoint = x.endpoint
    if endpoint is None:
        return
    if not x.stalled:
        x.stalled = True
        endpoint.meter.stalls += 1
        x.door.reports.happened(Happened("stall", x.pool.name, endpoint.spec.instance, endpoint.spec.run))
    if _elsewhere(x, endpoint, now):
        failed(x, "stall", "silent")


def freeze(x: "Exchange", endpoint: Endpoint) -> None:
    """The whole replica is silent: move if there is an elsewhere, else wait until it thaws or dies."""
    if x.endpoint is endpoint and _elsewhere(x, endpoint, x.door.now()):
        failed(x, "frozen", "replica frozen")


def _elsewhere(x: "Exchange", endpoint: Endpoint, now: float) -> bool:
    if x.started and (x.record is None or x.record.trouble not in (None, "no_ids")):
        return False  # nobody could go on with it: waiting is the better chance
    return x.can_repeat() and any(e is not endpoint for e in x.pool.usable(now))
