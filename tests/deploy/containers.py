"""
Compose's services as plain processes: their actual commands in their actual environments, at their own paths and ports.

What Docker would give them comes from the kernel: one network namespace for all, a mount namespace and a root for each
(`enter.py`). So nothing in the compose file is translated, and everything that is left in the network namespace at the end
is known to be ours.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import psutil
import pytest

from tests.deploy.compose import ROOT

ENTER = Path(__file__).parent / "enter.py"
BIN = Path(sys.executable).parent
IMAGE = {"PATH": f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/srv/recovery", "PYTHONUNBUFFERED": "1"}
"""The environment that the Dockerfile sets."""

_UP = """
import fcntl, socket, struct, sys, time
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sH14x", b"lo", 0x1 | 0x40))  # SIOCSIFFLAGS: IFF_UP, IFF_RUNNING
print("up", flush=True)
sys.stdin.read()
"""


class Network:
    """A network namespace with loopback only, in which the services run. Ends everything that is in it."""

    def __init__(self) -> None:
        self._user = ["--user", "--map-root-user"] if os.getuid() else []
        command = ["unshare", *self._user, "--net", sys.executable, "-c", _UP]
        self._holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"up\n":
            raise OSError("cannot make a network namespace: root, or user namespaces for everybody, are needed")
        self._inode = Path(f"/proc/{self._holder.pid}/ns/net").stat().st_ino

    @property
    def entrance(self) -> list[str]:
        """What to put before a command that is to run in it."""
        user = ["--user", "--preserve-credentials"] if self._user else []
        return ["nsenter", f"--target={self._holder.pid}", *user, "--net"]

    def processes(self) -> Iterator[psutil.Process]:
        """Everything that runs in it."""
        for process in psutil.process_iter():
            try:
                if process.pid != self._holder.pid and Path(f"/proc/{process.pid}/ns/net").stat().st_ino == self._inode:
                    yield process
            except OSError:
                continue

    def close(self) -> None:
        """Kill what is left in it, until nothing is."""
        while left := [each for each in self.processes() if each.status() != psutil.STATUS_ZOMBIE]:
            for process in left:
                try:
                    process.kill()
                    process.wait(20)
                except psutil.Error:
                    continue
        assert self._holder.stdin is not None
        self._holder.stdin.close()
        self._holder.wait(20)
        assert self._holder.stdout is not None
        self._holder.stdout.close()


class Container:
    """One service of the compose file. `volumes` are folders of this machine by the volume's name."""

    def __init__(self, name: str, service: Mapping[str, Any], network: Network, folder: Path, secrets: Mapping[str, str]) -> None:
        self.name, self.service, self._network = name, service, network
        self._folder = folder
        self.log = folder / f"{name}.log"
        self.environ = {**IMAGE, **{key: str(value) for key, value in service.get("environment", {}).items()}}
        self._spec = {
            "root": str(self._made(folder / f"{name}.root")),
            "command": service["command"],
            "environ": self.environ,
            "read_only": service.get("read_only", False),
            "tmpfs": [each.split(":")[0] for each in service.get("tmpfs", [])],
            "binds": [*self._binds(), *self._secrets(secrets)],
            "tools": [each for each in {str(ROOT), sys.prefix} if each.split("/")[1] in ("srv", "data", "run", "tmp")],
            "cwd": "/",
        }
        self.process: subprocess.Popen[bytes] | None = None

    def _binds(self) -> list[tuple[str, str, str]]:
        hosts = self._folder / "hosts"
        found = [(str(hosts), "/etc/hosts", "ro")]
        for volume in self.service.get("volumes", []):
            source, target, *manner = volume.split(":")
            where = ROOT / source if source.startswith((".", "/")) else self._folder / "volumes" / source
            if not where.exists():  # as Docker does
                where = self._made(self._folder / "volumes" / source)
            found.append((str(where.resolve()), target, *(manner or ["rw"])))
        return found

    def _secrets(self, secrets: Mapping[str, str]) -> list[tuple[str, str, str]]:
        found = []
        for name in self.service.get("secrets", []):
            file = self._folder / f"secret-{name}"
            file.write_text(secrets[name])
            found.append((str(file), f"/run/secrets/{name}", "ro"))
        return found

    def _made(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def start(self) -> Self:
        """Start its command; it writes to `log`."""
        spec = self._folder / f"{self.name}.json"
        spec.write_text(json.dumps(self._spec))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._network.entrance, "unshare", "--mount", sys.executable, str(ENTER), str(spec)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in it, as `docker compose exec` does."""
        assert self.process is not None
        if self.process.poll() is not None:
            pytest.fail(f"{self.name} has ended:\n{self.log.read_text(errors='replace')[-3000:]}")
        user = ["--user", "--preserve-credentials"] if os.getuid() else []
        inside = ["nsenter", f"--target={self.process.pid}", *user, "--mount", "--net", "--root", "--"]
        return subprocess.run(
            [*inside, *command], env=self.environ, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL
        )

    def health(self) -> tuple[int, str]:
        """Its own health check: exit code and what it says."""
        kind, *words = self.service["healthcheck"]["test"]
        done = self.run("sh", "-c", words[0]) if kind == "CMD-SHELL" else self.run(*words)
        return done.returncode, f"{done.stdout}{done.stderr}"

    def signal(self, number: signal.Signals) -> int:
        """Signal its main process and wait for its end."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(120)


class Composed:
    """Services that run together."""

    def __init__(self, services: Mapping[str, Mapping[str, Any]], secrets: Mapping[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="rec-compose-", ignore_cleanup_errors=True)
        folder = Path(self._folder.name)
        names = {alias for each in services.values() for alias in (each.get("hostname"),) if alias} | set(services)
        (folder / "hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in ("localhost", *sorted(names))))
        self.network = Network()
        self.containers = {name: Container(name, service, self.network, folder, secrets) for name, service in services.items()}

    def __getitem__(self, name: str) -> Container:
        return self.containers[name]

    def close(self) -> None:
        """End everything."""
        self.network.close()
        for each in self.containers.values():
            if each.process is not None:
                each.process.wait(20)
        self._folder.cleanup()
