"""Requests that were in flight at two crashes: remembered by a hash of their body, so that they are refused when they come again."""

import hashlib
from collections import OrderedDict

from recovery.frontdoor.fleet import RunKey

MAX_ENTRIES = 10_000


def fingerprint(path: bytes, body: bytes) -> bytes:
    """What a request is known by; never the request itself."""
    return hashlib.blake2b(path + b"\0" + body, digest_size=16).digest()


class Poison:
    """
    The crashes each request was in flight at. Bounded in number and time.

    An answer acquits: many clients may send the same body, and one crash each proves nothing. What stays is a
    request that never had an answer.
    """

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self.known: OrderedDict[bytes, tuple[float, frozenset[RunKey]]] = OrderedDict()
        """By the request's mark: when it was noted last, and the crashes."""

    def crashes(self, mark: bytes, now: float) -> frozenset[RunKey]:
        """The crashes that requests like this one were in flight at without ever being answered."""
        at, runs = self.known.get(mark, (0.0, frozenset()))
        if runs and now - at > self._ttl_s:
            del self.known[mark]
            return frozenset()
        return runs

    def note(self, mark: bytes, runs: frozenset[RunKey], now: float) -> None:
        """Remember crashes of a request that ended without an answer."""
        self.known[mark] = (now, self.crashes(mark, now) | runs)
        self.known.move_to_end(mark)
        while len(self.known) > MAX_ENTRIES:
            self.known.popitem(last=False)

    def acquit(self, mark: bytes) -> None:
        """Forget: a request like this one was answered."""
        self.known.pop(mark, None)
