"""
Counters and histograms of the data path: plain integers here, Prometheus only when somebody asks.

An increment costs a tenth of a microsecond; `prometheus_client`'s own cost ten times that, per token.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Histogram:
    """Observations in seconds, counted per bucket."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as Prometheus wants them."""
        seen, out = 0, []
        for bound, count in zip([*map(str, self.bounds), "+Inf"], list(self.counts), strict=True):
            seen += count
            out.append((bound, float(seen)))
        return out


class ReplicaMeter:
    """One replica's share."""

    __slots__ = ("codes", "e2e", "in_flight", "inter_token", "stalls", "tokens", "ttft", "up")

    def __init__(self) -> None:
        self.codes: Counter[int] = Counter()
        self.ttft, self.inter_token, self.e2e = Histogram(LATENCY_S), Histogram(TOKEN_S), Histogram(LATENCY_S)
        self.tokens = self.stalls = self.in_flight = 0
        self.up = False


class ModelMeter:
    """One model's share: what happened to requests apart from any replica."""

    __slots__ = ("continued", "cut", "fallback", "held", "holding", "lost_clients", "poisoned", "refused", "replicas", "retried")

    def __init__(self) -> None:
        self.held = self.holding = self.poisoned = self.lost_clients = 0
        self.retried: Counter[str] = Counter()
        self.continued: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.cut: Counter[str] = Counter()
        self.fallback: Counter[str] = Counter()
        self.replicas: dict[str, ReplicaMeter] = {}

    def replica(self, instance: str) -> ReplicaMeter:
        """The replica's meter, made at first sight; `""` stands for "no replica"."""
        meter = self.replicas.get(instance)
        if meter is None:
            meter = self.replicas[instance] = ReplicaMeter()
        return meter


class Meters:
    """All of a door's meters; a Prometheus collector."""

    def __init__(self) -> None:
        self.models: dict[str, ModelMeter] = {}
        self.connections = 0
        self.refused: Counter[int] = Counter()

    def model(self, name: str) -> ModelMeter:
        if name not in self.models:
            self.models[name] = ModelMeter()
        return self.models[name]

    def describe(self) -> list[Metric]:
        """Nothing in advance: names depend on no state, and a registry would otherwise collect at registration."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families; read from the metrics server's thread, so every dict is copied first."""
        yield GaugeMetricFamily("recovery_frontdoor_connections", "Client connections open", value=self.connections)
        turned = CounterMetricFamily("recovery_frontdoor_turned_away", "Answered by the door itself with an error", labels=["code"])
        for code, n in list(self.refused.items()):
            turned.add_metric([str(code)], n)
        yield turned
        yield from self._per_model()
        yield from self._per_replica()

    def _per_model(self) -> Iterator[Metric]:
        held = CounterMetricFamily("recovery_frontdoor_held", "Requests that waited for a replica", labels=["model"])
        holding = GaugeMetricFamily("recovery_frontdoor_holding", "Requests waiting now", labels=["model"])
        poisoned = CounterMetricFamily("recovery_frontdoor_poisoned", "Requests refused for two crashes", labels=["model"])
        gone = CounterMetricFamily("recovery_frontdoor_client_gone", "Clients that left before the answer", labels=["model"])
        kinds = {
            "retried": CounterMetricFamily("recovery_frontdoor_retried", "Attempts after the first", labels=["model", "reason"]),
            "continued": CounterMetricFamily("recovery_frontdoor_continued", "Streams continued, by ids or text", labels=["model", "by"]),
            "refused": CounterMetricFamily("recovery_frontdoor_refused", "Requests refused", labels=["model", "reason"]),
            "cut": CounterMetricFamily("recovery_frontdoor_cut", "Streams ended with an error event", labels=["model", "reason"]),
            "fallback": CounterMetricFamily("recovery_frontdoor_fallback", "Requests served by another model", labels=["model", "by"]),
        }
        for name, meter in list(self.models.items()):
            held.add_metric([name], meter.held)
            holding.add_metric([name], meter.holding)
            poisoned.add_metric([name], meter.poisoned)
            gone.add_metric([name], meter.lost_clients)
            for kind, family in kinds.items():
                for label, n in list(getattr(meter, kind).items()):
                    family.add_metric([name, label], n)
        yield from (held, holding, poisoned, gone, *kinds.values())

    def _per_replica(self) -> Iterator[Metric]:
        both = ["model", "replica"]
        requests = CounterMetricFamily("recovery_frontdoor_requests", "Requests answered", labels=[*both, "code"])
        tokens = CounterMetricFamily("recovery_frontdoor_stream_events", "Stream events passed on", labels=both)
        stalls = CounterMetricFamily("recovery_frontdoor_stalls", "Streams silent over their time-out", labels=both)
        busy = GaugeMetricFamily("recovery_frontdoor_in_flight", "Requests at the replica", labels=both)
        up = GaugeMetricFamily("recovery_frontdoor_replica_up", "1 when the replica gets requests", labels=both)
        ttft = HistogramMetricFamily("recovery_frontdoor_ttft_seconds", "Request to first event", labels=both)
        inter = HistogramMetricFamily("recovery_frontdoor_inter_token_seconds", "Between events of a stream", labels=both)
        e2e = HistogramMetricFamily("recovery_frontdoor_e2e_seconds", "Request to its end", labels=both)
        for name, model in list(self.models.items()):
            for instance, meter in list(model.replicas.items()):
                labels = [name, instance]
                for code, n in list(meter.codes.items()):
                    requests.add_metric([*labels, str(code)], n)
                tokens.add_metric(labels, meter.tokens)
                stalls.add_metric(labels, meter.stalls)
                busy.add_metric(labels, meter.in_flight)
                up.add_metric(labels, float(meter.up))
                for family, histogram in ((ttft, meter.ttft), (inter, meter.inter_token), (e2e, meter.e2e)):
                    family.add_metric(labels, histogram.buckets(), histogram.total)
        yield from (requests, tokens, stalls, busy, up, ttft, inter, e2e)
