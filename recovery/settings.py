"""
What this installation is told by its environment, and the reading of the fleet file.

A word that is not known in a safety setting stops the start; it never means "off". Secrets are `SecretStr`, so that no log,
error or repr repeats them.
"""

import hashlib
import ipaddress
import os
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo

from recovery.core.fleet import HOST_PATTERN, Fleet, FleetKeys, Frozen, ModelSpec
from recovery.core.fleet_file import PATTERN_TEXTS, load_fleet_text
from recovery.core.fleet_plan import plan
from recovery.errors import ConfigError

TRUE_WORDS: Final = frozenset({"true", "1", "yes", "on"})
FALSE_WORDS: Final = frozenset({"false", "0", "no", "off"})
RUN_DIR_LIMIT: Final = 80
"""A socket's path must stay under 107 bytes (CELERY-FACTS.md), and its name needs some of them."""
LOG_LEVELS: Final = r"(?i)^(debug|info|warning|error)$"
MARKER: Final = "RECOVERY_RUN"
OURS: Final = frozenset({MARKER, "RECOVERY_PART", "RECOVERY_DEBUG", "RECOVERY_INSTANCE", "RECOVERY_CHAOS_DISK"})
"""What the code reads or sets that is no setting: marks of processes, --debug, the simulator's name, the disk of `recovery chaos`."""

_TOKEN: Final = re.compile(r"^[\x21-\x7e]+$")


def _env(name: str, default: Any, description: str, unit: str = "", **bounds: Any) -> Any:
    return Field(default, alias=name, description=description, json_schema_extra={"unit": unit}, **bounds)


def _port(name: str, default: int, description: str) -> Any:
    return _env(name, default, description, "port", ge=1, le=65535)


class Settings(Frozen):
    """The environment of this installation; the field's alias is the variable's name. Made by `load_settings`."""

    model_config = ConfigDict(populate_by_name=True)

    redis_url: SecretStr | None = _env("REDIS_URL", None, "broker and state; not set: an embedded Redis under RECOVERY_HOME")
    key_prefix: str = _env("RECOVERY_KEY_PREFIX", "recovery", "start of every key in Redis", pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    home: Path = _env("RECOVERY_HOME", Path(), "folder of everything that is kept (default: the user's state directory)")
    run_dir: Path = _env("RECOVERY_RUN_DIR", Path(), "short folder for sockets (default: below XDG_RUNTIME_DIR, else below /tmp)")
    host: str = _env("RECOVERY_HOST", "", "name of this GPU host (default: the machine's)", pattern=HOST_PATTERN)
    fleet: Path | None = _env("RECOVERY_FLEET", None, "path of the fleet file")

    api_host: str = _env("RECOVERY_API_HOST", "127.0.0.1", "address of the management API and the status page", min_length=1)
    api_port: int = _port("RECOVERY_API_PORT", 8099, "port of the management API and the status page")
    front_host: str = _env("RECOVERY_FRONT_HOST", "127.0.0.1", "address of the front door", min_length=1)
    front_port: int = _port("RECOVERY_FRONT_PORT", 8000, "port of the front door")
    front_metrics_port: int = _port("RECOVERY_FRONT_METRICS_PORT", 8098, "its metrics, on loopback (default: RECOVERY_API_PORT - 1)")
    flower_port: int = _port("RECOVERY_FLOWER_PORT", 5555, "port of Flower, on loopback")

    secure_mode: bool | None = _env("FMCP_SECURE_MODE", None, "true: the management API wants a token (default: if there is one)")
    bearer_token: SecretStr | None = _env("FMCP_BEARER_TOKEN", None, "token with the role admin")
    admin_tokens: tuple[SecretStr, ...] = _env("RECOVERY_ADMIN_TOKENS", (), "further tokens with the role admin, by commas")
    operate_tokens: tuple[SecretStr, ...] = _env("RECOVERY_OPERATE_TOKENS", (), "tokens that may also start, stop and restart")
    read_tokens: tuple[SecretStr, ...] = _env("RECOVERY_READ_TOKENS", (), "tokens that may only look")
    flower_password: SecretStr | None = _env("RECOVERY_FLOWER_PASSWORD", None, "Flower's password (default: made, kept with mode 0600)")
    webhook_url: SecretStr | None = _env("RECOVERY_WEBHOOK_URL", None, "told when an incident opens and closes")
    log_level: str = _env("RECOVERY_LOG_LEVEL", "INFO", "how much the parts log: debug, info, warning or error", pattern=LOG_LEVELS)

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        if problems := tuple(_contradictions(self)):
            raise ValueError("\n".join(problems))
        return self

    @property
    def secure(self) -> bool:
        """Whether the management API wants a token."""
        return self.has_token if self.secure_mode is None else self.secure_mode

    @property
    def has_token(self) -> bool:
        """Whether there is any token at all."""
        return bool(self.bearer_token or self.admin_tokens or self.operate_tokens or self.read_tokens)


class SettingRow(NamedTuple):
    """One line of the README's tables."""

    section: str
    name: str
    default: str
    unit: str
    meaning: str


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """The settings of this environment; ConfigError lists every faulty variable, by its name and without its value if secret."""
    env = os.environ if environ is None else environ
    problems: list[str] = []
    values: dict[str, object] = {}
    for name, field in _fields().items():
        text = env.get(name)
        if text is None or (text == "" and field.annotation != bool | None):
            continue  # compose files pass "" for what is not set; a safety switch must be told
        try:
            values[name] = _read(field, text)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    home = Path(str(values.get("RECOVERY_HOME") or _state_home(env))).expanduser().absolute()
    values["RECOVERY_HOME"] = home
    values["RECOVERY_RUN_DIR"] = Path(str(values.get("RECOVERY_RUN_DIR") or _short_dir(env, home)))
    values.setdefault("RECOVERY_HOST", socket.gethostname())
    values.setdefault("RECOVERY_FRONT_METRICS_PORT", _metrics_port(values))
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_input=False):
            name = str(detail["loc"][0]) if detail["loc"] else ""
            if not name:
                problems += str(detail["ctx"]["error"]).split("\n")
            else:
                pattern = str(detail.get("ctx", {}).get("pattern", ""))
                text = PATTERN_TEXTS.get(pattern, detail["msg"].replace("Input should be", "must be"))
                problems.append(f"{name}: {text[:1].lower()}{text[1:]}")
        settings = None
    if problems or settings is None:
        lines = "".join(f"\n  {line}" for line in problems)
        raise ConfigError(f"cannot start with these settings of the environment:{lines}", tuple(problems))
    return settings


