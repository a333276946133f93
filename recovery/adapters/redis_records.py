"""
What the store keeps beside the rows: heartbeats, counters, incidents, small values. Plain commands, no scripts.
"""

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import redis

from recovery.adapters.redis_errors import translated
from recovery.adapters.redis_keys import CHANGES_KEPT, EVENTS_KEPT, INCIDENTS_KEPT, SEEN_TTL_S, Keys
from recovery.adapters.redis_url import RedisUrl
from recovery.core.change import Count, Incident

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="RedisRecords")


def speaks_redis(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Let the method raise our errors only."""

    @functools.wraps(method)
    def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with translated(self.url.safe):
            return method(self, *args, **kwargs)

    return call


class RedisRecords:
    """
    The base of `RedisStore`: the connection, and the records that no decision is committed with.

    `changes_kept`, `events_kept` and `incidents_kept` bound the streams and the incidents.
    """

    def __init__(
        self,
        url: RedisUrl | str,
        prefix: str = "recovery",
        *,
        changes_kept: int = CHANGES_KEPT,
        events_kept: int = EVENTS_KEPT,
        incidents_kept: int = INCIDENTS_KEPT,
    ) -> None:
        self.url = RedisUrl.parse(url) if isinstance(url, str) else url
        self.keys = Keys(prefix)
        self._changes_kept, self._events_kept, self._incidents_kept = changes_kept, events_kept, incidents_kept
        self._redis: Any = self.url.client()  # redis-py types every answer as a union over protocols and sync or async

    def close(self) -> None:
        """Give the connections back."""
        self._redis.close()

    # Hosts

    @speaks_redis
    def beat(self, host: str, info: dict[str, Any], ttl_s: float) -> None:
        """Write the host's heartbeat."""
        now = seconds_of(self._redis.time())
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.set(self.keys.host_stem + host, compact({"at": now, "ttl_s": ttl_s, "info": info}), ex=SEEN_TTL_S)
            pipe.zadd(self.keys.hosts, {host: now})
            pipe.zremrangebyscore(self.keys.hosts, "-inf", now - SEEN_TTL_S)
            pipe.expire(self.keys.hosts, SEEN_TTL_S)
            pipe.execute()

    def hosts(self) -> dict[str, dict[str, Any]]:
        """Return the heartbeats that have not expired, with `age_s` added by Redis' clock."""
        alive = {host: info for host, info in self.known_hosts().items() if info["alive"]}
        return {host: {name: value for name, value in info.items() if name != "alive"} for host, info in alive.items()}

    @speaks_redis
    def known_hosts(self) -> dict[str, dict[str, Any]]:
        """Return the last heartbeat of every host seen within a day, expired ones with `alive: false`."""
        names = names_of(self._redis.zrange(self.keys.hosts, 0, -1))
        with self._redis.pipeline(transaction=True) as pipe:
            for name in names:
                pipe.get(self.keys.host_stem + name)
            pipe.time()
            *beats, time = pipe.execute()
        now = seconds_of(time)
        known: dict[str, dict[str, Any]] = {}
        for name, raw in zip(names, beats, strict=True):
            if raw is not None:
                beat = json.loads(raw)
                age_s = max(0.0, now - beat["at"])
                known[name] = {**beat["info"], "age_s": age_s, "alive": age_s < beat["ttl_s"]}
        return known

    # Counters and incidents

    @speaks_redis
    def count(self, counts: Iterable[Count]) -> None:
        """Add to counters outside a commit."""
        with self._redis.pipeline(transaction=True) as pipe:
            for count in counts:
                pipe.hincrbyfloat(self.keys.counters, counter_field(count), count.by)
            pipe.execute()

    @speaks_redis
    def counters(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Return all counters by name and labels (in the order they were counted with)."""
        found = {}
        for field, value in self._redis.hgetall(self.keys.counters).items():
            name, labels = json.loads(field)
            found[name, tuple((label, text) for label, text in labels)] = float(value)
        return found

    @speaks_redis
    def incident(self, incident_id: str) -> Incident | None:
        """Return one incident."""
        raw = self._redis.get(self.keys.incident_stem + incident_id)
        return None if raw is None else Incident.model_validate_json(raw)

    @speaks_redis
    def incidents(self, model: str | None, count: int) -> tuple[Incident, ...]:
        """Return the newest incidents first."""
        members = (member.decode().split(" ", 1) for member in self._redis.zrevrange(self.keys.incidents, 0, -1))
        ids = [incident_id for incident_id, of in members if model in (None, of)][: max(0, count)]
        found = self._redis.mget([self.keys.incident_stem + incident_id for incident_id in ids]) if ids else []
        return tuple(Incident.model_validate_json(raw) for raw in found if raw is not None)

    # Small values

    def put(self, key: str, value: Any, ttl_s: float) -> None:
        """Keep one small JSON value under a name, for a while (front door reports, brake, tick)."""
        self.put_many({key: value}, ttl_s)

    @speaks_redis
    def put_many(self, values: Mapping[str, Any], ttl_s: float) -> None:
        """The same for several, in as many round trips as for one (log tails)."""
        now = seconds_of(self._redis.time())
        with self._redis.pipeline(transaction=True) as pipe:
            for key, value in values.items():
                pipe.set(self.keys.value_stem + key, compact(value), px=max(1, round(ttl_s * 1000)))
            pipe.zadd(self.keys.values, dict.fromkeys(values, now + ttl_s))
            pipe.zremrangebyscore(self.keys.values, "-inf", now)
            pipe.execute()

    @speaks_redis
    def get(self, key: str) -> Any:
        """Return that value, None when absent."""
        raw = self._redis.get(self.keys.value_stem + key)
        return None if raw is None else json.loads(raw)

    @speaks_redis
    def get_many(self, pattern: str) -> dict[str, Any]:
        """Return all small values whose name begins with `pattern`, sorted by name."""
        names = [name for name in names_of(self._redis.zrange(self.keys.values, 0, -1)) if name.startswith(pattern)]
        found = self._redis.mget([self.keys.value_stem + name for name in names]) if names else []
        return {name: json.loads(raw) for name, raw in zip(names, found, strict=True) if raw is not None}

    @speaks_redis
    def remove(self, key: str) -> None:
        """Forget that value."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(self.keys.value_stem + key)
            pipe.zrem(self.keys.values, key)
            pipe.execute()

    # Redis itself

    @speaks_redis
    def info(self) -> dict[str, Any]:
        """Return what Redis says of itself (`INFO`), with `appendfsync` and the address, for the doctor."""
        said: dict[str, Any] = dict(self._redis.info())
        try:
            said.update(self._redis.config_get("appendfsync"))
        except redis.ResponseError:  # managed services and tight ACLs do not let everybody ask
            said["appendfsync"] = None
        return {**said, "url": self.url.safe}

    @speaks_redis
    def queue_depths(self, queues: Sequence[str]) -> dict[str, int]:
        """Return how many messages wait in each Celery queue."""
        with self._redis.pipeline(transaction=False) as pipe:
            for queue in queues:
                pipe.llen(queue)
            return dict(zip(queues, pipe.execute(), strict=True))


def names_of(raw: Iterable[bytes]) -> tuple[str, ...]:
    """Names from Redis, sorted."""
    return tuple(sorted(name.decode() for name in raw))


def seconds_of(time: tuple[int, int]) -> float:
    """The answer of TIME as seconds."""
    return time[0] + time[1] / 1e6


def compact(value: Any) -> str:
    """JSON without spaces."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def counter_field(count: Count) -> str:
    """The counter's field in the hash."""
    return compact([count.name, count.labels])
