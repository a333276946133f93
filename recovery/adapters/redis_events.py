"""
The streams: the changes of the fleet, and each model's history.

A reader waits in slices of a second on an ordinary connection, so a Redis that freezes or vanishes while nobody
writes is noticed within the socket time-out, however long the caller wants to wait.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from recovery.adapters.redis_keys import Keys
from recovery.adapters.redis_url import SOCKET_TIMEOUT_S
from recovery.core.change import Change

START = "0-0"
SLICE_S = SOCKET_TIMEOUT_S / 2
"""Longest wait inside Redis: below the socket time-out, above a busy loop."""
PAGE = 1_000

Entry = tuple[bytes, Mapping[bytes, bytes]]
T = TypeVar("T")


class Streams:
    """Reading and waiting on the streams of one store. Raises redis-py's errors; the store translates them."""

    def __init__(self, client: Any, keys: Keys, changes_kept: int) -> None:
        self._client = client
        self._keys = keys
        self._changes_kept = changes_kept

    def changes_after(self, position: str, block_s: float) -> tuple[Change, ...] | None:
        """
        Return the changes after `position`; None when some of them may be gone.

        A position is safe as long as its own entry is still there: what is newer than it is there then as well. From
        the very start it is, as long as nothing can have been trimmed.
        """

        def look() -> tuple[Change, ...] | None:
            with self._client.pipeline(transaction=True) as pipe:
                pipe.xrange(self._keys.changes, position, position, count=1)
                pipe.xlen(self._keys.changes)
                pipe.xrange(self._keys.changes, f"({position}", "+", count=PAGE)
                known, length, entries = pipe.execute()
            if not known and (position != START or length >= self._changes_kept):
                return None
            return tuple(_change(entry) for entry in entries)

        return self._wait(self._keys.changes, position, block_s, look)

    def events_after(self, model: str, after: str, count: int, block_s: float = 0.0) -> tuple[dict[str, Any], ...]:
        """Return the first `count` events after an id ("$": from now on), waiting for one up to `block_s`."""
        key = self._keys.events(model)
        position = last_id(self._client.xrevrange(key, count=1)) if after == "$" else after

        def look() -> tuple[dict[str, Any], ...]:
            return tuple(_event(entry) for entry in self._client.xrange(key, f"({position}", "+", count=count))

        return self._wait(key, position, block_s, look)

    def newest_events(self, model: str, count: int) -> tuple[dict[str, Any], ...]:
        """Return the newest events of a model, oldest first."""
        newest = self._client.xrevrange(self._keys.events(model), count=count) if count > 0 else []
        return tuple(_event(entry) for entry in reversed(newest))

    def _wait(self, key: str, position: str, block_s: float, look: Callable[[], T]) -> T:
        # The blocking read is only a wait: what it woke for is read by `look`, which sees a gap that arose meanwhile.
        until = time.monotonic() + block_s
        while (found := look()) == ():
            left_s = until - time.monotonic()
            if left_s <= 0:
                break
            self._client.xread({key: position}, count=1, block=max(1, int(min(left_s, SLICE_S) * 1000)))
        return found


def last_id(newest: Iterable[Entry]) -> str:
    """Return the id of the one entry given, the start of a stream where there is none."""
    return next((entry[0].decode() for entry in newest), START)


def _change(entry: Entry) -> Change:
    entry_id, raw = entry
    fields = {name.decode(): value.decode() for name, value in raw.items()}
    return Change(
        id=entry_id.decode(),
        instance=fields["instance"],
        model=fields["model"],
        version=int(fields["version"]),
        state=fields["state"],
        run=int(fields["run"]) if fields["run"] else None,
        base_url=fields["base_url"] or None,
        routable=fields["routable"] == "1",
    )


def _event(entry: Entry) -> dict[str, Any]:
    entry_id, fields = entry
    return {
        "id": entry_id.decode(),
        "at": int(entry_id.split(b"-")[0]) / 1000,  # the id is Redis' clock in milliseconds
        "kind": fields[b"kind"].decode(),
        "text": fields[b"text"].decode(),
        "data": json.loads(fields[b"data"]),
    }
