"""What must hold between the fields of a fleet file. Each fault is one line: path, what is wrong, what would be right."""

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Final

from recovery.core.fleet import VISIBILITY_TIMEOUT_S, Fleet, FleetKeys, ModelSpec
from recovery.core.fleet_plan import fixed_port, layout, port_in_args, port_in_url, uses

PLACEHOLDERS: Final = ("host", "port", "gpus", "replica")
RESERVED_ENV: Final = ("RECOVERY_RUN",)
"""The marker by which strays are found: a model that sets it itself would be killed as another's."""

_WORD_IN_BRACES: Final = re.compile(r"(?<!\{)\{([A-Za-z_]{1,20})\}(?!\})")


def problems_of(fleet: Fleet, models: Mapping[str, ModelSpec], known: Collection[str] = ()) -> tuple[str, ...]:
    """Every fault of these models within this fleet; `known` names further ones that could not be read for faults of their own."""
    found = list(fleet_problems(fleet))
    for model_id, spec in models.items():
        found += (f"llmModels.{model_id}.{line}" for line in policy_problems(spec))
        found += (f"llmModels.{model_id}.{line}" for line in layout_problems(fleet, spec))
    found += _host_problems(fleet, models)
    found += _fallback_problems(models, {*models, *known})
    if not found:  # a plan of faulty models would only repeat their faults
        found += layout(fleet, {model_id: spec for model_id, spec in models.items() if spec.supervised})[1]
    return tuple(found)


def fleet_problems(fleet: FleetKeys) -> Iterator[str]:
    """Faults outside the models."""
    yield from _range_problems(fleet.port_range)
    yield from _host_list_problems(fleet.host, fleet.hosts)
    for at, pattern in enumerate(fleet.redact_patterns):
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"redact_patterns[{at}]: not a regular expression: {error}"


def policy_problems(spec: ModelSpec) -> Iterator[str]:
    """Faults among a model's times and limits."""
    if spec.max_restart_delay >= VISIBILITY_TIMEOUT_S:
        yield (
            f"max_restart_delay: max_restart_delay ({spec.max_restart_delay:g} s) must be below visibility_timeout "
            f"({VISIBILITY_TIMEOUT_S} s), or Celery would deliver the restart twice"
        )
    if spec.restart_delay > spec.max_restart_delay:
        yield f"max_restart_delay: {spec.max_restart_delay:g} s must not be below restart_delay ({spec.restart_delay:g} s)"
    for name in RESERVED_ENV:
        if name in spec.env:
            yield f"env.{name}: is set by the keeper, by which it knows the processes of a run; choose another name"


def layout_problems(fleet: Fleet, spec: ModelSpec) -> Iterator[str]:
    """Faults in what is run, where, and under which address."""
    if spec.command is None:
        if spec.type == "vllm" and not spec.endpoints.base_url:
            yield "command: is missing; without it there must be an endpoints.base_url of a server that somebody else runs"
        return
    yield from _host_list_problems(spec.host, spec.hosts)
    if spec.port_range:
        yield from _range_problems(spec.port_range)
    yield from _placeholder_problems(spec)
    yield from _gpu_problems(spec)
    yield from _address_problems(fleet, spec)
    if spec.reschedule and len(fleet.hosts_of(spec)) < 2:
        yield "reschedule: needs at least two hosts to move between"


def _range_problems(ports: tuple[int, int]) -> Iterator[str]:
    if ports[0] > ports[1]:
        yield f"port_range: first port {ports[0]} is above last port {ports[1]}; write [first, last]"


def _host_list_problems(host: str | None, hosts: tuple[str, ...] | None) -> Iterator[str]:
    if hosts is not None and not hosts:
        yield "hosts: is empty; name at least one GPU host, or leave the key out"
    if hosts and len(set(hosts)) < len(hosts):
        yield "hosts: names a host twice; replicas are spread evenly, each host once is enough"
    if host and hosts:
        yield "hosts: host and hosts are both given; keep one"


