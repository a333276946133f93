"""
The part manager: starts the parts of an installation, brings back those that die, ends them in order.

A part writes to a file of its own, never to a pipe, and lives in a session of its own: neither Ctrl-C nor the death of
the manager touches it. Each carries RECOVERY_PART=<home>:<part> in its environment, so that the next manager finds what
an earlier one left, by that marker and its start time and not by its name.
"""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil

from recovery.errors import ConfigError, ConflictError, RecoveryError

MARKER = "RECOVERY_PART"
BACKOFF_S = (0.2, 5.0)
"""The first and the longest wait before a part that died is started again; it doubles in between."""
STEADY_S = 10.0
"""A part that lived this long begins again at the first wait."""
RECYCLE_S = 5.0
"""From SIGTERM to SIGKILL for a part that does not do its work anyway."""
LOG_BYTES, LOGS_KEPT = 10_000_000, 3
HELD_S = 10.0
"""How long a start waits for the last one of a single part to let go of its lock."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """One program of an installation. `stop_s`: from SIGTERM to SIGKILL; `hurry`: a second SIGTERM halfway means something to it."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    stop_s: float = 10.0
    hurry: bool = False
    single: bool = False
    """Two of it at once would do harm: a lock is held for as long as one lives."""
    hands_over: bool = False
    """A new one takes the work over from the old one, which then ends by itself."""


class Child(Protocol):
    """What runs: a process that can be waited for and ended."""

    pid: int

    def wait(self) -> int | None:
        """Block until it has ended; its exit status, None when nobody can know."""

    def stop(self, within_s: float | None = None) -> None:
        """End it: SIGTERM, and SIGKILL at the deadline (default: its own)."""


class Runner(Protocol):
    """What starts a part."""

    @property
    def name(self) -> str:
        """The part's name."""

    def start(self) -> Child:
        """Start it; raises `RecoveryError` or `OSError` when that cannot be done."""


class PartRunner:
    """Starts a `Part` under a home. `log` None: it writes where we write."""

    def __init__(self, part: Part, home: Path, environ: Mapping[str, str], log: Path | None) -> None:
        self.part, self._home, self._environ, self._log = part, home, environ, log

    @property
    def name(self) -> str:
        """The part's name."""
        return self.part.name

    def start(self) -> "PartChild":
        """Start it, once whatever an earlier manager left of it is gone."""
        marker = {MARKER: f"{self._home}:{self.name}", "SPT_NOENV": "1", "PYTHONUNBUFFERED": "1"}
        with contextlib.ExitStack() as stack:
            lock = stack.enter_context(_held(self._home, self.name)) if self.part.single else None
            log = stack.enter_context(self._log.open("ab")) if self._log is not None else None
            process = subprocess.Popen(
                self.part.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT if log is not None else None,
                env={**self._environ, **self.part.env, **marker},
                pass_fds=() if lock is None else (lock,),
                start_new_session=True,
            )
        return PartChild(self.part, process)


class PartChild:
    """A part that this manager started."""

    def __init__(self, part: Part, process: subprocess.Popen[bytes]) -> None:
        self._part, self._process, self.pid = part, process, process.pid

    def wait(self) -> int | None:
        """Block until it has ended; its exit status."""
        return self._process.wait()

    def stop(self, within_s: float | None = None) -> None:
        """End it as its part says."""
        with contextlib.suppress(psutil.NoSuchProcess):
            end([psutil.Process(self.pid)], self._part.stop_s if within_s is None else within_s, hurry=self._part.hurry)


