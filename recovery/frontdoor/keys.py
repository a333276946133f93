"""
API keys of clients: who may come in, how often, and how much at once.

The file holds SHA-256 digests, never keys: `{"keys": [{"name": "team-a", "sha256": "...", "rate_per_s": 10,
"concurrency": 50, "models": ["qwen"]}]}`. The keys are long and random, so a plain digest is enough.
"""

import hashlib
import hmac
import logging
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recovery.errors import ConfigError

log = logging.getLogger(__name__)


class KeyEntry(BaseModel):
    """One client's key and its limits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=100)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    rate_per_s: float | None = Field(default=None, gt=0, description="requests a second, none = no limit")
    burst: int = Field(default=10, ge=1, description="requests at once above the rate")
    concurrency: int | None = Field(default=None, ge=1, description="requests in flight, none = no limit")
    models: tuple[str, ...] = Field(default=(), description="models it may use, empty = all")


class KeysFile(BaseModel):
    """The file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[KeyEntry, ...]


class Account:
    """One client's key in use."""

    __slots__ = ("_at", "_tokens", "busy", "entry")

    def __init__(self, entry: KeyEntry, now: float) -> None:
        self.entry, self.busy = entry, 0
        self._tokens, self._at = float(entry.burst), now

    def admit(self, now: float) -> float | None:
        """Count one request in and return None, or the seconds after which it may come again."""
        entry = self.entry
        if entry.concurrency is not None and self.busy >= entry.concurrency:
            return 1.0
        if entry.rate_per_s is not None:
            self._tokens = min(float(entry.burst), self._tokens + (now - self._at) * entry.rate_per_s)
            self._at = now
            if self._tokens < 1.0:
                return (1.0 - self._tokens) / entry.rate_per_s
            self._tokens -= 1.0
        self.busy += 1
        return None

    def done(self) -> None:
        """Count one request out."""
        self.busy -= 1

    def renew(self, entry: KeyEntry) -> None:
        """Take the limits of a new file; what is in flight stays counted."""
        self.entry = entry


def digest(key: str) -> str:
    """What stands in the file for a key."""
    return hashlib.sha256(key.encode()).hexdigest()


class Keys:
    """The accounts of a keys file, read again when it changes."""

    def __init__(self, path: Path, now: float) -> None:
        """Read the file; `ConfigError` when that fails, for a door that lets everybody in is no answer to a typo."""
        self._path = path
        self._accounts: dict[bytes, Account] = {}
        self._known: dict[bytes, Account] = {}
        """By the whole header, once its key was found. Python's hash of it is keyed: the time of a look tells nothing."""
        self._seen: tuple[int, int, int] | None = None
        try:
            self._load(now)
        except (OSError, ValidationError) as error:
            raise ConfigError(f"cannot read the API keys {path}: {error}") from error

    def find(self, authorization: bytes | None) -> Account | None:
        """Return the account of an `Authorization: Bearer` header, None when there is none."""
        if authorization is None:
            return None
        account = self._known.get(authorization)
        if account is not None:
            return account
        if authorization[:7].lower() != b"bearer ":
            return None
        presented = hashlib.sha256(authorization[7:].strip()).digest()
        for known, candidate in self._accounts.items():  # all of them, so that time tells nothing
            if hmac.compare_digest(known, presented):
                account = candidate
        if account is not None and len(self._known) < 10_000:
            self._known[authorization] = account
        return account

    def refresh(self, now: float) -> None:
        """Read the file again if it changed; a broken one is logged and the last good one stands."""
        try:
            self._load(now)
        except (OSError, ValidationError) as error:
            log.warning("cannot read the API keys %s, keeping the last: %s", self._path, error)

    def _load(self, now: float) -> None:
        stat = self._path.stat()
        mark = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        if mark == self._seen:
            return
        self._seen = mark
        accounts: dict[bytes, Account] = {}
        for entry in KeysFile.model_validate_json(self._path.read_bytes()).keys:
            key = bytes.fromhex(entry.sha256)
            account = self._accounts.get(key)
            if account is None:
                account = Account(entry, now)
            else:
                account.renew(entry)
            accounts[key] = account
        self._accounts, self._known = accounts, {}
