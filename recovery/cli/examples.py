"""An example for every command, shown at the end of its `--help`. A test parses each."""

from collections.abc import Iterator, Mapping
from typing import Final

import typer
from typer.models import CommandInfo

EXAMPLES: Final[Mapping[str, tuple[str, ...]]] = {
    # running
    "up": ("recovery up --fleet fleet.json", "RECOVERY_HOME=~/second RECOVERY_API_PORT=9099 recovery up --fleet other.json --leave-models"),
    "down": ("recovery down", "recovery down --keep-models"),
    "host": ("recovery host --fleet /etc/recovery/fleet.json --host gpu-1", "recovery host --drain"),
    "control": ("REDIS_URL=redis://redis-1:6379/0 recovery control",),
    "beat": ("REDIS_URL=redis://redis-1:6379/0 recovery beat",),
    "api": ("RECOVERY_API_PORT=9099 recovery api",),
    "door": ("recovery door --fleet /etc/recovery/fleet.json",),
    "flower": ("RECOVERY_FLOWER_PORT=6555 recovery flower",),
    "health": ("recovery health host", "recovery health door || systemctl restart recovery-door"),
    # models
    "status": ("recovery status", "recovery status llama --json | jq .models[0].state"),
    "start": ("recovery start llama", "recovery start llama --no-wait"),
    "stop": ("recovery stop llama", "recovery stop llama --force --timeout 30"),
    "restart": ("recovery restart llama --wait",),
    "check": ("recovery check llama",),
    "reset": ("recovery reset llama",),
    # reading
    "logs": ("recovery logs llama -f", "recovery logs qwen-1 --lines 500 --run -1"),
    "events": ("recovery events llama", "recovery events llama -n 500 --json"),
    "incidents": ("recovery incidents", "recovery incidents llama -n 5 --json"),
    "incident": ("recovery incident llama-0-1795556519233136",),
    # changes without downtime
    "roll": ("recovery roll qwen", "recovery roll qwen --no-wait"),
    "apply": ("recovery apply fleet.json --dry-run", "recovery apply fleet.json"),
    "plan": ("recovery plan llama", "recovery plan llama --cause cuda_oom_load"),
    "workers restart": ("recovery workers restart", "recovery workers restart host door"),
    # care
    "doctor": ("recovery doctor", "recovery doctor --json"),
    "brake status": ("recovery brake status",),
    "brake release": ("recovery brake release",),
    "drill": ("recovery drill llama --fault kill", "recovery drill qwen --fault hang --replica 1 --json"),
    "chaos": ("recovery chaos --seconds 90 --seed 7", "recovery chaos --only server_killed --keep"),
    # files
    "validate": ("recovery validate fleet.json",),
    "schema": ("recovery schema > fleet-schema.json",),
    "diagnose": ("recovery diagnose vllm.log --exit-code 1", "journalctl -u vllm -n 2000 | recovery diagnose - --json"),
    # deployment
    "systemd print": ("recovery systemd print host --into /etc/systemd/system && systemctl enable --now recovery-host",),
    "acl print": ("recovery acl print --secrets /etc/recovery/redis-passwords > /etc/redis/users.acl",),
}
"""By the command's words."""


def add_examples(app: typer.Typer) -> None:
    """Put each command's examples at the end of its help."""
    for words, command in _commands(app, ""):
        lines = EXAMPLES.get(words, ())
        if lines:
            command.epilog = "\n\n".join(("Examples:", *(line.replace("[", "\\[") for line in lines)))


def _commands(app: typer.Typer, before: str) -> Iterator[tuple[str, CommandInfo]]:
    for command in app.registered_commands:
        yield f"{before}{command.name or (command.callback.__name__ if command.callback is not None else '')}", command
    for group in app.registered_groups:
        if group.typer_instance is not None:
            yield from _commands(group.typer_instance, f"{before}{group.name} ")