class Manager:
    """Keeps parts alive, one thread each. `say` is told when a part ends, cannot be started, or is back."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._stopping = threading.Event()
        self._kept: dict[str, _Kept] = {}
        self._leaving: list[_Kept] = []

    def start(self, runners: Iterable[Runner]) -> None:
        """Begin to keep these alive. Returns at once."""
        for runner in runners:
            self._kept[runner.name] = _Kept(runner, self._say, self._stopping)
        if os.getpid() == 1:
            threading.Thread(target=self._reap_strangers, name="reaper", daemon=True).start()

    def pids(self) -> dict[str, int | None]:
        """The pid of every part, None for one that is down."""
        return {name: kept.pid for name, kept in self._kept.items()}

    def stop(self, names: Sequence[str] | None = None, within_s: float | None = None) -> None:
        """End these parts (default: all) and keep them down; they go at the same time."""
        chosen = [kept for name, kept in self._all() if names is None or name in names]
        enders = [threading.Thread(target=kept.stop, args=(within_s,), daemon=True) for kept in chosen]
        for thread in enders:
            thread.start()
        for thread in enders:
            thread.join()
        for kept in chosen:
            self._kept.pop(kept.name, None)
        self._leaving = [kept for kept in self._leaving if kept not in chosen]
        if not self._kept:
            self._stopping.set()

    def recycle(self, name: str) -> None:
        """End a part that does not do its work; its thread starts it again. One that is down already is left to it."""
        kept = self._kept.get(name)
        if kept is not None:
            kept.end_once(RECYCLE_S)

    def restart(self, name: str) -> None:
        """End a part as it wants to be ended; its thread starts it again. Returns when the old one is gone."""
        self._kept[name].end_once(None)

    def hand_over(self, name: str) -> None:
        """Start another one beside the one that runs, which gives its work to it and then ends by itself. Returns at once."""
        old = self._kept[name]
        if old.pid is None:
            return  # it is just being started again
        old.let_go()
        self._leaving = [kept for kept in self._leaving if kept.pid is not None] + [old]
        self._kept[name] = old.successor()

    def _all(self) -> list[tuple[str, "_Kept"]]:
        return [*self._kept.items(), *((kept.name, kept) for kept in self._leaving)]

    def _reap_strangers(self) -> None:
        """As process 1 of a container: collect what is handed down to us, but leave our own parts to their threads."""
        while not self._stopping.wait(1.0):
            with contextlib.suppress(ChildProcessError):
                for _ in range(1000):
                    ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                    if ended is None or ended.si_pid in {kept.pid for _, kept in self._all()}:
                        break
                    os.waitpid(ended.si_pid, os.WNOHANG)


class _Kept:
    """One part and the thread that keeps it alive."""

    def __init__(self, runner: Runner, say: Say, stopping: threading.Event) -> None:
        self.name = runner.name
        self._runner, self._say, self._all_stop = runner, say, stopping
        self._down = threading.Event()
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._thread = threading.Thread(target=self._keep, name=f"part-{runner.name}", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """Its pid while it runs."""
        child = self._child
        return child.pid if child is not None else None

    def stop(self, within_s: float | None) -> None:
        """End it for good."""
        self._down.set()
        with self._lock:  # a start under way is waited for, and then ended
            child = self._child
        if child is not None:
            child.stop(within_s)
        self._thread.join()

    def end_once(self, within_s: float | None) -> None:
        """End what runs now; the next one comes as after any death."""
        child = self._child
        if child is not None:
            child.stop(within_s)

    def let_go(self) -> None:
        """Start it no more; what runs may finish."""
        self._down.set()

    def successor(self) -> "_Kept":
        """Another one of the same part, kept alive from now on."""
        return _Kept(self._runner, self._say, self._all_stop)

    def _keep(self) -> None:
        wait_s = 0.0
        while not self._down.wait(wait_s) and not self._all_stop.is_set():
            began = time.monotonic()
            try:
                with self._lock:
                    if self._down.is_set():
                        return
                    self._child = self._runner.start()
                status = self._child.wait()
                said = f"{self.name} (pid {self._child.pid}) ended{_how(status)}"
                self._child = None
            except (RecoveryError, OSError, psutil.Error) as error:
                said = f"{self.name}: {error}"
            if self._down.is_set():
                return
            steady = time.monotonic() - began >= STEADY_S
            wait_s = BACKOFF_S[0] if steady or not wait_s else min(wait_s * 2, BACKOFF_S[1])
            self._say(f"{said}; starting it again in {wait_s:g} s")


def _how(status: int | None) -> str:
    if status is None:
        return ""
    return f" by signal {-status}" if status < 0 else f" with exit code {status}"


# --- what an earlier manager left --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A living process of a part. psutil knows it by pid and start time, so a number used again hurts nobody."""

    part: str
    process: psutil.Process


def find(home: Path) -> tuple[Found, ...]:
    """Every living part of that home, whoever started it. A process of a model's run is never one."""
    prefix, found = f"{home}:", []
    for process in psutil.process_iter():
        try:
            environ = process.environ()
            marker = environ.get(MARKER, "")
            if marker.startswith(prefix) and "RECOVERY_RUN" not in environ and process.status() != psutil.STATUS_ZOMBIE:
                found.append(Found(marker.removeprefix(prefix), process))
        except (psutil.Error, OSError):
            continue  # gone, or not ours to look into
    return tuple(found)


