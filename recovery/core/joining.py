"""
How a row comes to be, from the fleet file and from what its host's disk remembers.

Only the host's own worker makes rows. A Redis that lost everything is filled again from the disks: the higher
token wins, a live server is taken over, and nothing is started that a human stopped or a spent budget left down.
"""

from recovery.core.commanding import Command, Verb, on_command
from recovery.core.decision import Decision, due_at
from recovery.core.fleet import InstancePlan, ModelSpec, Placement, launch_digest
from recovery.core.host import HostRecord, HostView
from recovery.core.instance import Desired, Instance
from recovery.core.launch import Override
from recovery.core.states import AT_REST, State

RETIRED = "retired"
"""The rest of an instance whose model left the fleet file: should it come back, it begins like any new one, with higher tokens."""
RESTS = {state.value: state for state in AT_REST}


def new_row(
    plan: InstancePlan,
    spec: ModelSpec,
    *,
    digest: str,
    base_url: str | None,
    hosts: tuple[str, ...],
    view: HostView,
    known: bool,
    now: float,
) -> Instance:
    """
    The row of an instance that Redis does not know. `known` says whether the disk remembers it.

    New to both: wanted running when the file says `autostart`. Known to the disk: as the disk says.
    """
    record = view.record
    known = known and record.rest != RETIRED
    row = Instance(
        id=plan.id,
        model=plan.model,
        replica=plan.replica,
        policy=spec.policy,
        placement=_placement(plan.placement, record) if known else plan.placement,
        hosts=hosts,
        base_url=base_url,
        planned=plan.placement,
        spec_digest=digest,
        wanted=launch_digest(spec),
        entered_at=now,
        token=max(record.token + 1, int(now * 1e6)),
    )
    if not known:
        wanted = {"desired": Desired.RUNNING, "state": State.RESTARTING, "reason": "first start", **due_at(now)}
        return row.evolve(**wanted) if spec.autostart else row.evolve(reason="autostart is off")
    row = remembered(row, record)
    if view.server_alive and view.run is not None:
        state = State.STARTING if record.desired == "running" else State.STOPPING
        alive = {"run": view.run.token, "token": max(record.token, view.run.token), "spawned_at": now, "state": state, "look_at": now}
        row = row.evolve(**alive, desired=record.desired, reason="found alive on its host", last_ended=record.last_ended)
        return row.evolve(look_at=None, **due_at(now)) if state is State.STOPPING else row
    if record.desired == "running" and record.rest not in RESTS and view.run is not None and view.run.token > record.last_ended:
        # It ended while nobody could say so. As a live row its end is accounted for like any other.
        alive = {"run": view.run.token, "token": max(record.token, view.run.token), "last_ended": record.last_ended, "spawned_at": now}
        return row.evolve(**alive, desired=Desired.RUNNING, state=State.STARTING, look_at=now, reason="its last run has ended unseen")
    if record.desired == "stopped":
        return row.evolve(desired=Desired.STOPPED, state=State.STOPPED, last_ended=record.token, reason="stopped, as its host remembers")
    if record.rest in RESTS:
        why = f"{record.why} (as its host remembers)" if record.why else "as its host remembers"
        return row.evolve(desired=record.desired, state=RESTS[record.rest], last_ended=record.token, reason=why)
    if spec.policy.max_restarts and row.used >= spec.policy.max_restarts and record.last_ended >= record.token:
        return row.evolve(
            desired=Desired.RUNNING, state=State.FAILED, last_ended=record.token, reason="budget spent, as its host remembers"
        )
    return row.evolve(
        desired=Desired.RUNNING, state=State.RESTARTING, last_ended=record.last_ended, reason="found down on its host", **due_at(now)
    )


def remembered(row: Instance, record: HostRecord) -> Instance:
    """The row raised to what the host has seen: the higher token and the larger use of the budget win."""
    changes: dict[str, object] = {}
    if record.token > row.token:
        changes["token"] = record.token
    if record.forgiven > row.forgiven:
        changes |= {"used": record.used, "attempt": record.attempt, "manual": record.manual, "forgiven": record.forgiven}
    elif record.forgiven == row.forgiven:
        for name in ("used", "attempt", "manual"):
            if getattr(record, name) > getattr(row, name):
                changes[name] = getattr(record, name)
    if record.restarts_total > row.restarts_total:
        changes["restarts_total"] = record.restarts_total
    if record.overrides and not row.overrides and record.forgiven >= row.forgiven:
        changes["overrides"] = tuple(Override.model_validate(raw) for raw in record.overrides)
    return row.evolve(**changes) if changes else row


