"""
The command line, environment and address of one instance. Nothing else in this project makes them.

Order: placeholders are filled, then the overrides of a repair are applied one after another, then a port override, which moves
everything that knows the port. `python` as the command is the Python that runs this project, so that examples need no path.
"""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Self
from urllib.parse import urlsplit, urlunsplit

from pydantic import AwareDatetime, Field, SecretStr, model_validator

from recovery.core.fleet import PLACEHOLDER, Frozen, ModelSpec, Placement
from recovery.core.fleet_plan import fixed_port, uses

ARGS: Final = "args"
PORT: Final = "--port"
MARKER: Final = "RECOVERY_RUN"
OWN_PREFIXES: Final = ("FMCP_", "FLOWER_", "CELERY_", "RECOVERY_")
OWN_NAMES: Final = frozenset({"REDIS_URL"})
"""Ours, and partly secret: a model has no business with the broker or with the tokens of the management API."""

_FLAG: Final = re.compile(r"^--?[A-Za-z]")
_LAUNCHERS: Final = ("serve",)


class Override(Frozen):
    """
    One step of a repair: a flag set to a value, or switched on (`value` None).

    Flag `args` replaces the whole argument list (a rung of `fallback_args`), what earlier steps did to it included.
    """

    flag: str = Field(pattern=r"^(args|--[A-Za-z][A-Za-z0-9_.-]*)$")
    value: str | tuple[str, ...] | None = None
    cause: str
    since: AwareDatetime

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.flag == ARGS) != isinstance(self.value, tuple):
            raise ValueError("a list of values belongs to flag 'args', and to it alone")
        if self.flag == PORT and not (isinstance(self.value, str) and self.value.isdecimal() and 0 < int(self.value) < 65536):
            raise ValueError("--port needs a port from 1 to 65535")
        return self


class Launch(Frozen):
    """What is executed and where it answers. Holds secrets: it stays on its host, and its repr tells none."""

    argv: tuple[str, ...] = Field(repr=False)
    env: dict[str, str] = Field(repr=False)
    base_url: str | None = Field(description="without a slash at the end; None: only the process can be checked")
    root_url: str | None = Field(description="base_url without /v1: /health, /metrics and /load are asked here, /v1/models below /v1")
    port: int | None
    served_names: tuple[str, ...] = Field(description="names requests may use, the first is the one in metrics; empty: unknown")
    api_key: SecretStr | None = Field(description="for /v1/*; /health and /metrics are open (VLLM-FACTS.md, section f)")


def launch(
    spec: ModelSpec,
    placement: Placement,
    overrides: Sequence[Override] = (),
    operator_env: Mapping[str, str] | None = None,
    python: str = sys.executable,
) -> Launch:
    """How to start this model at this place, with these steps of repair in force; `operator_env` is the worker's environment."""
    moved = next((int(str(step.value)) for step in reversed(overrides) if step.flag == PORT), None)
    port = moved or placement.port
    words = _words(placement, port)
    args = _fill_all(spec.args, words)
    for step in overrides:
        if isinstance(step.value, tuple):
            args = _fill_all(step.value, words)
        elif step.flag != PORT:
            args = with_flag(args, step.flag, step.value)
    if moved and (has_flag(args, PORT) or not uses(spec, "port")):
        args = with_flag(args, PORT, str(moved))
    env = child_environment(operator_env or {}, {name: _fill(text, words) for name, text in spec.env.items()}, placement)
    if spec.api_key_env and env.get(spec.api_key_env):
        env.setdefault("VLLM_API_KEY", env[spec.api_key_env])
    base_url = _address(spec, words, moved)
    key = next(iter(values_of(args, "--api-key")), None) or env.get("VLLM_API_KEY")
    return Launch(
        argv=(python if spec.command == "python" else spec.command or "", *args),
        env=env,
        base_url=base_url,
        root_url=base_url.removesuffix("/v1").rstrip("/") if base_url else None,
        port=port,
        served_names=served_names(args),
        api_key=SecretStr(key) if key else None,
    )


