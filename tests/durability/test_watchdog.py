"""Parts that run and do nothing: found by what they no longer leave behind, told of everywhere, and replaced while the models serve on."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import httpx
import psutil
import pytest

from recovery.core.watching import TICK_LATE_S
from recovery.doctor import examine
from tests.cli.installation import PATIENCE_S, ROOT, Installation, installation
from tests.helpers import wait_until

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def one() -> Iterator[Installation]:
    with installation("a") as made:
        made.up()
        yield made


def deafen(one: Installation) -> None:
    """Have the host's worker consume no more, as after a reconnect that went wrong; it beats on."""
    command = [sys.executable, "-m", "celery", "-A", "workers.app", "control", "-d", "gpu@here", "cancel_consumer", "gpu.here"]
    done = subprocess.run(command, env=one.environ, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert "no longer consuming" in done.stdout, done


def stop_the_clock(one: Installation) -> None:
    one.parts()["beat"].send_signal(signal.SIGSTOP)


def _metric(text: str, name: str) -> float:
    return next((float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name)), 0.0)


@pytest.mark.parametrize(
    ("part", "harm", "told", "metric", "above"),
    [
        pytest.param("host", deafen, "No host takes tasks", "recovery_host_deaf{", 0.0, id="a deaf worker"),
        pytest.param(
            "beat", stop_the_clock, "The clock does not tick", "recovery_tick_age_seconds ", TICK_LATE_S, id="a clock that stands"
        ),
    ],
)
def test_it_is_told_of_and_replaced(
    one: Installation, part: str, harm: Callable[[Installation], None], told: str, metric: str, above: float
) -> None:
    """`/readyz`, metrics and the doctor say so until the watchdog has started it again; the model has noticed nothing."""
    api = httpx.Client(base_url=f"http://127.0.0.1:{one.api}", timeout=PATIENCE_S)
    server, old = one.serves("a"), one.part_pids()
    assert one.wired.store.hosts()["here"]["up_s"] > 0, "by this a worker that was deaf from its first second is found"
    wait_until(lambda: api.get("/readyz").text, "ok", within_s=PATIENCE_S)
    said: set[str] = set()

    def look() -> tuple[set[str], bool]:
        ready = api.get("/readyz")
        if ready.status_code == 503 and told in ready.json()["detail"]:
            said.add("readyz")
        if _metric(api.get("/metrics").text, metric) > above:
            said.add("metrics")
        if any(found.what in ("clock", "host here") and found.level == "bad" for found in examine(one.wired, {})):
            said.add("doctor")
        return said, one.part_pids().get(part) not in (None, old[part])

    harm(one)

    wait_until(look, ({"readyz", "metrics", "doctor"}, True), within_s=PATIENCE_S)
    wait_until(lambda: api.get("/readyz").text, "ok", within_s=PATIENCE_S)
    assert f"{part} runs but does not do its work" in one.said
    assert {name for name, pid in one.part_pids().items() if pid != old[name]} == {part}
    assert not psutil.pid_exists(old[part])
    assert (one.server("a"), [row.restarts_total for row in one.wired.store.load_all()]) == (server, [0])
