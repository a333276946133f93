"""What is wrong with an installation, and how to mend it: findings from facts, each with what to do."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from recovery.core.instance import Value
from recovery.core.watching import Traces, deaf, tick_age_s

SKEW_WARN_S = 2.0
"""Celery compares host clocks where it expires messages; ours are dropped by Redis' clock, so this is only a warning."""
OLDEST_REDIS = (6, 2)
"""kombu 5.7's sweep needs ZRANGE BYSCORE (CELERY-FACTS.md, section 10)."""
TICK_LATE_S = 15.0
DISK_LOW_BYTES = 1 << 30

Level = Literal["ok", "warning", "bad"]


class Finding(Value):
    """One thing looked at; `mend` says what to do unless it is well."""

    what: str
    level: Level
    text: str
    mend: str = ""


class Facts(Value):
    """What the doctor is told. None = could not be asked."""

    redis: Mapping[str, Any] | None = None
    redis_error: str | None = None
    traces: Traces | None = None
    host: str = ""
    disk_free: int | None = None
    home: str = ""
    fleet_problems: tuple[str, ...] = ()
    driver: str | None = None
    cards: int = 0
    nvidia_device: bool = Field(False, description="the kernel has NVIDIA devices")
    flower_open: str | None = Field(None, description="how Flower can be used without a password")
    unknown_settings: tuple[str, ...] = ()
    port_problems: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = Field((), description="rows that a newer version wrote, each with why it is left alone")
    brake: str | None = None


def findings(facts: Facts) -> tuple[Finding, ...]:
    """Everything looked at, in the order in which one would mend it."""
    return (*_redis(facts), *_parts(facts), *_clocks(facts), *_machine(facts), *_fleet(facts))


def _redis(facts: Facts) -> Iterator[Finding]:
    info = facts.redis
    if info is None:
        yield Finding(what="redis", level="bad", text=facts.redis_error or "does not answer", mend="start it, or correct REDIS_URL")
        return
    version = str(info.get("redis_version", "0"))
    parts = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    yield _judge("redis version", parts >= OLDEST_REDIS, version, "use Redis 6.2 or newer, or Valkey", "bad")
    durable = bool(info.get("aof_enabled"))
    yield _judge(
        "redis append-only file", durable, "on" if durable else "off", "set appendonly yes: a restart of Redis loses everything", "bad"
    )
    policy = str(info.get("maxmemory_policy", "noeviction"))
    keeps = policy == "noeviction"
    yield _judge("redis eviction", keeps, policy, "set maxmemory-policy noeviction: others throw rows away", "bad")
    limit, used = int(info.get("maxmemory", 0) or 0), int(info.get("used_memory", 0) or 0)
    room = not limit or used < 0.8 * limit
    said = f"{used >> 20} MiB used" + (f" of {limit >> 20}" if limit else ", no limit")
    yield _judge("redis memory", room, said, "raise maxmemory: without room Redis refuses writes and nothing is repaired", "warning")
    saved = [str(info.get(name, "ok")) for name in ("rdb_last_bgsave_status", "aof_last_write_status", "aof_last_bgrewrite_status")]
    written = all(status == "ok" for status in saved)
    mend = "free disk space where Redis keeps its data: it refuses writes (MISCONF) while it cannot save"
    yield _judge("redis saving", written, "ok" if written else "the last save failed", mend, "bad")


def _parts(facts: Facts) -> Iterator[Finding]:
    if facts.traces is None:
        return
    age_s = tick_age_s(facts.traces)
    ticking = age_s is not None and age_s <= TICK_LATE_S
    said = "never" if age_s is None else f"{age_s:.0f} s ago"
    yield _judge("clock", ticking, f"last tick {said}", "start beat and the control worker (`recovery up`, or beat and control)", "bad")
    for name, beat in sorted(facts.traces.hosts.items()):
        why = deaf(beat, facts.traces.now)
        yield _judge(
            f"host {name}", why is None, why or "takes tasks", f"restart the worker of {name} (`recovery host`); its models serve on", "bad"
        )
        for instance, problem in sorted(dict(beat.get("problems") or {}).items()):
            yield Finding(what=f"host {name}", level="bad", text=f"{instance}: {problem}", mend="the text says what to do")
    if not facts.traces.hosts:
        yield Finding(what="hosts", level="bad", text="none has ever joined", mend="start `recovery up`, or `recovery host` on a GPU host")


def _clocks(facts: Facts) -> Iterator[Finding]:
    for name, beat in sorted(facts.traces.hosts.items()) if facts.traces is not None else ():
        if "wall" in beat and facts.traces is not None:
            skew_s = float(beat["wall"]) - (facts.traces.now - float(beat.get("age_s", 0.0)))
            right = abs(skew_s) <= SKEW_WARN_S
            yield _judge(f"clock of {name}", right, f"{skew_s:+.1f} s against Redis", f"run an NTP client on {name}", "warning")


def _machine(facts: Facts) -> Iterator[Finding]:
    if facts.disk_free is not None:
        roomy = facts.disk_free >= DISK_LOW_BYTES
        said = f"{facts.disk_free >> 20} MiB free at {facts.home}"
        yield _judge("disk", roomy, said, "free space: logs and records of runs are written there", "warning")
    if facts.nvidia_device:
        seen = facts.driver is not None and facts.cards > 0
        said = f"driver {facts.driver}, {facts.cards} cards" if seen else "there are NVIDIA devices, but NVML does not answer"
        yield _judge(
            "gpu", seen, said, "install the `gpu` extra (nvidia-ml-py), and look at nvidia-smi: driver and library must match", "warning"
        )
    if facts.flower_open is not None:
        yield Finding(what="flower", level="bad", text=facts.flower_open, mend="set FLOWER_BASIC_AUTH, unset FLOWER_UNAUTHENTICATED_API")
    for name in facts.unknown_settings:
        yield Finding(what="settings", level="warning", text=f"{name} is no setting of ours", mend="correct its spelling, or unset it")
    for problem in facts.port_problems:
        yield Finding(what="ports", level="bad", text=problem, mend="give each its own port")


def _fleet(facts: Facts) -> Iterator[Finding]:
    for problem in facts.fleet_problems:
        yield Finding(
            what="fleet file", level="bad", text=problem, mend="correct it (`recovery validate FILE`); the last good one stays in force"
        )
    for text in facts.unreadable:
        yield Finding(what="row", level="bad", text=text, mend="`pip install` the newer version here, then `recovery workers restart`")
    for text in facts.failed:
        yield Finding(what="model", level="bad", text=text, mend="`recovery incidents`, then `recovery reset MODEL` once it is mended")
    if facts.brake is not None:
        yield Finding(what="brake", level="warning", text=facts.brake, mend="mend the common cause; `recovery brake release` lifts it")


def _judge(what: str, well: bool, text: str, mend: str, level: Level) -> Finding:
    return Finding(what=what, level="ok", text=text) if well else Finding(what=what, level=level, text=text, mend=mend)
