"""`recovery systemd print` and `recovery acl print`: what hosts outside containers need, as text to be put in its place."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from recovery.cli.exits import Exit
from recovery.deploy import access, units
from recovery.errors import ConfigError
from recovery.settings import load_settings

PANEL = "Deployment"


def register(app: typer.Typer) -> None:
    """Add the two groups."""
    for name, text, command in (
        ("systemd", "Units for hosts without containers.", print_units),
        ("acl", "Access rules for Redis, one user per role.", print_rules),
    ):
        group = typer.Typer(help=text, no_args_is_help=True)
        group.callback()(lambda: None)  # or typer would take the one command for the group itself
        group.command("print")(command)
        app.add_typer(group, name=name, rich_help_panel=PANEL)


def print_units(
    parts: Annotated[list[str] | None, typer.Argument(help="host, control, beat, api, door, flower [default: all]")] = None,
    user: Annotated[str, typer.Option("--user", help="who the parts run as")] = "recovery",
    redis_url: Annotated[str | None, typer.Option("--redis-url", help="where Redis is, without a password", show_default=False)] = None,
    fleet: Annotated[Path, typer.Option("--fleet", help="fleet file")] = Path("/etc/recovery/fleet.json"),
    home: Annotated[Path, typer.Option("--home", help="folder of everything that is kept")] = Path("/var/lib/recovery"),
    into: Annotated[Path | None, typer.Option("--into", help="write one file per unit there", show_default=False)] = None,
) -> int:
    """Print a systemd unit for each part named."""
    if unknown := [part for part in parts or () if part not in units.WHAT]:
        raise ConfigError(f"cannot print a unit for {unknown[0]!r}: there are {', '.join(units.WHAT)}")
    program = Path(sys.executable).parent / "recovery"
    for part in parts or units.WHAT:
        text = units.unit(part, user=user, recovery=program, home=home, redis_url=redis_url, fleet=fleet)
        if into is None:
            sys.stdout.write(f"{text}\n")
            continue
        file = into / f"recovery-{part}.service"
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {file}: {error.strerror}") from None
        sys.stdout.write(f"{file}\n")
    return Exit.OK


def print_rules(
    secrets: Annotated[Path, typer.Option("--secrets", help="file of the passwords; what it lacks is made and added, mode 0600")],
) -> int:
    """Print an access control file for Redis (its `aclfile`), with one user per role."""
    sys.stdout.write(access.rules(access.passwords(secrets), load_settings({**os.environ}).key_prefix))
    return Exit.OK
