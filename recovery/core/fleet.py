"""
The fleet file as frozen models: what runs, where, and by which rules it is repaired.

Every field has a default, a bound and a unit, so the JSON Schema, the README's tables and the errors of
`recovery validate` all come from here. What must hold between fields stands in `fleet_checks.py`, the reading
of the text in `fleet_file.py`, the placement in `fleet_plan.py`.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic.config import JsonDict

from recovery.core.fleet_fluidmcp import in_our_words

VISIBILITY_TIMEOUT_S: Final = 3600
"""Celery re-delivers a message with an ETA beyond this a second time (CELERY-FACTS.md, section 3); broker and checks share it."""

ID_PATTERN: Final = r"^[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9_-])?$"
"""Model ids become Redis keys, folder names, queue arguments and URL segments: no separators, no dots at the ends."""
HOST_PATTERN: Final = r"^[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?$"

LOCAL_HOST: Final = "localhost"
"""Stands for the machine that reads the file where neither the file nor the reader names one."""

PLACEHOLDER: Final = re.compile(r"\{(host|port|gpus|replica)\}")
"""The four words that are filled in; any other brace (JSON in an argument, a chat template) is left as it is."""

SECONDS: Final[JsonDict] = {"unit": "s"}
BYTES: Final[JsonDict] = {"unit": "bytes"}

ModelId = Annotated[str, StringConstraints(pattern=ID_PATTERN, max_length=64)]
HostName = Annotated[str, StringConstraints(pattern=HOST_PATTERN)]
Port = Annotated[int, Field(ge=1, le=65535)]
PortRange = tuple[Port, Port]
Text = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")]  # execve refuses NUL
EnvName = Annotated[str, StringConstraints(pattern=r"^[^\x00=]+$")]
RestartPolicy = Literal["no", "on-failure", "always"]


class Frozen(BaseModel):
    """Base of every model of the core: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Policy(Frozen):
    """
    How a model is watched and repaired: the part of its entry that is no secret.

    The row in Redis carries a copy, so that the control worker decides without the fleet file. Numbers without another
    source are settled in FAILURE-MODES.md, 1b. Keys of the specification keep its names; the others carry their unit.
    """

    restart_policy: RestartPolicy = Field("no", description="when to restart automatically: never, after failures, or after every end")
    max_restarts: int = Field(3, ge=0, le=1_000_000, description="automatic restarts until a stable time forgives them; 0 = no limit")
    restart_delay: float = Field(
        5,
        ge=0,
        lt=VISIBILITY_TIMEOUT_S,
        json_schema_extra=SECONDS,
        description="wait before the first restart, doubled by each further one",
    )
    max_restart_delay: float = Field(
        160, ge=0, json_schema_extra=SECONDS, description="longest wait between restarts; where it is not given, restart_delay raises it"
    )
    restart_jitter: float = Field(
        0.1, ge=0, le=1, description="fraction of the delay added by chance, so that what died together does not return together"
    )

    health_check_timeout: float = Field(10.0, gt=0, le=600, json_schema_extra=SECONDS, description="time-out of one health request")
    health_check_interval: float = Field(
        30, ge=0.1, le=86_400, json_schema_extra=SECONDS, description="between two looks at a healthy server"
    )
    health_confirm_interval: float = Field(
        2,
        ge=0.05,
        le=3600,
        json_schema_extra=SECONDS,
        description="from the start of a failed look to the next, or at once if that one took longer",
    )
    failure_threshold: int = Field(
        2, ge=1, le=1000, description="failed looks in a row that make a server unhealthy beyond repair by waiting"
    )
    startup_timeout_s: float = Field(
        600, gt=0, le=86_400, json_schema_extra=SECONDS, description="a server that has not served by then is started again"
    )
    stable_s: float = Field(
        600,
        ge=0,
        le=604_800,
        json_schema_extra=SECONDS,
        description="seconds of serving that forgive earlier restarts (at least twice the last load time)",
    )

    stop_grace_s: float = Field(30, ge=0, le=3600, json_schema_extra=SECONDS, description="seconds between SIGTERM and SIGKILL")
    kill_deadline_s: float = Field(
        30,
        gt=0,
        le=3600,
        json_schema_extra=SECONDS,
        description="seconds after SIGKILL until a process that remains is reported as unkillable",
    )
    drain_timeout_s: float = Field(
        60, ge=0, le=3600, json_schema_extra=SECONDS, description="seconds that requests in flight get to finish before a stop or restart"
    )

    busy_limit_s: float = Field(
        600,
        ge=0,
        le=86_400,
        json_schema_extra=SECONDS,
        description="seconds that a busy server may fail its health checks while it makes progress",
    )
    hang_window_s: float = Field(
        10, ge=0.1, le=3600, json_schema_extra=SECONDS, description="two looks without progress at least this far apart make a hang"
    )
    completion_check: bool = Field(True, description="ask for one token to tell ready from alive and hung from busy; off: /v1/models")
    completion_timeout_s: float = Field(10, gt=0, le=600, json_schema_extra=SECONDS, description="time-out of the one-token completion")
    validate_s: float = Field(
        30,
        ge=0,
        le=3600,
        json_schema_extra=SECONDS,
        description="seconds that a repaired server must keep serving before its incident is closed",
    )
    remedies: bool = Field(True, description="change flags, port or GPU as the cause demands; off: only restart")

    lease_s: float = Field(
        120,
        ge=5,
        le=3600,
        json_schema_extra=SECONDS,
        description="seconds without a worker after which the keeper ends the server (reschedule only)",
    )
    reschedule: bool = Field(False, description="move the instance to another host of its list when its own is lost")
    drill: bool = Field(False, description="`recovery drill` may break this model without --yes")

    hold_timeout_s: float = Field(
        60, ge=0, le=3600, json_schema_extra=SECONDS, description="seconds a request may wait at the front door for a ready replica"
    )
    hold_max_requests: int = Field(1024, ge=0, le=1_000_000, description="requests that may wait at once")
    hold_max_bytes: int = Field(64 * 2**20, ge=0, json_schema_extra=BYTES, description="bytes of request bodies that may wait at once")
    inter_token_timeout_s: float = Field(
        30, gt=0, le=3600, json_schema_extra=SECONDS, description="seconds of silence in mid-stream after which it is continued elsewhere"
    )
    allow_text_continuation: bool = Field(False, description="continue a cut stream by its text where token ids are not to be had")

    @model_validator(mode="before")
    @classmethod
    def _cap_follows_base(cls, data: Any) -> Any:
        """A FluidMCP file may have a restart_delay above our default cap: the cap then is that delay."""
        if isinstance(data, dict) and "max_restart_delay" not in data:
            base, default = data.get("restart_delay"), cls.model_fields["max_restart_delay"].default
            if isinstance(base, int | float) and base > default:
                return {**data, "max_restart_delay": base}
        return data


