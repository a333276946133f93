"""
What Prometheus reads: a collector that asks the store at each scrape.

Nothing is counted in this process. Any API process gives the same answer, a restart of one loses nothing, and counters
never fall: they are kept in Redis by the commits that count (`core/counting.py`). Labels are bounded: models, instances
and hosts of the fleet file, causes of the diagnosis, states.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from recovery.adapters.vllm_metrics import memories
from recovery.core import counting
from recovery.core.instance import Desired, Instance
from recovery.core.states import State
from recovery.core.summary import Load, load_of
from recovery.core.view import ModelView, by_model, model_view
from recovery.core.watching import deaf_hosts
from recovery.ports import Store
from recovery.queues import CONTROL_QUEUE, host_queue


class FleetCollector(Collector):
    """Everything about the fleet, as it is in Redis at this moment. `collect` raises `StoreUnavailableError`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        """Ask the store once, then give every series."""
        store = self._store
        rows, beats, counters = store.load_all(), store.known_hosts(), store.counters()
        kept, ticked = memories(store), store.get("tick")
        unreadable = max(0, len(store.ids()) - len(rows))
        depths = store.queue_depths([CONTROL_QUEUE, *(host_queue(host) for host in sorted(beats))])
        now = store.now()

        grouped = by_model(rows)
        alive = {host for host, beat in beats.items() if beat.get("alive", True)}
        models = [model_view(own, now, alive) for own in grouped.values()]
        loads = {model: load_of((kept[row.id] for row in own if row.id in kept), now) for model, own in grouped.items()}

        yield from _specified(models, counters)
        yield from _models(models)
        yield from _instances(rows, now)
        yield from _counters(_from_zero(rows, counters))
        yield from _traffic({model: load for model, load in loads.items() if load is not None})
        yield from _hosts(beats, now)
        yield from _machinery(ticked, depths, now)
        yield _gauge("recovery_rows_unreadable", "Instances left alone, since a newer version wrote their rows", [], [[unreadable]])


def _specified(models: Sequence[ModelView], counters: counting.Counters) -> Iterator[Metric]:
    """The specification's three, under its names and its label."""
    restarts: dict[str, float] = {model.id: 0.0 for model in models}
    for (name, labels), value in counters.items():
        if name == counting.RESTARTS:
            model = dict(labels)["model"]
            restarts[model] = restarts.get(model, 0.0) + value
    counter = CounterMetricFamily("fluidmcp_server_restarts", "Restarts of a model's servers, automatic and manual", labels=["server"])
    for model, count in sorted(restarts.items()):
        counter.add_metric([model], count)
    yield counter
    yield _gauge(
        "fluidmcp_server_status",
        "1 = at least one replica is ready, 0 = none is",
        ["server"],
        ([m.id, float(m.is_healthy)] for m in models),
    )
    yield _gauge(
        "fluidmcp_server_uptime_seconds",
        "Seconds since the youngest running server of a model was started; absent while none runs",
        ["server"],
        ([m.id, m.uptime_seconds] for m in models if m.uptime_seconds is not None),
    )


def _models(models: Sequence[ModelView]) -> Iterator[Metric]:
    yield _gauge(
        "recovery_desired", "1 = the operator wants it to run", ["model"], ([m.id, float(m.desired is Desired.RUNNING)] for m in models)
    )
    yield _gauge("recovery_replicas", "Replicas of a model", ["model"], ([m.id, m.replicas] for m in models))
    yield _gauge("recovery_replicas_ready", "Replicas that are ready", ["model"], ([m.id, m.ready] for m in models))
    yield _gauge(
        "recovery_degraded",
        "1 = serves with flags that a repair changed",
        ["model"],
        ([m.id, float(m.degraded_since is not None)] for m in models),
    )


def _instances(rows: Sequence[Instance], now: float) -> Iterator[Metric]:
    names = ["model", "instance", "host"]
    keys = {row.id: [row.model, row.id, row.placement.host] for row in rows}
    yield _gauge(
        "recovery_state",
        "1 for the state that an instance is in",
        [*names, "state"],
        ([*keys[row.id], row.state.value, 1.0] for row in rows),
    )
    waits = [row for row in rows if row.state is State.RESTARTING and row.desired is Desired.RUNNING]
    yield _gauge(
        "recovery_backoff_remaining_seconds",
        "Seconds until the next start of an instance that waits for one",
        names,
        ([*keys[row.id], max(0.0, row.not_before - now)] for row in waits),
    )
    yield _gauge(
        "recovery_budget_left",
        "Automatic restarts left; absent without a limit",
        names,
        ([*keys[row.id], max(0, row.policy.max_restarts - row.used)] for row in rows if row.policy.max_restarts),
    )
    yield _gauge(
        "recovery_attempt", "Failures since a stable time: what the backoff grows by", names, ([*keys[row.id], row.attempt] for row in rows)
    )
    yield _gauge(
        "recovery_probe_duration_seconds",
        "How long the last look at a server took",
        names,
        ([*keys[row.id], row.probe.duration_s] for row in rows if row.probe.duration_s is not None),
    )
    yield _gauge(
        "recovery_probe_failures",
        "Failed looks in a row",
        names,
        ([*keys[row.id], row.probe.failures] for row in rows if row.run is not None),
    )


def _from_zero(rows: Sequence[Instance], counters: counting.Counters) -> counting.Counters:
    """A series that first appears with a value has no increase in Prometheus, so what alerts rest on is told from zero."""
    ours = [count for row in rows for where in ("gpu", "host") for count in counting.out_of_memory(row.model, row.placement.host, where)]
    return {**{(count.name, count.labels): 0.0 for count in ours}, **counters}


