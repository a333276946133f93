"""
What the front door is told of the fleet: models, their settings, their replicas. It is told, it does not ask.

A `Feeder` (a thread that follows the change stream, a file, a test) hands over whole snapshots or single
changes; the last word stands for as long as nothing new comes.
"""

from collections.abc import Callable
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field

GONE = frozenset({"failed", "stopped", "completed"})
"""States that no replica leaves by itself."""
LEAVING = frozenset({"draining", "releasing", "stopping", "recycling"}) | GONE
"""States in which a replica gets no request even if its port answers."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Replica(_Frozen):
    """One instance as the supervisor sees it."""

    instance: str
    model: str
    host: str
    port: int = Field(ge=1, le=65535)
    base_url: str = Field(default="", description="path in front of /v1, usually empty: `http://h:p/x/v1` is `/x`")
    routable: bool = True
    state: str = "healthy"
    run: str | None = Field(default=None, description="fencing token of the run alive")
    api_key: str | None = Field(default=None, repr=False)
    ready_since: float | None = Field(default=None, description="Unix seconds")
    starting_since: float | None = Field(default=None, description="Unix seconds")
    expected_start_s: float | None = Field(default=None, ge=0, description="known start-up time")


class ModelSettings(_Frozen):
    """What a model's entry in the fleet file says of its requests; durations in seconds."""

    served_names: tuple[str, ...] = Field(default=(), description="names the servers answer to; the first is theirs")
    hold_timeout_s: float = Field(default=60.0, ge=0, description="a request waits so long for a ready replica; then 503")
    hold_max_requests: int = Field(default=1000, ge=0)
    hold_max_bytes: int = Field(default=256 * 1024 * 1024, ge=0)
    inter_token_timeout_s: float = Field(default=10.0, gt=0, description="a stream silent for so long is continued elsewhere")
    first_event_timeout_s: float = Field(default=600.0, gt=0, description="the same before the first event")
    allow_text_continuation: bool = Field(default=False, description="continue by text where a replica gives no token ids (inexact)")
    fallback: str | None = Field(default=None, description="model that serves when all replicas are failed")
    reasoning: bool = Field(default=False, description="the servers run a reasoning or tool parser on every answer")
    max_model_len: int | None = Field(default=None, ge=1, description="context length, if known")


class Model(_Frozen):
    """One model of the fleet with all its replicas."""

    name: str
    settings: ModelSettings = ModelSettings()
    replicas: tuple[Replica, ...] = ()


class Snapshot(_Frozen):
    """The whole fleet at one moment."""

    models: tuple[Model, ...] = ()


class View:
    """The last word on the fleet. All methods are to be called on the door's loop thread."""

    def __init__(self) -> None:
        self.snapshot = Snapshot()
        self.known = False
        """True once anything has been told: an empty fleet and an unknown one are not the same."""
        self.fed = True
        """False while the feeder has lost its source: then the door's own looks decide more."""
        self._listeners: list[Callable[[Snapshot], None]] = []

    def listen(self, listener: Callable[[Snapshot], None]) -> None:
        """Have `listener` called with each new snapshot, and with the present one now if there is one."""
        self._listeners.append(listener)
        if self.known:
            listener(self.snapshot)

    def apply(self, snapshot: Snapshot) -> None:
        """Take a whole snapshot for true."""
        self.known, self.fed, self.snapshot = True, True, snapshot
        for listener in self._listeners:
            listener(snapshot)

    def lost(self) -> None:
        """Say that the source is away. Nothing is forgotten."""
        self.fed = False


class Feeder(Protocol):
    """Brings news to a view; `start` and `stop` are called on the loop thread, `stop` may be called twice."""

    def start(self, view: View) -> None: ...

    def stop(self) -> None: ...
