"""One JSON line per request: who, what, where, how long, never the prompt or the answer."""

import os
import time
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import orjson

if TYPE_CHECKING:
    from recovery.frontdoor.exchange import Exchange


class AccessLog:
    """Lines gathered in memory and appended a few times a second, so that no request waits for a disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[bytes] = []

    def note(self, exchange: "Exchange") -> None:
        """Add a request that has ended."""
        request, now = exchange.request, perf_counter()
        line = {
            "at": time.time(),
            "id": request.request_id.decode("latin-1"),
            "client": exchange.client_key,
            "method": request.method.decode("latin-1"),
            "path": request.path.decode("latin-1"),
            "model": exchange.pool.name,
            "replica": exchange.answered_by,
            "status": exchange.status,
            "stream": exchange.stream,
            "attempts": exchange.attempts,
            "continued": exchange.continued,
            "held_s": round(exchange.held_s, 3) if exchange.held_s else 0,
            "first_s": round(exchange.first_at - request.began, 4) if exchange.first_at else None,
            "took_s": round(now - request.began, 4),
            "bytes_in": exchange.size,
            "events": exchange.tokens,
        }
        self._lines.append(orjson.dumps(line))

    def flush(self) -> None:
        """Append what has gathered; opened anew each time, so that a rotated file is let go. A full disk loses lines, not requests."""
        if not self._lines:
            return
        data, self._lines = b"\n".join(self._lines) + b"\n", []
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
            try:
                os.write(descriptor, data)
            finally:
                os.close(descriptor)
        except OSError:
            return
