"""
The store when Redis restarts, freezes, is away, or refuses: a named error in time, and on with it afterwards.
"""

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from recovery.adapters.redis_errors import unavailable
from recovery.adapters.redis_store import RedisStore
from recovery.adapters.redis_url import RedisUrl
from recovery.core.change import Commit, Count, ModelEvent
from recovery.errors import StoreUnavailableError
from tests.contract.world import instance
from tests.helpers import RedisServer, wait_until

HOPELESS_S = 60.0
"""A call that has not come back by now hangs. It should within four seconds, which a loaded machine may stretch."""


@contextmanager
def opened(url: RedisUrl | str, prefix: str = "recovery") -> Iterator[RedisStore]:
    store = RedisStore(url, prefix)
    try:
        yield store
    finally:
        store.close()


def every_call(store: RedisStore) -> dict[str, Callable[[], Any]]:
    """Every method of the port, ready to be called."""
    row, event = instance(), ModelEvent(kind="x")
    return {
        "now": store.now,
        "load": lambda: store.load("vllm-0"),
        "load_now": lambda: store.load_now("vllm-0"),
        "load_many": lambda: store.load_many(["vllm-0"]),
        "unreadable": store.unreadable,
        "ids": store.ids,
        "load_all": store.load_all,
        "commit": lambda: store.commit(Commit(after=row, expected_version=0)),
        "claim": lambda: store.claim("vllm-0", 5, 1.0),
        "delete": lambda: store.delete("vllm-0"),
        "pop_due": lambda: store.pop_due("steps", "gpu-1", 1.0, 10),
        "hosts_with_rows": store.hosts_with_rows,
        "once": lambda: store.once("tick", 1000),
        "beat": lambda: store.beat("gpu-1", {}, 10),
        "hosts": store.hosts,
        "known_hosts": store.known_hosts,
        "snapshot": store.snapshot,
        "follow": lambda: store.follow("0-0", 0),
        "add_event": lambda: store.add_event("vllm", event),
        "events": lambda: store.events("vllm", 10),
        "follow_events": lambda: store.follow_events("vllm", "$", 0),
        "count": lambda: store.count((Count(name="x_total"),)),
        "counters": store.counters,
        "incident": lambda: store.incident("i1"),
        "incidents": lambda: store.incidents(None, 10),
        "put": lambda: store.put("brake", 1, 10),
        "put_many": lambda: store.put_many({"brake": 1}, 10),
        "get": lambda: store.get("brake"),
        "get_many": lambda: store.get_many("b"),
        "remove": lambda: store.remove("brake"),
        "info": store.info,
        "queue_depths": lambda: store.queue_depths(["control"]),
    }


def test_every_call_of_the_port_is_tried_here() -> None:
    from recovery.ports import Store

    with opened("unix:///nowhere/redis.sock") as store:
        assert set(every_call(store)) == {name for name in vars(Store) if not name.startswith("_")}


def test_without_a_redis_every_call_says_so(tmp_path: Path) -> None:
    with opened(RedisUrl.unix(tmp_path / "r.sock")) as store:
        for name, call in every_call(store).items():
            with pytest.raises(StoreUnavailableError, match=r"cannot reach Redis at unix://.*is it running, and is REDIS_URL right\?"):
                call()
                pytest.fail(f"{name} answered")


def test_a_port_that_nobody_listens_on() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        with opened(f"redis://:hunter2@127.0.0.1:{held.getsockname()[1]}/0") as store, pytest.raises(StoreUnavailableError) as caught:
            store.now()
    assert "127.0.0.1" in str(caught.value) and "hunter2" not in str(caught.value)


def test_it_goes_on_after_a_restart(own_redis: RedisServer) -> None:
    with opened(own_redis.url) as store:
        row = store.commit(Commit(after=instance(due=1.0), expected_version=0))
        own_redis.restart()
        again = store.commit(Commit(after=row.evolve(reason="after"), expected_version=row.version))
        own_redis.restart()
        assert store.load(row.id) == again
        own_redis.restart()
        assert store.pop_due("steps", "gpu-1", 1.0, 10) == (row.id,)
        own_redis.restart()
        assert store.claim(row.id, row.token, 1.0).version > again.version


