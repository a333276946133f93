"""
A rolling restart of the parts of one machine: one after another, each only once the one before does its work again.

It is asked for by a file in the home and carried out by the part manager there, which notes in another file how far it
is. A manager of an older version does not look for the file, so asking it harms nothing; a command that is interrupted
leaves nothing half done. The models are no parts: nothing here touches them.
"""

import contextlib
import json
import logging
import secrets
import threading
import time  # noqa: TID251  # it waits for processes, as the part manager does
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import psutil

from recovery import health
from recovery.core.watching import TRACED, works_since
from recovery.errors import ConflictError, RecoveryError, StoreUnavailableError
from recovery.part_list import Listed
from recovery.parts import Manager, Say
from recovery.ports import Store
from recovery.watchdog import traces

log = logging.getLogger(__name__)

ORDER = ("host", "control", "beat", "api", "flower", "door")
"""Hosts first: a worker that is older than a row leaves that row alone, and rows are written by what comes after (docs/upgrade.md)."""
BACK_S = 90.0
"""Time for a part to do its work again; the slowest needs 6 s on an idle machine."""
REQUEST, PROGRESS = "restart.request", "restart.json"
LOOK_S = 0.5


@dataclass(frozen=True)
class Progress:
    """How far a rolling restart is. `by`: the pid of the manager that carries it out."""

    id: str
    by: int
    order: tuple[str, ...]
    state: Literal["running", "done", "failed"] = "running"
    done: tuple[str, ...] = ()
    current: str | None = None
    reason: str = ""


def ask(home: Path, parts: Sequence[str]) -> str:
    """Ask the manager of a home for a restart of these parts (none named: all it has); the request's id."""
    ident = secrets.token_hex(8)
    written = home / f"{REQUEST}.{ident}"
    try:
        written.write_text(json.dumps({"id": ident, "parts": list(parts)}))
        (home / REQUEST).hardlink_to(written)
    except FileExistsError:
        raise ConflictError("cannot ask for a restart of the parts: another one has just been asked for") from None
    except OSError as error:
        raise ConflictError(f"cannot ask for a restart of the parts in {home}: {error.strerror}") from None
    finally:
        written.unlink(missing_ok=True)
    return ident


def withdraw(home: Path, ident: str) -> None:
    """Take back a request that no manager has taken up."""
    with contextlib.suppress(OSError, ValueError):
        if json.loads((home / REQUEST).read_text())["id"] == ident:
            (home / REQUEST).unlink()


def progress(home: Path) -> Progress | None:
    """How far the last restart is; None when there was none."""
    try:
        told = json.loads((home / PROGRESS).read_text())
        return Progress(**{**told, "order": tuple(told["order"]), "done": tuple(told["done"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


class Restarter:
    """
    The manager's side, in a thread of its own.

    `spare` is told of each part before it is restarted, so that nobody takes its pause for idleness; `within_s` is the
    time that a part has to do its work again.
    """

    def __init__(
        self,
        home: Path,
        listed: Sequence[Listed],
        manager: Manager,
        store: Store,
        host: str,
        *,
        say: Say,
        spare: Callable[[str], None] = lambda _part: None,
        within_s: float = BACK_S,
    ) -> None:
        self._home, self._manager, self._store, self._host = home, manager, store, host
        self._listed = {each.part.name: each for each in sorted(listed, key=_place)}
        self._say, self._spare, self._within_s = say, spare, within_s
        (home / REQUEST).unlink(missing_ok=True)  # asked of a manager that is gone

    def run(self, ending: threading.Event) -> None:
        """Carry out what is asked for until told to end."""
        while not ending.wait(LOOK_S):
            try:
                if (asked := self._asked()) is not None:
                    self.restart(*asked, ending)
            except Exception:
                log.exception("cannot restart the parts")

    def _asked(self) -> tuple[str, tuple[str, ...]] | None:
        path = self._home / REQUEST
        if not path.exists():
            return None
        try:
            told = json.loads(path.read_text())
            return str(told["id"]), tuple(str(name) for name in told["parts"])
        except (ValueError, KeyError, TypeError):
            return None
        finally:
            path.unlink(missing_ok=True)

    def restart(self, ident: str, names: Sequence[str], ending: threading.Event) -> Progress:
        """Restart these parts (none named: all), and stop at the first that does not come back."""
        order = tuple(name for name in self._listed if name in names or not names)
        now = Progress(ident, psutil.Process().pid, order)
        if unknown := sorted(set(names) - self._listed.keys()):
            return self._note(_failed(now, f"there is no {', '.join(unknown)} here, only {', '.join(self._listed)}"))
        for name in order:
            now = self._note(replace(now, current=name, reason=f"{name} is restarted"))
            self._say(f"restarting {name}")
            why = self._one(self._listed[name], ending)
            if why is not None:
                left = [each for each in order if each not in now.done and each != name]
                return self._note(_failed(now, why + (f"; left as they are: {', '.join(left)}" if left else "")))
            now = self._note(replace(now, done=(*now.done, name), current=None, reason=f"{name} does its work again"))
        return self._note(replace(now, state="done", reason="all do their work again"))

    def _one(self, each: Listed, ending: threading.Event) -> str | None:
        """Restart one part; None once it does its work, else why not."""
        name = each.part.name
        old = self._manager.pids().get(name)
        self._spare(name)
        try:
            self._manager.hand_over(name) if each.part.hands_over else self._manager.restart(name)
        except RecoveryError as error:
            return str(error)
        since: float | None = None
        until, why = time.monotonic() + self._within_s, f"{name} is not there"
        while time.monotonic() < until:
            pid = self._manager.pids().get(name)
            with contextlib.suppress(StoreUnavailableError):
                if pid is not None and pid != old:
                    since = since or self._store.now()
                    idle = self._idle(each, pid, old, since)
                    if idle is None:
                        return None
                    why = idle
            if ending.wait(0.1):
                return f"{name} was being restarted when all was ended"
        return f"{name} has not come back within {self._within_s:g} s: {why}; its log says more"

    def _idle(self, each: Listed, pid: int, old: int | None, since: float) -> str | None:
        """Why a part that was started does not do its work yet; None when it does."""
        name = each.part.name
        if name in TRACED:
            return None if works_since(name, traces(self._store), self._host, since) else f"{name} runs and has done nothing yet"
        if name not in health.PORTS:
            return None if each.ready() else f"{name} runs and has done nothing yet"
        (_, port), *_ = each.ports.values()
        if old is not None and _accepts(old, port):
            return f"the {name} of before has not handed over yet"
        return health.answers(name, port) if _accepts(pid, port) else f"{name} does not listen on port {port} yet"

    def _note(self, now: Progress) -> Progress:
        path = self._home / PROGRESS
        written = path.with_suffix(".tmp")
        written.write_text(json.dumps(asdict(now)))
        written.replace(path)
        return now


def _failed(now: Progress, why: str) -> Progress:
    return replace(now, state="failed", reason=why)


def _place(each: Listed) -> int:
    return ORDER.index(each.part.name) if each.part.name in ORDER else len(ORDER)


def _accepts(pid: int, port: int) -> bool:
    """Whether that process listens there."""
    try:
        found = psutil.Process(pid).net_connections("tcp")
    except psutil.Error:
        return False
    return any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in found)
