"""A store written from numpy arrays, by code of its own, so that a test does not check the collector against itself.

Sums are taken in longdouble from the values, bins are found by searching the edges of docs/store-format.md. Only
`add_statistics` runs the code under test, for tests of what comes after it.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from neuronlens.recipe import OverlapSection
from neuronlens.store import Store
from pipeline.coverage import coverage_of
from pipeline.statistics import Resources, Settings, compute_layer, kept_pairs, layers_of

ATTEMPT = "0123456789ab"
BIN_EDGES = np.array([2.0 ** (-14 + (b - 1) // 8) * (1 + ((b - 1) % 8) / 8) for b in range(1, 209)])
"""lower(b) for b = 1..208."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The values of one shard: x_LSN is float32 [layers, samples, neurons], NaN and inf allowed.

    n_tokens_S is how long each text is, 10 without it. `answers` is what the model answered: a row of predictions a
    sample (predicted, correct, confidence).
    """

    concept: str
    x_LSN: np.ndarray
    n_tokens_S: np.ndarray | None = None
    answers: Sequence[tuple[str | None, bool, float | None]] | None = None

    @property
    def lengths_S(self) -> np.ndarray:
        return np.full(self.x_LSN.shape[1], 10) if self.n_tokens_S is None else self.n_tokens_S


def moments_of(x_S: np.ndarray) -> dict[str, float | None]:
    """A row of `moments` from the values of one neuron under one concept, two passes in longdouble."""
    x = np.asarray(x_S, dtype=np.float32)
    finite = x[np.isfinite(x)].astype(np.longdouble)
    row: dict[str, float | None] = {"n": len(finite), "n_nonfinite": len(x) - len(finite)}
    if len(finite) == 0:
        return row | dict.fromkeys(("mean", "std", "skewness", "kurtosis", "min", "max", "mean_abs"))
    mean = finite.mean()
    d = finite - mean
    std = np.sqrt((d**2).mean())
    constant = finite.min() == finite.max()
    return row | {
        "mean": float(mean),
        "std": 0.0 if constant else float(std),
        "skewness": None if constant else float((d**3).mean() / std**3),
        "kurtosis": None if constant else float((d**4).mean() / std**4),
        "min": float(finite.min()),
        "max": float(finite.max()),
        "mean_abs": float(np.abs(finite).mean()),
    }


def bins_of(x_S: np.ndarray) -> dict[int, int]:
    """How many finite values fall in each bin, sparse."""
    finite = x_S[np.isfinite(x_S)].astype(np.float64)
    level = np.searchsorted(BIN_EDGES, np.abs(finite), side="right")
    bins, counts = np.unique(np.where(finite < 0, -level, level), return_counts=True)
    return dict(zip(bins.tolist(), counts.tolist(), strict=True))


def bin_span(b: int) -> tuple[float, float]:
    """The nominal edges of a bin; the outermost reach to infinity."""
    if b < 0:
        low, high = bin_span(-b)
        return -high, -low
    if b == 0:
        return -BIN_EDGES[0], BIN_EDGES[0]
    return BIN_EDGES[b - 1], BIN_EDGES[b] if b < len(BIN_EDGES) else np.inf


def write_store(
    root: Path, shards: Sequence[Shard], *, hook_point: str = "mlp_post", histograms: bool = True, raw: bool = True
) -> dict[str, list[str]]:
    """Everything that collectors leave behind, under `root`; the paths of each kind."""
    files: dict[str, list[str]] = {kind: [] for kind in ("plan", "samples", "partials", "histograms", "raw", "commits")}
    first = 0
    for number, shard in enumerate(shards):
        name = f"shard-{number:05d}.{ATTEMPT}.parquet"
        partials, counts, values = [], [], []
        for layer, x_SN in enumerate(shard.x_LSN):
            partials.append(_partials(layer, hook_point, shard.concept, x_SN))
            counts.append(_counts(layer, hook_point, shard.concept, x_SN))
            if raw:
                values.append(f"raw/hook_point={hook_point}/layer={layer}/{name}")
                files["raw"].append(write(root / values[-1], [_values(shard.concept, x_SN, first)]))
        files["partials"].append(write(root / "partials" / name, partials))
        if histograms:
            files["histograms"].append(write(root / "histograms" / name, counts))
        kinds = ("partials", "histograms") if histograms else ("partials",)
        named = [stored(root, kind, f"{kind}/{name}") for kind in kinds] + [
            stored(root, "raw", path) for path in values
        ]
        if shard.answers is not None:
            path = write(root / "predictions" / name, [_predictions(shard.answers, first)])
            files.setdefault("predictions", []).append(path)
            named.append(stored(root, "predictions", f"predictions/{name}"))
        files["commits"].append(_commit(root, number, shard, named))
        first += shard.x_LSN.shape[1]
    files["plan"] = [write(root / "plan.parquet", [_plan(shards)])]
    files["samples"] = [write(root / "samples" / "part-00000.parquet", [_samples(shards)])]
    _describe(root, shards, hook_point, raw)
    return files


def stored(root: Path, kind: str, path: str) -> dict[str, object]:
    """A data file as a receipt names it."""
    content = (root / path).read_bytes()
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    n_rows = pq.ParquetFile(root / path).metadata.num_rows
    return {"kind": kind, "path": path, "n_bytes": len(content), "n_rows": n_rows, "blake2b": digest}


def write_moments(
    path: Path, rows: Sequence[Mapping[str, object]], *, layer: int = 0, hook_point: str = "mlp_post"
) -> str:
    """Rows of `moments` as given: neuron, concept, mean, std and what else matters; n is 100 where it is left out."""
    defaults = {"layer": layer, "hook_point": hook_point, "n": 100, "n_nonfinite": 0, "mean_abs": 1.0}
    columns = [
        ("layer", pa.int16()),
        ("hook_point", pa.string()),
        ("neuron", pa.int32()),
        ("concept", pa.string()),
        ("n", pa.int64()),
        ("n_nonfinite", pa.int64()),
        *((name, pa.float64()) for name in ("mean", "std", "skewness", "kurtosis")),
        ("min", pa.float32()),
        ("max", pa.float32()),
        ("mean_abs", pa.float64()),
    ]
    return write(path, [pa.Table.from_pylist([defaults | dict(row) for row in rows], schema=pa.schema(columns))])


def write(path: Path, row_groups: Sequence[pa.Table]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, row_groups[0].schema) as writer:
        for table in row_groups:
            writer.write_table(table)
    return str(path)


def _dictionary(value: str, n: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(np.zeros(n, np.int32), [value])


def _keys(layer: int, hook_point: str, concept: str, neurons: np.ndarray) -> dict[str, object]:
    return {
        "layer": np.full(len(neurons), layer, np.int16),
        "hook_point": _dictionary(hook_point, len(neurons)),
        "neuron": neurons.astype(np.int32),
        "concept": _dictionary(concept, len(neurons)),
    }


def _partials(layer: int, hook_point: str, concept: str, x_SN: np.ndarray) -> pa.Table:
    columns: dict[str, list] = {
        name: [] for name in ("n", "n_nonfinite", "mean", "m2", "m3", "m4", "min", "max", "mean_abs")
    }
    for x_S in x_SN.T:
        finite = x_S[np.isfinite(x_S)].astype(np.longdouble)
        d = finite - finite.mean() if len(finite) else finite
        some = len(finite) > 0
        columns["n"].append(len(finite))
        columns["n_nonfinite"].append(len(x_S) - len(finite))
        columns["mean"].append(float(finite.mean()) if some else None)
        for power in (2, 3, 4):
            columns[f"m{power}"].append(float((d**power).sum()))
        columns["min"].append(float(finite.min()) if some else None)
        columns["max"].append(float(finite.max()) if some else None)
        columns["mean_abs"].append(float(np.abs(finite).mean()) if some else None)
    types = {"n": pa.int64(), "n_nonfinite": pa.int64(), "min": pa.float32(), "max": pa.float32()}
    arrays = {name: pa.array(values, types.get(name, pa.float64())) for name, values in columns.items()}
    return pa.table(_keys(layer, hook_point, concept, np.arange(x_SN.shape[1])) | arrays)


def _counts(layer: int, hook_point: str, concept: str, x_SN: np.ndarray) -> pa.Table:
    rows = [(neuron, b, n) for neuron, x_S in enumerate(x_SN.T) for b, n in bins_of(x_S).items()]
    neurons, bins, counts = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    return pa.table(_keys(layer, hook_point, concept, neurons) | {"bin": bins.astype(np.int16), "n": counts})


def _values(concept: str, x_SN: np.ndarray, first_sample: int) -> pa.Table:
    n_samples, n_neurons = x_SN.shape
    n = n_samples * n_neurons
    return pa.table(
        {
            "neuron": np.repeat(np.arange(n_neurons, dtype=np.int32), n_samples),
            "sample": np.tile(first_sample + np.arange(n_samples), n_neurons),
            "position": np.tile(np.arange(n_samples, dtype=np.int32) % 7, n_neurons),
            "concept": _dictionary(concept, n),
            "value": np.ascontiguousarray(x_SN.T, dtype=np.float32).ravel(),
        }
    )


def _predictions(answers: Sequence[tuple[str | None, bool, float | None]], first_sample: int) -> pa.Table:
    predicted, correct, confidence = zip(*answers, strict=True)
    return pa.table(
        {
            "sample": first_sample + np.arange(len(answers)),
            "predicted": pa.array(predicted, pa.string()),
            "correct": pa.array(correct, pa.bool_()),
            "confidence": pa.array(confidence, pa.float32()),
        }
    )


def _plan(shards: Sequence[Shard]) -> pa.Table:
    n_samples = np.array([shard.x_LSN.shape[1] for shard in shards])
    return pa.table(
        {
            "shard": np.arange(len(shards), dtype=np.int32),
            "concept": [shard.concept for shard in shards],
            "n_samples": n_samples,
            "n_tokens": [int(shard.lengths_S.sum()) for shard in shards],
            "n_batches": np.ones(len(shards), np.int32),
            "samples_file": ["samples/part-00000.parquet"] * len(shards),
            "row_group": np.arange(len(shards), dtype=np.int32),
        }
    )


def _samples(shards: Sequence[Shard]) -> pa.Table:
    shard_of = np.repeat(np.arange(len(shards)), [shard.x_LSN.shape[1] for shard in shards])
    n = len(shard_of)
    n_tokens = np.concatenate([shard.lengths_S for shard in shards])
    return pa.table(
        {
            "sample": np.arange(n),
            "shard": shard_of.astype(np.int32),
            "batch": np.zeros(n, np.int32),
            "concept": [shards[s].concept for s in shard_of],
            "row": np.arange(n),
            "n_tokens": n_tokens.astype(np.int32),
            "truncated": np.zeros(n, bool),
            "text": [f"text {i}" for i in range(n)],
            "token_ids": pa.array([list(range(length)) for length in n_tokens], pa.list_(pa.int32())),
        }
    )


def _describe(root: Path, shards: Sequence[Shard], hook_point: str, raw: bool) -> None:
    n_layers, _, width = shards[0].x_LSN.shape
    description = {
        "format_version": 1,
        "store_hash": "0" * 64,
        "hook_points": [hook_point],
        "layers": list(range(n_layers)),
        "widths": {hook_point: width},
        "unit": "last_token",
        "model": {"id": "synthetic", "revision": None, "config_hash": "0" * 64},
        "raw": {"policy": "all" if raw else "none", "layers": "all", "neurons": "all"},
        "concepts": {
            concept: sum(shard.x_LSN.shape[1] for shard in shards if shard.concept == concept)
            for concept in sorted({shard.concept for shard in shards})
        },
        "files": [stored(root, "plan", "plan.parquet"), stored(root, "samples", "samples/part-00000.parquet")],
        "dataset": {"n_rows": sum(shard.x_LSN.shape[1] for shard in shards)},
    }
    (root / "store.json").write_text(json.dumps(description), encoding="utf-8")


def _commit(root: Path, number: int, shard: Shard, files: Sequence[dict[str, object]]) -> str:
    path = root / "commits" / f"shard-{number:05d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    receipt = {
        "format_version": 1,
        "shard": number,
        "attempt": ATTEMPT,
        "concept": shard.concept,
        "n_samples": shard.x_LSN.shape[1],
        "n_truncated": 0,
        "n_nonfinite": int((~np.isfinite(shard.x_LSN)).sum()),
        "files": list(files),
        "seconds": {"forward": 0.5, "total": 1.5},
        "finished_at": "2026-03-04T05:06:07+00:00",
    }
    path.write_text(json.dumps(receipt, indent=2), encoding="utf-8")
    return str(path)


def add_statistics(root: Path, *, keep: str = "auto") -> Store:
    """What the statistics stage makes of the shards under `root`, layer by layer; the store as a run leaves it."""
    store = Store(str(root))
    commits = store.receipts("commits")
    n_concepts = len({receipt["concept"] for receipt in commits})
    for layer in layers_of(store.describe()):
        compute_layer(
            store,
            layer,
            commits,
            settings=Settings(tau=2.5, overlap=kept_pairs(OverlapSection(keep=keep, top=1), n_concepts)),
            coverage=coverage_of(store, commits),
            resources=Resources(n_threads=1, memory_bytes=10**9, scratch=tempfile.gettempdir()),
        )
    return store
