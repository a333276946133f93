"""
The store in Redis or Valkey (6.2 or newer, not Cluster: the scripts touch several keys).

Python decides, Redis commits: three scripts in `lua/` write, everything else reads or keeps small values with an end.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recovery.adapters import rows
from recovery.adapters.redis_events import Streams, last_id
from recovery.adapters.redis_keys import CHANGES_KEPT, EVENTS_KEPT, HISTORY_TTL_S, INCIDENTS_KEPT, incident_member
from recovery.adapters.redis_records import RedisRecords, compact, counter_field, names_of, seconds_of, speaks_redis
from recovery.adapters.redis_url import RedisUrl
from recovery.core.change import Change, Commit, ModelEvent
from recovery.core.instance import Instance
from recovery.errors import LeaseHeldError, SchemaError, StaleTokenError, VersionConflictError
from recovery.ports import Queue

log = logging.getLogger(__name__)

CLAIM_EARLY_S = 0.1
"""How much before `not_before` a claim is still right: a delayed message and the row are timed by different clocks."""

_ROW_FIELDS = ("version", "lease_until", "due", "doc")


class RedisStore(RedisRecords):
    """The `Store` port on Redis. Safe to share between threads; each has a connection of its own while it asks."""

    def __init__(
        self,
        url: RedisUrl | str,
        prefix: str = "recovery",
        *,
        changes_kept: int = CHANGES_KEPT,
        events_kept: int = EVENTS_KEPT,
        incidents_kept: int = INCIDENTS_KEPT,
    ) -> None:
        super().__init__(url, prefix, changes_kept=changes_kept, events_kept=events_kept, incidents_kept=incidents_kept)
        self._streams = Streams(self._redis, self.keys, changes_kept)
        self._commit = self._script("commit")
        self._claim = self._script("claim")
        self._pop_due = self._script("pop_due")
        self._refused: dict[str, str] = {}

    def _script(self, name: str) -> Callable[..., Any]:
        text = (Path(__file__).parent / "lua" / f"{name}.lua").read_text(encoding="utf-8")
        script: Callable[..., Any] = self._redis.register_script(text)  # EVALSHA, and loaded again when a restart forgot it
        return script

    # Rows

    @speaks_redis
    def now(self) -> float:
        """Return Redis' time in seconds (microsecond resolution)."""
        return seconds_of(self._redis.time())

    @speaks_redis
    def load(self, instance_id: str) -> Instance | None:
        """Return the row, an older schema migrated; raise `SchemaError` on a newer one."""
        return _row(self._redis.hmget(self.keys.row(instance_id), _ROW_FIELDS))

    @speaks_redis
    def load_now(self, instance_id: str) -> tuple[Instance | None, float]:
        """Return the row and the time, in one round trip: what a decision is made on."""
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.hmget(self.keys.row(instance_id), _ROW_FIELDS)
            pipe.time()
            fields, time = pipe.execute()
        return _row(fields), seconds_of(time)

    def load_many(self, ids: Sequence[str]) -> tuple[Instance, ...]:
        """Return those rows that exist, in one round trip. One that this version cannot read is left out, and the log says so once."""
        return self._read(ids)[0]

    def unreadable(self) -> dict[str, str]:
        """Return why the rows that this version cannot read are left out, by their ids."""
        return self._read(self.ids())[1]

    @speaks_redis
    def _read(self, ids: Sequence[str]) -> tuple[tuple[Instance, ...], dict[str, str]]:
        with self._redis.pipeline(transaction=False) as pipe:
            for instance_id in ids:
                pipe.hmget(self.keys.row(instance_id), _ROW_FIELDS)
            answers = pipe.execute()
        found, refused = [], {}
        for instance_id, fields in zip(ids, answers, strict=True):
            try:
                if (row := _row(fields)) is not None:
                    found.append(row)
            except SchemaError as error:
                refused[instance_id] = str(error)
        for instance_id, why in refused.items():
            if self._refused.get(instance_id) != why:
                self._refused[instance_id] = why
                log.error("%s; it is left alone until then", why)
        return tuple(found), refused

    @speaks_redis
    def ids(self) -> tuple[str, ...]:
        """Return the ids of all rows, sorted."""
        return names_of(self._redis.smembers(self.keys.rows))

    def load_all(self) -> tuple[Instance, ...]:
        """Return all rows in two round trips."""
        return self.load_many(self.ids())

    @speaks_redis
    def commit(self, commit: Commit) -> Instance:
        """
        Write the row if its version is still `expected_version` (0 = absent) and return it with its new version.

        After `StoreUnavailableError` it may or may not have been written: read again.
        """
        after, incident, host = commit.after, commit.incident, commit.after.placement.host
        keys = (
            self.keys.row(after.id),
            self.keys.rows,
            self.keys.queue_hosts,
            self.keys.queue("steps", host),
            self.keys.queue("looks", host),
            self.keys.changes,
            self.keys.events(after.model),
            self.keys.counters,
            self.keys.incidents,
        )
        args: list[str | bytes | int] = [self.keys.due_stem, self.keys.looks_stem, self.keys.incident_stem]
        args += [after.id, commit.expected_version, after.token, host]
        args += [after.desired.value, repr(after.not_before), repr(after.lease_until), _text(after.due), _text(after.look_at)]
        args += [rows.encode(after)]
        args += [self._changes_kept, after.model, after.state.value, _text(after.run), after.base_url or "", int(after.routable)]
        args += [HISTORY_TTL_S, self._events_kept, len(commit.events)]
        for event in commit.events:
            args += [event.kind, event.text, compact(event.data)]
        args += [len(commit.counts)]
        for count in commit.counts:
            args += [counter_field(count), repr(count.by)]
        if incident is None:
            args += [self._incidents_kept, "", "", "", ""]
        else:
            args += [self._incidents_kept, incident.id, incident_member(incident), repr(incident.opened_at), incident.model_dump_json()]

        verdict, value = self._commit(keys=keys, args=args)
        if verdict == b"version":
            raise VersionConflictError(
                f"cannot commit {after.id}: it is at version {int(value)}, the decision was made on {commit.expected_version}"
            )
        if verdict == b"token":
            raise StaleTokenError(f"cannot commit {after.id} with token {after.token}: the row's is {int(value)}")
        return after.model_copy(update={"version": int(value)})

    @speaks_redis
    def claim(self, instance_id: str, token: int, lease_s: float) -> Instance:
        """Take the lease to start run `token`; the row's due becomes the lease's end."""
        keys = (self.keys.row(instance_id), self.keys.queue_hosts)
        verdict, *values = self._claim(keys=keys, args=(self.keys.due_stem, instance_id, token, repr(lease_s), repr(CLAIM_EARLY_S)))
        refused = f"cannot claim run {token} of {instance_id}"
        match verdict:
            case b"absent":
                raise StaleTokenError(f"{refused}: there is no such instance")
            case b"token":
                raise StaleTokenError(f"{refused}: its token is {int(values[0])}")
            case b"desired":
                raise StaleTokenError(f"{refused}: it is wanted {values[0].decode()}")
            case b"lease":
                raise LeaseHeldError(f"{refused}: it is leased until {float(values[0]):.3f}")
            case b"early":
                raise LeaseHeldError(f"{refused}: it is not to start before {float(values[0]):.3f}")
        version, lease_until, due, doc = values
        return rows.decode(doc, int(version), float(lease_until), float(due))

    @speaks_redis
    def delete(self, instance_id: str) -> None:
        """
        Forget a row and what is due for it. Readers of the changes see one last entry with the state "deleted".

        The model's history and incidents stay until their time is up.
        """
        self._redis.transaction(functools.partial(self._delete, instance_id), self.keys.row(instance_id))

    def _delete(self, instance_id: str, pipe: Any) -> None:
        row = _row(pipe.hmget(self.keys.row(instance_id), _ROW_FIELDS))  # watched: whoever commits now makes this begin again
        if row is None:
            return
        steps, looks = (self.keys.queue(queue, row.placement.host) for queue in ("steps", "looks"))
        pipe.watch(steps, looks)
        others = {*pipe.zrange(steps, 0, -1), *pipe.zrange(looks, 0, -1)} - {instance_id.encode()}
        pipe.multi()
        pipe.delete(self.keys.row(instance_id))
        pipe.srem(self.keys.rows, instance_id)
        pipe.zrem(steps, instance_id)
        pipe.zrem(looks, instance_id)
        if not others:
            pipe.srem(self.keys.queue_hosts, row.placement.host)
        gone = {"instance": row.id, "model": row.model, "version": row.version + 1, "state": "deleted"}
        pipe.xadd(self.keys.changes, {**gone, "run": "", "base_url": "", "routable": 0}, maxlen=self._changes_kept, approximate=True)

    # What is due

    @speaks_redis
    def pop_due(self, queue: Queue, host: str, push_s: float, limit: int) -> tuple[str, ...]:
        """Return ids that are due and push each `push_s` on, so that nobody else delivers them at once."""
        ids = self._pop_due(keys=(self.keys.queue(queue, host),), args=(repr(push_s), limit))
        return tuple(instance_id.decode() for instance_id in ids)

    @speaks_redis
    def hosts_with_rows(self) -> tuple[str, ...]:
        """Return the hosts that have a `due` or `looks` set, whether alive or not."""
        hosts = names_of(self._redis.smembers(self.keys.queue_hosts))
        with self._redis.pipeline(transaction=False) as pipe:
            for host in hosts:
                pipe.exists(self.keys.queue("steps", host), self.keys.queue("looks", host))
            return tuple(host for host, sets in zip(hosts, pipe.execute(), strict=True) if sets)

    @speaks_redis
    def once(self, key: str, ttl_ms: int) -> bool:
        """True for the first caller within `ttl_ms`: collapses doubled ticks."""
        return bool(self._redis.set(self.keys.once_stem + key, 1, nx=True, px=ttl_ms))

    # Streams

    @speaks_redis
    def snapshot(self) -> tuple[str, tuple[Instance, ...]]:
        """Return the change stream's position and all rows as they were at it or later."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.xrevrange(self.keys.changes, count=1)
            pipe.smembers(self.keys.rows)
            newest, ids = pipe.execute()
        return last_id(newest), self.load_many(names_of(ids))

    @speaks_redis
    def follow(self, position: str, block_s: float) -> tuple[Change, ...] | None:
        """Return the changes after `position` (at most 1000), empty after `block_s`; None = a gap, take a new snapshot."""
        return self._streams.changes_after(position, block_s)

    @speaks_redis
    def add_event(self, model: str, event: ModelEvent) -> None:
        """Add one line to a model's history that no row changed with."""
        key = self.keys.events(model)
        with self._redis.pipeline(transaction=True) as pipe:
            fields: dict[Any, Any] = {"kind": event.kind, "text": event.text, "data": compact(event.data)}
            pipe.xadd(key, fields, maxlen=self._events_kept, approximate=True)
            pipe.expire(key, HISTORY_TTL_S)
            pipe.execute()

    @speaks_redis
    def events(self, model: str, count: int, after: str | None = None) -> tuple[dict[str, Any], ...]:
        """Return the newest events of a model, or the first ones after an id; oldest first: id, at, kind, text, data."""
        if after is None:
            return self._streams.newest_events(model, count)
        return self._streams.events_after(model, after, count)

    @speaks_redis
    def follow_events(self, model: str, after: str, block_s: float) -> tuple[dict[str, Any], ...]:
        """Return events after an id ("$": from now on, "0-0": all), waiting up to `block_s`."""
        return self._streams.events_after(model, after, self._events_kept, block_s)


def _row(fields: Sequence[bytes | None]) -> Instance | None:
    version, lease_until, due, doc = fields
    if version is None or lease_until is None or doc is None:
        return None
    return rows.decode(doc, int(version), float(lease_until), float(due) if due else None)


def _text(value: float | None) -> str:
    """A number as Lua is to pass it on, "" for None."""
    return "" if value is None else repr(value)
