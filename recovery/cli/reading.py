"""What there is to read of the fleet: `logs`, `events`, `incidents`, `incident`."""

import json as jsons
import sys
import time
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.table import Table

from recovery.cli.asking import ask, err, out, rows_of, wired, within
from recovery.cli.exits import Exit, UnknownNameError
from recovery.core.causes import ADVICE, Cause
from recovery.core.change import Incident
from recovery.core.instance import Instance
from recovery.core.postmortem import post_mortem, spans
from recovery.errors import ConflictError, HostAwayError, RecoveryError
from recovery.queues import host_queue

READING = "What happened"
POLL_S = 0.5
PATIENCE_S = 30.0
"""How long `logs -f` waits for a host that does not answer before it gives up."""

Json = Annotated[bool, typer.Option("--json", help="as JSON, for scripts")]


def register(app: typer.Typer) -> None:
    """Add the commands of this group."""
    for command in (logs, events, incidents, incident):
        app.command(rich_help_panel=READING)(command)


def logs(
    name: Annotated[str, typer.Argument(help="a model, or one instance of it")],
    follow: Annotated[bool, typer.Option("-f", "--follow", help="go on with what is written, also by the next runs")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, max=10_000, help="lines from the end")] = 100,
    run: Annotated[int | None, typer.Option("--run", help="of this run; -1 is the one before the newest", show_default=False)] = None,
) -> int:
    """The log of a model's servers, without secrets; each run has its own."""
    rows = rows_of(name)
    readers = [_Reader(row, prefix=len(rows) > 1) for row in rows]
    for reader in readers:
        reader.first(lines, run)
    waited_since = None
    while follow:
        time.sleep(POLL_S)
        try:
            for reader in readers:
                reader.more()
            waited_since = None
        except RecoveryError as error:
            waited_since = waited_since or time.monotonic()
            if time.monotonic() - waited_since >= PATIENCE_S:
                raise
            err.print(f"{error}; trying again")
    return Exit.OK


class _Reader:
    """One instance's log as it is printed."""

    def __init__(self, row: Instance, *, prefix: bool) -> None:
        self._row, self._prefix = row, f"{row.id}  " if prefix else ""
        self._end: str | None = None
        self._run: int | None = None

    def first(self, lines: int, run: int | None) -> None:
        """Print the last lines; from Redis when the host is away."""
        if self._row.placement.host not in within(wired().store.hosts):
            self._from_redis(lines, run)
            return
        token = None if run is None else self._token(run)
        self._take(self._ask(lines=lines, run=token))

    def more(self) -> None:
        """Print what has come since, of the run that was shown and of the next."""
        told = self._ask(lines=10_000, after=self._end)
        if self._run is not None and told.get("run") not in (None, self._run):
            self._print(f"--- run {told['run']} ---\n")
        self._take(told)

    def _token(self, run: int) -> int:
        """The token meant by a number: itself, or counted from the newest."""
        if run > 0:
            return run
        runs = self._ask(lines=1)["runs"]
        if -run >= len(runs):
            raise UnknownNameError(f"cannot go back {-run} runs of {self._row.id}: {len(runs)} have a log")
        return int(runs[run - 1])

    def _ask(self, **options: Any) -> dict[str, Any]:
        told: dict[str, Any] = ask("recovery.read_logs", self._row.id, options, queue=host_queue(self._row.placement.host))
        if "error" in told:
            raise ConflictError(f"cannot read the log of {self._row.id}: {told['detail']}")
        return told

    def _take(self, told: dict[str, Any]) -> None:
        for line in told["lines"]:
            self._print(line)
        sys.stdout.flush()
        self._end, self._run = told["end"], told["run"]

    def _print(self, line: str) -> None:
        sys.stdout.write(f"{self._prefix}{line}")

    def _from_redis(self, lines: int, run: int | None) -> None:
        host = self._row.placement.host
        kept = within(lambda: wired().store.get(f"logtail:{self._row.id}"))
        if kept is None or run not in (None, kept["run"]):
            raise HostAwayError(f"cannot read the log of {self._row.id}: host {host} has no heartbeat, and it has left no tail in Redis")
        err.print(f"host {host} is away; this is the tail that it left at {_time(float(kept['at']))}")
        for line in kept["lines"][-lines:]:
            self._print(line)


def events(
    model: Annotated[str, typer.Argument(help="id of a model")],
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=1000, help="events from the end")] = 50,
    json: Json = False,
) -> int:
    """The history of a model: what was seen and done, oldest first."""
    rows = rows_of(model)
    found = within(lambda: wired().store.events(rows[0].model, count))
    if json:
        out.print_json(jsons.dumps(found))
        return Exit.OK
    for event in found:
        out.print(f"{_time(float(event['at']))}  {event['kind']:<12} {event['text']}", markup=False)
    return Exit.OK


def incidents(
    model: Annotated[str | None, typer.Argument(help="only this model", show_default=False)] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=500, help="the newest so many")] = 20,
    json: Json = False,
) -> int:
    """The outages there were, newest first: when, why, how long, how they ended."""
    if model is not None:
        rows_of(model)
    found = within(lambda: wired().store.incidents(model, count))
    if json:
        out.print_json(jsons.dumps([each.model_dump(mode="json") for each in found]))
        return Exit.OK
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("INCIDENT", "OPENED", "CAUSE", "DOWN", "OUTCOME"):
        table.add_column(name, overflow="fold", no_wrap=name in ("INCIDENT", "CAUSE"))  # to be copied
    for each in found:
        table.add_row(each.id, _time(each.opened_at)[5:], each.cause, _down(each), each.outcome or "open")
    out.print(table) if found else out.print("no incidents")
    return Exit.OK


def incident(incident_id: Annotated[str, typer.Argument(metavar="ID", help="id of an incident")], json: Json = False) -> int:
    """One outage as a post-mortem: cause, times, every step with its outcome, and what there was to see."""
    found = within(lambda: wired().store.incident(incident_id))
    if found is None:
        raise UnknownNameError(f"cannot find an incident {incident_id[:80]!r}; `recovery incidents` lists them")
    kept = within(lambda: wired().store.get(f"evidence:{incident_id}")) or {}
    if json:
        out.print_json(jsons.dumps({**found.model_dump(mode="json"), "evidence": {**found.evidence, **kept}, "seconds": spans(found)}))
        return Exit.OK
    advice = next((ADVICE[cause] for cause in Cause if cause.value == found.cause), "")
    for line in post_mortem(found, kept, _time, advice):
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    return Exit.OK


def _down(incident: Incident) -> str:
    """From the failure until it served again."""
    if incident.ready_at is None:
        return "-"
    return f"{incident.ready_at - (incident.failed_at or incident.opened_at):.1f} s"


def _time(at: float) -> str:
    return datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M:%S")
