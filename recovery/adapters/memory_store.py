"""
The store in memory, for tests and simulations: the same rules as `RedisStore`, held to it by one contract suite.

Its clock is moved by hand. It can be made unavailable, and put back to an earlier state, which is what a Redis does
that lost its last second.
"""

import copy
import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from recovery.adapters import rows
from recovery.adapters.memory_streams import START, MemoryStream
from recovery.adapters.redis_keys import CHANGES_KEPT, EVENTS_KEPT, HISTORY_TTL_S, INCIDENTS_KEPT, SEEN_TTL_S
from recovery.adapters.redis_store import CLAIM_EARLY_S
from recovery.core.change import Change, Commit, Count, Incident, ModelEvent
from recovery.core.instance import Desired, Instance
from recovery.errors import LeaseHeldError, SchemaError, StaleTokenError, StoreUnavailableError, VersionConflictError
from recovery.ports import Queue

PAGE = 1_000
T = TypeVar("T")


class ManualClock:
    """A clock that stands still until it is moved. Calling it gives the seconds."""

    def __init__(self, start: float = 1_800_000_000.0) -> None:
        self.now = start

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Move it on (or back, with a negative number)."""
        self.now += seconds


@dataclass
class _Row:
    version: int
    token: int
    desired: str
    not_before: float
    lease_until: float
    due: float | None
    host: str
    doc: bytes


@dataclass
class _State:
    """Everything that a Redis would hold."""

    rows: dict[str, _Row] = field(default_factory=dict)
    queues: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)  # (queue, host) -> id -> score
    changes: MemoryStream = field(default_factory=MemoryStream)
    events: dict[str, MemoryStream] = field(default_factory=dict)
    counters: dict[tuple[str, tuple[tuple[str, str], ...]], float] = field(default_factory=dict)
    incidents: dict[str, tuple[float, str, bytes]] = field(default_factory=dict)  # id -> end, model, body
    beats: dict[str, tuple[float, float, str]] = field(default_factory=dict)  # host -> at, ttl, info
    values: dict[str, tuple[float, str]] = field(default_factory=dict)  # name -> end, JSON
    once: dict[str, float] = field(default_factory=dict)  # name -> end


class MemoryStore:
    """
    The `Store` port in memory. `available = False` makes every call raise `StoreUnavailableError`.

    `follow` and `follow_events` wait in real time, since somebody else moves the clock.
    """

    def __init__(
        self,
        clock: Callable[[], float] | None = None,
        *,
        changes_kept: int = CHANGES_KEPT,
        events_kept: int = EVENTS_KEPT,
        incidents_kept: int = INCIDENTS_KEPT,
    ) -> None:
        self.clock = clock or ManualClock()
        self.available = True
        self._changes_kept, self._events_kept, self._incidents_kept = changes_kept, events_kept, incidents_kept
        self._state = _State()
        self._last_version = 0  # outside of the state: time goes on while a Redis is down, so no version comes twice
        self._changed = threading.Condition(threading.RLock())

    # What only a fake can do

    def save(self) -> object:
        """Return a copy of everything, for `restore`."""
        with self._changed:
            return copy.deepcopy(self._state)

    def restore(self, saved: object) -> None:
        """Put everything back to what `save` returned: a Redis that lost what came later."""
        assert isinstance(saved, _State)
        with self._changed:
            lost, self._state = self._state, copy.deepcopy(saved)
            self._state.changes.go_on_after(lost.changes)
            self._changed.notify_all()

    def wipe(self) -> None:
        """Forget everything."""
        self.restore(_State())

    @contextmanager
    def _open(self) -> Iterator[_State]:
        if not self.available:
            raise StoreUnavailableError("cannot use the store: it was made unavailable")
        with self._changed:
            yield self._state

    # Rows

    def now(self) -> float:
        """Return the clock."""
        with self._open():
            return self.clock()

    def load(self, instance_id: str) -> Instance | None:
        """Return the row."""
        with self._open() as state:
            row = state.rows.get(instance_id)
        return None if row is None else rows.decode(row.doc, row.version, row.lease_until, row.due)

    def load_now(self, instance_id: str) -> tuple[Instance | None, float]:
        """Return the row and the clock."""
        return self.load(instance_id), self.now()

    def load_many(self, ids: Sequence[str]) -> tuple[Instance, ...]:
        """Return those rows that exist and can be read."""
        return self._read(ids)[0]

    def unreadable(self) -> dict[str, str]:
        """Return why the rows that this version cannot read are left out, by their ids."""
        return self._read(self.ids())[1]

    def _read(self, ids: Sequence[str]) -> tuple[tuple[Instance, ...], dict[str, str]]:
        found, refused = [], {}
        with self._open():
            for instance_id in ids:
                try:
                    if (row := self.load(instance_id)) is not None:
                        found.append(row)
                except SchemaError as error:
                    refused[instance_id] = str(error)
        return tuple(found), refused

    def ids(self) -> tuple[str, ...]:
        """Return the ids of all rows, sorted."""
        with self._open() as state:
            return tuple(sorted(state.rows))

    def load_all(self) -> tuple[Instance, ...]:
        """Return all rows."""
        return self.load_many(self.ids())

    def commit(self, commit: Commit) -> Instance:
        """Write the row if its version is still the expected one, and all that goes with it."""
        after = commit.after
        with self._open() as state:
            stored = state.rows.get(after.id)
            version = stored.version if stored else 0
            if version != commit.expected_version:
                raise VersionConflictError(
                    f"cannot commit {after.id}: it is at version {version}, the decision was made on {commit.expected_version}"
                )
            if stored and stored.token > after.token:
                raise StaleTokenError(f"cannot commit {after.id} with token {after.token}: the row's is {stored.token}")
            written = after.model_copy(update={"version": self._next_version(version)})
            if stored and stored.host != after.placement.host:
                self._settle("steps", stored.host, after.id, None)
                self._settle("looks", stored.host, after.id, None)
            state.rows[after.id] = _Row(
                version=written.version,
                token=after.token,
                desired=after.desired.value,
                not_before=after.not_before,
                lease_until=after.lease_until,
                due=after.due,
                host=after.placement.host,
                doc=rows.encode(after),
            )
            self._settle("steps", after.placement.host, after.id, after.due)
            self._settle("looks", after.placement.host, after.id, after.look_at)
            self._add_change(written, written.state.value)
            for event in commit.events:
                self._add_event(after.model, event)
            self._count(commit.counts)
            if commit.incident:
                self._keep(commit.incident)
            self._changed.notify_all()
            return written

    def claim(self, instance_id: str, token: int, lease_s: float) -> Instance:
        """Take the lease to start run `token`; the row's due becomes the lease's end."""
        refused = f"cannot claim run {token} of {instance_id}"
        with self._open() as state:
            now, row = self.clock(), state.rows.get(instance_id)
            if row is None:
                raise StaleTokenError(f"{refused}: there is no such instance")
            if row.token != token:
                raise StaleTokenError(f"{refused}: its token is {row.token}")
            if row.desired != Desired.RUNNING:
                raise StaleTokenError(f"{refused}: it is wanted {row.desired}")
            if row.lease_until > now:
                raise LeaseHeldError(f"{refused}: it is leased until {row.lease_until:.3f}")
            if now < row.not_before - CLAIM_EARLY_S:
                raise LeaseHeldError(f"{refused}: it is not to start before {row.not_before:.3f}")
            row.version, row.lease_until, row.due = self._next_version(row.version), now + lease_s, now + lease_s
            self._settle("steps", row.host, instance_id, row.due)
            return rows.decode(row.doc, row.version, row.lease_until, row.due)

    def delete(self, instance_id: str) -> None:
        """Forget a row and what is due for it; the changes get one last entry with the state "deleted"."""
        with self._open() as state:
            if (row := self.load(instance_id)) is None:
                return
            del state.rows[instance_id]
            self._settle("steps", row.placement.host, instance_id, None)
            self._settle("looks", row.placement.host, instance_id, None)
            self._add_change(row.model_copy(update={"version": row.version + 1, "run": None, "base_url": None}), "deleted")
            self._changed.notify_all()

    # What is due

    def pop_due(self, queue: Queue, host: str, push_s: float, limit: int) -> tuple[str, ...]:
        """Return ids that are due and push each `push_s` on."""
        with self._open() as state:
            now, scores = self.clock(), state.queues.get((queue, host), {})
            ids = sorted((name for name, score in scores.items() if score <= now), key=lambda name: (scores[name], name))[: max(0, limit)]
            scores.update(dict.fromkeys(ids, now + push_s))
            return tuple(ids)

    def hosts_with_rows(self) -> tuple[str, ...]:
        """Return the hosts that have something due, now or later."""
        with self._open() as state:
            return tuple(sorted({host for _, host in state.queues}))

    def once(self, key: str, ttl_ms: int) -> bool:
        """True for the first caller within `ttl_ms`."""
        with self._open() as state:
            now = self.clock()
            if state.once.get(key, now) > now:
                return False
            state.once[key] = now + ttl_ms / 1000
            return True

    # Hosts

    def beat(self, host: str, info: dict[str, Any], ttl_s: float) -> None:
        """Write the host's heartbeat."""
        with self._open() as state:
            state.beats[host] = (self.clock(), ttl_s, json.dumps(info))

    def hosts(self) -> dict[str, dict[str, Any]]:
        """Return the heartbeats that have not expired, with `age_s`."""
        alive = {host: info for host, info in self.known_hosts().items() if info["alive"]}
        return {host: {name: value for name, value in info.items() if name != "alive"} for host, info in alive.items()}

    def known_hosts(self) -> dict[str, dict[str, Any]]:
        """Return the last heartbeat of every host seen within a day, with `age_s` and `alive`."""
        with self._open() as state:
            now, known = self.clock(), {}
            for host, (at, ttl_s, info) in sorted(state.beats.items()):
                age_s = max(0.0, now - at)
                if age_s < SEEN_TTL_S:
                    known[host] = {**json.loads(info), "age_s": age_s, "alive": age_s < ttl_s}
            return known

    # Streams

    def snapshot(self) -> tuple[str, tuple[Instance, ...]]:
        """Return the change stream's position and all rows as they were at it."""
        with self._open() as state:
            return state.changes.end, self.load_all()

    def follow(self, position: str, block_s: float) -> tuple[Change, ...] | None:
        """Return the changes after `position`, empty after `block_s`; None = a gap."""

        def look() -> tuple[Change, ...] | None:
            changes = self._state.changes
            if not changes.has(position) and (position != START or len(changes) >= self._changes_kept):
                return None
            return tuple(Change(id=name, **fields) for name, fields in changes.after(position, PAGE))

        return self._wait(look, block_s)

    def add_event(self, model: str, event: ModelEvent) -> None:
        """Add one line to a model's history."""
        with self._open():
            self._add_event(model, event)
            self._changed.notify_all()

    def events(self, model: str, count: int, after: str | None = None) -> tuple[dict[str, Any], ...]:
        """Return the newest events of a model, or the first ones after an id; oldest first."""
        with self._open():
            history = self._history(model)
            entries = history.newest(count) if after is None else history.after(history.end if after == "$" else after, count)
            return tuple({"id": name, **fields} for name, fields in entries)

    def follow_events(self, model: str, after: str, block_s: float) -> tuple[dict[str, Any], ...]:
        """Return events after an id, waiting up to `block_s`."""
        start = self._history(model).end if after == "$" else after
        return self._wait(lambda: self.events(model, self._events_kept, start), block_s)

    def _wait(self, look: Callable[[], T], block_s: float) -> T:
        with self._open():
            self._changed.wait_for(lambda: not self.available or look() != (), timeout=block_s)
        with self._open():
            return look()

    # Counters and incidents

    def count(self, counts: Iterable[Count]) -> None:
        """Add to counters outside a commit."""
        with self._open():
            self._count(counts)

    def counters(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Return all counters by name and labels."""
        with self._open() as state:
            return dict(state.counters)

    def incident(self, incident_id: str) -> Incident | None:
        """Return one incident."""
        with self._open() as state:
            end, _, body = state.incidents.get(incident_id, (0.0, "", b""))
            return Incident.model_validate_json(body) if end > self.clock() else None

    def incidents(self, model: str | None, count: int) -> tuple[Incident, ...]:
        """Return the newest incidents first."""
        with self._open() as state:
            ids = [incident_id for incident_id, (_, of, _) in state.incidents.items() if model in (None, of)]
            kept = [found for incident_id in ids if (found := self.incident(incident_id))]
        return tuple(sorted(kept, key=lambda found: (found.opened_at, found.id), reverse=True)[: max(0, count)])

    # Small values

    def put(self, key: str, value: Any, ttl_s: float) -> None:
        """Keep one small JSON value under a name, for a while."""
        self.put_many({key: value}, ttl_s)

    def put_many(self, values: Mapping[str, Any], ttl_s: float) -> None:
        """The same for several."""
        with self._open() as state:
            for key, value in values.items():
                state.values[key] = (self.clock() + ttl_s, json.dumps(value))

    def get(self, key: str) -> Any:
        """Return that value, None when absent."""
        with self._open() as state:
            end, value = state.values.get(key, (0.0, "null"))
            return json.loads(value) if end > self.clock() else None

    def get_many(self, pattern: str) -> dict[str, Any]:
        """Return all small values whose name begins with `pattern`, sorted by name."""
        with self._open() as state:
            now = self.clock()
            return {
                name: json.loads(value) for name, (end, value) in sorted(state.values.items()) if name.startswith(pattern) and end > now
            }

    def remove(self, key: str) -> None:
        """Forget that value."""
        with self._open() as state:
            state.values.pop(key, None)

    # Itself

    def info(self) -> dict[str, Any]:
        """Return what the doctor would like to hear."""
        with self._open() as state:
            healthy = {"redis_version": "8.0.0", "aof_enabled": 1, "appendfsync": "everysec", "maxmemory_policy": "noeviction"}
            return {**healthy, "role": "master", "used_memory": len(state.rows), "maxmemory": 0, "url": "memory"}

    def queue_depths(self, queues: Sequence[str]) -> dict[str, int]:
        """Return 0 for each: there is no Celery here."""
        with self._open():
            return dict.fromkeys(queues, 0)

    # Pieces, called with the lock held

    def _next_version(self, last: int) -> int:
        self._last_version = max(last + 1, self._last_version + 1, int(self.clock() * 1_000_000))
        return self._last_version

    def _settle(self, queue: str, host: str, instance_id: str, score: float | None) -> None:
        scores = self._state.queues.setdefault((queue, host), {})
        if score is None:
            scores.pop(instance_id, None)
        else:
            scores[instance_id] = score
        if not scores:
            del self._state.queues[queue, host]

    def _add_change(self, row: Instance, state: str) -> None:
        fields = {
            "instance": row.id,
            "model": row.model,
            "version": row.version,
            "state": state,
            "run": row.run,
            "base_url": row.base_url or None,
            "routable": row.routable and state != "deleted",
        }
        self._state.changes.add(self.clock(), fields, self._changes_kept)

    def _history(self, model: str) -> MemoryStream:
        history = self._state.events.get(model)
        if history is None or history.ends <= self.clock():
            history = MemoryStream()
        return history

    def _add_event(self, model: str, event: ModelEvent) -> None:
        history = self._state.events[model] = self._history(model)
        name = history.add(self.clock(), {}, self._events_kept)
        history.entries[-1] = (name, {"at": int(name.split("-")[0]) / 1000, **json.loads(event.model_dump_json())})
        history.ends = self.clock() + HISTORY_TTL_S

    def _count(self, counts: Iterable[Count]) -> None:
        for count in counts:
            self._state.counters[count.name, count.labels] = self._state.counters.get((count.name, count.labels), 0.0) + count.by

    def _keep(self, incident: Incident) -> None:
        kept = self._state.incidents
        kept[incident.id] = (self.clock() + HISTORY_TTL_S, incident.model, incident.model_dump_json().encode())
        oldest_first = sorted(kept, key=lambda name: (json.loads(kept[name][2])["opened_at"], name))
        for name in itertools.islice(oldest_first, max(0, len(kept) - self._incidents_kept)):
            del kept[name]
