"""
The tools people know, each keeping one child alive: a bare shell loop, supervisord, circus.

They are installed into an environment of their own in the user's cache, and run with their own defaults except for one
thing: none may give up.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

CHILD = Path(__file__).parent / "child.sh"
PACKAGES = ("supervisor==4.3.0", "circus==0.19.0", "setuptools<80")
"""supervisor 4.3 asks setuptools for its own version."""


def environment(name: str, packages: Sequence[str]) -> Path:
    """The folder with the programs of these packages, in an environment of their own; installed at the first call."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-recovery" / name
    stamp = folder / ".stamp"
    if not stamp.exists() or stamp.read_text() != " ".join(packages):
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin/python"), "-m", "pip", "install", "--quiet", *packages], check=True)
        stamp.write_text(" ".join(packages))
    return folder / "bin"


def shell_loop(folder: Path, _bin: Path) -> list[str]:
    """The floor: nothing but fork and wait."""
    return ["bash", "-c", f"while :; do bash {CHILD} {folder / 'execs'}; done"]


def supervisord(folder: Path, programs: Path) -> list[str]:
    """supervisord with autorestart."""
    (folder / "supervisord.conf").write_text(
        f"[supervisord]\nnodaemon=true\nlogfile={folder}/supervisord.log\npidfile={folder}/pid\nuser=root\n"
        f"[program:child]\ncommand=bash {CHILD} {folder}/execs\nautorestart=true\nstartretries=1000000\n"
    )
    return [str(programs / "supervisord"), "-c", str(folder / "supervisord.conf")]


def circus(folder: Path, programs: Path) -> list[str]:
    """circusd with respawn, which is its default, as is its look every 5 s beside the signal of the child."""
    (folder / "circus.ini").write_text(
        f"[circus]\nendpoint=ipc://{folder}/a\npubsub_endpoint=ipc://{folder}/b\nstatsd=False\n"
        f"[watcher:child]\ncmd=bash {CHILD} {folder}/execs\nmax_retry=-1\n"
    )
    return [str(programs / "circusd"), str(folder / "circus.ini")]


PEERS = {"shell loop": shell_loop, "supervisord": supervisord, "circus": circus}


@contextlib.contextmanager
def running() -> Iterator[dict[str, Path]]:
    """All peers, each with its child; where each child's execs are noted, by the peer's name."""
    programs = environment("bench-peers", PACKAGES)
    with tempfile.TemporaryDirectory(prefix="rb-", ignore_cleanup_errors=True) as place, contextlib.ExitStack() as ends:
        notes = {}
        for number, (name, command) in enumerate(PEERS.items()):
            folder = Path(place) / str(number)
            folder.mkdir()
            with (folder / "out").open("wb") as out:
                process = subprocess.Popen(
                    command(folder, programs), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
                )
            ends.callback(_end, process)
            notes[name] = folder / "execs"
        yield notes


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a peer and everything below it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for each in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait(20)
