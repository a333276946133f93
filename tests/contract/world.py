"""
What a test of the contract holds: a store, its surroundings, and rows to put into it.
"""

import json
from dataclasses import dataclass
from typing import Any

from recovery.core.change import Commit
from recovery.core.fleet import Placement, Policy
from recovery.core.instance import Desired, Instance
from recovery.core.states import State
from tests.helpers import RedisServer, wait_until


@dataclass
class World:
    """A store, and what a test needs to know of its surroundings."""

    store: Any
    memory: bool
    limits: dict[str, int]
    server: RedisServer | None = None

    def pass_time(self, seconds: float) -> None:
        """Let the store's clock move on by at least `seconds`: by hand, or by waiting for Redis'."""
        if self.memory:
            self.store.clock.advance(seconds)
            return
        until = self.store.now() + seconds
        wait_until(self.store.now, lambda now: now >= until, within_s=seconds + 30)

    def set_document(self, instance_id: str, **fields: Any) -> None:
        """Change fields of the stored document behind the store's back."""
        if self.memory:
            row = self.store._state.rows[instance_id]
            row.doc = json.dumps({**json.loads(row.doc), **fields}).encode()
            return
        assert self.server
        with self.server.client() as client:
            key = self.store.keys.row(instance_id)
            raw: Any = client.hget(key, "doc")
            client.hset(key, "doc", json.dumps({**json.loads(raw), **fields}))

    def put_new(self, row: Instance) -> Instance:
        """Commit a row that is not there yet."""
        written: Instance = self.store.commit(Commit(after=row, expected_version=0))
        return written

    def put_next(self, before: Instance, **changes: Any) -> Instance:
        """Commit changes to a row as it was read."""
        written: Instance = self.store.commit(Commit(after=before.evolve(**changes), expected_version=before.version))
        return written


def instance(instance_id: str = "vllm-0", **fields: Any) -> Instance:
    """A row with what must be given."""
    model, _, replica = instance_id.rpartition("-")
    given = {
        "id": instance_id,
        "model": model,
        "replica": int(replica),
        "policy": Policy(),
        "placement": Placement(host="gpu-1", port=8001),
        "token": 5,
        "desired": Desired.RUNNING,
        "state": State.RESTARTING,
    }
    return Instance.model_validate({**given, **fields})


def on_host(row: Instance, host: str) -> Placement:
    """The row's placement, moved."""
    return row.placement.model_copy(update={"host": host})
