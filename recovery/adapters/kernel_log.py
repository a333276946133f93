"""
What the kernel knows of an end: whom its OOM killer took, and what the NVIDIA driver complained of.

Best effort, never an error: /dev/kmsg may be closed to us (dmesg_restrict, containers), and a cgroup's counter may be
missing. What cannot be read says nothing.
"""

import contextlib
import os
import re
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final, NamedTuple

KMSG: Final = Path("/dev/kmsg")
CGROUPS: Final = Path("/sys/fs/cgroup")
READ_BYTES: Final = 8192
"""A record of /dev/kmsg is at most 1024 bytes of text; a read returns one."""
SAMPLES: Final = 4096
RECORDS: Final = 8192
"""Kept of the log; more than a kernel keeps by default."""
CLOCK_SLACK_S: Final = 2.0
"""The kernel's stamps stop while a machine sleeps and drift from the wall clock by a little."""

_KILLED: Final = re.compile(r"Killed process (\d+) \((.*?)\)")
_XID: Final = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)")


class Record(NamedTuple):
    """One record of the kernel's log."""

    at: float
    """Unix seconds."""
    text: str


class KernelLog:
    """The kernel's log and this cgroup's count of OOM kills. `sample()` now and then sharpens what `oom_killed` can say."""

    def __init__(self, kmsg: Path = KMSG, cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> None:
        self._kmsg = kmsg
        self._counters = tuple(_counters(cgroups, own))
        self._samples: deque[tuple[float, int]] = deque(maxlen=SAMPLES)
        self._handle: int | None = None
        self._rest = b""
        self._read: deque[tuple[float, str]] = deque(maxlen=RECORDS)
        self._lock = threading.Lock()
        self.sample()

    def sample(self) -> None:
        """Note how many processes of this cgroup the OOM killer took so far."""
        count = self._count()
        if count is not None and (not self._samples or self._samples[-1][1] != count):
            self._samples.append((time.time(), count))

    def oom_killed(self, pid: int, since: float, others: Collection[int] = ()) -> bool:
        """
        True when the OOM killer took `pid`, or one of `others` of its run, since an instant (Unix seconds).

        Where the kernel's log cannot be read, a rise of this cgroup's count in that time has to do: it may be another model's.
        """
        self.sample()
        records = self.records(since)
        if records is None:
            return self._rose(since)
        killed = {int(found[1]) for record in records for found in _KILLED.finditer(record.text)}
        return bool(killed & {pid, *others})

    def xids(self, since: float) -> tuple[tuple[str, int], ...]:
        """Xid events since an instant, as (PCI address, number): what NVML tells too, where it is not there to tell."""
        return tuple((found[1], int(found[2])) for record in self.records(since) or () if (found := _XID.search(record.text)))

    def records(self, since: float) -> tuple[Record, ...] | None:
        """The log since an instant; None when it cannot be read."""
        offset = time.time() - time.clock_gettime(time.CLOCK_MONOTONIC)
        try:
            with self._lock:
                self._read.extend(self._news())
                return tuple(Record(offset + seconds, text) for seconds, text in self._read if offset + seconds >= since - CLOCK_SLACK_S)
        except OSError:
            return None

    def _news(self) -> Iterator[tuple[float, str]]:
        """
        What has come since the last time, as (seconds since boot, text): all of it costs 5 ms, and a failure waits for it.

        Records look like `6,1234,5678901,-;text`, then indented detail.
        """
        if self._handle is None:
            self._handle = os.open(self._kmsg, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        while True:
            try:
                chunk = os.read(self._handle, READ_BYTES)
            except BlockingIOError:
                return
            except BrokenPipeError:  # a record was overwritten before it was read
                continue
            if not chunk:
                return
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            for line in lines:
                head, _, text = line.decode(errors="replace").partition(";")
                fields = head.split(",")
                if len(fields) >= 3 and fields[2].isdecimal() and text:
                    yield int(fields[2]) / 1e6, text

    def _count(self) -> int | None:
        counts = [count for path in self._counters if (count := _oom_kills(path)) is not None]
        return max(counts, default=None)

    def _rose(self, since: float) -> bool:
        before = [count for at, count in self._samples if at <= since] or [count for _, count in self._samples][:1]
        return bool(before) and self._samples[-1][1] > before[-1]


def _counters(cgroups: Path, own: Path) -> Iterator[Path]:
    """The files that may hold this process' count of OOM kills: cgroup v2, v1, and what a container sees as its root."""
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            relative = path.lstrip("/")
            if not controllers:
                yield cgroups / relative / "memory.events"
            elif "memory" in controllers.split(","):
                yield cgroups / "memory" / relative / "memory.oom_control"
    yield cgroups / "memory.events"
    yield cgroups / "memory" / "memory.oom_control"


def _oom_kills(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return None
