"""
Fixtures for every folder: one real Redis per test session, one key prefix per test.
"""

import shutil
import signal
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from recovery.adapters.redis_store import RedisStore
from recovery.adapters.redis_url import RedisUrl
from tests.helpers import RedisServer

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # begun in the background: what the tests start shall hear Ctrl-C all the same

settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock")
"""No test fails for the time an example took: machines are slow at times."""


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One real Redis for the session. A test that stops or freezes one takes `own_redis`."""
    with _server() as server:
        yield server


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A real Redis for this test alone, to be killed, frozen and restarted."""
    with _server() as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> RedisUrl:
    """Where the session's Redis is."""
    return redis_server.url


@pytest.fixture
def prefix() -> str:
    """A key prefix that no other test has."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def store(redis_url: RedisUrl, prefix: str) -> Iterator[RedisStore]:
    """A store on the session's Redis, empty."""
    store = RedisStore(redis_url, prefix)
    yield store
    store.close()


class _server:
    """A server in a short directory of its own (a socket's path has 107 bytes), gone afterwards."""

    def __enter__(self) -> RedisServer:
        self._folder = Path(tempfile.mkdtemp(prefix="rec-"))
        self._server = RedisServer(self._folder)
        return self._server.start()

    def __exit__(self, *_: object) -> None:
        self._server.stop()
        shutil.rmtree(self._folder, ignore_errors=True)
