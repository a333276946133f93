"""
A newcomer's machine: a clean clone with its own `.venv`, a home of its own, and all ports free.

Commands run in a network namespace, so those of the README run as they stand there, default ports and all.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.deploy.compose import ROOT
from tests.deploy.containers import Network
from tests.helpers import wait_until

PATIENCE_S = 150.0
INSTALL_S = 600.0
UP = "Ctrl-C ends"


def bare(home: Path, *first: Path) -> dict[str, str]:
    """An environment with nothing of ours in it; `first` is put before PATH. What pip is told of its index stays."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("PIP_", "SSL_", "REQUESTS_")) or name.lower().endswith("_proxy")
    }
    python = Path(sys.base_prefix) / "bin"
    path = ":".join(map(str, (*first, python, "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin")))
    return {**kept, "HOME": str(home), "PATH": path, "LANG": "C.UTF-8", "TERM": "dumb", "COLUMNS": "200"}


class Newcomer:
    """The clone, and what is started in it. `close` ends everything by pid."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rec-new-"))
        self.home, self.clone = self.folder / "home", self.folder / "clone"
        self.home.mkdir()
        self.network = Network()
        self.environ = bare(self.home, self.clone / ".venv/bin")
        self._started: list[subprocess.Popen[bytes]] = []

    def outside(self, *command: str, cwd: Path | None = None) -> str:
        """Run a command that may fetch packages, with this machine's network; what it said. It must succeed."""
        done = subprocess.run(
            command, cwd=cwd or self.clone, env=self.environ, capture_output=True, text=True, timeout=INSTALL_S, check=False
        )
        assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def run(self, command: str, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a line of a shell to its end; every command of a pipe must succeed."""
        return subprocess.run(
            [*self.network.entrance, "bash", "-o", "pipefail", "-c", command],
            cwd=cwd or self.clone, env={**self.environ, **environ}, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def begin(self, command: str, cwd: Path | None = None, **environ: str) -> "Running":
        """Start a line of a shell that goes on until it is ended."""
        out = self.folder / f"{len(self._started)}.out"
        with out.open("wb") as file:
            process = subprocess.Popen(
                [*self.network.entrance, "bash", "-c", command],
                cwd=cwd or self.clone, env={**self.environ, **environ}, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self._started.append(process)
        return Running(process, out)

    def close(self) -> None:
        """End everything."""
        self.network.close()
        for process in self._started:
            process.wait(60)
        shutil.rmtree(self.folder, ignore_errors=True)


class Running:
    """A command that goes on."""

    def __init__(self, process: subprocess.Popen[bytes], out: Path) -> None:
        self.process, self._out = process, out

    @property
    def said(self) -> str:
        """What it has printed so far."""
        return self._out.read_text(errors="replace")

    def says(self, text: str) -> str:
        """Wait until it has printed that; all it has printed."""
        wait_until(lambda: text in self.said or self._ended(), within_s=PATIENCE_S)
        return self.said

    def _ended(self) -> bool:
        if self.process.poll() is not None:
            pytest.fail(f"it has ended with {self.process.returncode}:\n{self.said[-3000:]}")
        return False

    def interrupt(self) -> int:
        """Ctrl-C: to the whole foreground group, as a terminal does; its exit code."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(PATIENCE_S)


def cloned() -> Newcomer:
    """A newcomer with a clone of what is committed, and nothing installed."""
    made = Newcomer()
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(made.clone)], check=True)
    return made
