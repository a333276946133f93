"""
What the outside sees: rows and heartbeats in, the specification's JSON out.

A model is a pure sum over its instances (FAILURE-MODES.md, 1b): running if any runs, healthy if at least one is ready,
counts are sums, the uptime is the shortest, and `health_message` says "2/3 ready". The specification's fields keep
their names, types and texts; what this project adds stands after them. Instants are Unix seconds of Redis' clock.

A host without a fresh heartbeat is a reading on top of the state: its instances keep the state they were last seen in,
but nobody can vouch for them, so they count as not ready and the message names the host.
"""

from collections.abc import Container, Iterable, Sequence
from itertools import groupby
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from recovery.core.instance import Desired, Instance, Intent, LastExit
from recovery.core.launch import Override
from recovery.core.states import State

S = State

STATE_ORDER: tuple[State, ...] = (
    S.HEALTHY,
    S.UNHEALTHY,
    S.STARTING,
    S.RELEASING,
    S.RECYCLING,
    S.RESTARTING,
    S.DRAINING,
    S.STOPPING,
    S.FAILED,
    S.COMPLETED,
    S.STOPPED,
)
"""A model shows the first of these that one of its instances is in: what serves, then what comes back, then what is down."""


class Shown(BaseModel):
    """A frozen answer; the models double as the API's OpenAPI document."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ExitView(Shown):
    """How a run ended, as far as anybody knows."""

    run: int = Field(description="number of the run that ended")
    at: float = Field(description="Unix seconds")
    code: int | None = Field(description="exit code; null when a signal ended it or nobody saw it end")
    signal: int | None
    cause: str = Field(description="what the diagnosis made of it")
    evidence: str = Field(description="the log line or reading that tells, redacted")
    advice: str
    clean: bool = Field(description="ended by itself in good order")


class OverrideView(Shown):
    """One flag that a repair changed."""

    flag: str
    value: str | None
    cause: str
    since: float = Field(description="Unix seconds")


class InstanceView(Shown):
    """One replica."""

    id: str
    replica: int
    state: State
    desired: Desired
    reason: str = Field(description="one sentence on why it is in this state")
    host: str
    host_alive: bool = Field(description="the host has a fresh heartbeat")
    port: int | None
    gpus: tuple[int, ...]
    is_running: bool
    is_healthy: bool
    health_message: str | None
    run: int | None = Field(description="number of the run alive")
    uptime_seconds: float | None
    started_at: float | None
    ready_at: float | None
    load_seconds: float | None = Field(description="the last load, from exec to ready")
    restart_count: int
    restarts_total: int
    budget_left: int | None = Field(description="automatic restarts left; null = no limit")
    consecutive_health_failures: int
    last_restart_time: float | None
    last_health_check_time: float | None
    health_check_seconds: float | None = Field(description="how long the last look took")
    next_restart_at: float | None
    has_cuda_oom: bool
    degraded_since: float | None
    overrides: tuple[OverrideView, ...]
    incident: str | None
    last_exit: ExitView | None


class ModelView(Shown):
    """A model of the fleet: the specification's fields, then this project's."""

    id: str
    is_running: bool
    is_healthy: bool
    health_message: str | None
    restart_policy: str
    restart_count: int = Field(description="automatic and manual restarts since the last forgiveness or reset")
    max_restarts: int = Field(description="automatic restarts allowed per instance; 0 = no limit")
    consecutive_health_failures: int
    uptime_seconds: float | None = Field(description="the shortest of the running instances; null when none runs")
    last_restart_time: float | None
    last_health_check_time: float | None
    has_cuda_oom: bool

    state: State
    desired: Desired
    reason: str
    replicas: int
    ready: int
    restarts_total: int = Field(description="restarts ever; never falls")
    budget_left: int | None = Field(description="of the instance that has least left; null = no limit")
    next_restart_at: float | None = Field(description="Unix seconds of the next automatic restart that is due")
    last_exit: ExitView | None
    incident: str | None
    degraded_since: float | None = Field(description="serves with changed flags since then")
    hosts_away: tuple[str, ...] = Field(description="hosts of this model that have not been heard from")
    instances: tuple[InstanceView, ...]


class FleetView(Shown):
    """All models."""

    models: tuple[ModelView, ...]
    total: int
    at: float = Field(description="Redis' clock when this was read, Unix seconds")


def fleet_view(rows: Iterable[Instance], now: float, hosts: Container[str]) -> FleetView:
    """Return every model of `rows`, sorted by id; `hosts` holds those with a fresh heartbeat."""
    models = tuple(model_view(own, now, hosts) for own in by_model(rows).values())
    return FleetView(models=models, total=len(models), at=now)


def by_model(rows: Iterable[Instance]) -> dict[str, tuple[Instance, ...]]:
    """Return the rows of each model, models by id and instances by replica."""
    ordered = sorted(rows, key=lambda row: (row.model, row.replica))
    return {model: tuple(own) for model, own in groupby(ordered, key=lambda row: row.model)}


def model_view(rows: Sequence[Instance], now: float, hosts: Container[str]) -> ModelView:
    """Return one model as the sum of its rows, of which there is at least one."""
    shown = tuple(instance_view(row, now, hosts) for row in rows)
    ready = sum(each.is_healthy for each in shown)
    leading = min(shown, key=lambda each: (STATE_ORDER.index(each.state), each.replica))
    troubled = next((each for each in shown if not each.is_healthy), leading)
    policy = rows[0].policy
    exits = [each.last_exit for each in shown if each.last_exit]
    return ModelView(
        id=rows[0].model,
        is_running=any(each.is_running for each in shown),
        is_healthy=ready > 0,
        health_message=_health_message(shown, ready),
        restart_policy=policy.restart_policy,
        restart_count=sum(each.restart_count for each in shown),
        max_restarts=policy.max_restarts,
        consecutive_health_failures=sum(each.consecutive_health_failures for each in shown),
        uptime_seconds=_least(each.uptime_seconds for each in shown),
        last_restart_time=_most(each.last_restart_time for each in shown),
        last_health_check_time=_most(each.last_health_check_time for each in shown),
        has_cuda_oom=any(each.has_cuda_oom for each in shown),
        state=leading.state,
        desired=Desired.RUNNING if any(row.desired is Desired.RUNNING for row in rows) else Desired.STOPPED,
        reason=troubled.reason,
        replicas=len(shown),
        ready=ready,
        restarts_total=sum(each.restarts_total for each in shown),
        budget_left=_least(each.budget_left for each in shown),
        next_restart_at=_least(each.next_restart_at for each in shown),
        last_exit=max(exits, key=lambda each: each.at, default=None),
        incident=next((each.incident for each in shown if each.incident), None),
        degraded_since=_least(each.degraded_since for each in shown),
        hosts_away=tuple(sorted({each.host for each in shown if not each.host_alive})),
        instances=shown,
    )


def instance_view(row: Instance, now: float, hosts: Container[str]) -> InstanceView:
    """Return one replica as it is shown at `now`."""
    running = row.run is not None
    host_alive = row.placement.host in hosts
    ready = running and host_alive and row.state is S.HEALTHY and row.intent is not Intent.CRASH
    return InstanceView(
        id=row.id,
        replica=row.replica,
        state=row.state,
        desired=row.desired,
        reason=row.reason,
        host=row.placement.host,
        host_alive=host_alive,
        port=row.placement.port,
        gpus=row.placement.gpus,
        is_running=running,
        is_healthy=ready,
        health_message=None if ready else _why_not_ready(row, host_alive),
        run=row.run,
        uptime_seconds=round(max(0.0, now - row.spawned_at), 3) if running and row.spawned_at is not None else None,
        started_at=row.spawned_at if running else None,
        ready_at=row.ready_at if running else None,
        load_seconds=row.load_s,
        restart_count=row.restart_count,
        restarts_total=row.restarts_total,
        budget_left=max(0, row.policy.max_restarts - row.used) if row.policy.max_restarts else None,
        consecutive_health_failures=row.probe.failures,
        last_restart_time=row.last_restart_at,
        last_health_check_time=row.probe.last_at,
        health_check_seconds=row.probe.duration_s,
        next_restart_at=row.not_before if row.state is S.RESTARTING and row.desired is Desired.RUNNING else None,
        has_cuda_oom=row.has_cuda_oom,
        degraded_since=row.degraded_since,
        overrides=tuple(_override(each) for each in row.overrides),
        incident=row.incident,
        last_exit=_exit(row.last_exit) if row.last_exit else None,
    )


def _exit(last: LastExit) -> ExitView:
    return ExitView(
        run=last.token,
        at=last.at,
        code=last.code,
        signal=last.signal,
        cause=last.cause,
        evidence=last.evidence,
        advice=last.advice,
        clean=last.clean,
    )


def _override(step: Override) -> OverrideView:
    """A whole argument list (a rung of `fallback_args`) is only named: command lines do not leave the host."""
    shown = "another argument list" if isinstance(step.value, tuple) else step.value
    return OverrideView(flag=step.flag, value=shown, cause=step.cause, since=step.since.timestamp())


def _why_not_ready(row: Instance, host_alive: bool) -> str:
    """One sentence for the field that the specification keeps null while all is well."""
    seen = row.probe.message if row.state in (S.UNHEALTHY, S.STARTING) else None
    said = seen or row.reason or row.state.value
    return said if host_alive else f"host '{row.placement.host}' has not been heard from; last seen {row.state.value}: {said}"


def _health_message(shown: Sequence[InstanceView], ready: int) -> str | None:
    if ready == len(shown):
        return None
    return f"{ready}/{len(shown)} ready" if len(shown) > 1 else shown[0].health_message


def _least(values: Iterable[Any]) -> Any:
    return min((value for value in values if value is not None), default=None)


def _most(values: Iterable[Any]) -> Any:
    return max((value for value in values if value is not None), default=None)


STATUS_FIELDS: tuple[str, ...] = (
    "id",
    "is_running",
    "is_healthy",
    "health_message",
    "restart_policy",
    "restart_count",
    "max_restarts",
    "consecutive_health_failures",
    "uptime_seconds",
    "last_restart_time",
    "last_health_check_time",
    "has_cuda_oom",
)
"""The specification's fields of a model, in its order."""


class CheckView(Shown):
    """The specification's answer to a health check, and this project's state."""

    model_id: str
    is_healthy: bool
    health_message: str | None
    consecutive_health_failures: int
    last_health_check_time: float | None
    has_cuda_oom: bool
    state: State
    ready: int
    replicas: int


def check_view(model: ModelView) -> CheckView:
    """Return what a health check answers."""
    return CheckView(
        model_id=model.id,
        is_healthy=model.is_healthy,
        health_message=model.health_message,
        consecutive_health_failures=model.consecutive_health_failures,
        last_health_check_time=model.last_health_check_time,
        has_cuda_oom=model.has_cuda_oom,
        state=model.state,
        ready=model.ready,
        replicas=model.replicas,
    )
