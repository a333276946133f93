"""`chaos`: break an installation of its own, beside nothing real, and judge what came of it."""

from typing import Annotated

import typer

from recovery.chaos.__main__ import main
from recovery.cli.steering import Json


def register(app: typer.Typer) -> None:
    """Add the commands of this group."""
    app.command(rich_help_panel="Care")(chaos)


def chaos(
    seconds: Annotated[float, typer.Option("--seconds", min=5, max=86_400, help="how long to break things")] = 60.0,
    seed: Annotated[int | None, typer.Option("--seed", help="the same faults again [default: by chance]", show_default=False)] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="only this kind of fault; often, if need be", show_default=False)] = None,
    keep: Annotated[bool, typer.Option("--keep", help="keep its folder afterwards")] = False,
    json: Json = False,
) -> int:
    """
    Kill, freeze and starve an installation of its own on simulated servers, and judge it from the servers' own journal.

    Nothing of a real installation is touched. Ends with 0 when no server ran twice, no repair was lost, no budget was
    exceeded and everything was healthy after the last fault; with 1 when not.
    """
    arguments = ["--seconds", str(seconds), *(["--seed", str(seed)] if seed is not None else [])]
    for kind in only or ():
        arguments += ["--only", kind]
    return main([*arguments, *(["--keep"] if keep else []), *(["--json"] if json else [])])
