"""A lease on a real disk with a real keeper: put off while somebody renews it, and final once it is over."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from recovery.adapters.processes import Processes
from tests.helpers import wait_until

INSTANCE = "m-0"
LONG_S = 600.0


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path)
    yield made
    view = made.look(INSTANCE)
    if view.run is not None:
        made.kill(INSTANCE, view.run.token)
    wait_until(lambda: made.look(INSTANCE).keeper_alive, False, within_s=60)


def start(host: Processes, lease_s: float | None, token: int = 1) -> None:
    environ = {"PATH": os.environ["PATH"]}
    host.spawn(INSTANCE, token, ["sleep", "600"], environ, kill_deadline_s=10, log_bytes=1 << 16, log_files=2, lease_s=lease_s)


def test_it_ends_the_server_when_nobody_renews_it(host: Processes) -> None:
    """And the record says why."""
    start(host, 1.0)
    wait_until(lambda: host.look(INSTANCE).server_alive, False, within_s=60)
    wait_until(lambda: host.look(INSTANCE).exit is not None, within_s=60)
    ended = host.look(INSTANCE).exit
    assert ended is not None
    assert (ended.signal, ended.reason) == (9, "lease expired")


def test_a_renewed_one_does_not(host: Processes) -> None:
    """Far ahead; then taken back to now, which only the keeper's own reading of the file can see."""
    start(host, LONG_S)
    assert host.renew(INSTANCE, host.boot_clock() + 2 * LONG_S)
    assert host.look(INSTANCE).server_alive
    assert host.renew(INSTANCE, host.boot_clock() + 0.01)
    wait_until(lambda: host.look(INSTANCE).server_alive, False, within_s=60)


def test_one_that_is_over_is_never_renewed(host: Processes) -> None:
    """A machine that slept wakes with its keeper and its worker at once: the worker must not save what may run elsewhere by now."""
    start(host, LONG_S)
    host.renew(INSTANCE, host.boot_clock() - 1.0)
    assert not host.renew(INSTANCE, host.boot_clock() + LONG_S)
    wait_until(lambda: host.look(INSTANCE).server_alive, False, within_s=60)


def test_a_run_without_a_lease_has_none_even_after_one_with(host: Processes) -> None:
    """`reschedule` was taken away: the file of the last run must not end this one."""
    start(host, LONG_S)
    assert host.leased(INSTANCE)
    host.kill(INSTANCE, 1)
    wait_until(lambda: host.look(INSTANCE).locked, False, within_s=60)
    start(host, None, token=2)
    assert not host.leased(INSTANCE)
    assert not host.renew(INSTANCE, host.boot_clock() - 1.0)
    assert host.look(INSTANCE).server_alive
