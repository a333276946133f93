"""The fleet file's text to a `Fleet`, or every fault of it at once; and its JSON Schema."""

import difflib
import json
import re
from collections.abc import Iterator
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from recovery.core.fleet import HOST_PATTERN, ID_PATTERN, Endpoints, Fleet, FleetKeys, ModelSpec, Policy
from recovery.core.fleet_checks import fleet_problems, policy_problems, problems_of
from recovery.errors import ConfigError

SECRET_KEYS: Final = frozenset({"env", "args", "fallback_args", "api_key", "redact_patterns", "github_token", "base_url"})
"""Values below these keys are never repeated in an error."""

LAYOUT_KEYS: Final = frozenset(ModelSpec.model_fields) - frozenset(Policy.model_fields) | {"reschedule", "addresses"}
"""Keys whose fault leaves open what runs where; checks between them would then only invent further faults."""

PATTERN_TEXTS: Final = {
    ID_PATTERN: "must be 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit and not ending in '.'",
    HOST_PATTERN: "must be a host name: letters, digits, '.', '_' and '-'",
    r"^[^\x00]*$": "must not contain a NUL character",
    r"^[^\x00=]+$": "must be the name of an environment variable",
    r"^https?://[^\s\x00]+$": "must be a URL that starts with http:// or https://",
}


M = TypeVar("M", bound=BaseModel)


class _Object(dict[str, Any]):
    """A JSON object that remembers which of its keys came twice."""

    twice: tuple[str, ...] = ()


def load_fleet_text(text: str, host: str | None = None) -> Fleet:
    """
    The fleet that the text describes.

    `host` is the machine that reads it: the home of all models where the file names no host, reached over loopback.
    Raises ConfigError whose `problems` lists every fault at once, with the key's path and what is allowed; no secret is repeated.
    Keys that start with an underscore are comments.
    """
    data = _parsed(text)
    problems = list(_duplicates(data))
    data = _at_home(_without_comments(data), host)
    models = data.pop("llmModels", {})
    keys, bad_keys, found = _validated(FleetKeys, data, "")
    problems += found
    if not isinstance(models, dict):
        problems.append("llmModels: must be an object of models by id")
        models = {}
    checked: dict[str, ModelSpec] = {}
    for model_id, entry in models.items():
        path = f"llmModels.{model_id}"
        if not re.fullmatch(ID_PATTERN, model_id):
            problems.append(f"{path}: the id {PATTERN_TEXTS[ID_PATTERN]}")
        if not isinstance(entry, dict):
            problems.append(f"{path}: must be an object")
            continue
        spec, bad, found = _validated(ModelSpec, _without_comments(entry), path)
        problems += found
        if spec and bad.isdisjoint(LAYOUT_KEYS):
            checked[model_id] = spec
        elif spec:  # what it runs is not known: its times and limits can still be checked
            problems += (f"{path}.{line}" for line in policy_problems(spec))
    if keys and bad_keys.isdisjoint(LAYOUT_KEYS):
        fleet = Fleet.model_construct(**{name: getattr(keys, name) for name in FleetKeys.model_fields}, llmModels=checked)
        problems += problems_of(fleet, checked, models)
    elif keys:
        problems += fleet_problems(keys)
    if problems or keys is None:
        shown = tuple(dict.fromkeys(problems))
        raise ConfigError("cannot load the fleet file:" + "".join(f"\n  {line}" for line in shown), shown)
    return Fleet(**{name: getattr(keys, name) for name in FleetKeys.model_fields}, llmModels=checked)


