"""The probe stage: a linear probe per layer, from the raw values of a store.

neuronlens ranges STORE --salience probe

Its scores are rows of `salience` like all others, in files that a receipt of their own names: probes/<site>.json.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from neuronlens.errors import UsageError
from neuronlens.probe import Probe, train_probe
from neuronlens.query import connect, run_file
from neuronlens.store import Store, StoredFile, files_of, new_attempt, receipt_of
from pipeline.statistics import Layer, inputs_hash, layers_of

if TYPE_CHECKING:
    import duckdb

    from pipeline.driver import Reporter

SCHEMA = pa.schema(
    [
        ("layer", pa.int16()),
        ("hook_point", pa.string()),
        ("neuron", pa.int32()),
        ("concept", pa.string()),
        ("method", pa.string()),
        ("score", pa.float64()),
        ("rank", pa.int32()),
    ]
)


def make_probes(store: Store, reporter: "Reporter") -> list[dict[str, Any]]:
    """Train the probes that the store does not hold yet, and commit them. Returns the receipts of all its layers.

    Raises UsageError where a layer has no raw values of all its neurons.
    """
    layers, commits = layers_of(store.describe()), store.receipts("commits")
    inputs = inputs_hash(commits)
    _check_raw(store, layers, commits)
    kept = {layer: _kept(store, layer, inputs) for layer in layers}
    missing = [layer for layer, receipt in kept.items() if receipt is None]
    if missing:
        with (
            connect({"raw": _raw_files(store, commits)}, fs=store.fs, views="stored") as con,
            reporter.stage("probes", len(missing), "layers") as advance,
        ):
            for layer in missing:
                kept[layer] = _commit(store, layer, inputs, _train(con, layer))
                advance(1)
    return [receipt for receipt in kept.values() if receipt is not None]


def _kept(store: Store, layer: Layer, inputs: str) -> dict[str, Any] | None:
    """The receipt of the layer's probe if it still counts. One that does not is removed, with its file."""
    path = _receipt_path(layer)
    if not store.exists(path):
        return None
    receipt = store.read_json(path)
    files = files_of(receipt)
    if receipt["inputs"] == inputs and not any(map(store.fault_of, files)):
        return receipt
    for file in (path, *(file.path for file in files)):
        store.remove(file)
    return None


def _train(con: "duckdb.DuckDBPyConnection", layer: Layer) -> Probe:
    site = {"hook_point": layer.hook_point, "layer": layer.layer}
    rows = run_file(con, "probe_rows", **site)
    x_NR = run_file(con, "probe_values", **site)["value"].to_numpy().reshape(layer.width, rows.num_rows)
    return train_probe(x_NR.T, np.array(rows["concept"].to_pylist()), rows["sample"].to_numpy())


def _commit(store: Store, layer: Layer, inputs: str, probe: Probe) -> dict[str, Any]:
    file = _write(store, layer, probe)
    receipt = receipt_of(
        [file],
        hook_point=layer.hook_point,
        layer=layer.layer,
        inputs=inputs,
        n_rows=probe.n_rows,
        accuracy=None if np.isnan(probe.accuracy) else probe.accuracy,
    )
    if store.create_json(_receipt_path(layer), receipt):
        return receipt
    store.remove(file.path)
    return store.read_json(_receipt_path(layer))


def _write(store: Store, layer: Layer, probe: Probe) -> StoredFile:
    def tables() -> list[pa.Table]:
        return [
            _ranked(layer, concept, score_N) for concept, score_N in zip(probe.concepts, probe.score_CN, strict=True)
        ]

    return store.write_parquet(
        "salience", f"salience/{layer.name}.{new_attempt()}.parquet", SCHEMA, tables, compression="zstd"
    )


def _ranked(layer: Layer, concept: str, score_N: np.ndarray) -> pa.Table:
    """Rows of one concept, the highest score first, ties by neuron."""
    neuron_N = np.argsort(-score_N, kind="stable")
    n = len(neuron_N)
    return pa.table(
        [
            np.full(n, layer.layer, np.int16),
            pa.array([layer.hook_point] * n),
            neuron_N.astype(np.int32),
            pa.array([concept] * n),
            pa.array(["probe"] * n),
            score_N[neuron_N],
            np.arange(1, n + 1, dtype=np.int32),
        ],
        schema=SCHEMA,
    )


def _check_raw(store: Store, layers: Sequence[Layer], commits: Sequence[Mapping[str, Any]]) -> None:
    raw = store.describe()["raw"]
    without = [layer.name for layer in layers if raw["layers"] != "all" and layer.layer not in raw["layers"]]
    if raw["policy"] == "none" or raw["neurons"] != "all" or without:
        lack = "no raw values" if raw["policy"] == "none" else "raw values of some neurons or layers only"
        raise UsageError(
            f"{store.root} holds {lack}, and a linear probe learns from those of every neuron. Collect again with "
            "--set collect.raw=all, or take another method of salience."
        )
    if not commits:
        raise UsageError(f"{store.root} holds no committed shard. Let the same 'neuronlens run' command go on first.")


def _raw_files(store: Store, commits: Sequence[Mapping[str, Any]]) -> list[str]:
    return [store.path(file.path) for receipt in commits for file in files_of(receipt) if file.kind == "raw"]


def _receipt_path(layer: Layer) -> str:
    return f"probes/{layer.name}.json"
