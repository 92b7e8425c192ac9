"""Where a run stands, read from its store alone: from any machine, while it runs or after it has died.

neuronlens status STORE
"""

from datetime import UTC, datetime
from typing import Any

from neuronlens.store import Store
from pipeline.frozen import load_shards
from pipeline.lease import current, is_alive_here, told
from pipeline.progress import FILE, quarantined
from pipeline.statistics import layers_of

STATES = ("waiting", "running", "committed", "retrying", "quarantined")


def status_of(store: Store) -> dict[str, Any]:
    """What is done (receipts say), what is under way (the driver said so last), and who holds the store.

    `state` is running, gone (a driver of this machine that ended without giving the store back), or idle. A driver of
    another machine counts as running: `reported_seconds_ago`, by its clock and ours, says how fresh its word is.
    Raises UsageError where there is no store.
    """
    description = store.describe()
    shards = {shard.name: shard for shard in load_shards(store)}
    committed = {name.removesuffix(".json") for name in store.names("commits")} & shards.keys()
    given_up = [receipt for receipt in quarantined(store) if _name(receipt) not in committed]
    _, holder = current(store)
    state = "idle" if holder is None else "gone" if is_alive_here(holder) is False else "running"
    told_last = store.read_json(FILE) if store.exists(FILE) else {}
    running = told_last.get("running", {}) if state == "running" else {}
    retrying = told_last.get("retrying", {}) if state == "running" else {}
    n_tokens = sum(shard.n_tokens for shard in shards.values())
    n_done = sum(shards[name].n_tokens for name in committed)
    rate = told_last.get("tokens_per_second") if state == "running" else None
    layers = layers_of(description)
    counts = {
        "running": len(running),
        "committed": len(committed),
        "retrying": len(retrying),
        "quarantined": len(given_up),
    }
    return {
        "store": store.root,
        "state": state,
        "holder": told(holder) if holder else None,
        "reported_seconds_ago": _age(told_last.get("at")) if state == "running" else None,
        "n_shards": len(shards),
        "shards": {"waiting": len(shards) - sum(counts.values()), **counts},
        "n_tokens": n_tokens,
        "n_tokens_committed": n_done,
        "tokens_per_second": rate,
        "eta_seconds": (n_tokens - n_done) / rate if rate else None,
        "workers": told_last.get("workers", {}) if state == "running" else {},
        "running": running,
        "retrying": retrying,
        "quarantined": [
            {"shard": _name(one), "concept": one["concept"], "reasons": one["reasons"], "rows": one["rows"]}
            for one in given_up
        ],
        "collector_seconds": told_last.get("seconds", {}),
        "n_layers": len(layers),
        "n_layers_with_statistics": len(store.names("statistics")),
        "range_tables": store.table_ids(),
    }


def _name(receipt: dict[str, Any]) -> str:
    return f"shard-{receipt['shard']:05d}"


def _age(at: str | None) -> float | None:
    return None if at is None else (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds()
