"""
An API on a real Redis behind a real uvicorn; the control worker is the real `Service`, run in the calling thread.

The host is the test: `Fleet` writes rows as a host's worker would, through the same store.
"""

import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import uvicorn

from recovery.adapters.rate_limits import RateLimits
from recovery.adapters.redis_store import RedisStore
from recovery.adapters.redis_url import RedisUrl
from recovery.api.app import create_app
from recovery.api.limits import PER_MINUTE
from recovery.api.tasks import TaskAnswer
from recovery.core.change import Commit, Count, Incident, ModelEvent
from recovery.core.commanding import Command, Verb
from recovery.core.fleet import Placement, Policy
from recovery.core.instance import Desired, Instance, ProbeMemory
from recovery.core.states import State
from recovery.errors import StoreUnavailableError
from recovery.service import Service
from recovery.settings import Settings
from tests.helpers import wait_until

HOST = "gpu-1"


class NoSender:
    """The fast path is off: in these tests nobody takes messages."""

    def send(self, task: str, kwargs: dict[str, Any], **timing: Any) -> str | None:
        """Take nothing."""
        return None


class Worker:
    """The task queue with its workers: commands are carried out by the real service, host tasks by the test."""

    def __init__(self, store: RedisStore) -> None:
        self.service = Service(store, NoSender())
        self.answers: dict[str, TaskAnswer] = {}
        self.sent: list[tuple[str, dict[str, Any], str]] = []
        self.on_host: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {}
        self.away = False  # nobody takes what is sent
        self.broken = False  # the broker does not take it

    def send(self, task: str, kwargs: dict[str, Any], queue: str) -> str:
        """Carry a task out at once."""
        if self.broken:
            raise StoreUnavailableError("cannot send the command: the task queue (Redis) does not answer; nothing was changed")
        task_id = str(uuid.uuid4())
        self.sent.append((task, kwargs, queue))
        if not self.away:
            result = self._run(task, dict(kwargs))
            if result is not None:
                self.answers[task_id] = TaskAnswer("done", result)
        return task_id

    def _run(self, task: str, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        if task in self.on_host:
            return self.on_host[task](kwargs)
        verb = Verb(task.removeprefix("recovery.")) if task.removeprefix("recovery.") in set(Verb) else None
        if verb is None:
            return None
        return self.service.command(kwargs.pop("model"), Command(verb=verb, **kwargs)).model_dump(mode="json")

    def look(self, task_id: str) -> TaskAnswer:
        """How far it is."""
        return self.answers.get(task_id, TaskAnswer("queued"))

    def forget(self, task_id: str) -> None:
        """Drop the answer."""
        self.answers.pop(task_id, None)


class Fleet:
    """Writes rows and heartbeats as hosts do."""

    def __init__(self, store: RedisStore) -> None:
        self.store = store
        self._stop = threading.Event()
        self._beats = threading.Thread(target=self._beat_forever, daemon=True)
        self.hosts: dict[str, dict[str, Any]] = {HOST: {}}
        self._beats.start()

    def stop(self) -> None:
        """End the heartbeats."""
        self._stop.set()
        self._beats.join(timeout=30)

    def _beat_forever(self) -> None:
        while not self._stop.is_set():
            try:
                for host, facts in list(self.hosts.items()):
                    self.store.beat(host, {"wall": self.store.now(), "gpus": [], **facts}, 3.0)
                self.store.put("tick", self.store.now(), 600.0)
            except StoreUnavailableError:
                pass  # a test stopped it
            self._stop.wait(0.5)

    def add(self, model: str = "vllm", replica: int = 0, host: str = HOST, policy: Policy | None = None, **changes: Any) -> Instance:
        """A healthy instance, unless `changes` say otherwise."""
        now = self.store.now()
        healthy = {
            "state": State.HEALTHY,
            "desired": Desired.RUNNING,
            "reason": "serving",
            "token": 7,
            "run": 7,
            "spawned_at": now - 125.3,
            "ready_at": now - 100.0,
            "base_url": f"http://127.0.0.1:{8001 + replica}/v1",
            "probe": ProbeMemory(last_at=now - 9.0),
        }
        row = Instance(
            id=f"{model}-{replica}",
            model=model,
            replica=replica,
            policy=policy or Policy(restart_policy="on-failure", drain_timeout_s=0),
            placement=Placement(host=host, port=8001 + replica, replica=replica),
            **{**healthy, **changes},
        )
        return self.store.commit(Commit(after=row, expected_version=0))

    def change(
        self,
        instance: str = "vllm-0",
        *,
        events: tuple[ModelEvent, ...] = (),
        counts: tuple[Count, ...] = (),
        incident: Incident | None = None,
        **changes: Any,
    ) -> Instance:
        """Change a row as it is now."""
        row = self.store.load(instance)
        assert row is not None
        after = row.evolve(**changes)
        return self.store.commit(Commit(after=after, expected_version=row.version, events=events, counts=counts, incident=incident))

    def row(self, instance: str = "vllm-0") -> Instance:
        """The row."""
        row = self.store.load(instance)
        assert row is not None
        return row

    def bring_up(self, instance: str = "vllm-0") -> None:
        """What a host does after a restart was committed: a run with the new token that answers."""
        wait_until(lambda: self.row(instance).state, State.RELEASING, within_s=60)
        row = self.row(instance)
        self.change(instance, state=State.HEALTHY, intent=None, run=row.token, spawned_at=self.store.now(), reason="serving", due=None)


class Api:
    """One API process' worth of server, in a thread."""

    def __init__(self, app: Any) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def start(self) -> "Api":
        """Serve."""
        self._thread.start()
        wait_until(lambda: self.client.get("/livez").status_code, 200, within_s=60)
        return self

    def stop(self) -> None:
        """End it."""
        self.client.close()
        self._server.should_exit = True
        self._thread.join(timeout=60)
        self._socket.close()


@pytest.fixture
def fleet(store: RedisStore) -> Iterator[Fleet]:
    """An empty fleet with one host that lives."""
    made = Fleet(store)
    wait_until(store.hosts, lambda hosts: HOST in hosts, within_s=60)
    yield made
    made.stop()


@pytest.fixture
def worker(store: RedisStore) -> Worker:
    """The task queue."""
    return Worker(store)


MakeApi = Callable[..., Api]


@pytest.fixture
def make_api(store: RedisStore, redis_url: RedisUrl, prefix: str, worker: Worker, fleet: Fleet) -> Iterator[MakeApi]:
    """Starts APIs with these settings; `per_minute` lifts the rate limits where a test needs more."""
    made: list[Api] = []

    def make(per_minute: int | None = 10_000, **settings: Any) -> Api:
        limits = PER_MINUTE if per_minute is None else dict.fromkeys(PER_MINUTE, per_minute)
        app = create_app(Settings(**settings), store, worker, RateLimits.on_redis(redis_url, prefix, limits))
        made.append(Api(app).start())
        return made[-1]

    yield make
    for each in made:
        each.stop()


@pytest.fixture
def api(make_api: MakeApi) -> Api:
    """An API without tokens."""
    return make_api()