def caught_up(row: Instance, record: HostRecord, now: float) -> Instance:
    """
    The row raised to what the host has seen, with the wish that came with a higher token.

    Every command raises the token, and the host writes both down before it acts. So when Redis lost the second in which
    the operator stopped or started an instance, the host still knows, and the stop stays a stop.
    """
    after = remembered(row, record)
    if record.token <= row.token or record.desired == row.desired.value:
        return after
    verb = Verb.STOP if record.desired == "stopped" else Verb.START
    decision = on_command(after, Command(verb=verb, by="its host"), now)
    return decision.after if isinstance(decision, Decision) else after


def recorded(row: Instance, record: HostRecord, *, started_at: float | None = None) -> HostRecord:
    """The host's record brought up to the row; `started_at` adds a start (Unix seconds). A row that is behind keeps its wish to itself."""
    starts = record.starts if record.forgiven == row.forgiven else ()
    rest = row.state.value if row.state in AT_REST else None
    return record.model_copy(
        update={
            "token": max(record.token, row.token),
            "desired": record.desired if record.token > row.token else row.desired.value,
            "last_ended": max(record.last_ended, row.last_ended),
            "starts": (*starts, started_at)[-1000:] if started_at is not None else starts,
            "overrides": tuple(override.model_dump(mode="json") for override in row.overrides),
            "used": row.used,
            "attempt": row.attempt,
            "manual": row.manual,
            "restarts_total": row.restarts_total,
            "forgiven": row.forgiven,
            "rest": rest,
            "why": row.reason[:300].removesuffix(" (as its host remembers)") if rest is not None else None,
            "port": row.placement.port,
            "gpus": row.placement.gpus,
        }
    )


def forgotten(record: HostRecord) -> HostRecord:
    """What the host remembers of an instance whose model left the fleet file: that its tokens must go on rising."""
    return HostRecord(token=record.token, last_ended=record.token, rest=RETIRED)


def changed(
    row: Instance, planned: InstancePlan, spec: ModelSpec, *, digest: str, base_url: str | None, hosts: tuple[str, ...]
) -> Decision | None:
    """The decision that brings a changed fleet file's policy into the row; None when nothing changed."""
    after = _respecified(row, planned, spec, digest=digest, base_url=base_url, hosts=hosts)
    return Decision(after=after, reason="the fleet file changed") if after is not None else None


def retired(row: Instance, now: float) -> Decision | None:
    """A model that left the fleet file is stopped in good order."""
    decision = on_command(row, Command(verb=Verb.STOP, by="fleet file"), now)
    return decision if isinstance(decision, Decision) else None


def hindered(row: Instance, why: str) -> Decision | None:
    """Its host cannot do anything about it now, and says why; None where the row says so, or is at rest for a reason of its own."""
    return None if row.state in AT_REST or row.reason == why else Decision(after=row.evolve(reason=why), reason=why)


def _respecified(
    row: Instance, planned: InstancePlan, spec: ModelSpec, *, digest: str, base_url: str | None, hosts: tuple[str, ...]
) -> Instance | None:
    """The row with a changed fleet file's policy; None when nothing changed. A live server keeps its port and arguments."""
    wanted = launch_digest(spec)
    changes: dict[str, object] = {"policy": spec.policy, "spec_digest": digest, "hosts": hosts, "wanted": wanted}
    if row.run is None and row.planned != planned.placement:
        changes |= {"placement": planned.placement, "planned": planned.placement, "base_url": base_url}
    after = row.evolve(**changes)
    return None if after == row else after


def last_place(planned: InstancePlan, record: HostRecord) -> tuple[Placement, tuple[Override, ...]]:
    """Where and with which changed flags the last start of an instance was made, as its host remembers."""
    return _placement(planned.placement, record), tuple(Override.model_validate(raw) for raw in record.overrides)


def _placement(planned: Placement, record: HostRecord) -> Placement:
    """The plan, with the port and GPUs the last start really used."""
    changes: dict[str, object] = {}
    if record.port is not None and planned.port is not None:
        changes["port"] = record.port
    if record.gpus is not None:
        changes["gpus"] = record.gpus
    return planned.model_copy(update=changes)
