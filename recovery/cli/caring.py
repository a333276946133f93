"""Looking after an installation: `doctor`, `brake`, `drill`."""

import json as jsons
import os
from typing import Annotated

import typer

from recovery.adapters.drill_hands import Hands
from recovery.adapters.processes import Processes
from recovery.cli.asking import err, out, wired, within
from recovery.cli.exits import Exit
from recovery.cli.steering import Json, Model
from recovery.core.braking import BRAKE_KEY, BRAKE_TTL_S, Brake
from recovery.doctor import examine
from recovery.drill import Fault, Moment, run_drill

CARING = "Care"
MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "bad": "[red]bad[/]"}

brake = typer.Typer(help="The fleet brake: it stops mass repair when many instances fail with one cause.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands of this group."""
    for command in (doctor, drill):
        app.command(rich_help_panel=CARING)(command)
    app.add_typer(brake, name="brake", rich_help_panel=CARING)


def doctor(json: Json = False) -> int:
    """Look at Redis, our own parts, clocks, cards, ports, disk and the fleet file, and say how to mend what is wrong."""
    found = within(lambda: examine(wired(), os.environ), 20.0)
    if json:
        out.print_json(jsons.dumps([each.model_dump() for each in found]))
    for each in found if not json else ():
        out.print(f"{MARKS[each.level]:<20} {each.what}: {each.text}" + (f"\n         {each.mend}" if each.mend else ""))
    return Exit.REFUSED if any(each.level == "bad" for each in found) else Exit.OK


@brake.command("status")
def brake_status(json: Json = False) -> int:
    """Say whether the brake is on, since when, and for what."""
    found = _brake()
    if json:
        out.print_json(jsons.dumps(found.model_dump() if found is not None else None))
    elif found is None or found.released_at is not None:
        out.print("the brake is off")
    else:
        out.print(f"the brake is on: {len(found.instances)} instances failed with {found.cause}: {', '.join(found.instances)}")
    return Exit.OK


@brake.command("release")
def brake_release() -> int:
    """Let the brake go: everything that waits for it is repaired at once, within the limits on loads."""
    found = _brake()
    if found is None or found.released_at is not None:
        out.print("the brake is off already")
        return Exit.OK
    store = wired().store
    released = found.evolve(released_at=within(store.now))
    within(lambda: store.put(BRAKE_KEY, released.model_dump(mode="json"), BRAKE_TTL_S))
    out.print(f"released: {', '.join(found.instances)} may be repaired at once")
    return Exit.OK


def _brake() -> Brake | None:
    kept = within(lambda: wired().store.get(BRAKE_KEY))
    return Brake.model_validate(kept) if kept is not None else None


def drill(
    model: Model,
    fault: Annotated[Fault, typer.Option("--fault", help="what to do to it")],
    yes: Annotated[bool, typer.Option("--yes", help="also for a model that is not marked `drill: true`")] = False,
    replica: Annotated[
        int | None, typer.Option("--replica", help="which one [default: the first that serves here]", show_default=False)
    ] = None,
    json: Json = False,
) -> int:
    """Cause a fault on a live model of this host from outside, watch, and print what happened when."""
    settings = wired().settings

    def show(moment: Moment) -> None:
        err.print(f"{moment.after_s:8.2f} s  {moment.kind:<11} {moment.text}")

    report = run_drill(
        wired().store, Processes(settings.home).look, Hands(), settings.host, model, fault, yes=yes, replica=replica, on_event=show
    )
    out.print_json(report.model_dump_json()) if json else out.print(report.lines()[-1])
    return Exit.OK if report.passed else Exit.REFUSED
