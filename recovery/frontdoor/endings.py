"""How a request ends without the answer it asked for: refused, given up, cut."""

from typing import TYPE_CHECKING

import orjson

from recovery.core.continuation import REASONS
from recovery.frontdoor.poison import fingerprint
from recovery.frontdoor.reports import Happened
from recovery.frontdoor.wire import error_body, error_event

if TYPE_CHECKING:
    from recovery.frontdoor.exchange import Exchange


def refuse(x: "Exchange", reason: str, message: str, hopeless: bool = False) -> None:
    """Answer 503, with the time after which it is worth coming back if anybody knows it."""
    x.pool.meter.refused[reason] += 1
    retry_s = None if hopeless else x.pool.retry_after_s()
    lines = b"" if retry_s is None else b"retry-after: %d\r\n" % retry_s
    end_with_error(x, 503, error_body(503, message, code=reason), lines)


def give_up(x: "Exchange") -> None:
    """No replica is left to try: pass on what the last one said."""
    if x.started:
        cut(x, "attempts")
    elif x.answer is not None:
        status, lines, body = x.answer
        if status == 503 and b"\r\nretry-after:" not in b"\r\n" + lines:
            lines += b"retry-after: 1\r\n"
        x.deliver((status, lines, body))
    else:
        end_with_error(x, 502, error_body(502, "every replica failed"))


def refuse_poison(x: "Exchange") -> None:
    """Answer 422: the request was in flight at two crashes. It is remembered, and refused at once when it comes again."""
    seen, now = mark(x), x.door.now()
    x.door.poison.note(seen, frozenset(x.crashes), now)
    x.pool.meter.poisoned += 1
    runs = sorted(f"{instance}:{run or ''}#{life}" for instance, run, life in x.crashes)
    x.door.reports.happened(Happened("poison", x.pool.name, data={"request": seen.hex(), "runs": runs}))
    message = "this request was in flight when two servers crashed, so it is not sent to a third"
    end_with_error(x, 422, error_body(422, message, code="poison_request"))


def cut(x: "Exchange", reason: str) -> None:
    """End a stream that can't be continued, with an error event that says why."""
    x.pool.meter.cut[reason] += 1
    message = f"the replica failed in mid-stream, and the answer cannot be continued: {REASONS.get(reason, reason)}"
    end_with_error(x, 502, error_body(502, message, code=f"stream_cut_{reason}"))


def end_with_error(x: "Exchange", status: int, body: bytes, lines: bytes = b"") -> None:
    """End the answer with an error: as a status while the head is still here, as an event after it."""
    x.status = status
    if x.committed:
        error = orjson.loads(body).get("error", {}) if body[:1] == b"{" else {}
        x.client.send(error_event(status, str(error.get("message", "failed")), error.get("code")))
        x.client.end()
    else:
        x.client.reply(status, b"content-type: application/json\r\n" + lines + x.own_lines(), body)
    x.finish(answered=False)


def end_for_shutdown(x: "Exchange") -> None:
    """End the answer now: the door's time to drain is over."""
    connection = x.connection
    x.leave()
    if connection is not None:
        connection.abort()
    x.pool.held.remove(x)
    end_with_error(x, 503, error_body(503, "the front door is shutting down"), b"retry-after: 1\r\n")


def mark(x: "Exchange") -> bytes:
    """What the request is known by when it comes again."""
    return fingerprint(x.request.target, x.request.body)
