"""
What tests of every folder share: waiting for a condition, and a Redis of their own.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import redis

from recovery.adapters.redis_url import RedisUrl

T = TypeVar("T")
_TRUE = object()


def wait_until(look: Callable[[], T], expected: Any = _TRUE, within_s: float = 10.0) -> T:
    """
    Return what `look` sees as soon as it is what is `expected`; fail at the deadline with what it last saw.

    `expected` is a value, a predicate, or left out: then anything true will do. An exception in `look` counts as
    something seen. Deadlines are generous: they say how long a hopeless test goes on, not how fast the code is.
    """
    until = time.monotonic() + within_s
    while True:
        try:
            found = look()
            if _fits(found, expected):
                return found
            seen: object = found
        except Exception as error:  # the thing looked at may not be there yet
            seen = error
        if time.monotonic() >= until:
            wanted = "something true" if expected is _TRUE else getattr(expected, "__name__", repr(expected))
            pytest.fail(f"waited {within_s} s for {wanted}, last saw {seen!r}")
        time.sleep(0.02)


def _fits(seen: Any, expected: Any) -> bool:
    if expected is _TRUE:
        return bool(seen)
    if callable(expected):
        return bool(expected(seen))
    return bool(seen == expected)


class RedisServer:
    """
    A Redis of a test's own, on a unix socket in a directory of its own. Without `port` it has no TCP port.

    It is ended by its pid, whatever became of it.
    """

    def __init__(self, folder: Path, *extra: str, binary: str | None = None, aof: bool = True) -> None:
        self.folder = folder
        self.socket = folder / "redis.sock"
        self.url = RedisUrl.unix(self.socket)
        found = binary or shutil.which("redis-server") or shutil.which("valkey-server")
        if found is None:
            pytest.fail("no redis-server on PATH: the tests need a real one")
        self.binary = found
        self._command = [found, "--port", "0", "--unixsocket", str(self.socket), "--dir", str(folder), "--save", ""]
        self._command += ["--appendonly", "yes" if aof else "no", "--appendfsync", "everysec", "--maxmemory-policy", "noeviction"]
        self._command += ["--logfile", str(folder / "redis.log"), *extra]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> "RedisServer":
        """Start it and wait until it answers."""
        self.run(self._command)
        try:
            with self.client() as client:
                wait_until(client.ping, True, within_s=60)
        except BaseException:
            self.stop()
            raise
        return self

    def run(self, command: list[str]) -> None:
        """Start this command in its place, which is what `stop` ends then."""
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def client(self) -> redis.Redis:
        """A plain client, for a test to look behind the store."""
        return self.url.client(timeout_s=30, connect_timeout_s=30)

    def kill(self) -> None:
        """SIGKILL, and reaped."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=60)

    def stop(self) -> None:
        """End it, frozen or not."""
        if self._process is None or self._process.poll() is not None:
            return
        self.resume()
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.kill()

    def restart(self) -> None:
        """End it in good order and start it again on the same data."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: it answers nothing, and its connections stay open."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)
