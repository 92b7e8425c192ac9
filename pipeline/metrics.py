"""What a run tells Prometheus, through Ray's own metrics (infra/monitoring/ holds the dashboard that draws them)."""

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

NAMES = (
    "neuronlens_tokens",
    "neuronlens_samples",
    "neuronlens_bytes_written",
    "neuronlens_seconds",
    "neuronlens_shards",
    "neuronlens_workers",
)
ACTIVITIES = ("forward", "statistics", "write", "storage_wait", "work_wait")
"""What a collector's seconds go into: the model, the sums over its activations, storage, and the model standing idle
because storage is behind or because no shard was there."""


class CollectorMetrics:
    """Counted by each collector, a shard at a time."""

    def __init__(self, store: str) -> None:
        self._store = {"store": store}
        self._tokens = Counter(NAMES[0], "Tokens of committed shards.", ("store",))
        self._samples = Counter(NAMES[1], "Samples of committed shards.", ("store",))
        self._bytes = Counter(NAMES[2], "Bytes of committed files.", ("store", "kind"))
        self._seconds = Counter(NAMES[3], "What the collectors' seconds go into.", ("store", "activity"))

    def committed(self, receipt: Mapping[str, Any]) -> None:
        _add(self._tokens, receipt["n_tokens"], self._store)
        _add(self._samples, receipt["n_samples"], self._store)
        for file in receipt["files"]:
            _add(self._bytes, file["n_bytes"], self._store | {"kind": file["kind"]})
        for activity in ACTIVITIES:
            _add(self._seconds, receipt["seconds"].get(activity, 0.0), self._store | {"activity": activity})


class RunMetrics:
    """Set by the driver, whenever it looks."""

    def __init__(self, store: str) -> None:
        self._store = {"store": store}
        self._shards = Gauge(NAMES[4], "Shards of the plan by state.", ("store", "state"))
        self._workers = Gauge(NAMES[5], "Collectors by state.", ("store", "state"))

    def set(self, *, shards: Mapping[str, int], workers: Mapping[str, int]) -> None:
        for gauge, counts in ((self._shards, shards), (self._workers, workers)):
            for state, n in counts.items():
                gauge.set(n, self._store | {"state": state})


def _add(counter: Counter, amount: float, tags: dict[str, str]) -> None:
    if amount > 0:
        counter.inc(amount, tags)
