"""
The fake and the real store do the same: random walks are taken on both, and what they answer is compared.

Instants are far in the past or far in the future, so that the two clocks need not agree.
"""

import uuid
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recovery.adapters.memory_store import MemoryStore
from recovery.adapters.redis_store import RedisStore
from recovery.core.change import Commit, Count, Incident, ModelEvent
from recovery.core.instance import Desired, Instance
from recovery.core.states import State
from recovery.errors import RecoveryError
from tests.contract.world import instance, on_host
from tests.helpers import RedisServer

PAST, FUTURE = 1.0, 9_000_000_000.0
IDS = st.sampled_from(["a-0", "a-1", "b-0"])
HOSTS = st.sampled_from(["gpu-1", "gpu-2"])
TIMES = st.sampled_from([None, PAST, PAST + 1, FUTURE])
LIMITS = {"changes_kept": 10_000, "events_kept": 1_000, "incidents_kept": 3}

commits = st.fixed_dictionaries(
    {
        "do": st.just("commit"),
        "id": IDS,
        "stale": st.sampled_from([0, 0, 0, 0, 1]),
        "token": st.sampled_from([0, 0, 1, 2, -1]),
        "host": HOSTS,
        "due": TIMES,
        "look_at": TIMES,
        "not_before": st.sampled_from([0.0, 0.0, FUTURE]),
        "lease_until": st.sampled_from([0.0, 0.0, FUTURE, None]),
        "desired": st.sampled_from(Desired),
        "state": st.sampled_from(State),
        "says": st.integers(0, 3),
    }
)
claims = st.fixed_dictionaries(
    {"do": st.just("claim"), "id": IDS, "token": st.sampled_from([0, 0, 0, 1]), "lease_s": st.sampled_from([1e6, -1.0])}
)
pops = st.fixed_dictionaries(
    {"do": st.just("pop"), "queue": st.sampled_from(["steps", "looks"]), "host": HOSTS, "push_s": st.just(1e6), "limit": st.integers(0, 3)}
)
deletes = st.fixed_dictionaries({"do": st.just("delete"), "id": IDS})
walks = st.lists(st.one_of(commits, commits, claims, pops, deletes), max_size=25)


class Walker:
    """Takes the steps of a walk on one store and writes down what a caller can see of it, without versions and times."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.position = store.snapshot()[0]
        self.incidents = 0

    def step(self, what: dict[str, Any]) -> Any:
        try:
            answer = getattr(self, what["do"])(what)
        except RecoveryError as error:
            return type(error)
        return self.told(answer) if isinstance(answer, Instance) else answer

    def commit(self, what: dict[str, Any]) -> Instance:
        before: Instance | None = self.store.load(what["id"])
        row = before or instance(what["id"])
        changes = {name: what[name] for name in ("due", "look_at", "not_before", "desired", "state")}
        lease = row.lease_until if what["lease_until"] is None else what["lease_until"]
        after = row.evolve(**changes, lease_until=lease, token=row.token + what["token"], placement=on_host(row, what["host"]))
        self.incidents += 1
        of = {"model": row.model, "instance": row.id, "host": what["host"], "token": row.token, "cause": "exit"}
        said = Commit(
            after=after,
            expected_version=row.version + what["stale"],
            events=(ModelEvent(kind="x", data={"n": self.incidents}),) * what["says"],
            counts=(Count(name="x_total", labels=(("model", row.model),)),) * what["says"],
            incident=Incident(id=f"i{self.incidents}", opened_at=self.incidents, **of) if what["says"] else None,
        )
        return self.store.commit(said)

    def claim(self, what: dict[str, Any]) -> Instance:
        row = self.store.load(what["id"])
        return self.store.claim(what["id"], (row.token if row else 5) + what["token"], what["lease_s"])

    def pop(self, what: dict[str, Any]) -> Any:
        return self.store.pop_due(what["queue"], what["host"], what["push_s"], what["limit"])

    def delete(self, what: dict[str, Any]) -> None:
        self.store.delete(what["id"])

    def told(self, row: Instance) -> Instance:
        """The row, its versions and the times that a claim made replaced by words."""
        now = self.store.now()

        def rough(at: float | None) -> float | None:
            return at if at in (None, 0.0, PAST, PAST + 1, FUTURE) else float(at > now)

        return row.model_copy(update={"version": 1, "lease_until": rough(row.lease_until), "due": rough(row.due)})

    def seen(self) -> dict[str, Any]:
        """Everything that can be read."""
        changes = self.store.follow(self.position, 0)
        versions = [row.version for row in self.store.load_all()]
        return {
            "rows": [self.told(row) for row in self.store.load_all()],
            "versions are real": all(version > 0 for version in versions),
            "snapshot": [self.told(row) for row in self.store.snapshot()[1]],
            "changes": [change.model_copy(update={"id": "", "version": 1}) for change in changes],
            "hosts": self.store.hosts_with_rows(),
            "events": {name: [(event["kind"], event["data"]) for event in self.store.events(name, 100)] for name in ("a", "b")},
            "counters": self.store.counters(),
            "incidents": {name: self.store.incidents(name, 100) for name in (None, "a", "b")},
        }


@pytest.mark.timeout(600)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(walk=walks)
def test_both_stores_answer_alike(redis_server: RedisServer, walk: list[dict[str, Any]]) -> None:
    real = RedisStore(redis_server.url, f"same-{uuid.uuid4().hex[:8]}", **LIMITS)
    try:
        fake, true = Walker(MemoryStore(**LIMITS)), Walker(real)
        for what in walk:
            assert fake.step(what) == true.step(what), what
            assert fake.seen() == true.seen(), what
    finally:
        real.close()
