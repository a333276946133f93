"""Starting keepers, ahead of time where they are wanted soon, and hearing from them whether the server was executed."""

import contextlib
import getpass
import hashlib
import importlib.util
import json
import os
import py_compile
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recovery import keeper
from recovery.adapters.host_disk import HostDisk, write_json
from recovery.adapters.run_logs import log_path
from recovery.core.host import RunRecord
from recovery.errors import DiskError

ANSWER_S = 10.0
"""How long a keeper may take to say that the server is executed; 30 ms on an idle machine, most of it Python's start."""
TMPDIR_LONGEST = 60
"""vLLM and multiprocessing put sockets with names of up to 45 bytes in TMPDIR; a socket's path must stay under 108."""
ORDER_BYTES = 65_536
"""What a pipe takes at once; an environment above it goes to a keeper of its own, so that none can make us wait by not reading."""
ADOPT_DEFAULTS = {"kill_deadline_s": 30.0, "log_bytes": 64 << 20, "log_files": 4, "deadline_file": None}


@dataclass(frozen=True)
class Answer:
    """What a new keeper said. `silent`: nothing in time, so it has been killed."""

    ok: bool = False
    error: str = ""
    kind: str = ""
    silent: bool = False


class Keepers:
    """Starts the keepers of one home, and reaps those of them that end while we live."""

    def __init__(self, disk: HostDisk, python: str) -> None:
        self._disk = disk
        self._python = python
        self._script: str | None = None
        self._spare: subprocess.Popen[bytes] | None = None
        self._ahead = False
        self._children: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()

    def start(self, instance: str, token: int, spec: Mapping[str, Any], env: Mapping[str, str], cwd: Path | None) -> Answer:
        """Start a run in the environment `env`, with the marker and a TMPDIR of its own added to it."""
        folder = self._disk.folder(instance)
        self._sweep(instance)
        tmpdir, marker = _make_tmpdir(folder, token), self._disk.marker(instance, token)
        usual_tmp = env.get("TMPDIR") or tempfile.gettempdir()
        whole = {
            # torch keeps compiled kernels in TMPDIR by default; they must outlive a run, or every restart is a slow one
            "TORCHINDUCTOR_CACHE_DIR": f"{usual_tmp}/torchinductor_{getpass.getuser()}",
            **env,
            "TMPDIR": tmpdir,
            "RECOVERY_RUN": marker,
            "SPT_NOENV": "1",  # or setproctitle, which vLLM uses, wipes the marker out of /proc/PID/environ
        }
        own = {"mode": "run", "token": token, "marker": marker, "tmpdir": tmpdir, "log": str(log_path(folder, token))}
        return self._run_keeper(instance, {**spec, **own}, whole, cwd)

    def adopt(self, instance: str, run: RunRecord) -> Answer:
        """Start a keeper for a server that lives without one."""
        own = {
            "mode": "adopt",
            "token": run.token,
            "marker": run.marker,
            "tmpdir": run.tmpdir,
            "log": str(log_path(self._disk.folder(instance), run.token)),
            "server_pid": run.server_pid,
            "server_start": run.server_start,
        }
        env = {**os.environ, "RECOVERY_RUN": run.marker, "SPT_NOENV": "1"}
        return self._run_keeper(instance, {**ADOPT_DEFAULTS, **self._last_spec(instance), **own}, env, None)

    def stay_ahead(self) -> None:
        """From now on have one keeper started before it is needed; it ends with this process."""
        self._ahead = True
        self._start_spare()

    def reap(self) -> None:
        """Collect the keepers we started that have ended: a zombie is no harm, but it is untidy."""
        with self._lock:
            self._children = [child for child in self._children if child.poll() is None]

    def _run_keeper(self, instance: str, spec: Mapping[str, Any], env: Mapping[str, str], cwd: Path | None) -> Answer:
        folder = self._disk.folder(instance)
        path, errors = folder / "spec.json", folder / "keeper.log"
        write_json(path, {**spec, "version": keeper.SPEC_VERSION})
        child = self._order_spare({"spec": str(path), "env": dict(env), "cwd": None if cwd is None else str(cwd), "errors": str(errors)})
        if child is None:
            try:
                with errors.open("wb") as complaints:
                    child = subprocess.Popen(
                        [*self._command(), str(path)],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        stderr=complaints,
                        env=env,
                        cwd=cwd,
                    )
            except (OSError, ValueError) as error:  # ValueError: a NUL or a "=" where the environment cannot have one
                return Answer(error=f"{self._python} in {cwd or Path.cwd()} as its keeper: {error}")
        answer = _read_answer(child)
        if not answer.ok:
            answer = _end_failed(child, answer)
        with self._lock:
            self._children.append(child)
        self.reap()
        if self._ahead:
            self._start_spare()
        return answer

    def _command(self) -> list[str]:
        return [self._python, "-I", "-S", self._keeper_script()]

    def _start_spare(self) -> None:
        """
        Start one unless it is there; without one, a start takes longer, and that is all.

        Without our own variables: it is no part of the fleet, and whoever ends those by their mark must not find it.
        """
        with self._lock, contextlib.suppress(OSError):
            if self._spare is not None and self._spare.poll() is not None:
                _let_go(self._spare)
                self._spare = None
            if self._spare is None:
                self._spare = subprocess.Popen(
                    self._command(),
                    bufsize=0,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env={name: value for name, value in os.environ.items() if not name.startswith("RECOVERY_")},
                )

    def _order_spare(self, order: Mapping[str, Any]) -> subprocess.Popen[bytes] | None:
        """Hand the run to the keeper that waits; None when there is none, or it cannot be told."""
        line = json.dumps(order).encode() + b"\n"
        if len(line) > ORDER_BYTES:
            return None
        with self._lock:
            spare, self._spare = self._spare, None
        if spare is None or spare.stdin is None:
            return None
        try:
            with spare.stdin:
                spare.stdin.write(line)
        except OSError:  # it has ended
            _let_go(spare)
            return None
        return spare

    def _keeper_script(self) -> str:
        """
        The keeper as bytecode under the home: 4 ms less per start, and an upgrade that replaces our files disturbs none.

        The source where that cannot be written, or another Python than this one is to run it.
        """
        if self._script is None:
            source = Path(keeper.__file__)
            self._script = str(source)
            if self._python == sys.executable:
                digest = hashlib.sha256(source.read_bytes() + importlib.util.MAGIC_NUMBER).hexdigest()[:16]
                compiled = self._disk.home / f"keeper-{digest}.pyc"
                with contextlib.suppress(OSError, py_compile.PyCompileError):
                    if not compiled.exists():
                        py_compile.compile(str(source), cfile=str(compiled), doraise=True)
                    self._script = str(compiled)
        return self._script

    def _last_spec(self, instance: str) -> dict[str, Any]:
        try:
            spec = json.loads((self._disk.folder(instance) / "spec.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return spec if isinstance(spec, dict) else {}

    def _sweep(self, instance: str) -> None:
        """Remove the temporary directory of the last run, when its keeper was killed before it could."""
        tmpdir = self._last_spec(instance).get("tmpdir")
        if isinstance(tmpdir, str):
            keeper.remove_tree(tmpdir)


def _make_tmpdir(folder: Path, token: int) -> str:
    """A temporary directory for one run: in the instance's own, if its path leaves room for a socket."""
    inside = folder / "tmp" / str(token)
    try:
        if len(os.fsencode(inside)) > TMPDIR_LONGEST:
            return tempfile.mkdtemp(prefix="recovery-")
        inside.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise DiskError(f"cannot make a temporary directory for a run: {error}; free space or mend the permissions there") from error
    return str(inside)


def _let_go(spare: subprocess.Popen[bytes]) -> None:
    """Let go of a keeper that ended before it was needed."""
    with spare:
        spare.kill()


def _read_answer(child: subprocess.Popen[bytes]) -> Answer:
    """The keeper's one line, or nothing when it ends or stays silent without one."""
    assert child.stdout is not None
    with child.stdout as pipe:
        poller = select.poll()
        poller.register(pipe, select.POLLIN)
        line = pipe.readline() if poller.poll(1000 * ANSWER_S) else b""
    try:
        said = json.loads(line)
        return Answer(ok=said.get("ok", False), error=said.get("error", ""), kind=said.get("kind", ""))
    except ValueError:
        return Answer(error=f"its keeper did not answer within {ANSWER_S:g} s")


def _end_failed(child: subprocess.Popen[bytes], answer: Answer) -> Answer:
    """A keeper that failed ends by itself at once, or it is killed."""
    try:
        status = child.wait(timeout=1.0)
        return answer if answer.kind else Answer(error=f"its keeper ended with status {status} and said nothing", silent=True)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return Answer(error=answer.error, kind=answer.kind, silent=True)
