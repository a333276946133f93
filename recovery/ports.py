"""
One small Protocol per outside thing. Adapters fill them; the service knows nothing else of the world.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

from recovery.core.change import Change, Commit, Count, Incident, ModelEvent
from recovery.core.diagnosis import GpuReading
from recovery.core.host import HostRecord, HostView, PortHolder, RunRecord
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

    def load_now(self, instance_id: str) -> tuple[Instance | None, float]:
        """Return the row and the time, in one round trip: what a decision is made on."""

    def load_many(self, ids: Sequence[str]) -> tuple[Instance, ...]:
        """Return those rows that exist, in one round trip. One that this version cannot read is left out, here and below."""

    def unreadable(self) -> Mapping[str, str]:
        """Return why the rows that this version cannot read are left out, by their ids."""

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

    def put(self, key: str, value: Any, ttl_s: float) -> None:
        """Keep one small JSON value under a name, for a while (front door reports, brake, tick)."""

    def put_many(self, values: Mapping[str, Any], ttl_s: float) -> None:
        """The same for several, in as many round trips as for one (log tails)."""

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


class Sender(Protocol):
    """The task queue. Sending is a hint, the row is the truth: a send that fails is told, never raised."""

    def send(
        self,
        task: str,
        kwargs: dict[str, Any],
        *,
        queue: str,
        countdown_s: float = 0.0,
        expires_s: float = 60.0,
        task_id: str | None = None,
    ) -> str | None:
        """Publish a task (under `task_id` when given) and return its id; None when the broker did not take it."""


class Host(Protocol):
    """The processes and files of one GPU host (`adapters/processes.py`). Raises `DiskError`, `SpawnError`, `LeaseHeldError`."""

    def stay_ahead(self) -> None:
        """From now on have what a start needs ready beforehand."""

    def instances(self) -> tuple[str, ...]:
        """Return the instances this host's disk knows."""

    def read_record(self, instance: str) -> HostRecord:
        """Return host.json; an empty record when there is none."""

    def write_record(self, instance: str, record: HostRecord) -> None:
        """Write host.json by rename, synced."""

    def step_lock(self, instance: str) -> AbstractContextManager[None]:
        """Serialise the steps of an instance on this host; raise `LeaseHeldError` at once when held."""

    def look(self, instance: str) -> HostView:
        """Return what is there of an instance."""

    def spawn(
        self,
        instance: str,
        token: int,
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        kill_deadline_s: float,
        log_bytes: int,
        log_files: int,
        keep_logs: int,
        lease_s: float | None = None,
    ) -> RunRecord:
        """
        Start a keeper with this run; raise `SpawnError`, `DiskError` or `LeaseHeldError`.

        With `lease_s` the keeper ends the server when `renew` has not been called for so long.
        """

    def boot_clock(self) -> float:
        """Return the seconds since this host's boot, suspended time included: no administrator turns it back."""

    def renew(self, instance: str, until: float) -> bool:
        """Put off the end of a leased run to an instant of the boot clock; False when its lease is over: that end stands."""

    def leased(self, instance: str) -> bool:
        """Return whether the newest run was started with a lease."""

    def adopt(self, instance: str) -> RunRecord:
        """Start a keeper for a server whose keeper died."""

    def terminate(self, instance: str, token: int) -> bool:
        """Send SIGTERM to the run's main process."""

    def kill(self, instance: str, token: int) -> Any:
        """Send SIGKILL to everything of the run."""

    def end_keeper(self, instance: str, token: int) -> bool:
        """Send SIGKILL to a keeper that does not act though its server is dead."""

    def end_strays(self, instance: str) -> Any:
        """Send SIGKILL to what is left of runs that are over."""

    def keeper_pidfd(self, instance: str) -> int | None:
        """Return a pidfd of the live keeper."""

    def port_holder(self, port: int) -> PortHolder | None:
        """Return who listens on a port of this host."""

    def listens(self, instance: str, port: int) -> bool:
        """True when the LISTEN socket belongs to this instance's run."""

    def cpu_seconds(self, instance: str) -> float | None:
        """Return the CPU time of the run's process tree."""

    def read_log(self, instance: str, token: int, max_bytes: int) -> str:
        """Return a run's log, its head and its tail when it is longer."""

    def protect(self, instance: str, token: int) -> None:
        """Keep the log of this run: the first failing one of a crash loop."""


class Gpu(Protocol):
    """The cards of this host; a host without any has no readings, and that is no error."""

    def readings(self) -> tuple[GpuReading, ...]:
        """Return one reading per card."""

    def xids(self, gpus: Sequence[int], since: float) -> tuple[int, ...]:
        """Return the Xid events of these cards (all when empty) since an instant (Unix seconds)."""


class Kernel(Protocol):
    """What the kernel knows of an end."""

    def oom_killed(self, pid: int, since: float, others: Collection[int] = ()) -> bool:
        """True when the OOM killer took this process or one of `others`, as far as this host lets us see."""


class Webhook(Protocol):
    """Somebody outside who wants to know of incidents."""

    def tell(self, message: dict[str, Any]) -> None:
        """Deliver a message; raise `WebhookError` when it was not taken."""
