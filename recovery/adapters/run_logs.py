"""The logs of an instance's runs: one per run, in parts when it was long. The keeper bounds a run's, this bounds their number."""

import os
from collections import deque
from pathlib import Path

from recovery.keeper import log_parts

CHUNK = 64 * 1024


def log_path(folder: Path, token: int) -> Path:
    """Where that run writes; its first and its middle parts lie beside it as .1, .2, ..."""
    return folder / "runs" / f"{token}.log"


def runs(folder: Path) -> tuple[int, ...]:
    """The tokens of the runs whose logs are still here, oldest first."""
    try:
        names = [path.name for path in (folder / "runs").iterdir()]
    except OSError:
        return ()
    return tuple(sorted({int(name.split(".")[0]) for name in names if name.split(".")[0].isdigit() and ".log" in name}))


def files(folder: Path, token: int) -> list[Path]:
    """The files of one run's log in the order they were written."""
    log = log_path(folder, token)
    try:
        parts = log_parts(str(log))
    except OSError:
        return []
    return [path for path in [*(log.with_name(f"{log.name}.{part}") for part in parts), log] if path.exists()]


def tail(folder: Path, token: int, lines: int) -> list[str]:
    """The last lines of a run, at most `lines` of them, without their line ends."""
    kept: deque[str] = deque(maxlen=max(lines, 0))
    missing = lines
    for path in reversed(files(folder, token)):
        if missing <= 0:
            break
        block = _last_lines(path, missing)
        kept.extendleft(reversed(block))
        missing -= len(block)
    return list(kept)


def read(folder: Path, token: int, max_bytes: int) -> str:
    """
    A run's log, both streams; when it is longer than `max_bytes`, its head and its tail with a line between that says so.

    The cause of a failure stands at either end: at the head what was configured, at the tail what went wrong.
    """
    paths = files(folder, token)
    sizes = [path.stat().st_size for path in paths]
    total, numbers = sum(sizes), [int(path.suffix[1:]) for path in paths if path.suffix != ".log"]
    gap = len(numbers) >= 2 and numbers[-1] - numbers[0] >= len(numbers)
    if total <= max_bytes and not gap:
        return b"".join(path.read_bytes() for path in paths).decode("utf-8", "replace")
    half = max_bytes // 2
    head, behind = b"", b""
    for path in paths[:1] if gap else paths:
        head += _piece(path, 0, half - len(head))
    for path in reversed(paths[1:] if gap else paths):
        want = half - len(behind)
        behind = _piece(path, max(path.stat().st_size - want, 0), want) + behind
    left_out = f"\n... {total - len(head) - len(behind)} bytes{' and more, already removed,' if gap else ''} left out ...\n"
    return head.decode("utf-8", "replace") + left_out + behind.decode("utf-8", "replace")


def protect(folder: Path, token: int) -> None:
    """Keep that run's log beyond its turn: the first failing run of a crash loop. One at a time; the last call holds."""
    for old in (folder / "runs").glob("*.keep"):
        old.unlink(missing_ok=True)
    (folder / "runs" / f"{token}.keep").touch(mode=0o600)


def prune(folder: Path, keep: int) -> None:
    """Remove the logs of all but the latest `keep` runs and the protected one."""
    for token in runs(folder)[: -keep or None]:
        if not (folder / "runs" / f"{token}.keep").exists():
            for path in files(folder, token):
                path.unlink(missing_ok=True)


def _piece(path: Path, offset: int, length: int) -> bytes:
    if length <= 0:
        return b""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def _last_lines(path: Path, count: int) -> list[str]:
    """The last lines of one file, read from its end in blocks."""
    with path.open("rb") as file:
        position, data = file.seek(0, os.SEEK_END), b""
        while position > 0 and data.count(b"\n") <= count:
            step = min(CHUNK, position)
            position -= step
            file.seek(position)
            data = file.read(step) + data
    return data.decode("utf-8", "replace").splitlines()[-count:]
