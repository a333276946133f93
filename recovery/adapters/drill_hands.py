"""
The hands of a drill: they hurt one live server from outside, as a bad day would.

A process is only touched when its start time is still the one that was looked at, through a pidfd, so a number that was
used again meanwhile hits nobody else.
"""

import contextlib
import itertools
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx

from recovery.core.host import HostView
from recovery.errors import ConflictError
from recovery.keeper import process_table

ENGINE = "VLLM::"
"""vLLM's own title for its engine and workers (VLLM-FACTS.md, section a); the kernel cuts names at 15 characters."""
ASK_S = 5.0


class Hands:
    """Signals, sockets, and the faults that a server offers by itself."""

    def kill(self, view: HostView) -> str:
        """SIGKILL the server's main process; return what was done."""
        assert view.run is not None
        _signal(view.run.server_pid, view.run.server_start, signal.SIGKILL)
        return f"SIGKILL to the server (pid {view.run.server_pid})"

    def kill_engine(self, view: HostView) -> str:
        """SIGKILL the engine; raise `ConflictError` when this server has none of its own."""
        pid, start, name = _engine(view)
        _signal(pid, start, signal.SIGKILL)
        return f"SIGKILL to {name} (pid {pid})"

    def freeze(self, view: HostView) -> tuple[str, tuple[int, int]]:
        """SIGSTOP the engine, or the server where there is none; return what was done and whom to thaw."""
        assert view.run is not None
        try:
            pid, start, name = _engine(view)
        except ConflictError:
            pid, start, name = view.run.server_pid, view.run.server_start, "the server"
        _signal(pid, start, signal.SIGSTOP)
        return f"SIGSTOP to {name} (pid {pid})", (pid, start)

    def thaw(self, who: tuple[int, int]) -> None:
        """SIGCONT, if it is still there."""
        with contextlib.suppress(ConflictError):
            _signal(*who, signal.SIGCONT)

    def inject_oom(self, view: HostView, root_url: str | None) -> str:
        """Have the server run out of memory in its own words; raise `ConflictError` when it does not offer that."""
        assert view.run is not None
        if root_url is not None and _asked(root_url):
            return "the server was told to run out of GPU memory (POST /admin/fault)"
        if path := _fault_file(view.run.server_pid):
            path.write_text("once oom" if _is_plugin(view.run.server_pid) else "oom")
            return f"the fault file {path} says: oom, at the next step of the engine"
        raise ConflictError("cannot cause an OOM: this server offers no injected faults (a simulator with --admin, or FAULT_FILE)")

    @contextlib.contextmanager
    def hold_port(self, port: int) -> Iterator[str]:
        """Listen on a port for as long as the block lasts; raise `ConflictError` when it cannot be had."""
        with socket.socket() as held:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                held.bind(("0.0.0.0", port))
                held.listen(8)
            except OSError as error:
                raise ConflictError(f"cannot take port {port}: {error.strerror}") from None
            yield f"port {port} is held by the drill"


def _signal(pid: int, start: int, number: signal.Signals) -> None:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        raise ConflictError(f"cannot signal pid {pid}: it is gone") from None
    try:
        found = process_table().get(pid)
        if found is None or found.start != start:
            raise ConflictError(f"cannot signal pid {pid}: it is another process now")
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        raise ConflictError(f"cannot signal pid {pid}: it is gone") from None
    finally:
        os.close(fd)


def _engine(view: HostView) -> tuple[int, int, str]:
    for each in view.members:
        if each.name.startswith(ENGINE) and "Engine" in each.name:
            return each.pid, each.start, each.name
    raise ConflictError("cannot hit the engine: this server has no engine process of its own")


def _asked(root_url: str) -> bool:
    try:
        answer = httpx.post(f"{root_url}/admin/fault", json={"serve_error": "oom"}, timeout=ASK_S, trust_env=False)
    except httpx.HTTPError:
        return False
    return answer.status_code == 200


def _fault_file(pid: int) -> Path | None:
    argv = _split(pid, "cmdline")
    for option, value in itertools.pairwise(argv):
        if option == "--fault-file":
            return Path(value)
    named = next((entry.removeprefix("FAULT_FILE=") for entry in _split(pid, "environ") if entry.startswith("FAULT_FILE=")), "")
    return Path(named) if named else None


def _is_plugin(pid: int) -> bool:
    return "--fault-file" not in _split(pid, "cmdline")


def _split(pid: int, name: str) -> list[str]:
    try:
        return [word.decode(errors="replace") for word in Path(f"/proc/{pid}/{name}").read_bytes().split(b"\0") if word]
    except OSError:
        return []
