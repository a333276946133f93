"""
`python enter.py SPEC`: become a service's process in a root folder of its own, as a container would have it.

Runs in a mount namespace of its own. The root is a fresh tmpfs with this machine's folders bound into it, read-only where
the service is, and the service's volumes, tmpfs and secrets at their own paths. SPEC is a JSON file, see `containers.py`.
"""

import ctypes
import json
import os
import sys
from pathlib import Path

MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
OWN = {"srv", "data", "prometheus", "run", "tmp", "lost+found"}
"""What a container has of its own; the rest is this machine's."""

_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: Path, kind: str = "", flags: int = 0) -> None:
    """mount(2)."""
    if _libc.mount(source.encode(), str(target).encode(), kind.encode(), flags, None):
        raise OSError(ctypes.get_errno(), f"cannot mount {source} on {target}: {os.strerror(ctypes.get_errno())}")


def bind(source: Path, root: Path, target: str, *, read_only: bool = False) -> None:
    """Show `source` at `target` below `root`."""
    at = root / target.lstrip("/")
    if source.is_dir():
        at.mkdir(parents=True, exist_ok=True)
    elif not at.exists():
        at.parent.mkdir(parents=True, exist_ok=True)
        at.touch()
    mount(str(source), at, flags=MS_BIND | MS_REC)
    if read_only:
        mount("none", at, flags=MS_REMOUNT | MS_BIND | MS_RDONLY)


def main() -> None:
    """Build the root, change into it, and exec."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    root = Path(spec["root"])
    mount("none", Path("/"), flags=MS_REC | MS_PRIVATE)
    mount("none", root, "tmpfs")
    read_only = bool(spec["read_only"])
    for entry in Path("/").iterdir():
        if entry.name in OWN:
            continue
        if entry.is_symlink():
            (root / entry.name).symlink_to(entry.readlink())
        elif entry.is_dir():
            bind(entry, root, entry.name, read_only=read_only and entry.name not in ("proc", "sys", "dev"))
    (root / "run").mkdir()
    (root / "tmp").mkdir()
    for folder in spec["tmpfs"]:
        (root / folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
        mount("none", root / folder.lstrip("/"), "tmpfs")
    for folder in spec["tools"]:  # this project and its Python, where they lie in a folder that the container has of its own
        bind(Path(folder), root, folder)
    for source, target, manner in spec["binds"]:
        bind(Path(source), root, target, read_only=manner == "ro")
    if read_only:
        mount("none", root, flags=MS_REMOUNT | MS_BIND | MS_RDONLY)
    os.chroot(root)
    os.chdir(spec["cwd"])
    os.execvpe(spec["command"][0], spec["command"], spec["environ"])


if __name__ == "__main__":
    main()
