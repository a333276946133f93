"""Changes without downtime: `roll`, `apply`; and `plan`, which shows what a repair would do."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from recovery.applier import Applier
from recovery.cli.asking import ask, err, out, rows_of, wired, within
from recovery.cli.exits import Exit, TimedOutError
from recovery.cli.steering import Model
from recovery.core.rolling import Roll
from recovery.errors import ConfigError, ConflictError, UnknownModelError
from recovery.queues import host_queue
from recovery.service import Service
from recovery.settings import load_fleet
from recovery.wiring import FleetFile

CHANGING = "Changes without downtime"
POLL_S = 0.2


def register(app: typer.Typer) -> None:
    """Add the commands of this group."""
    for command in (roll, apply, plan):
        app.command(rich_help_panel=CHANGING)(command)


def roll(
    model: Model,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="wait for the end and show the way there")] = True,
    timeout: Annotated[float, typer.Option("--timeout", help="seconds to wait")] = 3600.0,
) -> int:
    """
    Restart a model's replicas one after another, none before the last one serves; stops at the first failure.

    It is carried out by the fleet itself and goes on when this command ends. With one replica, a spare port and room on
    its cards a second replica serves meanwhile.
    """
    rows_of(model)
    answer = ask("recovery.roll", model, by="command line")
    if not answer["accepted"]:
        raise UnknownModelError(answer["reason"]) if answer["status"] == "unknown_model" else ConflictError(answer["reason"])
    out.print(f"{model}: rolling {', '.join(each['instance'] for each in answer['instances'])}")
    return _watch(model, timeout) if wait else Exit.OK


def _watch(model: str, timeout: float) -> int:
    roller = _service().roller
    until, said = time.monotonic() + timeout, ""
    with err.status(f"roll of {model}") as progress:
        while True:
            found: Roll | None = within(lambda: roller.of(model))
            if found is None:
                raise ConflictError(f"cannot follow the roll of {model}: it is no longer remembered")
            if found.reason != said:
                said = found.reason
                out.print(f"{len(found.done)}/{len(found.order)}  {said}")
            if found.state != "running":
                break
            if time.monotonic() >= until:
                raise TimedOutError(f"cannot wait any longer for the roll of {model}: {found.reason}; it goes on")
            progress.update(f"{len(found.done)} of {len(found.order)} done, now {found.current or 'waiting'}")
            time.sleep(POLL_S)
    if found.state == "failed":
        raise ConflictError(f"the roll of {model} was stopped: {found.reason}")
    return Exit.OK


def apply(
    fleet: Annotated[Path, typer.Argument(help="the changed fleet file")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only show what would be done")] = False,
) -> int:
    """
    Bring a changed fleet file into force with the fewest actions; shown first, taken back where a replica does not come up.

    The file is installed as RECOVERY_FLEET of this machine; other GPU hosts read their own copy, so put it there first.
    """
    settings = wired().settings
    changed = load_fleet(fleet, settings.host)
    if settings.fleet is None:
        raise ConfigError("cannot apply a fleet file: RECOVERY_FLEET does not say where this installation keeps its own")
    service = _service()
    applier = Applier(service.store, service.sender, service.roller, settings.fleet, _wait, out.print)
    todo = within(lambda: applier.plan(changed))
    if not todo:
        out.print("nothing to do: the fleet is as this file says")
        return Exit.OK
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("ACTION", "INSTANCE", "WHY"):
        table.add_column(name)
    for action in todo:
        table.add_row(action.kind, action.instance, action.why)
    out.print(table)
    if dry_run:
        return Exit.OK
    applier.apply(fleet, changed)
    out.print(f"{fleet} is in force")
    return Exit.OK


def plan(
    model: Model,
    cause: Annotated[str | None, typer.Option("--cause", help="as if it failed with this [default: its last failure]")] = None,
) -> int:
    """Show what would be done about a model's next failure, step by step. Nothing is done."""
    for row in rows_of(model):
        answer = ask("recovery.plan_instance", row.id, cause, queue=host_queue(row.placement.host))
        if answer["outcome"] != "planned":
            raise ConflictError(answer["reason"])
        left = f"{row.policy.max_restarts - row.used} restarts left" if row.policy.max_restarts else "no limit of restarts"
        out.print(f"{row.id}, should it fail with {answer['cause']} ({left}, policy {row.policy.restart_policy}):")
        for number, step in enumerate(answer["steps"], 1):
            out.print(f"  {number}. {step['kind']}: {step['reason']}")
        if row.overrides:
            out.print("  in force now: " + ", ".join(f"{each.flag} {each.value or ''}".strip() for each in row.overrides))
    return Exit.OK


def _service() -> Service:
    from workers.app import app
    from workers.sending import CelerySender

    settings = wired().settings
    return Service(wired().store, CelerySender(app), FleetFile(settings) if settings.fleet is not None else None)


def _wait(text: str, done: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    with err.status(text):
        while not done():
            if time.monotonic() >= until:
                return False
            time.sleep(POLL_S)
    return True
