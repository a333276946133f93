"""
Redis' errors as ours: what happened, and what to do about it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from redis import exceptions

from recovery.errors import StoreUnavailableError

_ADVICE = (
    ("MISCONF", "it refuses writes because it cannot save to disk: free space in its data directory or mend its rights, then writes go on"),
    ("OOM", "it is at its maxmemory: raise maxmemory (and keep maxmemory-policy noeviction, or state is thrown away)"),
    ("READONLY", "it is a replica and takes no writes: point REDIS_URL at the primary, or use a sentinel:// URL"),
    ("NOAUTH", "it wants a password: put it into REDIS_URL (redis://user:password@host:6379/0)"),
    ("WRONGPASS", "it does not accept this user and password: correct REDIS_URL"),
    (
        "NOPERM",
        "its user may not run this command: allow it what this project and Celery use (~* &* +@all -@dangerous +info)",
    ),
    ("LOADING", "it is still loading its data: wait, it comes back by itself"),
    ("MASTERDOWN", "it has lost its primary: wait for the failover"),
    ("NOREPLICAS", "too few replicas are connected (min-replicas-to-write)"),
    ("BUSY", "a script keeps it busy: `redis-cli SCRIPT KILL`"),
    ("MOVED", "it is a Redis Cluster, which this project does not support: use a single Redis or sentinels"),
    ("CROSSSLOT", "it is a Redis Cluster, which this project does not support: use a single Redis or sentinels"),
    ("CLUSTERDOWN", "it is a Redis Cluster, which this project does not support: use a single Redis or sentinels"),
    ("UNKNOWN COMMAND", "it is too old: 6.2 or newer is needed"),
)

_TYPES: tuple[tuple[type[exceptions.RedisError], str], ...] = (
    (exceptions.ReadOnlyError, "READONLY"),
    (exceptions.OutOfMemoryError, "OOM"),
    (exceptions.NoPermissionError, "NOPERM"),
    (exceptions.BusyLoadingError, "LOADING"),
    (exceptions.MasterDownError, "MASTERDOWN"),
    (exceptions.ClusterError, "CLUSTERDOWN"),
    (exceptions.AuthenticationError, "NOAUTH"),
)
"""redis-py cuts the code off the text of the errors that it has a class for."""


def unavailable(error: exceptions.RedisError, where: str) -> StoreUnavailableError:
    """Return our error for one of redis-py's."""
    text = " ".join(str(error).split())
    if advice := _advice(error, text):
        return StoreUnavailableError(f"cannot use Redis at {where}: {advice} ({text})")
    if isinstance(error, exceptions.TimeoutError):
        return StoreUnavailableError(f"cannot use Redis at {where}: it does not answer in time (frozen, overloaded or cut off)")
    if isinstance(error, exceptions.ConnectionError):
        return StoreUnavailableError(f"cannot reach Redis at {where}: {text}; is it running, and is REDIS_URL right?")
    return StoreUnavailableError(f"cannot use Redis at {where}: {text}")


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Let no redis-py error out."""
    try:
        yield
    except exceptions.RedisError as error:
        raise unavailable(error, where) from error


def _advice(error: exceptions.RedisError, text: str) -> str | None:
    words = dict(_ADVICE)
    upper = text.upper()
    if isinstance(error, exceptions.AuthenticationError) and ("WRONGPASS" in upper or "INVALID" in upper):
        return words["WRONGPASS"]
    for code, advice in _ADVICE:
        # From a pipeline it comes as "Command # 1 (...) caused error: CODE ...", from an older script as "...: -CODE ...".
        if re.search(rf"(^|: |: -|ERR ){code} ", upper):
            return advice
    return next((words[code] for kind, code in _TYPES if isinstance(error, kind)), None)
