"""
The front door's link to the fleet: rows and changes in, work in flight and what it saw out.

Both directions run in threads of their own with the synchronous store; the data path never waits for Redis, and
serves from what it knows while Redis is away.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from urllib.parse import urlsplit

from recovery.core.change import Change, ModelEvent
from recovery.core.fleet import Fleet, ModelSpec
from recovery.core.instance import Instance
from recovery.core.launch import has_flag, launch
from recovery.core.states import State
from recovery.errors import RecoveryError, StoreUnavailableError
from recovery.frontdoor.reports import Activity, Happened
from recovery.frontdoor.view import Model, ModelSettings, Replica, Snapshot, View
from recovery.ports import Sender, Store
from recovery.queues import CONTROL_QUEUE

log = logging.getLogger(__name__)

FOLLOW_S = 1.0
RETRY_S = 0.5
REPORT_TTL_S = 5.0
"""A door that has not reported for so long has nothing in flight as far as a drain is concerned."""
ASK_AGAIN_S = 1.0
"""Between two looks asked for at one model: a hundred streams that stall at once are one sign."""


class StoreFeeder:
    """Snapshots and changes of the fleet, from Redis to the view. `fleet` gives what is no business of Redis: keys and names."""

    def __init__(self, store: Store, fleet: Callable[[], Fleet], environ: dict[str, str]) -> None:
        self._store, self._fleet, self._environ = store, fleet, environ
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, view: View) -> None:
        """Follow the store from now on; comes back at once."""
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._follow, args=(view, loop), name="feed", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop following; the view keeps the last word."""
        self._stop.set()

    def _follow(self, view: View, loop: asyncio.AbstractEventLoop) -> None:
        while not self._stop.is_set():
            try:
                self._follow_once(view, loop)
            except StoreUnavailableError as error:
                log.warning("serving from what is known: %s", error)
                _on(loop, view.lost)
            except RecoveryError as error:
                log.warning("cannot read the fleet: %s", error)
            except Exception:
                log.exception("cannot follow the fleet; trying again")
            self._stop.wait(RETRY_S)

    def _follow_once(self, view: View, loop: asyncio.AbstractEventLoop) -> None:
        """One snapshot, then changes until there is a gap or Redis goes away."""
        position, rows = self._store.snapshot()
        known = {row.id: _telling(row) for row in rows}
        _on(loop, view.apply, self._snapshot(rows))
        while not self._stop.is_set():
            changes = self._store.follow(position, FOLLOW_S)
            if changes is None:
                return
            if changes:
                position = changes[-1].id
            elif not view.fed:
                return  # Redis is back and quiet: say so with a snapshot
            if any(known.get(change.instance) != _told(change) for change in changes):
                rows = self._store.load_all()
                known = {row.id: _telling(row) for row in rows}
                _on(loop, view.apply, self._snapshot(rows))

    def _snapshot(self, rows: Iterable[Instance]) -> Snapshot:
        fleet = self._fleet()
        models: dict[str, list[Instance]] = {}
        for row in rows:
            models.setdefault(row.model, []).append(row)
        return Snapshot(models=tuple(self._model(name, of_it, fleet.models.get(name)) for name, of_it in sorted(models.items())))

    def _model(self, name: str, rows: list[Instance], spec: ModelSpec | None) -> Model:
        policy = rows[0].policy
        found = [self._replica(row, spec) for row in sorted(rows, key=lambda row: row.replica)]
        args = spec.args if spec is not None else ()
        settings = ModelSettings(
            served_names=launch(spec, rows[0].placement, (), self._environ).served_names if spec is not None else (),
            hold_timeout_s=policy.hold_timeout_s,
            hold_max_requests=policy.hold_max_requests,
            hold_max_bytes=policy.hold_max_bytes,
            inter_token_timeout_s=policy.inter_token_timeout_s,
            allow_text_continuation=policy.allow_text_continuation,
            fallback=spec.fallback if spec is not None else None,
            reasoning=has_flag(args, "--reasoning-parser"),
        )
        return Model(name=name, settings=settings, replicas=tuple(replica for replica in found if replica is not None))

    def _replica(self, row: Instance, spec: ModelSpec | None) -> Replica | None:
        """The row as the door sees it; None for a model that answers nowhere."""
        if row.base_url is None:
            return None
        key = launch(spec, row.placement, row.overrides, self._environ).api_key if spec is not None else None
        parts = urlsplit(row.base_url)
        return Replica(
            instance=row.id,
            model=row.model,
            host=parts.hostname or row.placement.host,
            port=parts.port or row.placement.port or 80,
            base_url=parts.path.rstrip("/").removesuffix("/v1"),
            routable=row.routable,
            state=row.state.value,
            run=str(row.run) if row.run is not None else None,
            api_key=key.get_secret_value() if key is not None else None,
            ready_since=row.ready_at,
            starting_since=row.spawned_at if row.state is State.STARTING else None,
            expected_start_s=row.load_s,
        )


class StoreReports:
    """Work in flight and events, to Redis and to the loop. Never blocks: what cannot be told soon is dropped."""

    def __init__(self, store: Store, sender: Sender, door: str) -> None:
        self._store, self._sender, self._door = store, sender, door
        self._queue: queue.Queue[Callable[[], object]] = queue.Queue(maxsize=1000)
        self._asked: dict[str, float] = {}
        self._busy: set[str] = set()
        threading.Thread(target=self._tell, name="reports", daemon=True).start()

    def activity(self, rows: Sequence[Activity]) -> None:
        """Keep each busy replica's work in flight where a drain looks for it, and say once when it has none any more."""
        telling = [row for row in rows if row.in_flight or row.instance in self._busy]
        self._busy.difference_update(row.instance for row in telling if not row.in_flight)
        self._busy.update(row.instance for row in telling if row.in_flight)
        if telling:
            self._put(lambda: self._keep(telling))

    def _keep(self, rows: Sequence[Activity]) -> None:
        for row in rows:
            self._store.put(f"door:{row.instance}:{self._door}", asdict(row), REPORT_TTL_S)

    def happened(self, event: Happened) -> None:
        """Put it into the model's history; a stall, a crash or a suspicion asks for a look at once."""
        if event.kind in ("stall", "crash", "suspect"):
            self._look_at(event.model)
        if event.kind in ("back", "suspect"):
            return
        data = {**event.data, "instance": event.instance, "run": event.run, "door": self._door}
        text = f"front door: {event.kind}" + (f" at {event.instance}" if event.instance else "")
        self._put(lambda: self._store.add_event(event.model, ModelEvent(kind=event.kind, text=text, data=data)))

    def _look_at(self, model: str) -> None:
        now = time.monotonic()
        if now - self._asked.get(model, -ASK_AGAIN_S) >= ASK_AGAIN_S:
            self._asked[model] = now
            self._put(lambda: self._sender.send("recovery.check", {"model": model, "by": "front door"}, queue=CONTROL_QUEUE))

    def _put(self, work: Callable[[], object]) -> None:
        try:
            self._queue.put_nowait(work)
        except queue.Full:
            log.warning("reports are dropped: Redis is slow or away")

    def _tell(self) -> None:
        while True:
            work = self._queue.get()
            try:
                work()
            except StoreUnavailableError as error:
                log.debug("a report is lost: %s", error)
            except Exception:
                log.exception("cannot report")


def _telling(row: Instance) -> tuple[str, int | None, str | None, bool]:
    return row.state.value, row.run, row.base_url, row.routable


def _told(change: Change) -> tuple[str, int | None, str | None, bool]:
    return change.state, change.run, change.base_url or None, change.routable


def _on(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *args: object) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(call, *args)
