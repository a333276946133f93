"""
The command line. Each module of this package is a group of commands and has a `register(app)`; a new one is found by itself.
"""

import importlib
import os
import pkgutil
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer

from recovery.cli.examples import add_examples
from recovery.cli.exits import EXIT_HELP, Exit, exit_of
from recovery.errors import RecoveryError, StoreUnavailableError

__all__ = ["Exit", "app", "main", "run"]

_UsageError: type[Any] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
"""Typer's own copy of click or click itself, whichever this version of Typer uses."""

app = typer.Typer(
    name="recovery",
    help=f"Keeps vLLM servers alive: starts them, sees them fail, repairs them.\n\n{EXIT_HELP}",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="show where an error came from", envvar="RECOVERY_DEBUG"),
) -> None:
    """Options of every command."""


def _register() -> None:
    for module in pkgutil.iter_modules(__path__):
        if module.name == "__main__":
            continue
        register = getattr(importlib.import_module(f"{__name__}.{module.name}"), "register", None)
        if register is not None:
            register(app)
    add_examples(app)


_register()


def run(arguments: Sequence[str]) -> int:
    """Run a command line; the exit code. No error leaves as a traceback unless --debug asks for it."""
    try:
        return int(typer.main.get_command(app).main(args=list(arguments), prog_name="recovery", standalone_mode=False) or 0)
    except typer.Exit as asked:
        return int(asked.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.stderr.write("interrupted\n")
        return Exit.INTERRUPTED
    except RecoveryError as error:
        if "--debug" in arguments or os.environ.get("RECOVERY_DEBUG"):
            traceback.print_exc()
        sys.stderr.write(f"error: {error}\n{_hint(error)}")
        return exit_of(error)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  # so that the interpreter's last flush fails no more
        return Exit.REFUSED
    except _UsageError as error:
        error.show()
        return Exit.USAGE


def _hint(error: RecoveryError) -> str:
    if isinstance(error, StoreUnavailableError) and not os.environ.get("REDIS_URL"):
        return "(REDIS_URL is not set, so this looks for the embedded Redis of `recovery up` on the same RECOVERY_HOME)\n"
    return ""


def main() -> None:
    """Entry point of the `recovery` command."""
    sys.exit(run(sys.argv[1:]))