def end(processes: Sequence[psutil.Process], within_s: float, *, hurry: bool = False) -> None:
    """End processes: SIGTERM, in a hurry once more halfway, and SIGKILL at the deadline; returns when they are gone."""
    left = _sent(processes, "terminate", within_s / 2 if hurry else within_s)
    if hurry:
        left = _sent(left, "terminate", within_s / 2)
    left = _sent(left, "kill", 10.0)
    if left:
        names = ", ".join(f"pid {process.pid} ({process.status()})" for process in left)
        raise ConflictError(f"cannot end {names}: SIGKILL has not ended it; look at it by hand")


def _sent(processes: Sequence[psutil.Process], what: str, within_s: float) -> list[psutil.Process]:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()  # a frozen one takes no SIGTERM
            getattr(process, what)()
    until = time.monotonic() + within_s
    left = list(processes)
    while left and time.monotonic() < until:
        left = [process for process in left if lives(process)]
        if left:
            time.sleep(0.02)
    return left


def lives(process: psutil.Process) -> bool:
    """Whether that very process still runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


# --- locks -------------------------------------------------------------------------------------------------------


class HomeLock:
    """The right to manage the parts of a home; lost by the kernel's hand when its holder dies."""

    def __init__(self, home: Path) -> None:
        self.path = home / "up.lock"
        self._fd = -1

    def take(self, command: str) -> None:
        """Take it; raise `ConflictError`, which names the holder, when somebody has it."""
        self._fd = _open_lock(self.path)
        if not _try_lock(self._fd):
            os.close(self._fd)
            raise ConflictError(
                f"cannot start: {self._holder_text()} already runs on {self.path.parent}; end it with `recovery down`, "
                "or give this one another RECOVERY_HOME (and ports)"
            )
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps({"pid": os.getpid(), "command": command}).encode(), 0)

    def release(self) -> None:
        """Let go of it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def holder(self) -> psutil.Process | None:
        """The process that holds it; None when nobody does."""
        if not self.path.exists():
            return None
        fd = _open_lock(self.path)
        try:
            if _try_lock(fd):
                return None
            return psutil.Process(int(json.loads(self.path.read_text())["pid"]))
        except (ValueError, KeyError, psutil.Error):
            return None  # it is just coming or going
        finally:
            os.close(fd)

    def _holder_text(self) -> str:
        try:
            told = json.loads(self.path.read_text())
            return f"`recovery {told['command']}` (pid {told['pid']})"
        except (OSError, ValueError, KeyError):
            return "another `recovery up`"


@contextlib.contextmanager
def _held(home: Path, name: str) -> Iterator[int]:
    """A lock that the part inherits, so that it is held exactly as long as the part lives."""
    fd = _open_lock(home / f"{name}.lock")
    try:
        until = time.monotonic() + HELD_S
        while not _try_lock(fd):
            end([found.process for found in find(home) if found.part == name], 5.0)
            if time.monotonic() >= until:
                raise ConflictError(f"cannot start another {name} on {home}: one holds {home / name}.lock and cannot be found")
            time.sleep(0.05)
        yield fd
    finally:
        os.close(fd)


def _open_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot use {path}: {error.strerror}; free space, mend the permissions, or set another RECOVERY_HOME") from None


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# --- logs --------------------------------------------------------------------------------------------------------


def rotate(folder: Path, max_bytes: int = LOG_BYTES, kept: int = LOGS_KEPT) -> None:
    """Cut every log in a folder that has grown over `max_bytes`; writers append, so they go on at the new start."""
    for log in folder.glob("*.log"):
        with contextlib.suppress(OSError):  # a full disk costs us the old lines, see below
            if log.stat().st_size <= max_bytes:
                continue
            for number in range(kept - 1, 0, -1):
                older = log.with_name(f"{log.name}.{number}")
                if older.exists():
                    older.replace(log.with_name(f"{log.name}.{number + 1}"))
            try:
                shutil.copyfile(log, log.with_name(f"{log.name}.1"))
            finally:
                os.truncate(log, 0)
