"""
The access rules of Redis: one user per role, passwords as hashes.

The passwords lie in a file of the operator's, made once and read again, so that the rules can be printed anew.
"""

import hashlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from recovery.errors import ConfigError

ROLES: Final = ("beat", "control", "host", "api", "door", "flower", "admin")

_GROUPS: Final = {
    "@connection@": "+@connection +select -client|kill -client|list -client|pause -client|unpause -client|no-evict",
    "@sender@": "+@transaction +llen +smembers +sadd +lpush +publish",
    "@reader@": "+@read -@dangerous +info +time +@transaction",
    "@worker@": "+@read +@write +@transaction +@scripting +@pubsub +@blocking -@dangerous -@admin +info +time",
}


def passwords(file: Path) -> dict[str, str]:
    """The password of each role: those in the file, and new ones for roles that it lacks, which are added to it (mode 0600)."""
    try:
        known = _read(file)
        missing = {role: secrets.token_hex(24) for role in ROLES if role not in known}
        if missing:
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as out:
                out.writelines(f"{role}={password}\n" for role, password in missing.items())
        return {**known, **missing}
    except OSError as error:
        raise ConfigError(f"cannot keep the passwords in {file}: {error.strerror}; name a file that can be written") from None


def _read(file: Path) -> dict[str, str]:
    if not file.exists():
        return {}
    pairs = [line.split("=", 1) for line in file.read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith("#")]
    if bad := [pair[0] for pair in pairs if len(pair) != 2 or pair[0] not in ROLES or not pair[1].strip()]:
        raise ConfigError(f"cannot read {file}: a line must be ROLE=PASSWORD with a role of {', '.join(ROLES)}, not {bad[0]!r}")
    return {role: password.strip() for role, password in pairs}


def rules(known: Mapping[str, str], prefix: str) -> str:
    """The access control file for these passwords and this key prefix."""
    text = (Path(__file__).parent / "templates" / "redis.acl").read_text(encoding="utf-8")
    for name, group in _GROUPS.items():
        text = text.replace(name, group)
    for role, password in known.items():
        text = text.replace(f"#@{role}@", f"#{hashlib.sha256(password.encode()).hexdigest()}")
    # An access control file knows no comments and no empty lines.
    lines = [line for line in text.replace("@prefix@", prefix).splitlines() if line.startswith("user ")]
    return "\n".join(lines) + "\n"
