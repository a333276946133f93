"""What holds when something is away: Redis, a host, the control worker, or the API itself."""

import threading
from typing import Any

import pytest

from recovery.adapters.rate_limits import RateLimits
from recovery.adapters.redis_store import RedisStore
from recovery.api.app import create_app
from recovery.api.limits import PER_MINUTE
from recovery.core.states import State
from recovery.settings import Settings
from tests.api.conftest import Api, Fleet, MakeApi, Worker
from tests.helpers import RedisServer, wait_until

MODEL = "/api/llm/models/vllm"
READS = ["/api/llm/models", MODEL, f"{MODEL}/events", "/api/hosts", "/api/llm/load", "/api/llm/door", "/metrics", "/readyz"]


@pytest.fixture
def apart(own_redis: RedisServer, prefix: str) -> Any:
    """An API on a Redis of its own, which the test may stop; with what belongs to it."""
    store = RedisStore(own_redis.url, prefix)
    fleet = Fleet(store)
    worker = Worker(store)
    limits = RateLimits.on_redis(own_redis.url, prefix, dict.fromkeys(PER_MINUTE, 1000))
    api = Api(create_app(Settings(), store, worker, limits)).start()
    fleet.add()
    wait_until(lambda: api.client.get(MODEL).status_code, 200, within_s=60)
    wait_until(lambda: api.client.get("/readyz").status_code, 200, within_s=60)
    yield api, own_redis, worker
    own_redis.resume()
    api.stop()
    fleet.stop()
    store.close()


@pytest.mark.parametrize("how", ["stop", "pause"])
def test_without_redis_everything_is_503_and_comes_back(apart: Any, how: str):
    api, redis, worker = apart
    getattr(redis, how)()
    wait_until(lambda: api.client.get(MODEL).status_code, 503, within_s=60)

    for path in READS:
        answer = api.client.get(path)
        assert answer.status_code == 503, path
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["detail"]
    assert api.client.post(f"{MODEL}/restart").status_code == 503
    assert api.client.get("/livez").status_code == 200
    assert api.client.get("/").status_code == 200
    assert worker.sent == []

    redis.resume() if how == "pause" else redis.start()
    wait_until(lambda: api.client.get(MODEL).status_code, 200, within_s=60)
    wait_until(lambda: [api.client.get(path).status_code for path in READS], [200] * len(READS), within_s=60)


def test_requests_that_wait_hold_nobody_up(make_api: MakeApi, fleet: Fleet, worker: Worker):
    """With one host frozen, more requests wait for it than there are threads, and everything else is answered."""
    fleet.add()
    fleet.add(model="other")
    api = make_api()
    wait_until(lambda: api.client.get("/api/llm/models").json()["total"], 2, within_s=60)
    worker.on_host["recovery.read_logs"] = lambda kwargs: None if kwargs["instance"] == "vllm-0" else {  # type: ignore[return-value]
        "lines": [], "total_lines": 0, "run": 7, "runs": [7], "end": "e"
    }  # fmt: skip
    paths = [("POST", f"{MODEL}/restart")] * 30 + [("GET", f"{MODEL}/logs")] * 30 + [("POST", f"{MODEL}/health-check")] * 10
    done: list[int] = []

    def wait(method: str, path: str) -> None:
        done.append(api.client.request(method, path).status_code)

    threads = [threading.Thread(target=wait, args=each, daemon=True) for each in paths]
    for thread in threads:
        thread.start()
    wait_until(lambda: fleet.row().state, State.RELEASING, within_s=60)

    other = "/api/llm/models/other"
    for path in ("/api/llm/models", other, f"{other}/events", f"{other}/logs", "/metrics", "/api/hosts", "/readyz"):
        assert api.client.get(path).status_code == 200, path
    assert api.client.post(f"{other}/reset").status_code == 200
    assert len(done) < len(paths), "they still wait"

    fleet.bring_up()
    for thread in threads:
        thread.join(60)
    assert len(done) == len(paths)


def test_the_end_of_the_api_changes_nothing_about_a_restart(make_api: MakeApi, fleet: Fleet):
    fleet.add()
    api = make_api()
    wait_until(lambda: api.client.get(MODEL).status_code, 200, within_s=60)
    thread = threading.Thread(target=lambda: _ignoring(lambda: api.client.post(f"{MODEL}/restart")), daemon=True)
    thread.start()
    wait_until(lambda: fleet.row().state, State.RELEASING, within_s=60)
    task = wait_until(lambda: next(iter(fleet.store.get_many("task:"))), within_s=60)

    api.stop()
    thread.join(60)
    fleet.bring_up()

    again = make_api()
    link = f"/api/tasks/{task.removeprefix('task:')}"
    told = wait_until(lambda: again.client.get(link).json(), lambda found: found.get("outcome") == "done", within_s=60)
    assert told["accepted"] is True
    assert again.client.get(MODEL).json()["restart_count"] == 1


def _ignoring(call: Any) -> None:
    try:
        call()
    except Exception:
        return


def test_a_clock_that_does_not_tick_is_not_ready(make_api: MakeApi, fleet: Fleet):
    api = make_api()
    wait_until(lambda: api.client.get("/readyz").status_code, 200, within_s=60)
    fleet.stop()
    fleet.store.put("tick", fleet.store.now() - 60, 600.0)

    answer = api.client.get("/readyz")

    assert (answer.status_code, answer.json()["detail"]) == (503, "The clock does not tick: no beat or no control worker runs")


def test_an_unknown_task_is_404(api: Api):
    assert api.client.get("/api/tasks/00000000-0000-0000-0000-000000000000").status_code == 404
