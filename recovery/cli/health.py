"""`recovery health`: whether one part does its work, for the health checks of containers and units."""

from enum import StrEnum
from typing import Annotated

import typer

from recovery import health as checks
from recovery.cli.asking import err, out
from recovery.cli.exits import Exit


class PartName(StrEnum):
    """The parts that can be asked for."""

    HOST = "host"
    CONTROL = "control"
    BEAT = "beat"
    API = "api"
    DOOR = "door"
    FLOWER = "flower"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel="Running")(health)


def health(part: Annotated[PartName, typer.Argument(help="the part to ask for")]) -> int:
    """Say whether a part on this machine does its work: 0 yes, 1 no and why."""
    why = checks.problem(part.value)
    if why is not None:
        err.print(why, markup=False)
        return Exit.REFUSED
    out.print("ok")
    return Exit.OK
