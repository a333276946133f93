"""The host's process table, as /proc shows it: which run a process belongs to, and who listens on a port."""

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Iterable
from pathlib import Path

from recovery import keeper
from recovery.keeper import Proc

SETTLED_TICKS = 2 * os.sysconf("SC_CLK_TCK")
"""Two seconds: a younger process may still be on its way to the exec that gives it its environment."""
LISTEN = "0A"  # TCP_LISTEN in /proc/net/tcp


class ProcTable:
    """Looks at all processes; remembers whose they are, so that a look costs one small file per process, not two."""

    def __init__(self) -> None:
        self._markers: dict[tuple[int, int], str] = {}
        self._lock = threading.Lock()

    def scan(self) -> dict[int, Proc]:
        """Every process, zombies included, by pid."""
        return keeper.process_table()

    def markers(self, table: dict[int, Proc]) -> dict[int, str]:
        """The RECOVERY_RUN of every living process that carries one, by pid."""
        with self._lock:
            known, youngest = self._markers, max((proc.start for proc in table.values()), default=0)
            fresh: dict[tuple[int, int], str] = {}
            found: dict[int, str] = {}
            for pid, proc in table.items():
                key = (pid, proc.start)
                marker = known.get(key)
                if marker is None and keeper.can_read(proc):
                    marker = keeper.marker_of(pid)
                if marker is None:
                    continue
                if marker or youngest - proc.start > SETTLED_TICKS:
                    fresh[key] = marker
                if marker and proc.alive:
                    found[pid] = marker
            self._markers = fresh
            return found


def listened(port: int) -> bool:
    """
    Whether anything may listen on that TCP port, on any address; False is sure.

    Asks by binding it for an instant: 20 us, where reading /proc/net/tcp takes milliseconds on a host with many connections.
    """
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # or a connection that lingers counts as a listener
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(("", port))
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                return True  # taken, or not ours to ask
    return False


def listen_inodes(port: int) -> set[int]:
    """The inodes of the TCP sockets that listen on that port, on any address, IPv4 and IPv6."""
    inodes: set[int] = set()
    if not listened(port):
        return inodes
    for name in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            field = line.split()
            if field[3] == LISTEN and int(field[1].rpartition(":")[2], 16) == port:
                inodes.add(int(field[9]))
    return inodes


def holder(pids: Iterable[int], inodes: set[int]) -> int | None:
    """The first of these processes that has one of these sockets open."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for pid in pids:
        try:
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):  # closed meanwhile
                    if str(link.readlink()) in wanted:
                        return pid
        except OSError:
            continue
    return None
