"""
The listening socket's way from one door to the next: over a unix socket in the runtime directory.

The successor connects, gets the socket (SCM_RIGHTS), begins to accept and says so; only then does the old one stop.
No connection is refused in between: both accept from one queue.
"""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from recovery.errors import ConfigError

NAME = "frontdoor.sock"
HELLO, READY, DONE = b"recovery-frontdoor 1\n", b"ready\n", b"done\n"


def control_path(runtime_dir: Path) -> Path:
    """Where a door can be asked for its socket."""
    return runtime_dir / NAME


class Successor:
    """The new door's side: holds the old door's socket until it is `ready`."""

    def __init__(self, control: socket.socket, listener: socket.socket) -> None:
        self._control, self.listener = control, listener

    def ready(self) -> None:
        """Tell the old door to stop accepting, and wait until it has (5 s at most)."""
        with self._control, contextlib.suppress(OSError):
            self._control.sendall(READY)
            self._control.recv(len(DONE))


def take_over(runtime_dir: Path) -> Successor | None:
    """Return the socket of the door that runs here, None when there is none (a stale path is cleared away)."""
    path = control_path(runtime_dir)
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    control.settimeout(5.0)
    try:
        control.connect(str(path))
        hello, descriptors, _, _ = socket.recv_fds(control, len(HELLO), 1)
    except FileNotFoundError:
        control.close()
        return None
    except OSError:
        control.close()
        path.unlink(missing_ok=True)
        return None
    if hello != HELLO or len(descriptors) != 1:
        for descriptor in descriptors:
            os.close(descriptor)
        control.close()
        raise ConfigError(f"cannot take over from the door at {path}: it speaks another version")
    return Successor(control, socket.socket(fileno=descriptors[0]))


class Handover:
    """The old door's side: offers the socket to whoever of the same user asks."""

    def __init__(self, runtime_dir: Path, listener: socket.socket, released: Callable[[], None]) -> None:
        self._path, self._listener, self._released = control_path(runtime_dir), listener, released
        self._loop = asyncio.get_running_loop()
        self._server: socket.socket | None = None
        self._asking: set[socket.socket] = set()

    def open(self) -> None:
        """Begin to offer; `ConfigError` when the path cannot be used."""
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._path.unlink(missing_ok=True)
            server.bind(str(self._path))
            self._path.chmod(0o600)
        except OSError as error:
            server.close()
            raise ConfigError(f"cannot offer the listening socket at {self._path}: {error}") from error
        server.listen(4)
        server.setblocking(False)
        self._server = server
        self._loop.add_reader(server, self._asked)

    def close(self, unlink: bool = True) -> None:
        """Offer no more."""
        if self._server is not None:
            self._loop.remove_reader(self._server)
            self._server.close()
            self._server = None
            if unlink:
                self._path.unlink(missing_ok=True)
        for control in list(self._asking):
            self._drop(control)

    def _asked(self) -> None:
        assert self._server is not None
        try:
            control, _ = self._server.accept()
        except OSError:
            return
        credentials = control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", credentials)[1] != os.getuid():
            control.close()
            return
        control.setblocking(False)
        try:
            socket.send_fds(control, [HELLO], [self._listener.fileno()])
        except OSError:
            control.close()
            return
        self._asking.add(control)
        self._loop.add_reader(control, self._answered, control)

    def _answered(self, control: socket.socket) -> None:
        try:
            word = control.recv(len(READY))
        except OSError:
            word = b""
        if word == READY:
            self._loop.remove_reader(control)
            self._asking.discard(control)
            self._released()
            with control, contextlib.suppress(OSError):
                control.sendall(DONE)
        else:
            self._drop(control)  # it gave up: nothing has changed

    def _drop(self, control: socket.socket) -> None:
        self._asking.discard(control)
        self._loop.remove_reader(control)
        control.close()
