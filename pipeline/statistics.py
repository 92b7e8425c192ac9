"""The statistics stage: DuckDB merges the partials of one layer into moments, overlap and salience. One Ray task a
layer."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from neuronlens.errors import RunFailed
from neuronlens.query import attach, connect, run_to_parquet
from neuronlens.store import Store, content_hash, new_attempt, receipt_of

QUERIES = {"moments": "merge", "overlap": "overlap", "salience": "salience"}
"""Kind of file -> the query in sql/ that makes it, in the order in which they need each other."""
DEFAULT_MEMORY_SHARE = 0.6
"""Of a node's memory, what all the SQL tasks on it may use together before they spill."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one SQL task may use."""

    n_threads: int
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One unit of the stage: a hook point of a layer."""

    hook_point: str
    layer: int

    @property
    def name(self) -> str:
        return f"{self.hook_point}.{self.layer:03d}"


def layers_of(description: dict[str, Any]) -> list[Layer]:
    return [
        Layer(hook_point=hook_point, layer=layer)
        for hook_point in description["hook_points"]
        for layer in description["layers"]
    ]


def inputs_hash(commits: Sequence[dict[str, Any]]) -> str:
    """What a layer's statistics were merged from: the attempts that count, in the order of their shards."""
    return content_hash([[receipt["shard"], receipt["attempt"]] for receipt in commits])


def compute_layer(
    store: Store, layer: Layer, commits: Sequence[dict[str, Any]], *, tau: float, resources: Resources
) -> dict[str, Any]:
    """Merge one layer of the shards in `commits` (their receipts) and commit its three files.

    Returns the receipt that counts; does nothing where it is there.
    """
    inputs = inputs_hash(commits)
    receipt_path = f"statistics/{layer.name}.json"
    if store.exists(receipt_path):
        kept = store.read_json(receipt_path)
        if kept["inputs"] == inputs and kept["tau"] == tau:
            return kept
        store.remove(receipt_path)
        for file in kept["files"]:
            store.remove(file["path"])
    started = time.perf_counter()
    attempt = new_attempt()
    files = []
    with (
        tempfile.TemporaryDirectory(prefix="neuronlens-sql-") as spill,
        connect(
            _merged_files(store, commits),
            fs=store.fs,
            memory_limit=f"{resources.memory_bytes}B",
            threads=resources.n_threads,
            temp_directory=spill,
        ) as con,
    ):
        for kind, query in QUERIES.items():
            params = {"tau": tau} if kind == "overlap" else {}
            relative = f"{kind}/{layer.name}.{attempt}.parquet"
            store.write_through(relative, partial(_copy, con, query, layer, params))
            files.append(store.adopt(kind, relative))
            attach(con, kind, [store.path(relative)], fs=store.fs)
    receipt = receipt_of(
        files,
        hook_point=layer.hook_point,
        layer=layer.layer,
        inputs=inputs,
        tau=tau,
        seconds=time.perf_counter() - started,
    )
    if store.create_json(receipt_path, receipt):
        return receipt
    for file in files:
        store.remove(file.path)
    return store.read_json(receipt_path)


def compute_statistics(
    store: Store, *, tau: float, memory_limit: int | None, on_done: Callable[[dict[str, Any]], None]
) -> None:
    """Every layer of the store, as Ray tasks that share the cluster's cores. Raises RunFailed naming what failed."""
    layers = layers_of(store.describe())
    n_cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
    n_threads = max(1, n_cores // len(layers))
    resources = Resources(n_threads=n_threads, memory_bytes=memory_limit or _memory_share(n_threads))
    task = ray.remote(compute_layer).options(num_cpus=n_threads, max_retries=2)
    commits = ray.put(store.receipts("commits"))
    pending = {task.remote(store, layer, commits, tau=tau, resources=resources): layer for layer in layers}
    while pending:
        done, _ = ray.wait(list(pending), num_returns=1)
        layer = pending.pop(done[0])
        try:
            on_done(ray.get(done[0]))
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            raise RunFailed(
                f"The statistics of {layer.name} failed: {str(cause).strip().splitlines()[0]}. The shards are safe: "
                "mend the reason (too little memory: set compute.memory_limit; a damaged file: neuronlens verify) "
                "and run again."
            ) from error


def _copy(con: Any, query: str, layer: Layer, params: dict[str, Any], path: str) -> None:
    run_to_parquet(con, query, path, hook_point=layer.hook_point, layer=layer.layer, **params)


def _memory_share(n_threads: int) -> int:
    node = next(node for node in ray.nodes() if node["Alive"])["Resources"]
    share = DEFAULT_MEMORY_SHARE * n_threads / max(1.0, node.get("CPU", 1.0))
    return max(512 * 2**20, int(node.get("memory", 4e9) * share))


def _merged_files(store: Store, commits: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    lists: dict[str, list[str]] = {"partials": [], "histograms": []}
    for receipt in commits:
        for file in receipt["files"]:
            if file["kind"] in lists:
                lists[file["kind"]].append(store.path(file["path"]))
    return lists
