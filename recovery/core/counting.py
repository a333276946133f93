"""
The counters a decision adds to: the one place that names them, their labels and their buckets.

Each function returns the `Count` values to put into a `Commit` (or into `Store.count`). They are kept in Redis and
only ever rise, so a scrape gives the same answer whichever process is asked. Labels are few and bounded: models and
hosts come from the fleet file, causes and kinds from the diagnosis.

A histogram is kept as one counter per bucket (an observation adds to the one bucket it falls into, so an
observation costs two additions) and is made cumulative when it is read, by `histogram`.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from recovery.core.change import Count

Labels = tuple[tuple[str, str], ...]
Counters = Mapping[tuple[str, Labels], float]

RESTARTS = "recovery_restarts_total"
FAILURES = "recovery_failures_total"
INCIDENTS = "recovery_incidents_closed_total"
OOMS = "recovery_oom_total"
TIME_TO_DETECT = "recovery_time_to_detect_seconds"
TIME_TO_READY = "recovery_time_to_ready_seconds"
TIME_TO_RECOVER = "recovery_time_to_recover_seconds"

HELP: Mapping[str, str] = {
    RESTARTS: "Restarts of a model's instances, by the cause that led to them and by who asked",
    FAILURES: "Failures seen, by kind, one per run",
    INCIDENTS: "Incidents closed, by cause and outcome",
    OOMS: "Runs that ended out of memory, on the GPU or on the host",
    TIME_TO_DETECT: "Seconds from a failure to the commit that saw it, by cause",
    TIME_TO_READY: "Seconds from the start of a server process to its first real answer",
    TIME_TO_RECOVER: "Seconds from a failure to the first real answer of the run that replaced it and lasted, by the incident's cause",
}
"""Every counter and what it says; the scrape prints these and nothing else."""

BUCKETS_S: Mapping[str, tuple[float, ...]] = {
    # A watched exit is seen in milliseconds, a hang after two looks: from 10 ms to a few minutes.
    TIME_TO_DETECT: (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
    # From a tiny model on a CPU to 11-minute loads of large ones.
    TIME_TO_READY: (1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600, 1200, 2400),
    TIME_TO_RECOVER: (1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600, 1200, 2400),
}
"""Upper bounds of the histograms' buckets, in seconds; the last bucket, "+Inf", is implied."""
BY_CAUSE = frozenset({TIME_TO_DETECT, TIME_TO_RECOVER})
"""Histograms with a label `cause` beside `model`."""

INF = "+Inf"


def restarted(model: str, host: str, cause: str, *, manual: bool = False) -> tuple[Count, ...]:
    """One restart committed: `cause` is the incident's, `manual` when an operator asked for it."""
    return (_count(RESTARTS, model=model, host=host, cause=cause, by="operator" if manual else "policy"),)


def failed(model: str, host: str, kind: str) -> tuple[Count, ...]:
    """One failure committed (a run ended, hung or did not come up): `kind` is a cause of the diagnosis."""
    return (_count(FAILURES, model=model, host=host, kind=kind),)


def out_of_memory(model: str, host: str, where: Literal["gpu", "host"]) -> tuple[Count, ...]:
    """One run that ended for lack of memory."""
    return (_count(OOMS, model=model, host=host, where=where),)


def incident_closed(model: str, cause: str, outcome: str) -> tuple[Count, ...]:
    """One incident closed: `outcome` is `recovered`, `failed`, `stopped` or another word of the few in use."""
    return (_count(INCIDENTS, model=model, cause=cause, outcome=outcome),)


def detected(model: str, cause: str, seconds: float) -> tuple[Count, ...]:
    """One failure seen `seconds` after it happened (0 when the clocks say less)."""
    return _observe(TIME_TO_DETECT, seconds, model=model, cause=cause)


def ready(model: str, seconds: float) -> tuple[Count, ...]:
    """One run that answered for the first time `seconds` after its process started."""
    return _observe(TIME_TO_READY, seconds, model=model)


def recovered(model: str, cause: str, seconds: float) -> tuple[Count, ...]:
    """One outage over: the run that lasted answered `seconds` after the first one failed."""
    return _observe(TIME_TO_RECOVER, seconds, model=model, cause=cause)


class Histogram(NamedTuple):
    """One histogram of one model (and one cause, where the name has that label) as Prometheus wants it."""

    model: str
    cause: str
    buckets: tuple[tuple[str, float], ...]
    """(upper bound, observations at or below it), rising; the last bound is "+Inf"."""
    total_s: float


def histogram(counters: Counters, name: str) -> tuple[Histogram, ...]:
    """Return the histogram `name` of each set of labels that has observations, made cumulative, sorted."""
    bounds = (*(_bound(b) for b in BUCKETS_S[name]), INF)
    series = sorted({tuple(label for label in labels if label[0] != "le") for (kept, labels) in counters if kept == f"{name}_bucket"})
    found = []
    for own in series:
        rising, buckets = 0.0, []
        for bound in bounds:
            rising += counters.get((f"{name}_bucket", tuple(sorted((*own, ("le", bound))))), 0.0)
            buckets.append((bound, rising))
        named = dict(own)
        found.append(Histogram(named["model"], named.get("cause", ""), tuple(buckets), counters.get((f"{name}_sum", own), 0.0)))
    return tuple(found)


def _observe(name: str, seconds: float, **labels: str) -> tuple[Count, ...]:
    seconds = max(0.0, seconds)
    bound = next((_bound(b) for b in BUCKETS_S[name] if seconds <= b), INF)
    return (_count(f"{name}_bucket", 1.0, **labels, le=bound), _count(f"{name}_sum", seconds, **labels))


def _bound(bound: float) -> str:
    return str(float(bound))


def _count(name: str, by_s: float = 1.0, **labels: str) -> Count:
    """Labels are sorted, so that one series has one key whoever adds to it."""
    return Count(name=name, labels=tuple(sorted(labels.items())), by=by_s)