def load_fleet(path: Path | str, host: str | None = None) -> Fleet:
    """
    The fleet of that file; ConfigError says what to do about a file that cannot be read or has faults.

    `host` is where models run that name none: this host by default (RECOVERY_HOST, else the machine's name).
    """
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"cannot load the fleet file {file}: there is none; name another with --fleet or RECOVERY_FLEET") from None
    except IsADirectoryError:
        raise ConfigError(f"cannot load the fleet file {file}: it is a folder; name the JSON file in it") from None
    except PermissionError:
        raise ConfigError(f"cannot load the fleet file {file}: not allowed to read it; check its owner and mode") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot load the fleet file {file}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"cannot load the fleet file {file}: {error.strerror}") from None
    try:
        return load_fleet_text(text, host or os.environ.get("RECOVERY_HOST") or socket.gethostname())
    except ConfigError as error:
        raise ConfigError(str(error).replace("the fleet file", f"the fleet file {file}", 1), error.problems) from None


def port_clashes(fleet: Fleet, settings: Settings) -> tuple[str, ...]:
    """One line for each server of this host whose port a part of `recovery up` wants too."""
    ours = {port: name for name, port in _own_ports(settings)}
    return tuple(
        f"{wanted.id} and {ours[wanted.placement.port]} both want port {wanted.placement.port} on this machine; change one"
        for wanted in plan(fleet)
        if wanted.placement.host == settings.host and wanted.placement.port in ours
    )


def unknown_names(environ: Mapping[str, str]) -> tuple[str, ...]:
    """RECOVERY_* variables that no setting is called by: most likely misspelt."""
    return tuple(sorted(name for name in environ if name.startswith("RECOVERY_") and name not in _fields() and name not in OURS))


def settings_table() -> tuple[SettingRow, ...]:
    """Every setting with default, unit and meaning: environment, fleet, model."""
    sections: tuple[tuple[str, type[BaseModel]], ...] = (("environment", Settings), ("fleet", FleetKeys), ("model", ModelSpec))
    return tuple(row for section, model in sections for row in _rows(section, model, ""))


