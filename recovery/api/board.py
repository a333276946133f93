"""
The fleet in memory: one thread follows the store, every request reads what it holds.

Reading a row costs a request nothing but a look into a dict, so a frozen host, a slow Redis or a thousand open pages
hold no thread. The board knows how old its knowledge is: when Redis stops answering, requests are refused
(`StoreUnavailableError`) instead of being told what was true a while ago.
"""

import asyncio
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import orjson

from recovery.core.instance import Instance
from recovery.core.view import FleetView, ModelView, by_model, model_view
from recovery.errors import RecoveryError, SchemaError, StoreUnavailableError, UnknownModelError
from recovery.ports import Store

log = logging.getLogger(__name__)

FOLLOW_S = 1.0
"""Longest wait for a change; heartbeats and Redis' clock are read this often."""
RETRY_S = 0.25
STALE_S = 8.0
"""Knowledge older than this is not told. A frozen Redis is noticed after its socket time-out (2 s) and one follow."""


class Watch:
    """Wakes a request when one of the models it waits for has changed."""

    def __init__(self, models: frozenset[str] | None) -> None:
        self._models = models
        self._event = asyncio.Event()
        self._changed: set[str] = set()

    def tell(self, models: set[str]) -> None:
        """Note that these models changed; called on the event loop."""
        if own := models if self._models is None else models & self._models:
            self._changed |= own
            self._event.set()

    async def wait(self, within_s: float) -> set[str]:
        """Return the models that changed since the last call, waiting for a change up to `within_s`."""
        try:
            async with asyncio.timeout(within_s):
                await self._event.wait()
        except TimeoutError:
            return set()
        changed, self._changed = self._changed, set()
        self._event.clear()
        return changed


