"""What needs no fleet that runs: `validate`, `schema`, `diagnose`."""

import json as jsons
import signal as signals
import sys
from pathlib import Path
from typing import Annotated

import typer

from recovery.cli.asking import err, out
from recovery.cli.exits import Exit
from recovery.core.diagnosis import diagnose_file_lines
from recovery.core.fleet_file import fleet_schema
from recovery.core.fleet_plan import plan
from recovery.errors import ConfigError
from recovery.settings import load_fleet, load_settings, port_clashes

FILES = "Files"


def register(app: typer.Typer) -> None:
    """Add the commands of this group."""
    for command in (validate, schema, diagnose):
        app.command(rich_help_panel=FILES)(command)


def validate(file: Annotated[Path, typer.Argument(help="fleet file")]) -> int:
    """Check a fleet file: every error at once, with its place and what is allowed; else what it would run where."""
    settings = load_settings()
    fleet = load_fleet(file, settings.host)
    clashes = port_clashes(fleet, settings)
    if clashes:
        raise ConfigError(f"cannot use {file} here:" + "".join(f"\n  {line}" for line in clashes), clashes)
    for planned in plan(fleet):
        port = f":{planned.placement.port}" if planned.placement.port is not None else ""
        gpus = f"  GPUs {','.join(map(str, planned.placement.gpus))}" if planned.placement.gpus else ""
        out.print(f"{planned.id:<20} {planned.placement.host}{port}{gpus}  {fleet.models[planned.model].policy.restart_policy}")
    for model_id in fleet.unsupervised:
        out.print(f"{model_id:<20} not supervised: it has no command of its own")
    out.print(f"{file} is valid: {len(fleet.models)} models, {len(plan(fleet))} instances")
    return Exit.OK


def schema() -> int:
    """Print the JSON Schema of the fleet file, for editors and CI."""
    sys.stdout.write(jsons.dumps(fleet_schema(), indent=2) + "\n")
    return Exit.OK


def diagnose(
    logfile: Annotated[str, typer.Argument(help="log of a vLLM server; - for standard input")],
    exit_code: Annotated[int | None, typer.Option("--exit-code", help="its exit code, if known", show_default=False)] = None,
    signal: Annotated[int | None, typer.Option("--signal", help="the signal that ended it, if known", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="as JSON, for scripts")] = False,
) -> int:
    """Say why a vLLM server failed, from its log: the cause, the line that tells, and what to do."""
    try:
        with sys.stdin if logfile == "-" else Path(logfile).open(encoding="utf-8", errors="replace") as lines:
            found = diagnose_file_lines(lines, exit_code=exit_code, signal=signal)
    except OSError as error:
        raise ConfigError(f"cannot read {logfile}: {error.strerror}") from None
    if json:
        out.print_json(found.model_dump_json())
        return Exit.OK
    if found.cause is None:
        out.print("nothing in it tells of a failure")
        return Exit.OK
    out.print(f"cause:       {found.cause.value} ({found.confidence})", markup=False)
    out.print(f"evidence:    {found.evidence}", markup=False)
    out.print(f"advice:      {found.advice}", markup=False)
    again = "can help" if found.retry else "cannot help: the same command line fails again"
    out.print(f"start again: {again}", markup=False)
    for name, value in found.suggested.items():
        out.print(f"would fit:   {name} = {value:g}", markup=False)
    if signal is not None and signal not in set(signals.Signals):
        err.print(f"note: {signal} is no signal of this machine")
    return Exit.OK