def _rows(section: str, model: type[BaseModel], path: str) -> Iterator[SettingRow]:
    for name, field in model.model_fields.items():
        if isinstance(field.default, BaseModel):
            yield from _rows(section, type(field.default), f"{path}{name}.")
        elif not field.exclude:
            yield SettingRow(section, path + (field.alias or name), _shown(field), _unit(field), field.description or "")


def _fields() -> dict[str, FieldInfo]:
    return {field.alias or name: field for name, field in Settings.model_fields.items()}


def _read(field: FieldInfo, text: str) -> object:
    """The variable's text as the field's type; ValueError without the text, which may be secret."""
    if field.annotation == bool | None:
        word = text.strip().lower()
        if word not in TRUE_WORDS | FALSE_WORDS:
            raise ValueError("must be true or false; a word that is not known never means off")
        return word in TRUE_WORDS
    if field.annotation is int:
        if not re.fullmatch(r"\d{1,9}", text.strip()):
            raise ValueError("must be a whole number")
        return int(text)
    if field.annotation == tuple[SecretStr, ...]:
        return tuple(word.strip() for word in text.split(",") if word.strip())
    return text.strip()


def _contradictions(settings: Settings) -> Iterator[str]:
    tokens = [settings.bearer_token, *settings.admin_tokens, *settings.operate_tokens, *settings.read_tokens]
    if any(token is not None and not _TOKEN.fullmatch(token.get_secret_value()) for token in tokens):
        yield "FMCP_BEARER_TOKEN, RECOVERY_*_TOKENS: a token must be printable ASCII without spaces, or no header can carry it"
    if settings.secure_mode and not settings.has_token:
        yield "FMCP_SECURE_MODE: is true but there is no token; set FMCP_BEARER_TOKEN"
    if not is_loopback(settings.api_host) and not settings.secure:
        yield f"RECOVERY_API_HOST: {settings.api_host} can be reached from outside; set FMCP_SECURE_MODE=true and FMCP_BEARER_TOKEN"
    seen: dict[int, str] = {}
    for name, port in _own_ports(settings):
        if port in seen:
            yield f"{name}: {port} is the port of {seen[port]} too; give each its own"
        seen[port] = name
    if len(str(settings.run_dir)) > RUN_DIR_LIMIT:
        yield f"RECOVERY_RUN_DIR: {settings.run_dir} is longer than {RUN_DIR_LIMIT} characters, too long for a socket; set a shorter one"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address; a name other than localhost counts as reachable."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _own_ports(settings: Settings) -> tuple[tuple[str, int], ...]:
    return (
        ("RECOVERY_API_PORT", settings.api_port),
        ("RECOVERY_FRONT_PORT", settings.front_port),
        ("RECOVERY_FRONT_METRICS_PORT", settings.front_metrics_port),
        ("RECOVERY_FLOWER_PORT", settings.flower_port),
    )


def _metrics_port(values: Mapping[str, object]) -> int:
    """The first free port below the API's, so that the three ports of the documentation are enough to run two side by side."""
    names = {"RECOVERY_API_PORT": 8099, "RECOVERY_FRONT_PORT": 8000, "RECOVERY_FLOWER_PORT": 5555}
    api, *others = (int(str(values.get(name, default))) for name, default in names.items())
    return next((port for port in range(api - 1, 0, -1) if port not in others), 8098)


def _state_home(env: Mapping[str, str]) -> Path:
    base = env.get("XDG_STATE_HOME") or str(Path(env.get("HOME") or Path.home()) / ".local" / "state")
    return Path(base) / "recovery"


def _short_dir(env: Mapping[str, str], home: Path) -> Path:
    """A folder of its own for each RECOVERY_HOME, so that two installations run side by side."""
    name = f"recovery-{os.getuid()}-{hashlib.sha256(str(home).encode()).hexdigest()[:10]}"
    return Path(env.get("XDG_RUNTIME_DIR") or "/tmp") / name


def _unit(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    return str(extra.get("unit", "")) if isinstance(extra, dict) else ""


def _shown(field: FieldInfo) -> str:
    match field.default:
        case None | () | Path():
            return ""
        case bool():
            return "true" if field.default else "false"
        case tuple():
            return f"[{', '.join(map(str, field.default))}]"
        case float():
            return f"{field.default:g}"
        case _:
            return str(field.default)
