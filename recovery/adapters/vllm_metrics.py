"""
Reads the text of a vLLM server's `/metrics` (VLLM-FACTS.md, section d), and keeps what it says in Redis.

Labels `engine` and `model_name` are added up. Older releases named the cache gauge `gpu_cache_usage_perc`.
"""

import math
import re
from collections.abc import Iterable

from pydantic import ValidationError

from recovery.core.summary import Memory, Traffic, remember
from recovery.ports import Store

KEY = "traffic:"
KEPT_S = 600.0
"""A server that is not looked at any more is forgotten after this long."""

_GAUGES = {"vllm:num_requests_running": "running", "vllm:num_requests_waiting": "waiting"}
_CACHE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
_HISTOGRAMS = {"vllm:time_to_first_token_seconds": "ttft", "vllm:e2e_request_latency_seconds": "e2e"}
_FINISHED = "vllm:request_success"
_NAMES = (*_GAUGES, *_CACHE, f"{_FINISHED}_total", *(f"{name}_bucket" for name in _HISTOGRAMS))
_SAMPLE = re.compile(rf"({'|'.join(_NAMES)})" r"(\{(?:[^\"}]|\"(?:[^\"\\]|\\.)*\")*\})?[ \t]+(\S+)")
"""Only what is read here: a parser of everything takes a millisecond of CPU, and this runs at every look."""


def parse(text: str, at: float, run: int) -> Traffic | None:
    """Return what the text says; None when it is not vLLM's or cannot be read."""
    try:
        return _parse(text, at, run)
    except ValueError:  # the parser's word for text that is not in the format
        return None


def _parse(text: str, at: float, run: int) -> Traffic | None:
    gauges: dict[str, float] = {}
    usage: float | None = None
    buckets: dict[str, dict[str, float]] = {"ttft": {}, "e2e": {}}
    finished: dict[str, float] = {}
    for sample in filter(None, map(_SAMPLE.match, (line for line in text.split("\n") if line.startswith(_NAMES)))):
        name, labels, number = sample.groups(default="")
        value = float(number)
        if not math.isfinite(value):
            continue
        if name in _GAUGES:
            gauges[_GAUGES[name]] = gauges.get(_GAUGES[name], 0.0) + value
        elif name in _CACHE:
            usage = max(usage or 0.0, value)
        elif name == f"{_FINISHED}_total":
            reason = _label("finished_reason", labels)[:20]
            finished[reason] = finished.get(reason, 0.0) + value
        elif name.removesuffix("_bucket") in _HISTOGRAMS:
            held, bound = buckets[_HISTOGRAMS[name.removesuffix("_bucket")]], _label("le", labels)
            held[bound] = held.get(bound, 0.0) + value
    if not gauges:
        return None
    return Traffic(at=at, run=run, kv_cache_usage=usage, ttft=buckets["ttft"], e2e=buckets["e2e"], finished=finished, **gauges)


def _label(name: str, labels: str) -> str:
    found = re.search(rf'(?:^|[,{{ ]){name}="((?:[^"\\]|\\.)*)"', labels)
    return found[1] if found else "unknown"


class TrafficKeeper:
    """Keeps each instance's traffic where every API process finds it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._held: dict[str, Memory] = {}

    def take(self, instance: str, run: int, text: str) -> None:
        """Note what a look read; text of a server that is not vLLM's is passed over. Raises `StoreUnavailableError`."""
        look = parse(text, self._store.now(), run)
        if look is None:
            return
        kept = self._held[instance] = remember(self._held.get(instance), look)
        self._store.put(f"{KEY}{instance}", kept.model_dump(mode="json"), KEPT_S)

    def forget(self, instances: Iterable[str]) -> None:
        """Drop what is held of instances that are gone."""
        for instance in instances:
            self._held.pop(instance, None)


def memories(store: Store) -> dict[str, Memory]:
    """Return what is kept of every instance; what an older version wrote otherwise is passed over."""
    found: dict[str, Memory] = {}
    for key, raw in store.get_many(KEY).items():
        try:
            found[key.removeprefix(KEY)] = Memory.model_validate(raw)
        except ValidationError:
            continue
    return found
