"""One JSON line per request: who, what, where, how long, never the prompt or the answer."""

import os
import time
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import orjson

if TYPE_CHECKING:
    from recovery.frontdoor.exchange import Exchange

AT_ONCE = 50
"""Requests whose lines are made and appended together: one by one, each costs several times as much."""
Ended = tuple[float, bytes, str, bytes, bytes, str, str, int, bool, int, int, float, float | None, float, int, int]


class AccessLog:
    """Requests that have ended, gathered for a moment and appended together. Few wait for a disk, and none for long."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ended: list[Ended] = []

    def note(self, x: "Exchange") -> None:
        """Add a request that has ended."""
        request, began = x.request, x.request.began
        first_s, took_s = x.first_at - began if x.first_at else None, perf_counter() - began
        self._ended.append((
            time.time(), request.request_id, x.client_key, request.method, request.path, x.pool.name, x.answered_by, x.status, x.stream,
            x.attempts, x.continued, x.held_s, first_s, took_s, x.size, x.tokens,
        ))  # fmt: skip
        if len(self._ended) >= AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Append what has gathered; opened anew each time, so that a rotated file is let go. A full disk loses lines, not requests."""
        if not self._ended:
            return
        ended, self._ended = self._ended, []
        data = b"".join(map(_line, ended))
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
            try:
                os.write(descriptor, data)
            finally:
                os.close(descriptor)
        except OSError:
            return


def _line(ended: Ended) -> bytes:
    (at, request_id, client, method, path, model, replica, status, stream,
     attempts, continued, held_s, first_s, took_s, size, events) = ended  # fmt: skip
    line = {
        "at": at,
        "id": request_id.decode("latin-1"),
        "client": client,
        "method": method.decode("latin-1"),
        "path": path.decode("latin-1"),
        "model": model,
        "replica": replica,
        "status": status,
        "stream": stream,
        "attempts": attempts,
        "continued": continued,
        "held_s": round(held_s, 3) if held_s else 0,
        "first_s": round(first_s, 4) if first_s is not None else None,
        "took_s": round(took_s, 4),
        "bytes_in": size,
        "events": events,
    }
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
