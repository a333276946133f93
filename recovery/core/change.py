"""What one commit says to the world beside the row itself: an event, counters, the incident it touches."""

from typing import Any

from pydantic import Field

from recovery.core.instance import Instance, Value


class ModelEvent(Value):
    """One line of a model's history."""

    kind: str
    text: str = ""
    data: dict[str, Any] = Field(default_factory=dict)


class Count(Value):
    """An addition to a counter that never falls. `labels` are few and bounded; `by` may be a float (seconds)."""

    name: str
    labels: tuple[tuple[str, str], ...] = ()
    by: float = 1.0


class Incident(Value):
    """One outage of one instance: detected, diagnosed, each repair step, validated, closed."""

    id: str
    model: str
    instance: str
    host: str
    token: int
    opened_at: float
    cause: str
    reason: str = ""
    evidence: dict[str, Any] = Field(default_factory=dict)
    steps: tuple[dict[str, Any], ...] = ()
    detected_at: float | None = None
    failed_at: float | None = None
    started_at: float | None = None
    ready_at: float | None = None
    validated_at: float | None = None
    closed_at: float | None = None
    outcome: str | None = None


class Commit(Value):
    """A row to be written over the version it was decided from, and all that must be written with it."""

    after: Instance
    expected_version: int
    events: tuple[ModelEvent, ...] = ()
    counts: tuple[Count, ...] = ()
    incident: Incident | None = None


class Change(Value):
    """One entry of the stream that every reader of the fleet follows."""

    id: str
    instance: str
    model: str
    version: int
    state: str
    run: int | None
    base_url: str | None
    routable: bool