def fleet_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the fleet file, made from the models."""
    schema = Fleet.model_json_schema()
    comments = {"^_": {"description": "a comment"}}
    schema["patternProperties"] = comments
    schema["$defs"]["ModelSpec"]["patternProperties"] = comments
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Fleet file", **schema}


def _parsed(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text.removeprefix("\ufeff"), object_pairs_hook=_object, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise ConfigError(f"cannot load the fleet file: not JSON: {line}", (line,)) from None
    except (RecursionError, ValueError) as error:
        line = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"cannot load the fleet file: not JSON: {line}", (line,)) from None
    if not isinstance(data, dict):
        line = "the file must hold one JSON object with the key llmModels"
        raise ConfigError(f"cannot load the fleet file: {line}", (line,))
    return data


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    made = _Object(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        made.twice = tuple(sorted({name for name in names if names.count(name) > 1}))
    return made


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _duplicates(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, _Object):
        yield from (f"{_joined(path, name)}: the key stands here twice; JSON would keep only the last" for name in value.twice)
        for name, child in value.items():
            yield from _duplicates(child, _joined(path, name))
    elif isinstance(value, list):
        for at, child in enumerate(value):
            yield from _duplicates(child, f"{path}[{at}]")


def _without_comments(data: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if not name.startswith("_")}


def _at_home(data: dict[str, Any], host: str | None) -> dict[str, Any]:
    """With the reading machine as the home of all models, where the file names no host at all."""
    models, addresses = data.get("llmModels"), data.get("addresses", {})
    entries = [data, *(models.values() if isinstance(models, dict) else ())]
    if not host or not isinstance(addresses, dict) or any(isinstance(e, dict) and ("host" in e or "hosts" in e) for e in entries):
        return data
    return {**data, "host": host, "addresses": {host: "127.0.0.1", **addresses}}


def _validated(kind: type[M], data: dict[str, Any], path: str) -> tuple[M | None, set[str], list[str]]:
    """
    The model; the keys that were faulty, or probably meant by a misspelt one, and left at their defaults; one line per fault.

    Strict: `"3"` is no number and `true` no count. None where the fault is not tied to one key.
    """
    try:
        return kind.model_validate(_tuples(data), strict=True), set(), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    # an element that is missing is a fault of its list
    lines = [f"{_path(path, d['loc'][:-1] if d['type'] == 'missing' else d['loc'])}: {_message(kind, d)}" for d in details]
    bad = {str(detail["loc"][0]) for detail in details if detail["loc"]}
    try:
        rest = {name: value for name, value in data.items() if name not in bad}
        meant = {name for key in bad - kind.model_fields.keys() for name in _near(kind, key)}
        return (kind.model_validate(_tuples(rest), strict=True) if bad else None), bad | meant, lines
    except ValidationError:
        return None, bad, lines


def _tuples(value: Any) -> Any:
    """JSON arrays as tuples, since strict validation takes no list for one."""
    if isinstance(value, dict):
        return {name: _tuples(child) for name, child in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _message(kind: type[BaseModel], detail: ErrorDetails) -> str:
    context: dict[str, Any] = detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            return _unknown_key(kind, detail["loc"])
        case "literal_error":
            text = f"must be {context['expected']}"
        case "string_pattern_mismatch":
            text = PATTERN_TEXTS.get(context["pattern"], detail["msg"])
        case "value_error":
            return str(context["error"])
        case "missing" | "too_long" if "port_range" in detail["loc"]:
            text = "must be [first, last]"
        case _:
            text = detail["msg"].replace("Input should be", "must be").replace("valid tuple", "list")
            text = text[:1].lower() + text[1:]
    value = detail["input"]
    if SECRET_KEYS.isdisjoint(map(str, detail["loc"])) and isinstance(value, str | int | float | None) and len(str(value)) <= 80:
        return f"{text}, not {json.dumps(value)}"
    return text


def _unknown_key(kind: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    kind = Endpoints if "endpoints" in loc[:-1] else Fleet if kind is FleetKeys else kind
    allowed = [name for name, field in kind.model_fields.items() if not field.exclude]
    near = _near(kind, str(loc[-1]))
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown key; {hint}Allowed: {', '.join(allowed)}"


def _near(kind: type[BaseModel], key: str) -> list[str]:
    return difflib.get_close_matches(key, list(kind.model_fields), n=1, cutoff=0.6)


def _path(path: str, loc: tuple[int | str, ...]) -> str:
    for part in loc:
        path = f"{path}[{part}]" if isinstance(part, int) else _joined(path, part)
    return path or "the file"


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
