"""
One small Protocol per outside thing. Adapters fill them; the service knows nothing else of the world.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol

from recovery.core.change import Change, Commit, Count, Incident, ModelEvent
from recovery.core.instance import Instance

Queue = Literal["steps", "looks"]


class Store(Protocol):
    """
    Redis as memory. Every method raises `StoreUnavailableError` when Redis does not answer in time.

    Instants are Redis' own clock. No method blocks longer than the socket time-out (2 s).
    """

    def now(self) -> float:
        """Return Redis' time in seconds (microsecond resolution)."""

    def load(self, instance_id: str) -> Instance | None:
        """Return the row, an older schema migrated; raise `SchemaError` on a newer one."""

    def load_many(self, ids: Sequence[str]) -> tuple[Instance, ...]:
        """Return those rows that exist, in one round trip."""

    def ids(self) -> tuple[str, ...]:
        """Return the ids of all rows, sorted."""

    def load_all(self) -> tuple[Instance, ...]:
        """Return all rows in two round trips."""

    def commit(self, commit: Commit) -> Instance:
        """
        Write the row if its version is still `expected_version` (0 = absent) and return it with its new version.

        In the same script: due times into `steps` and `looks` of its host, one entry in the change stream, the
        model's events, counters, the incident. Raises `VersionConflictError` (read again), `StaleTokenError` (the
        stored token is higher).
        """

    def claim(self, instance_id: str, token: int, lease_s: float) -> Instance:
        """
        Take the lease to start run `token`; the row's due becomes the lease's end.

        Raises `StaleTokenError` when the token is not the row's or desired is not running, `LeaseHeldError` when
        leased or earlier than `not_before` - 0.1 s.
        """

    def delete(self, instance_id: str) -> None:
        """Forget a row and all that hangs on it (a model taken out of the fleet file)."""

    def pop_due(self, queue: Queue, host: str, push_s: float, limit: int) -> tuple[str, ...]:
        """Return ids that are due and push each `push_s` on, so that nobody else delivers them at once."""

    def hosts_with_rows(self) -> tuple[str, ...]:
        """Return the hosts that have a `due` or `looks` set, whether alive or not."""

    def once(self, key: str, ttl_ms: int) -> bool:
        """True for the first caller within `ttl_ms`: collapses doubled ticks."""

    def beat(self, host: str, info: dict[str, Any], ttl_s: float) -> None:
        """Write the host's heartbeat."""

    def hosts(self) -> dict[str, dict[str, Any]]:
        """Return the heartbeats that have not expired, with `age_s` added by Redis' clock."""

    def known_hosts(self) -> dict[str, dict[str, Any]]:
        """Return the last heartbeat of every host seen within a day, expired ones with `alive: false`."""

    def snapshot(self) -> tuple[str, tuple[Instance, ...]]:
        """Return the change stream's position and all rows as they were at it or later."""

    def follow(self, position: str, block_s: float) -> tuple[Change, ...] | None:
        """Return the changes after `position`, empty after `block_s`; None = a gap, take a new snapshot."""

    def add_event(self, model: str, event: ModelEvent) -> None:
        """Add one line to a model's history that no row changed with."""

    def events(self, model: str, count: int, after: str | None = None) -> tuple[dict[str, Any], ...]:
        """Return the newest (or those after an id) events of a model, oldest first: id, at, kind, text, data."""

    def follow_events(self, model: str, after: str, block_s: float) -> tuple[dict[str, Any], ...]:
        """Return events after an id, waiting up to `block_s`."""

    def count(self, counts: Iterable[Count]) -> None:
        """Add to counters outside a commit."""

    def counters(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Return all counters by name and labels."""

    def incident(self, incident_id: str) -> Incident | None:
        """Return one incident."""

    def incidents(self, model: str | None, count: int) -> tuple[Incident, ...]:
        """Return the newest incidents first."""

    def save_incident(self, incident: Incident) -> None:
        """Write an incident outside a row's commit (evidence that came later). Idempotent."""

    def put(self, key: str, value: Any, ttl_s: float) -> None:
        """Keep one small JSON value under a name, for a while (log tails, front door reports, brake, tick)."""

    def get(self, key: str) -> Any:
        """Return that value, None when absent."""

    def get_many(self, pattern: str) -> dict[str, Any]:
        """Return all small values whose name begins with `pattern`."""

    def remove(self, key: str) -> None:
        """Forget that value."""

    def info(self) -> dict[str, Any]:
        """Return what Redis says of itself (version, memory, persistence, policy), for the doctor."""

    def queue_depths(self, queues: Sequence[str]) -> dict[str, int]:
        """Return how many messages wait in each Celery queue."""