def test_it_goes_on_after_redis_was_away_and_forgot_its_scripts(own_redis: RedisServer) -> None:
    with opened(own_redis.url) as store:
        calls = every_call(store)
        for call in calls.values():
            call()
        own_redis.kill()
        with pytest.raises(StoreUnavailableError):
            store.now()
        own_redis.start()
        with own_redis.client() as client:
            client.script_flush()
            client.delete("recovery:row:vllm-0")
        for name in ("commit", "claim", "pop_due", "load_all"):
            calls[name]()


def test_a_frozen_redis_is_an_error_soon(own_redis: RedisServer) -> None:
    with opened(own_redis.url) as store, opened(own_redis.url) as fresh:
        store.now()
        calls = every_call(store)
        own_redis.pause()
        outcomes: dict[str, object] = {}

        def ask(name: str, call: Callable[[], object]) -> None:
            try:
                outcomes[name] = call()
            except Exception as error:
                outcomes[name] = error

        asked = {**calls, "a new connection": fresh.now, "waiting": lambda: store.follow("0-0", 300)}
        threads = [threading.Thread(target=ask, args=item, daemon=True) for item in asked.items()]
        for thread in threads:
            thread.start()
        until = time.monotonic() + HOPELESS_S
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        own_redis.resume()
        assert set(outcomes) == set(asked), f"still hanging: {set(asked) - set(outcomes)}"
        for name, outcome in outcomes.items():
            assert isinstance(outcome, StoreUnavailableError), f"{name}: {outcome!r}"
            assert "does not answer in time" in str(outcome), f"{name}: {outcome}"
        wait_until(store.now, lambda now: now > 0, within_s=60)


def test_waiting_for_a_change_ends_when_redis_dies(own_redis: RedisServer) -> None:
    with opened(own_redis.url) as store:
        store.commit(Commit(after=instance(), expected_version=0))
        position, _ = store.snapshot()
        outcome: list[object] = []

        def follow() -> None:
            try:
                outcome.append(store.follow(position, 300))
            except StoreUnavailableError as error:
                outcome.append(error)

        reader = threading.Thread(target=follow, daemon=True)
        reader.start()
        with own_redis.client() as client:
            wait_until(lambda: client.info("clients")["blocked_clients"], 1, within_s=60)
        own_redis.kill()
        reader.join(HOPELESS_S)
        assert len(outcome) == 1 and isinstance(outcome[0], StoreUnavailableError), outcome


def test_changes_that_a_crash_lost_are_a_gap(own_redis: RedisServer) -> None:
    with opened(own_redis.url) as store:
        store.commit(Commit(after=instance(), expected_version=0))
        position, _ = store.snapshot()
        with own_redis.client() as client:
            client.flushall()
        own_redis.restart()
        assert store.follow(position, 0) is None


def test_a_redis_that_cannot_save_refuses_writes_with_advice(own_redis: RedisServer) -> None:
    with own_redis.client() as client, opened(own_redis.url) as store:
        store.put("before", 1, 600)
        (own_redis.folder / "dump.rdb").mkdir()  # no file can take the place of a folder, not even root's
        client.config_set("save", "3600 1")
        client.bgsave()
        wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"], "err", within_s=60)
        for name in ("commit", "beat", "once", "put", "count", "add_event"):
            with pytest.raises(StoreUnavailableError, match=r"cannot save to disk: free space .* \(.*MISCONF"):
                every_call(store)[name]()
                pytest.fail(f"{name} was taken")
        assert store.get("before") == 1, "reading goes on"
        assert store.load_all() == (), "a refused commit wrote nothing"
        (own_redis.folder / "dump.rdb").rmdir()
        client.bgsave()
        wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"], "ok", within_s=60)
        every_call(store)["commit"]()


