"""`workers restart`: the parts of this machine anew, one after another, while the models serve on."""

import time
from pathlib import Path
from typing import Annotated

import typer

from recovery import part_restarts
from recovery.cli.asking import err, out
from recovery.cli.exits import Exit, TimedOutError
from recovery.errors import ConflictError
from recovery.part_restarts import Progress
from recovery.parts import HomeLock, lives
from recovery.settings import load_settings

TAKEN_UP_S = 15.0
"""The manager looks twice a second."""

workers = typer.Typer(help="The parts of this machine: host worker, control worker, clock, API, Flower, front door.", no_args_is_help=True)
workers.callback()(lambda: None)  # or typer would take the one command for the group itself


def register(app: typer.Typer) -> None:
    """Add the commands of this group."""
    app.add_typer(workers, name="workers", rich_help_panel="Changes without downtime")


@workers.command()
def restart(
    parts: Annotated[list[str] | None, typer.Argument(help="host, control, beat, api, flower, door [default: all there are]")] = None,
    timeout: Annotated[float, typer.Option("--timeout", help="seconds to wait")] = 900.0,
) -> int:
    """
    Restart the parts that `recovery up` (or `recovery host`) runs on RECOVERY_HOME, one after another; the models serve on.

    None is touched before the one before it does its work again; at the first that does not come back it stops, and says
    which. The front door hands its socket over, so no connection is refused. The part manager carries it out, and goes on
    when this command ends.
    """
    home = load_settings().home.resolve()
    manager = HomeLock(home).holder()
    if manager is None:
        raise ConflictError(f"cannot restart the parts: no `recovery up` or `recovery host` runs on {home} (set RECOVERY_HOME?)")
    before = part_restarts.progress(home)
    if before is not None and before.state == "running" and before.by == manager.pid:
        raise ConflictError(f"cannot restart the parts: a restart is under way, {before.reason}")
    ident = part_restarts.ask(home, parts or ())
    until, said = time.monotonic() + timeout, 0
    taken_by = min(until, time.monotonic() + TAKEN_UP_S)
    with err.status("waiting for the part manager") as shown:
        while True:
            now = part_restarts.progress(home)
            if now is not None and now.id == ident:
                said = _tell(now, said)
                if now.state != "running":
                    return _end(now)
                shown.update(now.reason)
            if not lives(manager):
                raise ConflictError("cannot tell how the restart ended: the part manager has ended")
            _in_time(home, ident, taken=now is not None and now.id == ident, taken_by=taken_by, until=until)
            time.sleep(0.1)


def _tell(now: Progress, said: int) -> int:
    """Print each part that is back, once."""
    for number, name in enumerate(now.done[said:], said + 1):
        out.print(f"{number}/{len(now.order)}  {name} does its work again")
    return len(now.done)


def _end(now: Progress) -> int:
    if now.state == "failed":
        raise ConflictError(f"the restart was stopped: {now.reason}")
    out.print("all parts are new; the models were not touched")
    return Exit.OK


def _in_time(home: Path, ident: str, *, taken: bool, taken_by: float, until: float) -> None:
    if not taken and time.monotonic() >= taken_by:
        part_restarts.withdraw(home, ident)
        raise TimedOutError(
            "cannot restart the parts: the part manager does not answer; if it is of a version before this command: "
            "`recovery down --keep-models`, then `recovery up`"
        )
    if time.monotonic() >= until:
        raise TimedOutError("cannot wait any longer for the restart of the parts; it goes on")
