"""systemd units, one per part, as text. The template lies beside this file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from recovery.adapters.redis_url import RedisUrl
from recovery.errors import ConfigError

DOCUMENTATION: Final = "man:systemd.service(5)"

WHAT: Final[Mapping[str, str]] = {
    "host": "worker of this GPU host",
    "control": "control worker",
    "beat": "clock",
    "api": "management API and status page",
    "door": "front door",
    "flower": "Flower",
}

_SEALED: Final = """\
TimeoutStopSec=90
NoNewPrivileges=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectSystem=strict
ReadWritePaths=@writable@
ProtectHome=read-only
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes
LockPersonality=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX"""

_HOST: Final = """\
# The models live in this unit's control group and outlive its main process: stopping or restarting the unit ends the
# worker only, and the next start adopts them. `recovery stop MODEL` ends a model.
KillMode=process
# A model that the kernel's OOM killer takes is repaired; systemd's own answer would be to stop the unit.
OOMPolicy=continue
TasksMax=infinity
LimitMEMLOCK=infinity
TimeoutStopSec=60
NoNewPrivileges=yes"""


def unit(part: str, *, user: str, recovery: Path, home: Path, redis_url: str | None = None, fleet: Path | None = None) -> str:
    """The unit of a part; `ConfigError` for an address of Redis with a password, which everybody could read there."""
    environment = {"RECOVERY_HOME": str(home)}
    if redis_url is not None:
        address = RedisUrl.parse(redis_url)
        if address.password or address.sentinel_password:
            raise ConfigError(
                "cannot put the password of Redis into a unit, which everybody may read: "
                f"write REDIS_URL=... into /etc/recovery/{part}.env with mode 0600, and leave --redis-url out"
            )
        environment["REDIS_URL"] = redis_url
    if fleet is not None:
        environment["RECOVERY_FLEET"] = str(fleet)
    values = {
        "manners": _HOST if part == "host" else _SEALED,
        "part": part,
        "what": WHAT[part],
        "documentation": DOCUMENTATION,
        "user": user,
        "writable": _escaped(f"-{home}"),
        "recovery": _escaped(str(recovery)),
        "environment": "\n".join(f"Environment={_escaped(f'{name}={value}')}" for name, value in environment.items()),
    }
    text = (Path(__file__).parent / "templates" / "recovery.service").read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def _escaped(word: str) -> str:
    """A word as a unit file takes it."""
    if any(letter in word for letter in '\n"\\'):
        raise ConfigError(f"cannot write {word!r} into a unit: choose a name without quotes, backslashes and line ends")
    return f'"{word.replace("%", "%%")}"' if " " in word else word.replace("%", "%%")