def test_a_full_redis_refuses_writes_with_advice(own_redis: RedisServer) -> None:
    with own_redis.client() as client, opened(own_redis.url) as store:
        client.config_set("maxmemory", 1)
        for name in ("commit", "put", "add_event"):
            with pytest.raises(StoreUnavailableError, match="raise maxmemory"):
                every_call(store)[name]()
        assert store.load_all() == ()


def test_a_replica_refuses_writes_with_advice(own_redis: RedisServer, redis_server: RedisServer) -> None:
    with own_redis.client() as client, opened(own_redis.url) as store:
        client.replicaof("127.0.0.1", 1)
        for name in ("commit", "put"):
            with pytest.raises(StoreUnavailableError, match="point REDIS_URL at the primary"):
                every_call(store)[name]()


def test_passwords_and_users(own_redis: RedisServer) -> None:
    path = own_redis.url.path
    with own_redis.client() as client:
        client.config_set("requirepass", "hunter2")
        client.acl_setuser("keeper", enabled=True, passwords=["+hunter3"], keys=["*"], commands=["+get", "+time"])
    with opened(own_redis.url) as store, pytest.raises(StoreUnavailableError, match="it wants a password"):
        store.now()
    with (
        opened(f"unix://:wrong@{path}") as store,
        pytest.raises(StoreUnavailableError, match="does not accept this user and password") as caught,
    ):
        store.now()
    assert "wrong@" not in str(caught.value)
    with opened(f"unix://:hunter2@{path}") as store:
        for name, call in every_call(store).items():
            call(), name
    with opened(f"unix://keeper:hunter3@{path}") as store:
        assert store.now() > 0
        with pytest.raises(StoreUnavailableError, match="its user may not run this command"):
            store.load("vllm-0")


def test_a_sentinel_names_the_primary(own_redis: RedisServer) -> None:
    ports = _free_ports(2)
    with own_redis.client() as client:
        client.config_set("port", ports[0])
    conf = own_redis.folder / "sentinel.conf"
    conf.write_text(f"port {ports[1]}\nbind 127.0.0.1\nsentinel monitor mymaster 127.0.0.1 {ports[0]} 1\n")
    sentinel = RedisServer(own_redis.folder / "s", str(conf), "--sentinel")
    sentinel.folder.mkdir()
    sentinel.run([sentinel.binary, str(conf), "--sentinel", "--logfile", str(sentinel.folder / "sentinel.log")])
    try:
        url = RedisUrl.parse(f"sentinel://127.0.0.1:1,127.0.0.1:{ports[1]}/mymaster/0")
        with opened(url) as store:
            wait_until(lambda: store.put("through", "the sentinel", 600) is None, True, within_s=60)
            with opened(own_redis.url) as direct:
                assert direct.get("through") == "the sentinel"
        with opened(f"sentinel://127.0.0.1:{ports[1]}/other/0") as store, pytest.raises(StoreUnavailableError, match="No master found"):
            store.now()
    finally:
        sentinel.stop()


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return [held.getsockname()[1] for held in sockets]
    finally:
        for held in sockets:
            held.close()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (redis.ResponseError("MISCONF Redis is configured to save RDB snapshots"), "cannot save to disk"),
        (redis.ResponseError("Error running script (call to f_1): @user_script:12: -MISCONF Redis is"), "cannot save to disk"),
        (redis.ResponseError("Command # 1 (SET a b) of pipeline caused error: MISCONF Redis is"), "cannot save to disk"),
        (redis.ResponseError("MOVED 1234 127.0.0.1:7000"), "does not support"),
        (redis.BusyLoadingError("Redis is loading the dataset in memory"), "still loading"),
        (redis.ResponseError("unknown command 'XADD'"), "too old"),
        (redis.ResponseError("something new"), "something new"),
    ],
)
def test_what_redis_says_in_our_words(error: redis.RedisError, says: str) -> None:
    assert re.search(rf"cannot use Redis at here: .*{says}", str(unavailable(error, "here")))
