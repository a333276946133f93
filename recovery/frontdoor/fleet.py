"""
The replicas as the data path knows them: what the view says, what the door has seen itself, who is in flight.
"""

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from recovery.core import breaker as breakers
from recovery.core.routing import choose
from recovery.frontdoor.hold import HoldQueue
from recovery.frontdoor.meters import Meters, ReplicaMeter
from recovery.frontdoor.reports import Happened
from recovery.frontdoor.settings import DoorSettings
from recovery.frontdoor.view import GONE, LEAVING, Model, Replica, Snapshot, View

if TYPE_CHECKING:
    from recovery.frontdoor.exchange import Exchange
    from recovery.frontdoor.upstream import Upstream

ON_PURPOSE = LEAVING - {"failed"}
"""States that a run ends in because somebody ended it."""
RunKey = tuple[str, str | None, int]
"""Instance and life: the run's token, and how often the door itself saw it begin anew."""


class Endpoint:
    """One replica. `busy`, `used` and `warm_from` are what the choice looks at (`routing.Candidate`)."""

    __slots__ = (
        "awaiting", "breaker", "busy", "cleared_at", "cold", "dead", "epoch", "head", "idle", "last_byte", "live", "meter", "pool",
        "prefix", "removed", "seen_well", "silent", "spec", "suspect", "up", "used", "warm_from", "watching",
    )  # fmt: skip

    def __init__(self, spec: Replica, pool: "Pool", meter: ReplicaMeter) -> None:
        self.spec, self.pool, self.meter = spec, pool, meter
        self.busy, self.used, self.warm_from = 0, 0, 0.0
        self.breaker = breakers.CLOSED
        self.up = self.suspect = self.dead = self.silent = self.removed = self.watching = self.seen_well = self.cold = False
        self.epoch, self.cleared_at, self.last_byte = 0, 0.0, 0.0
        self.idle: list[Upstream] = []
        self.live: set[Upstream] = set()
        self.awaiting: list[tuple[Exchange, RunKey]] = []
        """Requests that a broken connection threw back, and the run they were at: a crash or not, the next look tells."""
        self._address()

    def _address(self) -> None:
        spec = self.spec
        self.prefix = spec.base_url.rstrip("/").removesuffix("/v1").encode()
        if self.prefix.startswith(b"http"):  # a whole URL: only its path counts
            self.prefix = b"/" + b"/".join(self.prefix.split(b"/")[3:]) if self.prefix.count(b"/") > 2 else b""
        name = f"[{spec.host}]" if ":" in spec.host else spec.host
        auth = f"authorization: Bearer {spec.api_key}\r\n" if spec.api_key else ""
        self.head = f"host: {name}:{spec.port}\r\n{auth}".encode()

    @property
    def run_key(self) -> RunKey:
        """The life the replica leads now."""
        return (self.spec.instance, self.spec.run, self.epoch)

    def restate(self, spec: Replica) -> bool:
        """Take what the view says now; True when this is another life of the replica (so the last one has ended)."""
        old, self.spec = self.spec, spec
        if (old.host, old.port, old.base_url, old.api_key) != (spec.host, spec.port, spec.base_url, spec.api_key):
            self._address()
            self.close_idle()
        return spec.run != old.run and old.run is not None

    def reborn(self) -> None:
        """Begin another life: what was held against the last one is forgotten."""
        self.epoch += 1
        self.suspect = self.dead = self.silent = self.seen_well = False
        self.cold = True
        self.breaker = breakers.CLOSED
        self.close_idle()

    def close_idle(self) -> None:
        for connection in self.idle:
            connection.close()
        self.idle.clear()


