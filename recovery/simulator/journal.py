"""
Who ran when: one JSON line per exec and exit of a server, written by the server itself.

    {"event": "exec" | "exit" | "overlap", "instance", "token", "pid", "wall", "boottime", …}

`wall` is seconds since 1970, `boottime` seconds of the host's boot clock, which no clock step moves. An exit has
`code` or `signal`. SIGKILL leaves no line; so each part of a run (server, engine, orphan) holds a lock beside
the journal while it lives, and a run that finds one held by an earlier run writes an "overlap" line with its `part`.
"""

import fcntl
import os
import re
import threading
import time
from collections.abc import Mapping

import orjson

SERVER, ENGINE, ORPHAN = "server", "engine", "orphan"


def identity(given: str, fallback: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """Instance and token: `RECOVERY_RUN` is `TOKEN`, `INSTANCE:TOKEN` or `HOME/INSTANCE/TOKEN`; `--instance` wins."""
    *before, token = re.split("[:/]", environ.get("RECOVERY_RUN", ""))
    return given or (before[-1] if before else "") or environ.get("RECOVERY_INSTANCE") or fallback, token


class Journal:
    """The record of this run in `path`; with an empty path nothing is written."""

    def __init__(self, path: str, instance: str, token: str) -> None:
        self._path = path
        self.instance = instance
        self.token = token
        self._held: dict[str, int] = {}

    def begin(self) -> None:
        """Write the exec line, take every part's lock, and write an overlap line for each that an earlier run holds."""
        if not self._path:
            return
        self._write("exec")
        for part in (SERVER, ENGINE, ORPHAN):
            self._lock(part)

    def end(self, *, code: int | None = None, signal: int | None = None) -> None:
        """Write the exit line."""
        if self._path:
            self._write("exit", **({"code": code} if signal is None else {"signal": signal}))

    def keep_only(self, part: str) -> None:
        """In a forked child: hold the lock of this part and leave the others to the other processes."""
        self.release(*(other for other in list(self._held) if other != part))

    def release(self, *parts: str) -> None:
        """Close the locks of parts that other processes hold, or that this run does not have."""
        for part in parts:
            if part in self._held:
                os.close(self._held.pop(part))

    def descriptors(self) -> set[int]:
        return set(self._held.values())

    def _lock(self, part: str) -> None:
        name = re.sub(r"[^\w.@-]", "_", self.instance)
        middle = "" if part == SERVER else f".{part}"
        descriptor = os.open(f"{self._path}.{name}{middle}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._write("overlap", part=part, other=os.pread(descriptor, 100, 0).decode(errors="replace").strip())
            if part == SERVER:  # so that a third run sees the second when the first is gone
                threading.Thread(target=fcntl.flock, args=(descriptor, fcntl.LOCK_EX), daemon=True).start()
            else:
                os.close(descriptor)
                return
        else:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{self.token or '-'} {os.getpid()}\n".encode(), 0)
        self._held[part] = descriptor

    def _write(self, event: str, **more: object) -> None:
        record = {
            "event": event,
            "instance": self.instance,
            "token": self.token,
            "pid": os.getpid(),
            "wall": time.time(),
            "boottime": time.clock_gettime(time.CLOCK_BOOTTIME),
            **more,
        }
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.write(descriptor, orjson.dumps(record) + b"\n")
        finally:
            os.close(descriptor)
