"""An incident as a human reads it: what happened, how long each part of it took, what was done, and what there was to see."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from recovery.core.change import Incident

Clock = Callable[[float], str]
LOG_LINES = 30
SEEN = {"failed": "failed", "started": "started", "ready": "answered"}


def post_mortem(incident: Incident, evidence: Mapping[str, Any], clock: Clock, advice: str = "") -> Iterator[str]:
    """Return the lines; `clock` writes an instant (Unix seconds) as the reader's time of day."""
    yield f"{incident.id}: {incident.cause} of {incident.instance} on {incident.host}, {_outcome(incident)}"
    yield ""
    yield "What happened"
    yield f"  cause     {incident.cause}"
    if line := incident.evidence.get("line"):
        yield f"  seen in   {line}"
    yield f"  answer    {incident.reason}"
    if advice:
        yield f"  advice    {advice}"
    yield ""
    yield "How long it took"
    yield from _times(incident, clock)
    yield ""
    yield "What was done"
    for step in incident.steps:
        yield from _step(step, clock)
    if evidence:
        yield ""
        yield from _evidence(evidence)


def spans(incident: Incident) -> dict[str, float | None]:
    """Seconds from the failure to each moment of the repair; None where it was not reached."""
    since = incident.failed_at if incident.failed_at is not None else incident.opened_at
    moments = {
        "detected": incident.detected_at,
        "started again": incident.started_at,
        "first good token": incident.ready_at,
        "validated": incident.validated_at,
        "closed": incident.closed_at,
    }
    return {name: None if at is None else max(0.0, at - since) for name, at in moments.items()}


def _outcome(incident: Incident) -> str:
    down = spans(incident)["first good token"]
    words = {None: "still open", "recovered": "recovered by itself", "failed": "given up", "stopped": "stopped by the operator"}
    said = words.get(incident.outcome, incident.outcome or "")
    return f"{said}, down {down:.1f} s" if down is not None and incident.outcome == "recovered" else said


def _times(incident: Incident, clock: Clock) -> Iterator[str]:
    since = incident.failed_at if incident.failed_at is not None else incident.opened_at
    yield f"  {clock(since)}  failed"
    for name, seconds in spans(incident).items():
        yield f"  {'':>{len(clock(since))}}  {name}: " + ("not reached" if seconds is None else f"after {seconds:.2f} s")


def _step(step: Mapping[str, Any], clock: Clock) -> Iterator[str]:
    kind = str(step.get("kind", ""))
    head = f"  {clock(float(step['at']))}  "
    what = " ".join(str(step[key]) for key in ("what", "why") if step.get(key))
    if kind in SEEN:
        yield f"{head}{SEEN[kind]}: {what}"
        return
    yield f"{head}{kind}: {what}"
    told = [f"outcome: {step['outcome']}"] if step.get("outcome") else []
    told += [f"task {step['task']}"] if step.get("task") else []
    if told:
        yield f"  {'':>{len(head) - 2}}{', '.join(told)}"


def _evidence(evidence: Mapping[str, Any]) -> Iterator[str]:
    yield f"What there was to see (run {evidence.get('run', 'unknown')}, the first that failed)"
    for name in ("arguments", "overrides"):
        if evidence.get(name):
            yield f"  {name:<10}{'; '.join(map(str, evidence[name]))}"
    if versions := evidence.get("versions"):
        yield "  versions  " + ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    if port := evidence.get("port"):
        holder = port.get("held_by")
        yield f"  port      {port.get('port')}, " + (f"held by {holder['name']} (pid {holder['pid']})" if holder else "free")
    yield from _cards(evidence.get("gpu") or (), evidence.get("xids") or ())
    if metrics := evidence.get("metrics"):
        yield f"  metrics   {_short(metrics)}"
    if probe := evidence.get("probe"):
        yield f"  probes    {probe.get('failures', 0)} failed in a row; {probe.get('message') or 'no complaint'}"
    for each in evidence.get("processes") or ():
        yield f"  process   {each['pid']} {each['name']} ({each['state']}), {each.get('rss', 0) / 2**20:.0f} MiB"
    if evidence.get("ended_by_keeper"):
        yield f"  process   {evidence['ended_by_keeper']} more were ended with the server"
    if log := evidence.get("log"):
        yield f"  log, the last {min(len(log), LOG_LINES)} of {len(log)} lines kept:"
        yield from (f"    {line.rstrip()}" for line in log[-LOG_LINES:])


def _cards(cards: Sequence[Mapping[str, Any]], xids: Sequence[int]) -> Iterator[str]:
    for card in cards:
        used, total = card.get("used_bytes", 0) / 2**30, card.get("total_bytes", 0) / 2**30
        state = "lost" if card.get("lost") else f"{used:.1f} of {total:.1f} GiB used"
        yield f"  GPU {card.get('index')}     {card.get('name') or 'unnamed'}, {state}"
    if xids:
        yield f"  Xid       {', '.join(map(str, xids))}"


def _short(value: Any) -> str:
    """Numbers of a nested document on one line: `look.running 1, look.waiting 0`; long parts are left out."""
    if not isinstance(value, Mapping):
        return str(value)
    flat = [(name, each) for name, each in value.items() if isinstance(each, int | float | str) or each is None]
    nested = [(f"{name}.{inner}", each) for name, part in value.items() if isinstance(part, Mapping) for inner, each in part.items()]
    return ", ".join(f"{name} {each}" for name, each in (*flat, *nested) if isinstance(each, int | float))[:300]
