"""
What a GPU host knows about one instance: values read from its disk and its process table.

`recovery/keeper.py` and `recovery/adapters/` make them; decisions take them as arguments. Instants are Unix times in
seconds by the host's own clock; start times of processes are clock ticks since boot, as in /proc/PID/stat.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

HOST_SCHEMA = 1
"""Version of every file described here. A higher one is refused, unknown keys of the same one are passed over."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class HostRecord(_Value):
    """host.json: what survives when Redis has lost everything. Written before the row in Redis says so."""

    schema_: int = Field(default=HOST_SCHEMA, alias="schema", le=HOST_SCHEMA)
    token: int = 0  # the highest fencing token this host has seen for the instance
    desired: Literal["running", "stopped"] = "running"
    last_ended: int = 0  # the highest token whose end has been reported
    starts: tuple[float, ...] = ()  # instants of the starts since the budget was last forgiven
    overrides: tuple[dict[str, Any], ...] = ()  # the launch overrides as they came, raw JSON
    used: int = 0  # the row's budget as of the last start, so that a Redis that forgot cannot grant more
    attempt: int = 0
    manual: int = 0
    restarts_total: int = 0
    forgiven: float = 0.0  # which forgiveness these counts follow
    rest: str | None = None  # the state it came to rest in: failed, completed, stopped
    why: str | None = None  # and why, in the row's words
    port: int | None = None  # the port and GPUs of the last start, where a remedy moved them
    gpus: tuple[int, ...] | None = None

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class RunRecord(_Value):
    """run.json: one life of the server. Written by its keeper as soon as the server has a pid."""

    token: int
    keeper_pid: int
    keeper_start: int
    server_pid: int
    server_start: int
    session: int
    boot_id: str
    marker: str  # RECOVERY_RUN in the server's environment
    at: float  # instant of the exec
    boottime: float  # the same on CLOCK_BOOTTIME, seconds
    tmpdir: str | None = None
    adopted: bool = False  # the keeper that wrote this is not the server's parent: no exit code will be known


class ExitRecord(_Value):
    """exit.json: how a run ended. `unknown` means that nobody was there to ask: no code, no signal."""

    token: int
    code: int | None = None
    signal: int | None = None
    at: float
    unknown: bool = False
    reason: str = "exited"
    spawn_error: str | None = None  # set when there never was a process


class Stray(_Value):
    """A process of a run that is not its keeper. `rss` in bytes, `state` as ps shows it (D: cannot be killed now)."""

    pid: int
    start: int = 0
    name: str
    state: str
    rss: int = 0


class GoneRecord(_Value):
    """gone.json: what the keeper did with the rest of a run. `left` is what would not die in time."""

    token: int
    at: float
    killed: int = 0
    left: tuple[Stray, ...] = ()


class PortHolder(_Value):
    """Who has a port in LISTEN. `pid` is None when it belongs to somebody whose processes cannot be looked into."""

    pid: int | None
    name: str
    ours: bool
    instance: str | None = None


class HostView(_Value):
    """
    One look at an instance on its host.

    `strays` are processes of the instance outside the live run; when neither keeper nor server lives, all that is left.
    `locked` without `keeper_alive` is a keeper that has not written its record yet, or an older one that still tidies up.
    """

    record: HostRecord
    run: RunRecord | None
    exit: ExitRecord | None
    gone: GoneRecord | None
    keeper_alive: bool
    server_alive: bool
    locked: bool
    strays: tuple[Stray, ...]
    boot_id: str
    members: tuple[Stray, ...] = ()  # the living processes of the live run, without its keeper

    def rebooted(self) -> bool:
        """Whether the host has been booted since the recorded run was started, which ended it."""
        return self.run is not None and self.run.boot_id != self.boot_id

    def keeper_idles(self, token: int) -> bool:
        """Whether the keeper of that run lives and has not written down that its server is gone: it is about to, or stopped."""
        recorded = self.exit is not None and self.exit.token >= token
        return self.run is not None and self.run.token == token and self.keeper_alive and not self.server_alive and not recorded

    def ended(self, now: float) -> ExitRecord | None:
        """
        How the newest run ended, or None while it lives or its keeper has not said yet.

        A run that nobody saw end (keeper killed and server dead, or the host booted) ends as `unknown`, at `now`
        for want of a better instant.
        """
        if self.run is None or (self.exit is not None and self.exit.token >= self.run.token):
            return self.exit
        if self.keeper_alive or self.server_alive:
            return None
        reason = "host rebooted" if self.rebooted() else "keeper gone, nobody saw the server end"
        return ExitRecord(token=self.run.token, at=now, unknown=True, reason=reason)
