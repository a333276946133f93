"""What must survive anything: the models, when everything else is killed or forgotten at once."""

import os
import shutil
import signal
from collections.abc import Iterator

import pytest

from recovery.adapters import embedded_redis
from tests.cli.installation import PATIENCE_S, Installation, installation
from tests.helpers import wait_until

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def one() -> Iterator[Installation]:
    with installation("a", "b") as made:
        yield made


def keepers(one: Installation) -> dict[str, int]:
    """The pid of every living keeper."""
    views = {name: one.host.look(f"{name}-0") for name in one.models}
    return {name: view.run.keeper_pid for name, view in views.items() if view.run is not None and view.keeper_alive}


def runs(one: Installation) -> dict[str, int | None]:
    """The run that each row believes alive."""
    rows = {name: one.wired.store.load(f"{name}-0") for name in one.models}
    return {name: row.run if row is not None and row.state.value == "healthy" else None for name, row in rows.items()}


def kill_all_but_models(one: Installation) -> None:
    """SIGKILL to the manager, all parts and Redis."""
    redis = one.redis_pid()
    assert one.process is not None and redis is not None
    one.process.kill()
    one.process.wait(PATIENCE_S)
    for process in one.parts().values():
        process.kill()
    os.kill(redis, signal.SIGKILL)
    wait_until(one.part_pids, {}, within_s=PATIENCE_S)
    wait_until(one.redis_pid, None, within_s=PATIENCE_S)


@pytest.mark.parametrize("keepers_too", [False, True], ids=["keepers live", "keepers killed too"])
def test_kill_9_of_everything_but_the_servers(one: Installation, keepers_too: bool) -> None:
    """The next `up` adopts every server: none is restarted, and each has a keeper again, which sees its end."""
    one.up()
    servers = {name: one.serves(name) for name in one.models}
    before, guarded = runs(one), keepers(one)
    kill_all_but_models(one)
    if keepers_too:
        for pid in guarded.values():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: keepers(one), {}, within_s=PATIENCE_S)

    one.up("--leave-models")

    wait_until(lambda: runs(one), before, within_s=PATIENCE_S)
    assert one.servers() == servers
    wait_until(lambda: set(keepers(one)), set(one.models), within_s=PATIENCE_S)
    if not keepers_too:
        assert keepers(one) == guarded
    rows = [one.wired.store.load(f"{name}-0") for name in one.models]
    assert all(row is not None and row.used == row.restarts_total == 0 for row in rows)
    os.kill(servers["a"], signal.SIGKILL)
    one.serves("a", but=servers["a"])


def test_redis_is_killed_and_its_data_wiped(one: Installation) -> None:
    """The fleet is rebuilt from the host; no server is restarted, what is stopped stays stopped, and tokens go on rising."""
    one.up()
    servers = {name: one.serves(name) for name in one.models}
    one.ok("stop", "b", "--wait")
    wait_until(lambda: one.server("b"), None, within_s=PATIENCE_S)
    stopped = one.wired.store.load("b-0")
    assert stopped is not None and one.process is not None

    one.process.send_signal(signal.SIGSTOP)  # or the manager starts a new one between the kill and the wipe
    try:
        found = embedded_redis.find(one.home)
        assert found is not None
        found.process.kill()
        wait_until(one.redis_pid, None, within_s=PATIENCE_S)
        shutil.rmtree(one.home / "redis")
    finally:
        one.process.send_signal(signal.SIGCONT)

    wait_until(lambda: one.state("a"), "healthy", within_s=PATIENCE_S)
    wait_until(lambda: one.state("b"), "stopped", within_s=PATIENCE_S)
    assert one.servers() == {"a": servers["a"], "b": None}
    one.ok("start", "b")
    one.serves("b")
    again = one.wired.store.load("b-0")
    assert again is not None and again.run is not None and again.run > stopped.token