class Pool:
    """One model: its replicas and the requests that wait for one."""

    def __init__(self, fleet: "Fleet", model: Model) -> None:
        self.fleet, self.name = fleet, model.name
        self.meter = fleet.meters.model(model.name)
        self.endpoints: list[Endpoint] = []
        self.cards: dict[str, dict[str, object]] = {}
        """What a replica's `/v1/models` said, by id."""
        self.restate(model)

    def restate(self, model: Model) -> None:
        self.settings = model.settings
        if not hasattr(self, "held"):
            self.held: HoldQueue[Exchange] = HoldQueue(0, 0)
        self.held.max_requests, self.held.max_bytes = model.settings.hold_max_requests, model.settings.hold_max_bytes

    @property
    def names(self) -> tuple[str, ...]:
        """Names a client may ask for, the first being the one to answer with."""
        return tuple(dict.fromkeys((*self.settings.served_names, self.name, *self.cards)))

    def upstream_name(self, asked: str | None) -> str | None:
        """
        What the servers call the model a client asked for; None: leave the request as it is.

        Where their command line does not tell, it is what they list first, as vLLM does with the model itself before its adapters.
        """
        served = self.settings.served_names or tuple(self.cards)
        return served[0] if served and asked not in served and asked not in self.cards else None

    @property
    def max_model_len(self) -> int | None:
        """Context length, from the settings or from a replica."""
        if self.settings.max_model_len is not None:
            return self.settings.max_model_len
        lengths = (card.get("max_model_len") for card in self.cards.values())
        return next((n for n in lengths if isinstance(n, int)), None)

    def usable(self, now: float) -> Iterator[Endpoint]:
        """Replicas that may take a request now."""
        for endpoint in self.endpoints:
            if endpoint.up and (endpoint.breaker is breakers.CLOSED or breakers.allows(endpoint.breaker, now)):
                yield endpoint

    def choose(self, now: float, visited: dict["Endpoint", tuple[int, float]]) -> Endpoint | None:
        """The least busy usable replica that this request has not failed at."""
        slow_start_s = self.fleet.settings.slow_start_s
        if not visited:
            return choose(self.usable(now), now, slow_start_s)
        return choose((e for e in self.usable(now) if not been_at(visited, e)), now, slow_start_s)

    def hopeless(self) -> bool:
        """True when no replica will come back by itself."""
        return all(endpoint.spec.state in GONE and not endpoint.up for endpoint in self.endpoints)

    def retry_after_s(self) -> int | None:
        """Whole seconds until the first replica should be ready, by its known start-up time; None: nobody knows of one."""
        if self.hopeless():
            return None
        waits, unix = [], time.time()
        for endpoint in self.endpoints:
            spec = endpoint.spec
            if endpoint.up:
                waits.append(1.0)
            elif spec.state not in GONE and spec.expected_start_s is not None:
                elapsed = unix - spec.starting_since if spec.starting_since is not None else 0.0
                waits.append(spec.expected_start_s - elapsed)
        return max(1, int(-(-min(waits) // 1))) if waits else 5

    def wake(self) -> None:
        """Let everybody who waits look again: a replica is back, or nothing is left to wait for."""
        if len(self.held):
            for exchange in self.held.take_all():
                exchange.woken()


def been_at(visited: dict[Endpoint, tuple[int, float]], endpoint: Endpoint) -> bool:
    """
    True when a request has failed at this life of a replica and nothing speaks for trying again.

    The entry is the life and until when it counts: a broken connection counts until a look has found the
    replica well, an answer of 500 for as long as that life lasts.
    """
    entry = visited.get(endpoint)
    return entry is not None and entry[0] == endpoint.epoch and entry[1] > endpoint.cleared_at


class Fleet:
    """All pools, kept in step with the view."""

    def __init__(self, settings: DoorSettings, meters: Meters, clock: Callable[[], float], report: Callable[[Happened], None]) -> None:
        self.settings, self.meters, self.clock, self.report = settings, meters, clock, report
        self.pools: dict[str, Pool] = {}
        self.by_name: dict[str, Pool] = {}
        self.came_up: Callable[[Endpoint], None] = lambda endpoint: None
        self.view: View | None = None

    def follow(self, view: View) -> None:
        """Keep in step with a view from now on."""
        self.view = view
        view.listen(self.apply)

    def endpoints(self) -> Iterator[Endpoint]:
        for pool in self.pools.values():
            yield from pool.endpoints

    def apply(self, snapshot: Snapshot) -> None:
        """Make the pools what the snapshot says, keeping everything that is in flight."""
        wanted = {model.name: model for model in snapshot.models}
        for name in [name for name in self.pools if name not in wanted]:
            pool = self.pools.pop(name)
            for endpoint in pool.endpoints:
                self._remove(endpoint)
            pool.endpoints = []
            pool.wake()
        for model in snapshot.models:
            existing = self.pools.get(model.name)
            if existing is None:
                existing = self.pools[model.name] = Pool(self, model)
            else:
                existing.restate(model)
            self._endpoints(existing, model)
        self.index()
        for pool in list(self.pools.values()):
            pool.wake()

    def index(self) -> None:
        """Build the table from names to pools: a model's own names come before those its servers list."""
        self.by_name = {}
        for pool in self.pools.values():
            for name in (*pool.settings.served_names, pool.name):
                self.by_name.setdefault(name, pool)
        for pool in self.pools.values():
            for name in pool.cards:
                self.by_name.setdefault(name, pool)

    def _endpoints(self, pool: Pool, model: Model) -> None:
        known = {endpoint.spec.instance: endpoint for endpoint in pool.endpoints}
        pool.endpoints = []
        for spec in model.replicas:
            endpoint = known.pop(spec.instance, None)
            if endpoint is None:
                endpoint = Endpoint(spec, pool, pool.meter.replica(spec.instance))
                endpoint.warm_from = self._serving_since(spec)
            else:
                was_routable, run = endpoint.spec.routable, endpoint.run_key
                if endpoint.restate(spec):
                    if was_routable and spec.state not in ON_PURPOSE:
                        at_it = [c.exchange for c in endpoint.live if c.exchange is not None and c.exchange.run == run]
                        endpoint.awaiting += [(exchange, run) for exchange in at_it]  # the view was faster than the reset
                    self.run_ended(endpoint)
                    endpoint.reborn()
                elif spec.routable and not was_routable:
                    endpoint.suspect = endpoint.dead = endpoint.silent = False
            pool.endpoints.append(endpoint)
            self.refresh(endpoint, wake=False)
        for endpoint in known.values():
            self._remove(endpoint)

    def _serving_since(self, spec: Replica) -> float:
        if spec.ready_since is None:
            return self.clock() - self.settings.slow_start_s
        return self.clock() - max(0.0, time.time() - spec.ready_since)

    def _remove(self, endpoint: Endpoint) -> None:
        endpoint.removed = True
        endpoint.close_idle()
        self.refresh(endpoint, wake=False)

    def refresh(self, endpoint: Endpoint, wake: bool = True) -> None:
        """Decide anew whether a replica gets requests, and wake those who wait if it does so from now on."""
        spec = endpoint.spec
        told = spec.routable
        if not told and self.view is not None and not self.view.fed:
            told = endpoint.seen_well and spec.state not in LEAVING
        up = told and not (endpoint.suspect or endpoint.silent or endpoint.removed)
        if up != endpoint.up:
            endpoint.up = endpoint.meter.up = up
            if up:
                if endpoint.cold:
                    endpoint.cold, endpoint.warm_from = False, self.clock()
                self.came_up(endpoint)
            else:
                endpoint.close_idle()
        if up and wake:
            endpoint.pool.wake()

    def suspicious(self, endpoint: Endpoint, why: str) -> None:
        """Take a replica out of the choice until a look has found it well."""
        if not endpoint.suspect:
            endpoint.suspect = True
            self.report(Happened("suspect", endpoint.pool.name, endpoint.spec.instance, endpoint.spec.run, {"why": why}))
            self.refresh(endpoint)

    def run_ended(self, endpoint: Endpoint) -> None:
        """Count the end of a run against the requests that were in flight at it, once."""
        awaiting, endpoint.awaiting = endpoint.awaiting, []
        if awaiting:
            data = {"in_flight": len(awaiting)}
            self.report(Happened("crash", endpoint.pool.name, endpoint.spec.instance, endpoint.spec.run, data))
        for exchange, run in awaiting:
            exchange.crashed_at(run)

    def found_dead(self, endpoint: Endpoint) -> None:
        """A look was refused, or `/health` said 503: this life of the replica is over."""
        endpoint.seen_well = False
        self.run_ended(endpoint)
        if not endpoint.dead:
            endpoint.dead = endpoint.cold = True
            endpoint.epoch += 1
            endpoint.breaker = breakers.CLOSED
            endpoint.pool.wake()
        self.refresh(endpoint)

    def found_well(self, endpoint: Endpoint) -> None:
        """A look found a replica well: what broke was the connection, or it is back."""
        was_out = endpoint.suspect or endpoint.silent
        endpoint.awaiting, waiting = [], endpoint.awaiting
        for exchange, run in waiting:
            exchange.cleared_of(run)
        endpoint.suspect = endpoint.dead = endpoint.silent = False
        endpoint.seen_well, endpoint.cleared_at = True, self.clock()
        if was_out:
            self.report(Happened("back", endpoint.pool.name, endpoint.spec.instance, endpoint.spec.run))
        self.refresh(endpoint)
        endpoint.pool.wake()