def _counters(counters: counting.Counters) -> Iterator[Metric]:
    for name, text in counting.HELP.items():
        if name in counting.BUCKETS_S:
            by_cause = name in counting.BY_CAUSE
            histogram = HistogramMetricFamily(name, text, labels=["model", "cause"] if by_cause else ["model"])
            for each in counting.histogram(counters, name):
                own = [each.model, each.cause] if by_cause else [each.model]
                histogram.add_metric(own, list(each.buckets), each.total_s)
            yield histogram
            continue
        held = {labels: value for (kept, labels), value in counters.items() if kept == name}
        names = sorted({label for labels in held for label, _ in labels})
        family = CounterMetricFamily(name.removesuffix("_total"), text, labels=names)
        for labels, value in sorted(held.items()):
            family.add_metric([dict(labels).get(label, "") for label in names], value)
        yield family


def _traffic(loads: Mapping[str, Load]) -> Iterator[Metric]:
    """What the servers' own metrics say, over the last minute or two."""
    each = sorted(loads.items())
    yield _gauge("recovery_model_requests_running", "Requests in the engines", ["model"], ([m, load.running] for m, load in each))
    yield _gauge("recovery_model_requests_waiting", "Requests in the engines' queues", ["model"], ([m, load.waiting] for m, load in each))
    yield _gauge(
        "recovery_model_kv_cache_usage_ratio",
        "KV cache in use, of the fullest replica",
        ["model"],
        ([m, load.kv_cache_usage] for m, load in each if load.kv_cache_usage is not None),
    )
    yield _gauge(
        "recovery_model_ttft_seconds",
        "Time to first token of the last minute or two",
        ["model", "percentile"],
        ([m, _percentile(share), value] for m, load in each for share, value in load.ttft_s.items()),
    )
    yield _gauge(
        "recovery_model_e2e_seconds",
        "Duration of whole requests of the last minute or two",
        ["model", "percentile"],
        ([m, _percentile(share), value] for m, load in each for share, value in load.e2e_s.items()),
    )
    yield _gauge(
        "recovery_model_finished_requests",
        "Requests that finished in the last minute or two, by reason",
        ["model", "reason"],
        ([m, reason, count] for m, load in each for reason, count in sorted(load.finished.items())),
    )
    yield _gauge(
        "recovery_model_error_ratio",
        "Share of those that got no answer (error or abort)",
        ["model"],
        ([m, load.error_rate] for m, load in each if load.error_rate is not None),
    )


def _percentile(share: str) -> str:
    """`p95` for "0.95": Prometheus keeps the label `quantile` for its own summaries."""
    return f"p{float(share) * 100:g}"


def _hosts(beats: Mapping[str, Mapping[str, Any]], now: float) -> Iterator[Metric]:
    each = sorted(beats.items())
    yield _gauge(
        "recovery_host_up", "1 = the host has a fresh heartbeat", ["host"], ([h, float(bool(b.get("alive", True)))] for h, b in each)
    )
    yield _gauge("recovery_host_heartbeat_age_seconds", "Seconds since a host was heard from", ["host"], ([h, b["age_s"]] for h, b in each))
    yield _gauge(
        "recovery_host_clock_skew_seconds",
        "How far a host's clock is ahead of Redis' clock",
        ["host"],
        ([h, b["wall"] - (now - b["age_s"])] for h, b in each if isinstance(b.get("wall"), int | float)),
    )
    yield _gauge(
        "recovery_host_served_age_seconds",
        "Seconds since a task last came through a host's queue; rising while the host is up, its worker is deaf",
        ["host"],
        ([h, max(0.0, now - b["served_at"])] for h, b in each if b.get("served_at")),
    )
    deaf = deaf_hosts(beats, now)
    yield _gauge(
        "recovery_host_deaf",
        "1 = its worker beats but takes no tasks; it is started again by its part manager",
        ["host"],
        ([h, float(h in deaf)] for h, _ in each),
    )
    gpus = [(host, gpu) for host, beat in each for gpu in beat.get("gpus", ())]
    names = ["host", "gpu", "name"]
    keys = [[host, str(gpu["index"]), str(gpu.get("name", ""))] for host, gpu in gpus]
    cards = list(zip(keys, (gpu for _, gpu in gpus), strict=True))
    yield _gauge("recovery_gpu_memory_used_bytes", "GPU memory in use", names, ([*k, gpu.get("used_bytes", 0)] for k, gpu in cards))
    yield _gauge("recovery_gpu_memory_total_bytes", "GPU memory there is", names, ([*k, gpu.get("total_bytes", 0)] for k, gpu in cards))
    yield _gauge(
        "recovery_gpu_utilization_ratio",
        "Share of the last second or so that a kernel ran",
        names,
        ([*k, gpu["utilization"]] for k, gpu in cards if gpu.get("utilization") is not None),
    )
    yield _gauge(
        "recovery_gpu_lost", "1 = the driver no longer reaches the card", names, ([*k, float(bool(gpu.get("lost")))] for k, gpu in cards)
    )


def _machinery(ticked: Any, depths: Mapping[str, int], now: float) -> Iterator[Metric]:
    age = [[max(0.0, now - float(ticked))]] if isinstance(ticked, int | float) else []
    yield _gauge("recovery_tick_age_seconds", "Seconds since the clock last ticked; absent if it never did", [], age)
    yield _gauge("recovery_queue_depth", "Messages that wait in a queue", ["queue"], ([q, d] for q, d in sorted(depths.items())))


def _gauge(name: str, text: str, labels: list[str], samples: Any) -> GaugeMetricFamily:
    """A family from rows of label values followed by the value."""
    family = GaugeMetricFamily(name, text, labels=labels)
    for *values, value in samples:
        family.add_metric(values, value)
    return family
