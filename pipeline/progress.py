"""How far a run is, kept in the store for whoever asks: `neuronlens status STORE` on any machine.

progress.json is written over every few seconds and counts for nothing else: what is done, the receipts say. A shard
that was given up leaves quarantine/<shard>.json with its texts' ids and the reason of each try; its commit takes that
away.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from neuronlens.errors import RunFailed
from neuronlens.retry import StoreUnusable
from neuronlens.store import Store
from pipeline.frozen import Shard, read_samples
from pipeline.metrics import ACTIVITIES, RunMetrics
from pipeline.pool import Failure, Place, Watcher
from pipeline.stopping import GRACE_SECONDS, StopSignals

FILE = "progress.json"
QUARANTINE = "quarantine"
WRITE_SECONDS = 3.0
WINDOW_SECONDS = 300.0
"""The rate is that of the last so many seconds: what a person wants to know about a run whose workers come and go."""


class CollectProgress(Watcher[Shard]):
    """Follows the collecting stage: bars, metrics, progress.json, quarantine."""

    def __init__(
        self,
        store: Store,
        shards: Sequence[Shard],
        todo: Sequence[Shard],
        *,
        stop: StopSignals,
        check: Callable[[], None],
        on_tokens: Callable[[int], None],
        say: Callable[[str], None],
    ) -> None:
        self._store, self._n_shards, self._stop, self._check = store, len(shards), stop, check
        self._on_tokens, self._say = on_tokens, say
        self._n_committed = len(shards) - len(todo)
        self._n_tokens_left = sum(shard.n_tokens for shard in todo)
        self._running: dict[str, dict[str, Any]] = {}
        self._retrying: dict[str, str] = {}
        self._quarantined: dict[str, str] = {}
        self._quarantined_before = {name.removesuffix(".json") for name in store.names(QUARANTINE)}
        self._workers = {"starting": 0, "idle": 0, "busy": 0}
        self._metrics = RunMetrics(store.root.rsplit("/", 1)[-1])
        self._arrivals: deque[tuple[float, int]] = deque()
        self._started = time.monotonic()
        self._written = -WRITE_SECONDS
        self.seconds = dict.fromkeys(ACTIVITIES, 0.0)
        """What the collectors' seconds went into, summed over the shards of this run."""
        self.bytes_written: dict[str, int] = {}

    def started(self, job: Shard, place: Place) -> None:
        self._running[job.name] = {"worker": str(place), "since": _now()}
        self._retrying.pop(job.name, None)

    def done(self, job: Shard, result: dict[str, Any]) -> None:
        self._running.pop(job.name, None)
        self._n_committed += 1
        self._n_tokens_left -= job.n_tokens
        self._arrivals.append((time.monotonic(), job.n_tokens))
        for activity in ACTIVITIES:
            self.seconds[activity] += result["seconds"].get(activity, 0.0)
        for file in result["files"]:
            self.bytes_written[file["kind"]] = self.bytes_written.get(file["kind"], 0) + file["n_bytes"]
        if job.name in self._quarantined_before:
            self._store.remove(f"{QUARANTINE}/{job.name}.json")
        self._on_tokens(job.n_tokens)

    def failed(self, job: Shard, reason: str) -> None:
        self._running.pop(job.name, None)
        self._retrying[job.name] = reason
        self._say(f"{job.name} failed and is tried again: {reason}")

    def gave_up(self, failure: Failure[Shard]) -> None:
        shard = failure.job
        self._running.pop(shard.name, None)
        self._quarantined[shard.name] = failure.reason
        samples = read_samples(self._store, shard)
        self._store.replace_json(
            f"{QUARANTINE}/{shard.name}.json",
            {
                "shard": shard.shard,
                "concept": shard.concept,
                "reasons": list(failure.reasons),
                "samples": samples["sample"].to_pylist(),
                "rows": samples["row"].to_pylist(),
                "at": _now(),
            },
        )
        self._say(f"{shard.name} is quarantined after {failure.n_tries} tries: {failure.reason}")

    def tick(self, workers: dict[str, int]) -> None:
        self._check()
        self._workers = workers
        if time.monotonic() - self._written >= WRITE_SECONDS:
            self.write("collect")

    def stop_requested(self) -> bool:
        return self._stop.requested

    def grace_seconds(self) -> float:
        return GRACE_SECONDS

    def no_workers(self, seconds: float) -> None:
        self._say(
            f"no worker for {seconds:.0f} s: the cluster has no room for one. Look at 'ray status'; the run goes on as "
            "soon as there is room."
        )

    def write(self, stage: str) -> None:
        """Keep the state as it is now in progress.json and in the metrics. A run does not end for want of that."""
        self._written = time.monotonic()
        states = self._states()
        self._metrics.set(shards=states, workers=self._workers)
        rate = self._tokens_per_second()
        state = {
            "stage": stage,
            "at": _now(),
            "shards": states,
            "workers": self._workers,
            "running": self._running,
            "retrying": self._retrying,
            "tokens_per_second": rate,
            "n_tokens_left": self._n_tokens_left,
            "eta_seconds": self._n_tokens_left / rate if rate else None,
            "seconds": {activity: round(spent, 3) for activity, spent in self.seconds.items()},
            "bytes_written": self.bytes_written,
        }
        try:
            self._store.replace_json(FILE, state)
        except StoreUnusable:
            raise
        except RunFailed as error:
            self._say(str(error))

    def _states(self) -> dict[str, int]:
        counts = {
            "running": len(self._running),
            "committed": self._n_committed,
            "retrying": len(self._retrying),
            "quarantined": len(self._quarantined),
        }
        return {"waiting": self._n_shards - sum(counts.values()), **counts}

    def _tokens_per_second(self) -> float | None:
        now = time.monotonic()
        while self._arrivals and now - self._arrivals[0][0] > WINDOW_SECONDS:
            self._arrivals.popleft()
        if not self._arrivals:
            return None
        return sum(n for _, n in self._arrivals) / min(WINDOW_SECONDS, now - self._started)


def quarantined(store: Store) -> list[dict[str, Any]]:
    """The shards that were given up and not committed since, with their texts' ids."""
    return store.receipts(QUARANTINE)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