class Board:
    """What the fleet looks like now. Made on the event loop that serves requests."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._rows: dict[str, Instance] = {}
        self._models: dict[str, tuple[Instance, ...]] = {}
        self._unreadable: Mapping[str, str] = {}
        self._hosts: dict[str, dict[str, Any]] = {}
        self._alive: frozenset[str] = frozenset()
        self._hosts_read_at = 0.0
        self._clock_offset = 0.0
        self._fresh_at: float | None = None
        self._problem: str | None = "cannot answer yet: the fleet's state is being read"
        self._watches: set[Watch] = set()
        self._cache: dict[str, _Cached] = {}
        self._stop = threading.Event()
        self._first = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._follow_forever, name="board", daemon=True)

    def start(self) -> None:
        """Begin to follow the store."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; the one wait it may be in ends within about a second."""
        self._stop.set()
        self._thread.join(timeout=5)

    async def ready(self, within_s: float = 2.0) -> None:
        """Wait for the first reading; raise `StoreUnavailableError` when there is none in time."""
        if not self._first.is_set():
            try:
                async with asyncio.timeout(within_s):
                    await self._first.wait()
            except TimeoutError:
                self.check()

    def check(self) -> None:
        """Raise `StoreUnavailableError` when what is known may not be told."""
        if self._problem is not None:
            raise StoreUnavailableError(self._problem)
        if self._fresh_at is None or self._loop.time() - self._fresh_at > STALE_S:
            raise StoreUnavailableError("cannot read the fleet's state: Redis does not answer")

    @property
    def now(self) -> float:
        """Redis' clock, Unix seconds."""
        return self._loop.time() + self._clock_offset

    @property
    def hosts(self) -> Mapping[str, dict[str, Any]]:
        """Every host heard of within a day: its heartbeat, with `at` (Redis' clock) and `alive`."""
        return self._hosts

    @property
    def alive(self) -> frozenset[str]:
        """The hosts that have a fresh heartbeat."""
        return self._alive

    def age_s(self, host: str) -> float | None:
        """Seconds since a host was last heard from; None when it never was."""
        beat = self._hosts.get(host)
        return None if beat is None else max(0.0, self.now - float(beat["at"]))

    @property
    def known(self) -> Mapping[str, tuple[Instance, ...]]:
        """The rows of every model, models by id."""
        return self._models

    @property
    def unreadable(self) -> Mapping[str, str]:
        """Why rows that a newer version has written are not told of, by instance."""
        return self._unreadable

    def rows_of(self, model: str) -> tuple[Instance, ...]:
        """Return a model's rows by replica; raise `UnknownModelError`, `SchemaError` (a newer version's), `StoreUnavailableError`."""
        self.check()
        try:
            return self._models[model]
        except KeyError:
            for instance, why in self._unreadable.items():
                if instance.rpartition("-")[0] == model:
                    raise SchemaError(why) from None
            known = ", ".join(sorted(self._models)[:20]) or "none yet"
            raise UnknownModelError(f"LLM model '{model[:80]}' not found; there are: {known}") from None

    def model(self, model: str) -> ModelView:
        """Return a model as it is now; raise as `rows_of`."""
        return model_view(self.rows_of(model), self.now, self.alive)

    def fleet(self) -> FleetView:
        """Return all models as they are now."""
        self.check()
        models = tuple(model_view(rows, self.now, self.alive) for rows in self._models.values())
        return FleetView(models=models, total=len(models), at=self.now)

    def fleet_json(self) -> bytes:
        """Return the same as JSON. What did not change since the last call is not made anew; only uptimes move."""
        self.check()
        now = self.now
        models = [self._cached(model).at(now) for model in self._models]
        return orjson.dumps({"models": models, "total": len(models), "at": now})

    def model_json(self, model: str) -> bytes:
        """Return one model as JSON; raise as `rows_of`."""
        self.rows_of(model)
        return orjson.dumps(self._cached(model).at(self.now))

    @contextmanager
    def watch(self, *models: str) -> Iterator[Watch]:
        """Be told of changes to these models; of all when none is named."""
        watch = Watch(frozenset(models) if models else None)
        self._watches.add(watch)
        try:
            yield watch
        finally:
            self._watches.discard(watch)

    def _cached(self, model: str) -> "_Cached":
        rows, alive = self._models[model], self._alive
        cached = self._cache.get(model)
        if cached is None or cached.rows is not rows or not cached.fits(alive):
            cached = self._cache[model] = _Cached(rows, alive, self.now)
        return cached

    # The thread

    def _follow_forever(self) -> None:
        position: str | None = None
        while not self._stop.is_set():
            try:
                position = self._follow(position)
            except RecoveryError as error:
                self._call(self._lost, str(error))
                self._stop.wait(RETRY_S)
            except Exception:  # the thread must outlive any surprise: without it nothing is answered any more
                log.exception("cannot follow the fleet's state; starting afresh")
                self._call(self._lost, "cannot read the fleet's state: see the log of the management API")
                position = None
                self._stop.wait(RETRY_S)

    def _follow(self, position: str | None) -> str | None:
        if position is None:
            position, rows = self._store.snapshot()
            known: dict[str, Instance] | None = {row.id: row for row in rows}
            gone: set[str] = set()
        else:
            known, gone = None, set()
        changes = self._store.follow(position, FOLLOW_S if known is None else 0.0)
        if changes is None:
            return None
        if changes:
            ids = {change.instance for change in changes}
            changed = {row.id: row for row in self._store.load_many(tuple(ids))}
            gone = ids - changed.keys()
            known, replace = (known | changed, True) if known is not None else (changed, False)
            position = changes[-1].id
        else:
            replace = known is not None
        if gone or replace:
            self._unreadable = self._store.unreadable()
        self._call(self._learn, known or {}, gone, replace)
        if self._loop.time() - self._hosts_read_at >= FOLLOW_S or replace:  # not for each of many changes a second
            self._hosts_read_at = self._loop.time()
            hosts, now = self._store.known_hosts(), self._store.now()
            hosts = {name: {**beat, "at": now - float(beat["age_s"])} for name, beat in hosts.items()}
            self._call(self._learn_hosts, hosts, now - self._loop.time())
        return position

    def _call(self, what: Any, *args: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(what, *args)

    # On the event loop

    def _learn(self, rows: Mapping[str, Instance], gone: set[str], replace: bool) -> None:
        before = self._rows
        if replace:
            self._rows = dict(rows)
            touched = {row.model for row in (*before.values(), *rows.values()) if before.get(row.id) != self._rows.get(row.id)}
        else:
            touched = {row.model for row in rows.values()} | {before[each].model for each in gone if each in before}
            before.update(rows)
            for each in gone:
                before.pop(each, None)
        self._regroup(touched)
        self._tell(touched)

    def _learn_hosts(self, hosts: dict[str, dict[str, Any]], clock_offset: float) -> None:
        """Comes after `_learn`: only what is known of rows, hosts and clock together may be told."""
        alive = frozenset(host for host, beat in hosts.items() if beat.get("alive", True))
        flipped = alive ^ self._alive
        self._clock_offset, self._hosts, self._alive = clock_offset, hosts, alive
        self._fresh_at, self._problem = self._loop.time(), None
        self._first.set()
        self._tell({row.model for row in self._rows.values() if row.placement.host in flipped} if flipped else set())

    def _tell(self, touched: set[str]) -> None:
        if touched:
            for watch in self._watches:
                watch.tell(touched)

    def _regroup(self, touched: set[str]) -> None:
        own = by_model(row for row in self._rows.values() if row.model in touched)
        for model in touched:
            self._cache.pop(model, None)
        if touched <= own.keys() and touched <= self._models.keys():
            self._models = self._models | own
        else:
            kept = {model: rows for model, rows in self._models.items() if model not in touched}
            self._models = dict(sorted((kept | own).items()))

    def _lost(self, problem: str) -> None:
        self._problem = problem


class _Cached:
    """A model rendered once; `at` only moves what time moves."""

    def __init__(self, rows: tuple[Instance, ...], alive: frozenset[str], now: float) -> None:
        self.rows = rows
        self._hosts = frozenset(row.placement.host for row in rows)
        self._alive = alive
        self._shown = model_view(rows, now, alive).model_dump(mode="json")
        self._running = [each for each in self._shown["instances"] if each["started_at"] is not None]

    def fits(self, alive: frozenset[str]) -> bool:
        """Whether the same of its hosts live as when it was rendered."""
        if alive is self._alive:
            return True
        same = self._hosts & alive == self._hosts & self._alive
        if same:
            self._alive = alive  # the next question is answered at once
        return same

    def at(self, now: float) -> dict[str, Any]:
        """Return the model as it is at `now`. The dict is this object's own: serialise it before the next call."""
        for each in self._running:
            each["uptime_seconds"] = round(max(0.0, now - each["started_at"]), 3)
        self._shown["uptime_seconds"] = min((each["uptime_seconds"] for each in self._running), default=None)
        return self._shown