def _placeholder_problems(spec: ModelSpec) -> Iterator[str]:
    texts = [*((f"args[{at}]", text) for at, text in enumerate(spec.args)), *((f"env.{name}", text) for name, text in spec.env.items())]
    for path, text in texts:
        for word in _WORD_IN_BRACES.findall(text):
            if word not in PLACEHOLDERS and (near := difflib.get_close_matches(word.lower(), PLACEHOLDERS, n=1, cutoff=0.75)):
                yield f"{path}: unknown placeholder {{{word}}}; did you mean {{{near[0]}}}? Allowed: {_braced()}"
    for word in _unknown_words(spec.endpoints.base_url):
        yield f"endpoints.base_url: unknown placeholder {{{word}}}; allowed: {_braced()}"


def _unknown_words(url: str | None) -> list[str]:
    return [word for word in re.findall(r"\{([^{}]*)\}", url or "") if word not in PLACEHOLDERS]


def _braced() -> str:
    return ", ".join(f"{{{word}}}" for word in PLACEHOLDERS)


def _gpu_problems(spec: ModelSpec) -> Iterator[str]:
    if len(set(spec.gpus)) < len(spec.gpus):
        yield "gpus: names a GPU twice"
    if spec.gpus_per_replica and spec.gpus_per_replica > len(spec.gpus):
        yield f"gpus_per_replica: {spec.gpus_per_replica} asked for, but gpus has {len(spec.gpus)}"
    if spec.gpus and "CUDA_VISIBLE_DEVICES" in spec.env and "{gpus}" not in spec.env["CUDA_VISIBLE_DEVICES"]:
        yield "env.CUDA_VISIBLE_DEVICES: contradicts gpus, from which it is set; keep one of the two"
    if uses(spec, "gpus") and not spec.gpus:
        yield "gpus: {gpus} is used but no gpus are given"


def _address_problems(fleet: Fleet, spec: ModelSpec) -> Iterator[str]:
    url, hosts, by_range = spec.endpoints.base_url, fleet.hosts_of(spec), uses(spec, "port")
    try:
        url_port = port_in_url(url)
    except ValueError as error:
        if not _unknown_words(url):
            yield f"endpoints.base_url: {error}"
        return
    arg_port = port_in_args(spec.args)
    if spec.replicas > 1 and not by_range:
        yield f"replicas: {spec.replicas} replicas need {{port}} in args or env, else all of them listen on one port"
    elif url and "{port}" in url and not by_range:
        yield "endpoints.base_url: has {port}, but neither args nor env tell the server its port"
    if url and by_range and "{port}" not in url:
        yield f"endpoints.base_url: leads to port {url_port}, but the server gets its port from {{port}}; write {{port}} here too"
    elif arg_port and url_port and arg_port != url_port:
        yield f"endpoints.base_url: leads to port {url_port}, but args say --port {arg_port}"
    if (port := fixed_port(spec)) and not 0 < port < 65536:
        yield f"args: --port {port} is not a port; allowed: 1 to 65535"
    if url and len(hosts) > 1 and "{host}" not in url:
        yield f"endpoints.base_url: leads to one machine, but the model may run on {', '.join(hosts)}; write {{host}}"


def _host_problems(fleet: Fleet, models: Mapping[str, ModelSpec]) -> Iterator[str]:
    """A model without a host would run on every machine that reads the file, once some other model names one."""
    placed = [model_id for model_id, spec in models.items() if spec.supervised and (spec.host or spec.hosts)]
    if placed and not fleet.hosts and not fleet.host:
        for model_id, spec in models.items():
            if spec.supervised and not spec.host and not spec.hosts:
                yield f"llmModels.{model_id}.hosts: {placed[0]} names its hosts, so this model must too, or the fleet a host for all"


def _fallback_problems(models: Mapping[str, ModelSpec], known: Collection[str]) -> Iterator[str]:
    for model_id, spec in models.items():
        path = f"llmModels.{model_id}.fallback"
        if spec.fallback is None:
            continue
        if spec.fallback not in known or (spec.fallback in models and not models[spec.fallback].supervised):
            yield f"{path}: no supervised model {spec.fallback!r} in this fleet; there are: {', '.join(sorted(known))}"
            continue
        chain = [model_id]
        while (following := models[chain[-1]].fallback) and following in models and following not in chain:
            chain.append(following)
        if following == model_id:
            yield f"{path}: runs in a circle: {' -> '.join([*chain, model_id])}"
