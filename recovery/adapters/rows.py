"""
The row as bytes: written by this version, read from this one or an older one, refused from a newer one.

Python alone reads the document (Lua would print a token as 1.7955530604112e+15). What a script must compare
without reading it stands beside it in fields of its own, and overrides the document when it is read.
"""

import json
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from recovery.core.instance import SCHEMA, Instance
from recovery.errors import SchemaError

Migration = Callable[[dict[str, Any]], dict[str, Any]]

MIGRATIONS: dict[int, Migration] = {}
"""From the key's version to the next one. Each returns the document as the next version would have written it."""


def encode(instance: Instance) -> bytes:
    """Return the document to keep."""
    return instance.model_dump_json().encode()


def decode(doc: bytes, version: int, lease_until: float, due: float | None) -> Instance:
    """
    Return the row, with the fields that the scripts change.

    An older schema is migrated in memory (the next commit writes it back); `SchemaError` on a newer one, and on a
    document that this version cannot read.
    """
    try:
        instance = Instance.model_validate_json(doc)
    except ValidationError as error:
        instance = _migrated(doc, error)
    else:
        if instance.schema_version != SCHEMA:
            instance = _migrated(doc, None)
    return instance.model_copy(update={"version": version, "lease_until": lease_until, "due": due})


def _migrated(doc: bytes, error: ValidationError | None) -> Instance:
    try:
        fields = json.loads(doc)
        found = fields.get("schema_version", SCHEMA)
    except (ValueError, AttributeError):
        raise SchemaError(f"cannot read a row that is not a JSON object: {doc[:80]!r}; remove its key and its host makes it anew") from None
    name = fields.get("id")
    if not isinstance(found, int) or found > SCHEMA:
        raise SchemaError(f"cannot read the row of {name!r}: it has schema {found!r}, this part knows {SCHEMA}; upgrade this part")
    if found == SCHEMA:
        raise SchemaError(f"cannot read the row of {name!r}: it was written by another version of this project ({_first(error)})")
    for step in range(found, SCHEMA):
        if step not in MIGRATIONS:
            raise SchemaError(f"cannot read the row of {name!r}: no migration leads from schema {step} to {step + 1}")
        fields = MIGRATIONS[step](fields)
    try:
        return Instance.model_validate({**fields, "schema_version": SCHEMA})
    except ValidationError as invalid:
        raise SchemaError(f"cannot read the row of {name!r}, migrated from schema {found}: {_first(invalid)}") from None


def _first(error: ValidationError | None) -> str:
    if error is None:
        return "unknown"
    fault = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}"
