"""How much of its plan a store holds, for every output to say so."""

from collections.abc import Mapping, Sequence
from typing import Any

from neuronlens.store import Store
from pipeline.frozen import load_shards


def coverage_of(store: Store, commits: Sequence[Mapping[str, Any]] | None = None) -> dict[str, int]:
    """Shards and samples that count, beside those that were planned. `commits` are the receipts; by default all."""
    if commits is None:
        commits = store.receipts("commits")
    planned = load_shards(store)
    return {
        "n_shards": len(commits),
        "n_planned_shards": len(planned),
        "n_samples": sum(receipt["n_samples"] for receipt in commits),
        "n_planned_samples": sum(shard.n_samples for shard in planned),
    }
