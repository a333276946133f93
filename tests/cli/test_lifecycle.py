"""`recovery up` and `down` as they live and die: what ends, what lives on, what is never doubled."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.installation import PARTS, PATIENCE_S, Installation, installation
from tests.helpers import RedisServer, wait_until


@pytest.fixture(scope="module")
def one() -> Iterator[Installation]:
    """A home that each test finds and leaves without anything that runs on it."""
    with installation("a", "b") as made:
        yield made


def test_kill_9_of_up_and_the_next_one_takes_over(one: Installation) -> None:
    """
    Parts and models outlive it; the next ends the old parts, keeps the one Redis and adopts the models. Ctrl-C with
    --leave-models ends the parts only; `down` then ends the models with neither worker nor Redis there to do it.
    """
    one.up()
    parts, redis = one.part_pids(), one.redis_pid()
    servers = {name: one.serves(name) for name in one.models}
    assert set(parts) >= PARTS and redis

    one.signal(signal.SIGKILL)
    assert one.part_pids() == parts and one.servers() == servers

    one.up("--leave-models")
    assert (one.redis_pid(), one.servers()) == (redis, servers)
    wait_until(lambda: set(one.part_pids()) >= PARTS, within_s=PATIENCE_S)
    kept = {name for name, pid in one.part_pids().items() if parts.get(name) == pid}
    assert not kept - {"door"}  # it hands over, and may still be finishing its work
    os.kill(servers["a"], signal.SIGKILL)
    servers["a"] = one.serves("a", but=servers["a"])

    assert one.signal(signal.SIGINT) == 0
    wait_until(one.part_pids, {}, within_s=PATIENCE_S)
    wait_until(one.redis_pid, None, within_s=PATIENCE_S)
    assert one.servers() == servers

    assert one.ok("down").strip() == "ended"
    one.nothing_left()
    assert one.run("down").stdout.startswith("nothing runs")


def test_ctrl_c_ends_parts_and_models_and_the_next_up_starts_what_it_ended(one: Installation) -> None:
    """
    What an end has ended the next start starts again, but not what the operator has stopped. `down --keep-models` ends parts only.
    """
    one.up()
    one.serves("a")
    one.serves("b")
    one.ok("stop", "b")

    assert one.signal(signal.SIGINT) == 0
    assert "ending the models, then the parts" in one.said
    one.nothing_left()

    one.up()
    pid = one.serves("a")
    assert (one.state("b"), one.server("b")) == ("stopped", None)
    assert "still serving: a-0" in one.ok("down", "--keep-models")
    assert one.process is not None and one.process.wait(PATIENCE_S) == 0
    wait_until(one.part_pids, {}, within_s=PATIENCE_S)
    assert one.server("a") == pid

    one.ok("down")
    one.nothing_left()


def test_a_host_by_itself(own_redis: RedisServer) -> None:
    """
    `recovery host` restarts its worker inside, lets no second worker of its host in, and ends its models first with --drain.
    """
    url = f"unix://{own_redis.socket}"
    with installation("a", REDIS_URL=url) as made, installation("a", REDIS_URL=url) as other:
        for name in ("control", "beat"):
            made.begin(name)
        host = made.begin("host", "--drain")
        pid, worker = made.serves("a"), made.part_pids()["host"]
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: made.part_pids().get("host"), lambda seen: seen not in (None, worker), within_s=PATIENCE_S)

        for installed, word in ((made, "recovery host"), (other, "RECOVERY_HOST")):
            done = installed.run("up", "--fleet", str(installed.fleet))
            assert (done.returncode, word in done.stderr) == (1, True), done.stderr
        assert made.server("a") == pid

        host.terminate()
        assert host.wait(PATIENCE_S) == 0
        assert (made.state("a"), made.server("a"), made.part_pids()) == ("stopped", None, {})
        host = made.begin("host", "--drain")
        made.serves("a")  # it starts again what it has ended
        host.terminate()
        host.wait(PATIENCE_S)


def test_two_side_by_side_one_of_them_without_a_redis_on_path(tmp_path: Path) -> None:
    """
    Each has its own Redis, parts and models. `down` of one after the kill -9 of its `up` leaves the other alone.
    """
    for name in os.get_exec_path():
        for tool in Path(name).glob("*") if Path(name).is_dir() else ():
            if "redis" not in tool.name and "valkey" not in tool.name and not (tmp_path / tool.name).exists():
                (tmp_path / tool.name).symlink_to(tool)
    assert shutil.which("redis-server", path=str(tmp_path)) is None
    with installation("a") as first, installation("a", PATH=str(tmp_path)) as second:
        first.begin("up")
        second.up()
        first.serves("a")
        pid, redis = second.serves("a"), second.redis_pid()
        assert redis is not None and "falkordb" in str(Path(f"/proc/{redis}/exe").readlink())

        first.signal(signal.SIGKILL)
        assert first.ok("down").strip() == "ended"

        first.nothing_left()
        assert (second.server("a"), second.redis_pid(), second.state("a")) == (pid, redis, "healthy")
        assert set(second.part_pids()) >= PARTS
