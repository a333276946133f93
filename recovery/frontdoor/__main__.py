"""`python -m recovery.frontdoor --view FILE`: a front door on its own, told of its fleet by a JSON file or by lines on stdin."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from recovery.errors import ConfigError
from recovery.frontdoor.feeders import FileFeeder, LineFeeder
from recovery.frontdoor.reports import JsonReports
from recovery.frontdoor.server import Server, announce
from recovery.frontdoor.settings import DoorSettings
from recovery.frontdoor.view import Feeder


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="recovery.frontdoor", description=__doc__)
    parser.add_argument("--view", required=True, help="the fleet as JSON (view.Snapshot), read again when it changes; - for lines on stdin")
    parser.add_argument("--reports", type=Path, help="append reports to this file; else to stderr")
    for name, field in DoorSettings.model_fields.items():
        if name != "breaker":
            parser.add_argument(f"--{name.replace('_', '-')}", dest=name, help=field.description)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM; exit code 0 when everything in flight was finished, 2 for a setting that cannot be used."""
    arguments = vars(_arguments(argv))
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    view, reports_file = arguments.pop("view"), arguments.pop("reports")
    given: dict[str, Any] = {name: value for name, value in arguments.items() if value is not None}
    feeder: Feeder = LineFeeder() if view == "-" else FileFeeder(Path(view))
    out = reports_file.open("ab", buffering=0) if reports_file is not None else sys.stderr.buffer
    try:
        settings = DoorSettings.model_validate_strings(given)
        return Server(settings, feeder, JsonReports(out.write)).run(announce)
    except (ConfigError, ValidationError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    finally:
        if reports_file is not None:
            out.close()


if __name__ == "__main__":
    sys.exit(main())
