"""
The row: one document per instance, kept in Redis, replaced as a whole by compare-and-set on `version`.

Instants are seconds of Redis' clock (floats), the only clock that decides. Tokens are integers that only
rise; they number the runs of an instance.
"""

from enum import StrEnum
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from recovery.core.fleet import Placement, Policy
from recovery.core.launch import Override
from recovery.core.states import State

SCHEMA = 1
"""Version of the row's form. A newer one in Redis is refused, an older one migrated at load."""


class Value(BaseModel):
    """A frozen value that changes through one validating door."""

    model_config = ConfigDict(frozen=True, extra="forbid", revalidate_instances="never")

    def evolve(self, **changes: Any) -> Self:
        """Return a validated copy with `changes`; unknown fields are errors."""
        return type(self).model_validate({**{name: getattr(self, name) for name in type(self).model_fields}, **changes})


class Desired(StrEnum):
    """What the operator wants."""

    RUNNING = "running"
    STOPPED = "stopped"


class Intent(StrEnum):
    """How a run is to be ended: the manner, where the state says what comes after."""

    GRACEFUL = "graceful"  # SIGTERM, grace, SIGKILL
    KILL = "kill"  # SIGKILL at once: a hung engine drains nothing, or the operator said so
    CRASH = "crash"  # SIGKILL the server while it is HEALTHY, and treat what follows as a crash


class LastExit(Value):
    """How the last run ended, as far as anybody knows."""

    token: int
    at: float = Field(description="Redis seconds")
    code: int | None = None
    signal: int | None = None
    cause: str = "exit"
    evidence: str = ""
    advice: str = ""
    clean: bool = False


class LastFailure(Value):
    """The last failure that took a restart from the budget, or would have."""

    cause: str
    at: float


class ProbeMemory(Value):
    """What the next look needs to know of the looks before it. Belongs to one run."""

    failures: int = 0
    last_at: float | None = None
    last_ok_at: float | None = None
    message: str | None = None
    duration_s: float | None = None
    failing_since: float | None = None
    steps: float | None = Field(None, description="vLLM's step counter, as last read")
    steps_at: float | None = Field(None, description="when that value was first seen: no progress since then")
    cpu_s: float | None = Field(None, description="CPU seconds of the process tree at the last look")
    cpu_at: float | None = None
    cpu_cores: float | None = Field(None, description="cores used between the last two readings")
    asleep: bool = False


class Instance(Value):
    """One replica of a model: what is wanted, what is, and what is due."""

    schema_version: int = SCHEMA
    id: str
    model: str
    replica: int = 0
    version: int = 0
    state: State = State.STOPPED
    desired: Desired = Desired.STOPPED
    intent: Intent | None = None
    reason: str = Field("", description="one sentence on why it is in this state")
    entered_at: float = 0.0

    policy: Policy
    placement: Placement
    hosts: tuple[str, ...] = ()
    base_url: str | None = None
    planned: Placement | None = Field(None, description="the fleet file's placement that `placement` came from")
    surge: bool = Field(False, description="serves only while a roll restarts the model's one replica")
    spec_digest: str = ""
    wanted: str = Field("", description="digest of how the fleet file starts it now")
    launched: str = Field("", description="digest of how the present run was started")
    overrides: tuple[Override, ...] = ()
    degraded_since: float | None = None

    token: int = Field(0, description="highest token issued")
    run: int | None = Field(None, description="token of the run alive")
    leased: bool = Field(False, description="its keeper ends that run when no worker has renewed its lease")
    last_ended: int = 0
    not_before: float = 0.0
    due: float | None = Field(None, description="next delivery of a step; None = nothing to do")
    look_at: float | None = Field(None, description="next probe; None = not probed")
    lease_until: float = 0.0

    attempt: int = Field(0, description="restarts since the last forgiveness that grow the backoff")
    used: int = Field(0, description="automatic restarts since the last forgiveness: the budget")
    manual: int = Field(0, description="manual restarts since the last forgiveness")
    restarts_total: int = 0

    spawned_at: float | None = None
    ready_at: float | None = None
    load_s: float | None = Field(None, description="the last load, exec to ready, seconds")
    last_restart_at: float | None = None
    term_at: float | None = Field(None, description="first SIGTERM of the stop under way")
    kill_at: float | None = Field(None, description="first SIGKILL of the stop under way")
    drain_since: float | None = None
    restart_at: float | None = Field(None, description="while RECYCLING: when the next start is due")
    gives_up: bool = Field(False, description="while RECYCLING: no start follows")
    forgiven: float = Field(0.0, description="when the budget was last cleared; the host's record carries the same")

    probe: ProbeMemory = ProbeMemory()
    last_exit: LastExit | None = None
    last_failure: LastFailure | None = None
    has_cuda_oom: bool = False
    incident: str | None = None
    validate_until: float | None = Field(None, description="a repair is validated when it still serves at this time")
    sees: dict[str, int] = Field(default_factory=dict, description="failures since the last forgiveness, by cause and by cause@gpu")

    @property
    def restart_count(self) -> int:
        """Automatic and manual restarts since the last forgiveness or reset (the specification's `restart_count`)."""
        return self.used + self.manual

    @property
    def budget_spent(self) -> bool:
        """True when no automatic restart is left; `max_restarts` 0 means no limit."""
        return bool(self.policy.max_restarts) and self.used >= self.policy.max_restarts

    @property
    def routable(self) -> bool:
        """True when the front door may send it traffic."""
        return self.state is State.HEALTHY and self.intent is None
