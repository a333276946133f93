"""
Where each replica of the fleet runs: host, port and GPUs, the same on every machine that reads the same file.

The plan is what the file wants; a row that lives already keeps the placement it has.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Final
from urllib.parse import urlsplit

from recovery.core.fleet import PLACEHOLDER, Fleet, InstancePlan, ModelSpec, Placement, PortRange, instance_id

DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_PORT_FLAG: Final = re.compile(r"^--port(?:=(\d+))?$")


def plan(fleet: Fleet) -> tuple[InstancePlan, ...]:
    """Every instance of the fleet, models in the order of the file, ports counted up from the start of their range."""
    return layout(fleet, fleet.models)[0]


def spare_ports(fleet: Fleet, model: str, host: str) -> tuple[int, ...]:
    """Ports of the model's range that the plan gives to nobody on that host; where a port that a stranger holds is swapped."""
    taken = {p.placement.port for p in plan(fleet) if p.placement.host == host}
    first, last = _range_of(fleet, fleet.models[model])
    return tuple(port for port in range(first, last + 1) if port not in taken)


def own_turn(ports: Sequence[int], instance: str, fleet: Fleet, host: str) -> tuple[int, ...]:
    """
    The ports, beginning with another one for each instance of the host.

    Several that are put off their ports at once, and choose before any has committed, do not all choose the same.
    """
    names = sorted(p.id for p in plan(fleet) if p.placement.host == host)
    if not ports or instance not in names:
        return tuple(ports)
    begin = names.index(instance) % len(ports)
    return (*ports[begin:], *ports[:begin])


def layout(fleet: Fleet, models: Mapping[str, ModelSpec]) -> tuple[tuple[InstancePlan, ...], tuple[str, ...]]:
    """The plan of these models, and one line for every port that two of them would share or that is missing."""
    problems: list[str] = []
    taken: dict[tuple[str, int], str] = {}
    for model_id, spec in models.items():
        port = fixed_port(spec)
        for host in dict.fromkeys(_host_of(fleet, spec, replica) for replica in range(spec.replicas)) if port else ():
            if owner := taken.get((host, port or 0)):
                problems.append(f"llmModels.{model_id}: port {port} on host {host} is taken by {owner}; give each its own, or {{port}}")
            else:
                taken[host, port or 0] = model_id
    plans = []
    for model_id, spec in models.items():
        for replica in range(spec.replicas):
            host, port = _host_of(fleet, spec, replica), fixed_port(spec)
            if port is None and uses(spec, "port"):
                first, last = _range_of(fleet, spec)
                port = next((p for p in range(first, last + 1) if (host, p) not in taken), None)
                if port is None:
                    where = f"llmModels.{model_id}.port_range" if spec.port_range else "port_range"
                    problems.append(f"{where}: no port left in {first}-{last} on host {host} for replica {replica} of {model_id}; widen it")
                else:
                    taken[host, port] = model_id
            placement = Placement(
                host=host, port=port, gpus=_gpus_of(fleet, spec, replica), replica=replica, address=fleet.addresses.get(host)
            )
            plans.append(InstancePlan(id=instance_id(model_id, replica), model=model_id, replica=replica, placement=placement))
    return tuple(plans), tuple(dict.fromkeys(problems))


def uses(spec: ModelSpec, word: str) -> bool:
    """Whether the placeholder stands anywhere the server is told something."""
    return any(word in PLACEHOLDER.findall(text) for text in spec.filled_texts)


def port_in_args(args: tuple[str, ...]) -> int | None:
    """The literal number after the last `--port`, as argparse would read it."""
    found = None
    for at, arg in enumerate(args):
        if match := _PORT_FLAG.match(arg):
            value = match[1] or (args[at + 1] if at + 1 < len(args) else "")
            found = int(value) if value.isdecimal() else found
    return found


def port_in_url(base_url: str | None) -> int | None:
    """The port a literal URL leads to; None where a placeholder decides it or the URL is none. ValueError: not a port."""
    if not base_url or "{port}" in base_url:
        return None
    parts = urlsplit(PLACEHOLDER.sub("x", base_url))
    return parts.port or DEFAULT_PORTS.get(parts.scheme)


def fixed_port(spec: ModelSpec) -> int | None:
    """The port the file itself names; None where the range or nothing does."""
    if uses(spec, "port"):
        return None
    if port := port_in_args(spec.args):
        return port
    try:
        return port_in_url(spec.endpoints.base_url)
    except ValueError:  # told as a problem of base_url by the checks
        return None


def _range_of(fleet: Fleet, spec: ModelSpec) -> PortRange:
    return spec.port_range or fleet.port_range


def _host_of(fleet: Fleet, spec: ModelSpec, replica: int) -> str:
    hosts = fleet.hosts_of(spec)
    return hosts[replica % len(hosts)]


def _gpus_of(fleet: Fleet, spec: ModelSpec, replica: int) -> tuple[int, ...]:
    """The replica's share of the pool; replicas beyond the pool share GPUs, as small models do."""
    if not spec.gpus:
        visible = spec.env.get("CUDA_VISIBLE_DEVICES", "")
        return tuple(int(gpu) for gpu in visible.split(",")) if re.fullmatch(r"\d{1,4}(,\d{1,4})*", visible) else ()
    hosts = len(fleet.hosts_of(spec))
    replicas_here = -(-spec.replicas // hosts)
    share = spec.gpus_per_replica or max(1, len(spec.gpus) // replicas_here)
    start = (replica // hosts) * share
    return tuple(dict.fromkeys(spec.gpus[(start + offset) % len(spec.gpus)] for offset in range(share)))
