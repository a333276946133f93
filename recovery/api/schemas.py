"""
The API's answers beside the views of `core/view.py`, and the statuses each kind of request can have.
"""

from typing import Any, Final

from pydantic import Field

from recovery.core.change import Incident
from recovery.core.view import Shown

MODEL_PATTERN: Final = r"^[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9_-])?$"

EXAMPLE_MODEL: Final[dict[str, Any]] = {
    "id": "vllm",
    "is_running": True,
    "is_healthy": True,
    "health_message": None,
    "restart_policy": "on-failure",
    "restart_count": 0,
    "max_restarts": 3,
    "consecutive_health_failures": 0,
    "uptime_seconds": 125.3,
    "last_restart_time": None,
    "last_health_check_time": 1705423890.12,
    "has_cuda_oom": False,
    "state": "healthy",
    "desired": "running",
    "reason": "serving",
    "replicas": 1,
    "ready": 1,
    "restarts_total": 0,
    "budget_left": 3,
    "next_restart_at": None,
    "last_exit": None,
    "incident": None,
    "degraded_since": None,
    "hosts_away": [],
    "instances": [],
}


class Problem(Shown):
    """The one form of every error."""

    detail: str


class Restarted(Shown):
    """The specification's answer to a restart, and where to look further."""

    message: str = Field(examples=["LLM model 'vllm' restarted successfully"])
    restart_count: int = Field(examples=[1])
    uptime_seconds: float | None = Field(examples=[2.1])
    restarts_total: int
    task_id: str


class Commanded(Shown):
    """The answer to a command that has had its effect."""

    message: str = Field(examples=["LLM model 'vllm' stopped gracefully"])
    task_id: str
    restart_count: int
    state: str
    next_restart_at: float | None = Field(None, description="when it comes back by itself (stop with force), Unix seconds")
    comes_back: bool | None = Field(None, description="whether it comes back by itself (stop with force)")


class Accepted(Shown):
    """A command that is under way."""

    message: str = Field(examples=["Restart of LLM model 'vllm' accepted"])
    task_id: str
    link: str = Field(examples=["/api/tasks/5d0e…"], description="where to ask what became of it")


class TaskView(Shown):
    """What became of a command."""

    task_id: str
    command: str
    model: str
    at: float = Field(description="when it was sent, Unix seconds")
    status: str = Field(description="queued, running, done, failed or dropped: how far the task is")
    accepted: bool | None = Field(description="whether it was accepted; null while nobody has taken it")
    outcome: str | None = Field(description="waiting, done, failed or superseded: what became of an accepted command")
    detail: str | None = Field(description="why it was refused, or why it failed")


class LogView(Shown):
    """The specification's answer, and which run of which instance it is about."""

    model_id: str
    lines: tuple[str, ...]
    total_lines: int
    returned_lines: int
    instance: str
    run: int | None = Field(description="number of the run; ask for an earlier one with ?run=")
    runs: tuple[int, ...] = Field(description="runs whose logs are kept, oldest first")
    source: str = Field(description="'host', or 'redis' when the host is away and only the last lines are kept")
    at: float | None = Field(description="when a tail from Redis was taken, Unix seconds")


class EventView(Shown):
    """One line of a model's history."""

    id: str
    at: float
    kind: str
    text: str
    data: dict[str, Any]


class EventList(Shown):
    """The newest events, oldest first."""

    model_id: str
    events: tuple[EventView, ...]


class IncidentList(Shown):
    """The newest outages first."""

    model_id: str
    incidents: tuple[Incident, ...]


class GpuView(Shown):
    """One card."""

    index: int
    name: str
    used_bytes: int
    total_bytes: int
    utilization: float | None
    lost: bool


class HostView(Shown):
    """One GPU host."""

    host: str
    alive: bool
    age_seconds: float
    clock_skew_seconds: float | None
    gpus: tuple[GpuView, ...]


class HostList(Shown):
    """Every host heard of within a day."""

    hosts: tuple[HostView, ...]


class WhoView(Shown):
    """Who asks, and what they may do."""

    role: str
    by: str
    secure: bool
    version: str


class LoadView(Shown):
    """What a model serves, from its vLLM servers' own metrics, over the last minute or two."""

    at: float
    window_seconds: float
    running: float
    waiting: float
    kv_cache_usage: float | None = Field(description="0 to 1, of the fullest replica")
    ttft_seconds: dict[str, float] = Field(description="time to first token, by quantile")
    e2e_seconds: dict[str, float] = Field(description="whole requests, by quantile")
    finished: dict[str, float] = Field(description="requests finished in the window, by reason")
    error_rate: float | None = Field(description="share of them that got no answer")


class LoadList(Shown):
    """What each model serves; a model whose servers say nothing is absent."""

    loads: dict[str, LoadView]


class PassageView(Shown):
    """What the front doors did for a model: totals since they started, latencies of the last minute or two."""

    doors: int
    requests: float
    errors: float = Field(description="of them, answered with a status of 500 or more")
    holding: float = Field(description="requests that wait for a replica now")
    held: float = Field(description="requests that had to wait for a replica")
    retried: float = Field(description="attempts after the first")
    continued: float = Field(description="streams that went on at another replica")
    cut: float = Field(description="streams that ended with an error event")
    refused: float = Field(description="requests refused: no room, no replica in time, poison")
    fallback: float = Field(description="requests that another model answered")
    ttft_seconds: dict[str, float] = Field(description="time to the first event, by quantile")
    inter_token_seconds: dict[str, float] = Field(description="between the events of a stream, by quantile")
    e2e_seconds: dict[str, float] = Field(description="whole requests, by quantile")


class PassageList(Shown):
    """What the front doors did for each model; a model that nobody asked them for is absent."""

    models: dict[str, PassageView]


PROBLEM: Final[dict[str, Any]] = {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
"""Told so, and not by `model`: FastAPI would file it under the type of the good answer (text, a stream)."""


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The documented statuses of a request: those given, and those that any request may have."""
    said = {
        400: "A request that cannot be read",
        401: "No token, or an unknown one",
        403: "The token's role is too low, or the request comes from elsewhere",
        404: "No such model, instance or task",
        409: "The command does not fit the present state or policy",
        413: "The body is too large",
        422: "A parameter that cannot be used",
        429: "Too many requests; see Retry-After",
        502: "The command was carried out and did not lead to what it was to lead to",
        503: "Redis or the model's host is away; see Retry-After",
    }
    every = (*statuses, 400, 401, 403, 413, 422, 503)
    return {status: {"description": said[status], "content": PROBLEM} for status in sorted(set(every))}
