"""
What a host tells of its servers' logs: lines by run, redacted before they leave it, and a tail kept in Redis.

A position in a log is a text that only this module reads: run, piece and byte. The keeper cuts pieces off a long log
(`<token>.log.1`, `.2`, …), so a byte offset alone would come to mean another place.
"""

from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from recovery import keeper
from recovery.adapters import run_logs
from recovery.adapters.processes import Processes
from recovery.core.redaction import RedactionConfig, redact_lines, secret_values
from recovery.host.service import HostService

LINES_MOST = 10_000
BYTES_MOST = 8_000_000
"""What one answer may carry; the oldest of the lines asked for are left out beyond it."""
LINE_MOST = 20_000
"""Characters of one line; what is longer is cut."""
TAIL_LINES = 200
TAIL_TTL_S = 7 * 86_400.0
CHUNK = 1 << 20

Seen = MutableMapping[str, tuple[int, str]]


def read_logs(service: HostService, instance: str, lines: int = 100, run: int | None = None, after: str | None = None) -> dict[str, Any]:
    """
    The last `lines` lines (1 to 10000) of a run of an instance (default: the newest), or those after the position `after`.

    `{"lines", "total_lines", "run", "runs", "end"}`: each line with its end, `total_lines` of what is kept of that run,
    `runs` the tokens that have a log, oldest first, `end` the position for the next `after`. Or `{"error": "never_started" |
    "permission" | "no_directory", "detail"}`.
    """
    host = _processes(service)
    folder = host.disk.folder(instance)
    try:
        runs = _runs(folder)
        token = run if run is not None else (runs[-1] if runs else None)
        if token is None or token not in runs:
            return _absent(host, instance, folder, run)
        pieces = _Pieces(folder, token)
        wanted = max(1, min(lines, LINES_MOST))
        end = pieces.end()
        found = pieces.after(after, wanted) if after is not None else pieces.last(wanted)
        total = pieces.count()
    except PermissionError as error:
        return {"error": "permission", "detail": f"cannot read {error.filename}: this host's worker may not; mend its owner and mode"}
    except (FileNotFoundError, NotADirectoryError) as error:
        return {"error": "no_directory", "detail": f"cannot read {error.filename}: it is gone"}
    shown = redact_lines([_cut(line) for line in found], _redaction(service, instance))
    return {"lines": shown, "total_lines": total, "run": token, "runs": list(runs), "end": end}


def keep_tails(service: HostService, seen: Seen) -> int:
    """
    Put the last lines of each instance's newest run under `logtail:{instance}` when they have changed; how many were put.

    For when the host is away. The caller keeps `seen` from call to call and calls every half minute and after each exit.
    """
    tails: dict[str, Any] = {}
    states: Seen = {}
    for instance in service.host.instances():
        folder = _processes(service).disk.folder(instance)
        try:
            runs = _runs(folder)
            if not runs:
                continue
            state = (runs[-1], _Pieces(folder, runs[-1]).end())
        except OSError:
            continue
        if seen.get(instance) == state:
            continue
        told = read_logs(service, instance, TAIL_LINES)
        if "lines" in told:
            tails[f"logtail:{instance}"] = {**told, "host": service.name}
            states[instance] = state
    if tails:
        at = service.store.now()
        service.store.put_many({name: {**told, "at": at} for name, told in tails.items()}, TAIL_TTL_S)
        seen.update(states)
    return len(tails)


class _Pieces:
    """The files of one run's log, oldest first; the live one counts as the piece after the last that was cut off."""

    def __init__(self, folder: Path, token: int) -> None:
        self._token = token
        live = run_logs.log_path(folder, token)
        numbers = keeper.log_parts(str(live))
        self._files = [(number, live.with_name(f"{live.name}.{number}")) for number in numbers]
        self._files.append(((numbers[-1] if numbers else 0) + 1, live))

    def end(self) -> str:
        """The position behind the last whole line."""
        number, path = self._files[-1]
        return f"{self._token}:{number}:{_whole(path)}"

    def count(self) -> int:
        """How many lines are kept."""
        return sum(chunk.count(b"\n") for _, path in self._files for chunk in _chunks(path))

    def last(self, lines: int) -> list[str]:
        """The last whole lines."""
        found: list[str] = []
        for _, path in reversed(self._files):
            if len(found) >= lines:
                break
            found = _lines(path, max(0, _whole(path) - BYTES_MOST), cut_first=True)[-(lines - len(found)) :] + found
        return found

    def after(self, position: str, lines: int) -> list[str]:
        """The whole lines after a position, the newest of them if there are too many; all that is kept when it is of another run."""
        token, number, offset = _read_position(position)
        if token != self._token:
            return self.last(lines)
        found: list[str] = []
        for at, path in self._files:
            if at >= number:
                start = offset if at == number else 0
                found += _lines(path, max(start, _whole(path) - BYTES_MOST), cut_first=_whole(path) - BYTES_MOST > start)
        return found[-lines:]


def _read_position(text: str) -> tuple[int, int, int]:
    try:
        token, number, offset = (int(word) for word in text.split(":"))
    except ValueError:
        return (0, 0, 0)
    return (token, number, offset)


def _whole(path: Path) -> int:
    """The offset behind the last line end: a line that is still being written is for the next look."""
    with path.open("rb") as file:
        position = file.seek(0, 2)
        while position > 0:
            start = max(0, position - CHUNK)
            file.seek(start)
            at = file.read(position - start).rfind(b"\n")
            if at >= 0:
                return start + at + 1
            position = start
    return 0


def _lines(path: Path, start: int, *, cut_first: bool) -> list[str]:
    """The whole lines from `start` on. `cut_first`: a start in the middle of a line leaves that line out."""
    end = _whole(path)
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(max(0, end - start))
    if cut_first and start > 0:
        data = data.partition(b"\n")[2]
    return [f"{line}\n" for line in data.decode("utf-8", "replace").split("\n")[:-1]]  # progress bars hold \r: no line ends


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _runs(folder: Path) -> tuple[int, ...]:
    """The tokens that have a log; unlike `run_logs.runs` it raises when they cannot be listed."""
    if folder.exists():
        next(iter((folder / "runs").iterdir()), None)
    return run_logs.runs(folder)


def _absent(host: Processes, instance: str, folder: Path, run: int | None) -> dict[str, Any]:
    kept = run_logs.runs(folder)
    if run is not None and kept:
        detail = f"no log of run {run} of {instance} is kept; there are: {_listed(kept)}"
    elif host.read_record(instance).token == 0:
        detail = f"{instance} has never been started on this host"
    else:
        detail = f"{instance} has left no log on this host"
    return {"error": "never_started", "detail": detail}


def _listed(tokens: Sequence[int]) -> str:
    return ", ".join(map(str, tokens))


def _cut(line: str) -> str:
    return line if len(line) <= LINE_MOST else f"{line[:LINE_MOST]} … cut\n"


def _redaction(service: HostService, instance: str) -> RedactionConfig:
    """The fleet's rules, and the secrets of this server's own environment by value."""
    fleet = service.fleet()
    row = service.store.load(instance)
    made = service.launch_of(row) if row is not None else None
    literals = secret_values(made.env.items()) if made is not None else ()
    return RedactionConfig(patterns=tuple(fleet.redact_patterns), prompts=fleet.redact_prompts, literals=literals)


def _processes(service: HostService) -> Processes:
    assert isinstance(service.host, Processes)
    return service.host
