"""What the front door tells the supervisor: work in flight, progress, and what it saw happen."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import orjson


@dataclass(frozen=True, slots=True)
class Activity:
    """One replica's traffic through this door. Silence is a sign only while something is in flight."""

    instance: str
    run: str | None
    in_flight: int
    tokens: int
    """Stream events passed on since the door started: moving = alive."""
    silent_s: float
    """Since the last byte from it, 0 while nothing is in flight."""
    stalled: int
    """Streams over their inter-token time-out."""


@dataclass(frozen=True, slots=True)
class Happened:
    """
    Something worth an event: `stall`, `crash` (with requests in flight), `poison`, `fallback`, `suspect`, `back`.
    """

    kind: str
    model: str
    instance: str | None = None
    run: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)


class Reports(Protocol):
    """Where reports go. Called on the loop thread: must not block."""

    def activity(self, rows: Sequence[Activity]) -> None:
        """Take the state of all replicas; comes every `report_interval_s`, and at once when a drained one is empty."""

    def happened(self, event: Happened) -> None:
        """Take one event."""


class JsonReports:
    """Reports as JSON lines to `write`; activity only where something is in flight."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write

    def activity(self, rows: Sequence[Activity]) -> None:
        busy = [asdict(row) for row in rows if row.in_flight]
        if busy:
            self._write(orjson.dumps({"activity": busy}) + b"\n")

    def happened(self, event: Happened) -> None:
        self._write(orjson.dumps({"event": asdict(event)}) + b"\n")


class NoReports:
    """Nobody listens."""

    def activity(self, rows: Sequence[Activity]) -> None:
        pass

    def happened(self, event: Happened) -> None:
        pass