class Endpoints(Frozen):
    """Where a model answers."""

    base_url: Annotated[str, StringConstraints(pattern=r"^https?://[^\s\x00]+$")] | None = Field(
        None,
        repr=False,
        description="http(s) URL of the server, with or without /v1; placeholders allowed; absent: only the process is checked",
    )


class FluidMcpModelKeys(Frozen):
    """
    Keys of a model that FluidMCP knows and this project does not need: accepted, never read, never shown.

    Source: Fluid-AI/fluidmcp, `fluidmcp/cli/services/` (llm_launcher.py, vllm_config.py, omni_adapter.py)
    and its `examples/`.
    """

    model: Any = Field(None, exclude=True, repr=False, description="FluidMCP: model of the high-level form, or of a cloud provider")
    config: Any = Field(None, exclude=True, repr=False, description="FluidMCP: vLLM settings of the high-level form")
    profile: Any = Field(None, exclude=True, repr=False, description="FluidMCP: named defaults of the high-level form")
    port: Any = Field(None, exclude=True, repr=False, description="FluidMCP: port of the high-level form")
    timeouts: Any = Field(None, exclude=True, repr=False, description="FluidMCP: its proxy's time-outs; ignored")
    default_params: Any = Field(None, exclude=True, repr=False, description="FluidMCP: cloud providers; ignored")
    api_key: Any = Field(None, exclude=True, repr=False, description="FluidMCP: cloud providers; ignored")
    timeout: Any = Field(None, exclude=True, repr=False, description="FluidMCP: cloud providers; ignored")
    max_retries: Any = Field(None, exclude=True, repr=False, description="FluidMCP: cloud providers; ignored")
    capabilities: Any = Field(None, exclude=True, repr=False, description="FluidMCP: what its gateway offers; ignored")
    tooling: Any = Field(None, exclude=True, repr=False, description="FluidMCP: its function calling; ignored")
    shutdown_timeout: Any = Field(None, exclude=True, repr=False, json_schema_extra=SECONDS, description="FluidMCP: read as stop_grace_s")


