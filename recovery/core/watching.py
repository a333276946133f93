"""
Which of our own parts do not do their work though they run: a deaf worker, a clock that stopped.

After a reconnect a Celery worker can be up and take nothing (CELERY-FACTS.md, sections 5 and 11): only a round trip
through its own queue shows it. Everything here is read from Redis, by Redis' clock.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from recovery.core.instance import Value

DEAF_S = 30.0
"""Ten heartbeats without a task taken; a worker whose eight threads are busy for so long does not work either."""
TICK_LATE_S = 15.0
"""Beat sends a tick a second."""
TRACED = frozenset({"host", "control", "beat"})
"""The parts that are known by what they leave in Redis; the others listen on a port."""


class Traces(Value):
    """What the parts leave behind in Redis."""

    now: float
    tick_at: float | None = None
    control_waiting: int = Field(0, description="messages in the control queue")
    hosts: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict, description="the last heartbeat of each host, with age_s")


def idle_parts(traces: Traces, host: str) -> dict[str, str]:
    """The parts of this machine that run without doing their work, each with a sentence that says why."""
    found = {}
    beat = traces.hosts.get(host)
    if beat is not None and (why := deaf(beat, traces.now)) is not None:
        found["host"] = why
    late_s = tick_age_s(traces)
    if late_s is not None and late_s > TICK_LATE_S:
        waiting = traces.control_waiting > 0
        name, what = ("control", "ticks wait and none is carried out") if waiting else ("beat", "no tick is sent")
        found[name] = f"{what}: the last was carried out {late_s:.0f} s ago"
    return found


def deaf(beat: Mapping[str, Any], now: float) -> str | None:
    """Why a host's worker counts as deaf; None while it takes tasks. One that has only just come up is given its time."""
    age_s = float(beat.get("age_s", 0.0))
    if age_s > DEAF_S:
        return f"no heartbeat for {age_s:.0f} s"
    served_at = float(beat.get("served_at", 0.0))  # of this very worker: another one begins with 0
    silent_s = now - served_at if served_at else float(beat.get("up_s", 0.0))
    return f"it beats but has taken no task for {silent_s:.0f} s" if silent_s > DEAF_S else None


def deaf_hosts(hosts: Mapping[str, Mapping[str, Any]], now: float) -> dict[str, str]:
    """The hosts that beat but take no tasks, each with why. One that is gone altogether is not among them."""
    alive = {name: beat for name, beat in hosts.items() if beat.get("alive", True)}
    return {name: why for name, beat in sorted(alive.items()) if (why := deaf(beat, now)) is not None}


def unrepairable(traces: Traces) -> str | None:
    """Why nothing at all is repaired at this moment; None when the loop is at work, at least for some host."""
    late_s = tick_age_s(traces)
    if late_s is None or late_s > TICK_LATE_S:
        return "The clock does not tick: no beat or no control worker runs"
    alive = [beat for beat in traces.hosts.values() if beat.get("alive", True)]
    if alive and len(deaf_hosts(traces.hosts, traces.now)) == len(alive):
        return "No host takes tasks: its worker beats but is deaf, and is started again by its part manager"
    return None


def remarks(traces: Traces, unreadable: int = 0) -> tuple[str, ...]:
    """What else is wrong with our own parts, without names: anybody may read it."""
    deaf, hosts = len(deaf_hosts(traces.hosts, traces.now)), len(traces.hosts)
    said = (
        (deaf, f"of {hosts} hosts that beat or have beaten, {deaf} are deaf: `recovery doctor` says which"),
        (unreadable, f"{unreadable} instances are left alone, since a newer version wrote them: upgrade this part"),
    )
    return tuple(text for count, text in said if count)


def works_since(part: str, traces: Traces, host: str, since: float) -> bool:
    """
    Whether one of `TRACED` has done its work since then, by Redis' clock.

    A host's worker: it has beaten, and a task has come through its queue. Control and beat: a tick was carried out, which needs both.
    """
    if part != "host":
        return traces.tick_at is not None and traces.tick_at >= since
    beat = traces.hosts.get(host, {})
    return bool(beat) and traces.now - float(beat.get("age_s", 0.0)) >= since and float(beat.get("served_at", 0.0)) >= since


def tick_age_s(traces: Traces) -> float | None:
    """Seconds since a tick was carried out; None before the first."""
    return traces.now - traces.tick_at if traces.tick_at is not None else None
