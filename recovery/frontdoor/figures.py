"""
A door's figures, kept where the management API finds them: requests held, retried, continued, refused, and latencies.

Prometheus reads the door's own `/metrics`; the status page, which may be on another machine, reads this.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from recovery.core.passing import KEY, Latencies, Passed, Windows
from recovery.errors import RecoveryError
from recovery.frontdoor.meters import Histogram, Meters, ModelMeter
from recovery.ports import Store

log = logging.getLogger(__name__)

EVERY_S = 10.0
AGAIN_S = 60.0
"""A door without traffic says the same again so often."""
KEPT_S = 150.0


class Figures:
    """Tells one door's figures every few seconds from a thread of its own, as long as there is anything to tell."""

    def __init__(self, store: Store, door: str, every_s: float = EVERY_S) -> None:
        self._store, self._door, self._every_s = store, door, every_s
        self._stop = threading.Event()
        self._windows = Windows()

    def start(self, meters: Meters) -> None:
        """Begin; comes back at once."""
        threading.Thread(target=self._tell, args=(meters,), name="figures", daemon=True).start()

    def stop(self) -> None:
        """End; what was told last is forgotten by itself."""
        self._stop.set()

    def _tell(self, meters: Meters) -> None:
        told: dict[str, Any] = {}
        told_at = 0.0
        while not self._stop.wait(self._every_s):
            now = time.monotonic()
            passed = {name: each.model_dump(mode="json") for name, each in passed_of(meters, self._windows, now).items()}
            if not passed or (passed == told and now - told_at < AGAIN_S):
                continue
            try:
                self._store.put(f"{KEY}{self._door}", passed, KEPT_S)
                told, told_at = passed, now
            except RecoveryError as error:
                log.debug("figures are not told: %s", error)


def passed_of(meters: Meters, windows: Windows, now: float) -> Mapping[str, Passed]:
    """Return the figures of each model that was ever asked for. Every dict is copied first: the loop's thread goes on."""
    found = {}
    for name, meter in list(meters.models.items()):
        replicas = list(meter.replicas.values())
        codes: Counter[str] = Counter()
        for replica in replicas:
            codes.update({str(code): count for code, count in list(replica.codes.items())})
        if not codes and not meter.held and not meter.fallback:
            continue
        look = Latencies(
            ttft=_together(replica.ttft for replica in replicas),
            inter_token=_together(replica.inter_token for replica in replicas),
            e2e=_together(replica.e2e for replica in replicas),
        )
        found[name] = Passed(codes=codes, **_counts(meter), window=windows.take(name, now, look))
    return found


def _counts(meter: ModelMeter) -> dict[str, float]:
    sums = {name: float(sum(list(getattr(meter, name).values()))) for name in ("retried", "continued", "cut", "refused", "fallback")}
    sums["refused"] += meter.poisoned
    return {**sums, "held": meter.held, "holding": meter.holding}


def _together(histograms: Iterable[Histogram]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for histogram in histograms:
        total.update(dict(histogram.buckets()))
    return dict(total)