class ModelSpec(Policy, FluidMcpModelKeys):
    """
    One entry of `llmModels`: a command, where it runs, and its policy.

    `{host}`, `{port}`, `{gpus}` and `{replica}` in args, env values and base_url are filled per instance; every other brace stays.
    """

    type: str = Field("vllm", description="FluidMCP's provider; only entries with a command of their own are supervised")
    command: Annotated[Text, StringConstraints(min_length=1)] | None = Field(None, description="program to run; `python` is this Python")
    args: tuple[Text, ...] = Field((), repr=False, description="its arguments")
    env: dict[EnvName, Text] = Field({}, repr=False, description="environment of the server, over the operator's")
    endpoints: Endpoints = Endpoints()
    api_key_env: EnvName | None = Field(None, description="variable that holds the server's API key; handed to vLLM as VLLM_API_KEY")

    host: HostName | None = Field(None, description="the one GPU host it runs on")
    hosts: tuple[HostName, ...] | None = Field(None, description="GPU hosts its replicas are spread over; default: the fleet's")
    replicas: int = Field(1, ge=1, le=1000, description="servers of this model")
    port_range: PortRange | None = Field(None, description="first and last port for {port}; default: the fleet's")
    gpus: tuple[Annotated[int, Field(ge=0, le=1023)], ...] = Field((), description="GPU numbers on each host, shared out to its replicas")
    gpus_per_replica: int | None = Field(None, ge=1, le=1024, description="GPUs of one replica; default: an even share of `gpus`")

    autostart: bool = Field(True, description="started when the fleet comes up")
    fallback: ModelId | None = Field(None, description="model that answers while all replicas of this one are failed")
    fallback_args: tuple[tuple[Text, ...], ...] = Field(
        (), repr=False, description="whole argument lists to try after OOM, the largest first"
    )

    @model_validator(mode="before")
    @classmethod
    def _high_level_form(cls, data: Any) -> Any:
        """FluidMCP's other spellings; see `fleet_fluidmcp.py`."""
        return in_our_words(data) if isinstance(data, dict) else data

    @property
    def policy(self) -> Policy:
        """The part of the entry that may leave the host."""
        return Policy(**{name: getattr(self, name) for name in Policy.model_fields})

    @property
    def filled_texts(self) -> tuple[str, ...]:
        """Everything the server is told that may hold placeholders."""
        return (*self.args, *self.env.values(), *(text for args in self.fallback_args for text in args))

    @property
    def supervised(self) -> bool:
        """Whether there is a process to look after (cloud models of a FluidMCP file have none)."""
        return self.command is not None


