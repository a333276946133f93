"""What a request does while no replica can take it: wait in line, or be served by another model."""

from typing import TYPE_CHECKING

import orjson

from recovery.frontdoor import endings
from recovery.frontdoor.reports import Happened

if TYPE_CHECKING:
    from recovery.frontdoor.exchange import Exchange

SSE_LINES = b"content-type: text/event-stream; charset=utf-8\r\n"


def nobody(x: "Exchange", now: float) -> None:
    """No replica to send to: wait, hand over to the fallback model, or give up."""
    if not x.started and x.answer is not None and next(x.pool.usable(now), None) is not None:
        endings.give_up(x)
    elif x.pool.hopeless():
        fall_back(x)
    else:
        hold(x, now)


def hold(x: "Exchange", now: float) -> None:
    """Have the request wait in its model's queue, or refuse it when there is no room or its time is up."""
    settings = x.pool.settings
    if x.deadline is None:
        x.deadline = now + settings.hold_timeout_s - x.held_s
        if x.held_s == 0.0:
            x.pool.meter.held += 1
    left_s = x.deadline - now
    held = x.pool.held
    if left_s <= 0:
        _too_late(x)
        return
    if not held.add(x):
        victim = held.surplus(x.client_key)
        if victim is not None:
            refuse_for_room(victim)
        if victim is None or not held.add(x):
            refuse_for_room(x)
            return
    x.held_at = now
    x.timer = x.door.loop.call_later(left_s, expire, x)


def refuse_for_room(x: "Exchange") -> None:
    """Refuse: the queue is full."""
    x.stop_timer()
    endings.refuse(x, "hold_full", f"too many requests wait for a replica of {x.pool.name}")


def expire(x: "Exchange") -> None:
    """Refuse: it has waited for its whole time."""
    x.timer = None
    if x.pool.held.remove(x):
        _too_late(x)


def _too_late(x: "Exchange") -> None:
    timeout_s = x.pool.settings.hold_timeout_s
    endings.refuse(x, "hold_timeout", f"no replica of {x.pool.name} became ready within {timeout_s:g} s")


def woken(x: "Exchange") -> None:
    """Look again (taken out of the queue by the caller)."""
    x.stop_timer()
    now = x.door.now()
    x.held_s += now - x.held_at
    x.attempt()
    if x.endpoint is not None:
        x.deadline = None


def comment(x: "Exchange") -> None:
    """Tell a waiting stream's client that it is still being served. Commits the 200."""
    if not x.committed:
        x.committed = True
        x.client.begin(200, SSE_LINES + x.own_lines())
    x.client.send(b": waiting for a replica\n\n")


def fall_back(x: "Exchange") -> None:
    """Have another model serve a request all of whose replicas are failed; no model is asked twice for one request."""
    name = x.pool.settings.fallback
    pool = x.door.fleet.by_name.get(name) if name is not None else None
    if x.started and pool is not None:
        endings.cut(x, "model")
    elif pool is None or pool is x.pool or pool.name in x.fallbacks or x.body is None:
        endings.refuse(x, "failed", f"all replicas of {x.pool.name} are failed", hopeless=True)
    else:
        x.fallbacks.append(x.pool.name)
        x.pool.meter.fallback[pool.name] += 1
        x.door.reports.happened(Happened("fallback", x.pool.name, data={"by": pool.name}))
        x.pool, x.visited, x.answer = pool, {}, None
        x.body["model"] = pool.names[0]
        x.payload = orjson.dumps(x.body)
        x.plan()
        x.attempt()
