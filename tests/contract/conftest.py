"""
One suite, two stores: every test that takes `world` runs on the fake and on a real Redis.
"""

from collections.abc import Iterator

import pytest

from recovery.adapters.memory_store import ManualClock, MemoryStore
from recovery.adapters.redis_store import RedisStore
from tests.contract.world import World
from tests.helpers import RedisServer


@pytest.fixture(params=["memory", "redis"])
def world(request: pytest.FixtureRequest, prefix: str) -> Iterator[World]:
    """A store with small bounds: 100 changes, 100 events, 5 incidents."""
    limits = {"changes_kept": 100, "events_kept": 100, "incidents_kept": 5}
    if request.param == "memory":
        yield World(MemoryStore(ManualClock(), **limits), True, limits)
        return
    server: RedisServer = request.getfixturevalue("redis_server")
    store = RedisStore(server.url, prefix, **limits)
    yield World(store, False, limits, server)
    store.close()
