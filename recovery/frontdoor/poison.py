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
        self._crashes: OrderedDict[bytes, tuple[float, frozenset[RunKey]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._crashes)

    def crashes(self, mark: bytes, now: float) -> frozenset[RunKey]:
        """The crashes that requests like this one were in flight at without ever being answered."""
        at, runs = self._crashes.get(mark, (0.0, frozenset()))
        if runs and now - at > self._ttl_s:
            del self._crashes[mark]
            return frozenset()
        return runs

    def note(self, mark: bytes, runs: frozenset[RunKey], now: float) -> None:
        """Remember crashes of a request that ended without an answer."""
        known = self.crashes(mark, now)
        self._crashes[mark] = (now, known | runs)
        self._crashes.move_to_end(mark)
        while len(self._crashes) > MAX_ENTRIES:
            self._crashes.popitem(last=False)

    def acquit(self, mark: bytes) -> None:
        """Forget: a request like this one was answered."""
        self._crashes.pop(mark, None)