class FleetKeys(Frozen):
    """Everything of the fleet file but its models."""

    host: HostName | None = Field(None, description="host of models that name none; default: the machine that reads the file")
    hosts: tuple[HostName, ...] | None = Field(None, description="GPU hosts of models that name none")
    addresses: dict[HostName, Text] = Field({}, description="network address of a host where its name does not resolve; fills {host}")
    port_range: PortRange = Field((8100, 8299), description="first and last port for {port}, per host")

    max_loads_per_host: int = Field(4, ge=1, le=1000, description="servers that may load at once on one host")
    max_loads_fleet: int = Field(16, ge=1, le=100_000, description="servers that may load at once in the fleet")
    brake_failures: int = Field(5, ge=0, le=100_000, description="instances failing with one cause that stop mass repair; 0 = no brake")
    brake_window_s: float = Field(60, gt=0, le=86_400, json_schema_extra=SECONDS, description="seconds in which they must fail")

    redact_patterns: tuple[Text, ...] = Field((), description="regular expressions; what they match never leaves the host")
    redact_prompts: bool = Field(True, description="hide prompts in vLLM's request log lines")
    log_max_bytes: int = Field(
        64 * 2**20, ge=64 * 2**10, json_schema_extra=BYTES, description="bytes of one run's log file; beyond, its oldest half goes"
    )
    log_runs_kept: int = Field(10, ge=2, le=10_000, description="log files kept per instance; the first failing run of a crash loop stays")

    mcpServers: Any = Field(None, exclude=True, repr=False, description="FluidMCP; ignored")
    replicateModels: Any = Field(None, exclude=True, repr=False, description="FluidMCP (cloud models, old form); ignored")
    github_token: Any = Field(None, exclude=True, repr=False, description="FluidMCP; ignored")


class Fleet(FleetKeys):
    """The whole fleet file. `models` holds what is supervised."""

    llmModels: dict[ModelId, ModelSpec] = Field({}, description="the models by id")

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        from recovery.core.fleet_checks import problems_of  # the checks are written over these models

        if problems := problems_of(self, self.llmModels):
            raise ValueError("\n".join(problems))
        return self

    @property
    def unsupervised(self) -> tuple[str, ...]:
        """Ids of the entries without a process of ours: cloud models, and servers that somebody else runs."""
        return tuple(model_id for model_id, spec in self.llmModels.items() if not spec.supervised)

    @property
    def models(self) -> Mapping[str, ModelSpec]:
        """The supervised models by id, in the order of the file."""
        return {model_id: spec for model_id, spec in self.llmModels.items() if spec.supervised}

    def hosts_of(self, spec: ModelSpec) -> tuple[str, ...]:
        """The hosts that may run this model, in the order its replicas take them."""
        if spec.host:
            return (spec.host,)
        return spec.hosts or self.hosts or (self.host or LOCAL_HOST,)


class Placement(Frozen):
    """Where one replica runs. `port` is None where nothing tells it (no base_url, no --port, no {port})."""

    host: str
    port: int | None = None
    gpus: tuple[int, ...] = ()
    replica: int = 0
    address: str | None = Field(None, description="network address of the host; its name where None")


class InstancePlan(Frozen):
    """One instance as the fleet file wants it."""

    id: str
    model: str
    replica: int
    placement: Placement


def instance_id(model: str, replica: int) -> str:
    """The instance's id: `{model}-{replica}`."""
    return f"{model}-{replica}"


def digest(spec: ModelSpec) -> str:
    """SHA-256 of everything that makes the entry what it is; equal on every host that has the same entry."""
    canonical = json.dumps(spec.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def launch_digest(spec: ModelSpec) -> str:
    """SHA-256 of what a running server was started with: a change of it needs a restart, a change of policy does not."""
    policy = set(Policy.model_fields) | {"replicas", "autostart", "fallback", "fallback_args"}
    canonical = json.dumps(spec.model_dump(mode="json", exclude=policy), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
