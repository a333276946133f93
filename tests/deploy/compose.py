"""The compose file as Compose reads it: anchors merged, variables put in, profiles chosen."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker-compose.yml"

_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<name>\w+)(?:(?P<how>:?[-?])(?P<text>[^}]*))?\}|(?P<bare>\w+))")


class MissingVariableError(Exception):
    """A variable that the file demands is not set; the text is what Compose would print."""


def load(environ: Mapping[str, str]) -> dict[str, Any]:
    """The file with the variables of this environment in it."""
    found: dict[str, Any] = put_in(yaml.safe_load(FILE.read_text()), environ)
    return found


def put_in(value: Any, environ: Mapping[str, str]) -> Any:
    """`value` with every variable replaced as Compose does."""
    match value:
        case str():
            return _VARIABLE.sub(lambda found: _value(found, environ), value)
        case dict():
            return {name: put_in(each, environ) for name, each in value.items()}
        case list():
            return [put_in(each, environ) for each in value]
        case _:
            return value


def _value(found: re.Match[str], environ: Mapping[str, str]) -> str:
    if found["dollar"]:
        return "$"
    name, how, text = found["name"] or found["bare"], found["how"] or "", found["text"] or ""
    value = environ.get(name)
    if value is not None and (value or not how.startswith(":")):
        return value
    if how.endswith("?"):
        raise MissingVariableError(f"required variable {name} is missing a value: {text}")
    return put_in(text, environ) if how.endswith("-") else ""


def services(file: Mapping[str, Any], *profiles: str) -> dict[str, dict[str, Any]]:
    """The services that `docker compose up` starts with these profiles."""
    return {name: each for name, each in file["services"].items() if not each.get("profiles") or set(each["profiles"]) & set(profiles)}