def child_environment(operator_env: Mapping[str, str], spec_env: Mapping[str, str], placement: Placement) -> dict[str, str]:
    """
    The operator's environment (HF_TOKEN, VLLM_*, NCCL_*, ...) minus what is ours, under the model's own, with its GPUs.

    No allowlist: dropping what the operator set breaks gated models and caches (FAILURE-MODES.md, B15). The run's marker passes.
    """
    env = {name: value for name, value in operator_env.items() if name == MARKER or not _is_ours(name)}
    env.update(spec_env)
    if placement.gpus:
        env["CUDA_VISIBLE_DEVICES"] = _gpus(placement)
    return env


def with_flag(args: Sequence[str], flag: str, value: str | None) -> tuple[str, ...]:
    """
    The arguments with the flag set to the value, or switched on where the value is None.

    `--flag X`, `--flag=X` and underscores for dashes are the same flag to vLLM's parser; all of them are replaced where the first
    stood, `--no-flag` too. A flag that is not there is added at the end, where argparse lets it win.
    """
    kept: list[str] = []
    at = first = None
    names = (_name(flag), _name("--no-" + flag.removeprefix("--")))
    position = 0
    while position < len(args):
        arg = args[position]
        position += 1
        if _name(arg) not in names:
            kept.append(arg)
            continue
        first = len(kept) if first is None else first
        takes_value = value is not None and _name(arg) == names[0] and "=" not in arg
        if takes_value and position < len(args) and not _FLAG.match(args[position]):
            position += 1
    at = len(kept) if first is None else first
    return (*kept[:at], *([flag] if value is None else [flag, value]), *kept[at:])


def has_flag(args: Iterable[str], flag: str) -> bool:
    """Whether the flag stands there in any of its spellings."""
    return any(_name(arg) == _name(flag) for arg in args)


def values_of(args: Sequence[str], flag: str) -> tuple[str, ...]:
    """Everything the last such flag is given: what follows `=`, or all arguments up to the next flag."""
    found: tuple[str, ...] = ()
    for at, arg in enumerate(args):
        if _name(arg) == _name(flag):
            rest = args[at + 1 :]
            end = next((i for i, following in enumerate(rest) if _FLAG.match(following)), len(rest))
            found = (arg.split("=", 1)[1],) if "=" in arg else tuple(rest[:end])
    return found


def served_names(args: Sequence[str]) -> tuple[str, ...]:
    """The names the server answers to: `--served-model-name`, else `--model`, else what stands after `serve`."""
    if names := values_of(args, "--served-model-name") or values_of(args, "--model")[:1]:
        return names
    after = next((args[at + 1] for at, arg in enumerate(args[:-1]) if arg in _LAUNCHERS), "")
    return (after,) if after and not _FLAG.match(after) else ()


def _name(arg: str) -> str:
    return arg.split("=", 1)[0].replace("_", "-") if arg.startswith("--") else ""


def _is_ours(name: str) -> bool:
    return name in OWN_NAMES or name.startswith(OWN_PREFIXES)


def _gpus(placement: Placement) -> str:
    return ",".join(map(str, placement.gpus))


def _words(placement: Placement, port: int | None) -> dict[str, str]:
    return {
        "host": placement.address or placement.host,
        "port": "" if port is None else str(port),
        "gpus": _gpus(placement),
        "replica": str(placement.replica),
    }


def _fill(text: str, words: Mapping[str, str]) -> str:
    """One pass over the text, so that nothing that was filled in is filled again."""
    return PLACEHOLDER.sub(lambda match: words[match[1]], text)


def _fill_all(texts: Iterable[str], words: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(_fill(text, words) for text in texts)


def _address(spec: ModelSpec, words: Mapping[str, str], moved: int | None) -> str | None:
    """The filled base_url without slashes at the end, with the port it was moved to."""
    template = spec.endpoints.base_url
    if template is None:
        return None
    url = _fill(template, words).rstrip("/")
    if moved and "{port}" not in template and fixed_port(spec):
        parts = urlsplit(url)
        name = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        user = parts.netloc.rpartition("@")[0]
        url = urlunsplit(parts._replace(netloc=f"{user}@{name}:{moved}" if user else f"{name}:{moved}"))
    return url
