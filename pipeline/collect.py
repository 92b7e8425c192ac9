"""The collecting stage: one shard of texts through the model, its statistics into the store, a receipt back.

Only the receipt travels to the driver; activations go from the forward pass into running statistics and raw rows from
there into Parquet.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from neuronlens.batches import TokenBatch, pad
from neuronlens.capture import Capture
from neuronlens.histograms import MAX_BIN
from neuronlens.hookpoints import Site, find_sites
from neuronlens.models import LoadedModel
from neuronlens.moments import Moments
from neuronlens.predictions import AnswerKey, Predictions
from neuronlens.store import Store, StoredFile, files_of, new_attempt, receipt_of
from pipeline.frozen import Shard, read_samples
from pipeline.plan import package_versions

RAW_ROW_GROUP_ROWS = 262_144

_KEYS = [
    ("layer", pa.int16()),
    ("hook_point", pa.dictionary(pa.int8(), pa.string())),
    ("neuron", pa.int32()),
    ("concept", pa.dictionary(pa.int32(), pa.string())),
]
PARTIALS_SCHEMA = pa.schema(
    [
        *_KEYS,
        ("n", pa.int64()),
        ("n_nonfinite", pa.int64()),
        ("mean", pa.float64()),
        ("m2", pa.float64()),
        ("m3", pa.float64()),
        ("m4", pa.float64()),
        ("min", pa.float32()),
        ("max", pa.float32()),
        ("mean_abs", pa.float64()),
    ]
)
HISTOGRAMS_SCHEMA = pa.schema([*_KEYS, ("bin", pa.int16()), ("n", pa.int64())])
RAW_SCHEMA = pa.schema([_KEYS[2], ("sample", pa.int64()), ("position", pa.int32()), _KEYS[3], ("value", pa.float32())])
"""Hook point and layer stand in the path: a column that never changes still costs 10 ns a value to encode."""

PREDICTIONS_SCHEMA = pa.schema(
    [
        ("sample", pa.int64()),
        ("predicted", pa.dictionary(pa.int32(), pa.string())),
        ("correct", pa.bool_()),
        ("confidence", pa.float32()),
    ]
)

_FLOATS = ["mean", "m2", "m3", "m4", "min", "max", "mean_abs"]
PARTIALS_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": ["hook_point", "concept", "n", "n_nonfinite"],
    "column_encoding": dict.fromkeys(_FLOATS, "BYTE_STREAM_SPLIT") | {"neuron": "DELTA_BINARY_PACKED"},
}
HISTOGRAMS_OPTIONS: dict[str, Any] = {"compression": "zstd", "use_dictionary": ["hook_point", "concept", "bin", "n"]}
RAW_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 1,
    "use_dictionary": ["neuron", "sample", "position", "concept"],
    "column_encoding": {"value": "BYTE_STREAM_SPLIT"},
    "write_statistics": ["neuron"],
}


class Place(Protocol):
    """A hook point of one layer, as the keys of a row name it, and how many neurons it has."""

    @property
    def hook_point(self) -> str: ...

    @property
    def layer(self) -> int: ...

    @property
    def width(self) -> int: ...


class Full(Protocol):
    """The statistics of a place, once all texts of a shard are in them."""

    def moments(self) -> Moments: ...

    def counts(self) -> np.ndarray | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectSpec:
    """How every shard of a store is collected: what store.json decided, in the form that a collector needs."""

    hook_points: tuple[str, ...]
    layers: tuple[int, ...]
    modules: dict[str, str]
    unit: str
    histograms: bool
    raw_layers: tuple[int, ...]
    raw_neurons: tuple[int, ...] | None
    answers: dict[str, int] | None = None
    """The right token or class of each concept, where the answers are recorded or only the correct ones count."""
    predictions: bool = False
    only_correct: bool = False
    backend: str = "transformers"

    @classmethod
    def of(cls, description: dict[str, Any], answers: dict[str, int] | None) -> "CollectSpec":
        raw, layers = description["raw"], tuple(description["layers"])
        raw_layers = layers if raw["layers"] == "all" else tuple(raw["layers"])
        return cls(
            hook_points=tuple(description["hook_points"]),
            layers=layers,
            modules=description["model"]["modules"],
            unit=description["unit"],
            histograms=description["histograms"],
            raw_layers=() if raw["policy"] == "none" else raw_layers,
            raw_neurons=None if raw["neurons"] == "all" else tuple(raw["neurons"]),
            answers=description.get("answers") or (answers if description["only_correct"] else None),
            predictions=description.get("predictions", False),
            only_correct=description["only_correct"],
            backend=description.get("backend", "transformers"),
        )


@dataclass(slots=True, kw_only=True)
class Collected:
    """What the forward passes over one shard left in memory, to be written and committed."""

    shard: Shard
    samples: pa.Table
    sites: Sequence[Place]
    accumulators: Sequence[Full]
    capture: Capture | None = None
    """Where raw values wait; None where none can be."""
    n_kept: int = 0
    sample_ids: list[np.ndarray] = field(default_factory=list)
    """The sample numbers of each batch."""
    n_correct: int | None = None
    """None where nobody asked."""
    predictions: pa.Table | None = None
    """What the model answered to each sample, where that is recorded."""
    seconds: dict[str, float] = field(default_factory=dict)
    """What the time went into. `storage_wait` and `work_wait`: the model stood idle before this shard."""


def collect_shard(
    loaded: LoadedModel, spec: CollectSpec, store: Store, shard: Shard, *, n_threads: int = 1
) -> dict[str, Any]:
    """Run one shard and commit it. Returns the receipt that counts: ours, or that of another attempt that was first."""
    collected = run_shard(loaded, spec, shard, read_samples(store, shard), n_threads=n_threads)
    return commit_shard(spec, store, collected)


def run_shard(
    loaded: LoadedModel, spec: CollectSpec, shard: Shard, samples: pa.Table, *, n_threads: int = 1
) -> Collected:
    """The forward passes over one shard. Nothing is read from the store, nothing written."""
    started = time.perf_counter()
    sites = find_sites(loaded.module, spec.hook_points, spec.layers, spec.modules or None)
    capture = Capture(
        loaded, sites, unit=spec.unit, histograms=spec.histograms, raw=_raw_sites(spec, sites), n_threads=n_threads
    )
    collected = Collected(shard=shard, samples=samples, sites=sites, accumulators=capture.accumulators, capture=capture)
    _forward(loaded, spec, capture, collected)
    statistics_seconds = capture.statistics_seconds
    forward_seconds = time.perf_counter() - started - statistics_seconds
    collected.seconds = {"forward": forward_seconds, "statistics": statistics_seconds}
    return collected


def commit_shard(spec: CollectSpec, store: Store, collected: Collected) -> dict[str, Any]:
    """Write what was collected and create the receipt. Returns the receipt that counts."""
    started = time.perf_counter()
    shard, sites = collected.shard, collected.sites
    moments = [accumulator.moments() for accumulator in collected.accumulators]
    attempt = new_attempt()
    files = [write_partials(store, shard, attempt, sites, moments)]
    if spec.histograms:
        files.append(write_histograms(store, shard, attempt, sites, collected.accumulators))
    if collected.capture is not None:
        files += _write_raw(store, shard, attempt, collected.capture, spec, collected.sample_ids)
    if collected.predictions is not None:
        files.append(write_predictions(store, shard, attempt, collected.predictions))
    seconds = collected.seconds | {"write": time.perf_counter() - started}
    receipt = receipt_of(
        files,
        shard=shard.shard,
        attempt=attempt,
        concept=shard.concept,
        n_samples=shard.n_samples,
        n_kept=collected.n_kept,
        n_correct=collected.n_correct,
        n_tokens=shard.n_tokens,
        n_truncated=int(np.sum(collected.samples["truncated"].to_numpy())),
        n_nonfinite=int(sum(part.n_nonfinite_N.sum() for part in moments)),
        versions=package_versions(spec.backend),
        seconds=seconds | {"total": sum(seconds[work] for work in ("forward", "statistics", "write"))},
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return create_receipt(store, shard, receipt)


def create_receipt(store: Store, shard: Shard, receipt: dict[str, Any]) -> dict[str, Any]:
    """Let the files of a shard count. Returns the receipt that counts: where another attempt was first, that one, and
    the files of ours are gone."""
    path = f"commits/{shard.name}.json"
    if store.create_json(path, receipt):
        return receipt
    for file in files_of(receipt):
        store.remove(file.path)
    return store.read_json(path)


def batches_of(samples: pa.Table, pad_id: int) -> Iterator[tuple[np.ndarray, TokenBatch]]:
    """The frozen batches of a shard: (row numbers within the shard, padded tokens)."""
    rows = samples["token_ids"].to_pylist()
    batch_of = samples["batch"].to_numpy()
    edges = [0, *(np.flatnonzero(np.diff(batch_of)) + 1).tolist(), len(batch_of)]
    for first, last in itertools.pairwise(edges):
        yield np.arange(first, last), pad(rows[first:last], pad_id=pad_id)


def _forward(loaded: LoadedModel, spec: CollectSpec, capture: Capture, collected: Collected) -> None:
    sample_ids = collected.samples["sample"].to_numpy()
    key = None if spec.answers is None else AnswerKey.of(spec.answers, collected.shard.concept)
    answered = []
    collected.n_kept = collected.shard.n_samples
    for rows, batch in batches_of(collected.samples, loaded.pad_id):
        collected.sample_ids.append(sample_ids[rows])
        if key is None:
            capture.add(batch)
        else:
            answered.append(capture.add_and_predict(batch, key, only_correct=spec.only_correct))
    if key is not None:
        predictions = Predictions.joined(answered).cpu()
        collected.n_correct = int(predictions.correct_B.sum())
        collected.n_kept = collected.n_correct if spec.only_correct else collected.n_kept
        collected.predictions = _predictions_table(sample_ids, key, predictions) if spec.predictions else None


def _raw_sites(spec: CollectSpec, sites: tuple[Site, ...]) -> dict[int, np.ndarray | None]:
    neurons = None if spec.raw_neurons is None else np.array(spec.raw_neurons)
    return {index: neurons for index, site in enumerate(sites) if site.layer in spec.raw_layers}


def _keys(site: Place, concept: str, neuron_X: np.ndarray) -> dict[str, pa.Array]:
    """The four key columns for the neurons given, one value a row."""
    zeros = np.zeros(len(neuron_X), np.int8)
    return {
        "layer": pa.array(np.full(len(neuron_X), site.layer, np.int16)),
        "hook_point": pa.DictionaryArray.from_arrays(pa.array(zeros), pa.array([site.hook_point])),
        "neuron": pa.array(neuron_X.astype(np.int32)),
        "concept": pa.DictionaryArray.from_arrays(pa.array(zeros.astype(np.int32)), pa.array([concept])),
    }


def write_partials(
    store: Store, shard: Shard, attempt: str, sites: Sequence[Place], moments: Sequence[Moments]
) -> StoredFile:
    """The mergeable moments of one shard, a row group a site."""

    def tables() -> Iterator[pa.Table]:
        for site, part in zip(sites, moments, strict=True):
            columns = _keys(site, shard.concept, np.arange(site.width))
            columns |= {"n": pa.array(part.n_N), "n_nonfinite": pa.array(part.n_nonfinite_N)}
            columns |= {name: pa.array(getattr(part, f"{name}_N"), from_pandas=True) for name in _FLOATS}
            yield pa.Table.from_pydict(columns, schema=PARTIALS_SCHEMA)

    path = f"partials/{shard.name}.{attempt}.parquet"
    return store.write_parquet("partials", path, PARTIALS_SCHEMA, tables, **PARTIALS_OPTIONS)


def write_histograms(
    store: Store, shard: Shard, attempt: str, sites: Sequence[Place], accumulators: Sequence[Full]
) -> StoredFile:
    """The sparse counts of one shard, a row group a site."""

    def tables() -> Iterator[pa.Table]:
        for site, accumulator in zip(sites, accumulators, strict=True):
            counts_NB = accumulator.counts()
            assert counts_NB is not None
            neuron_X, bin_X = np.nonzero(counts_NB)
            columns = _keys(site, shard.concept, neuron_X)
            columns |= {
                "bin": pa.array((bin_X - MAX_BIN).astype(np.int16)),
                "n": pa.array(counts_NB[neuron_X, bin_X].astype(np.int64)),
            }
            yield pa.Table.from_pydict(columns, schema=HISTOGRAMS_SCHEMA)

    path = f"histograms/{shard.name}.{attempt}.parquet"
    return store.write_parquet("histograms", path, HISTOGRAMS_SCHEMA, tables, **HISTOGRAMS_OPTIONS)


def _predictions_table(sample_S: np.ndarray, key: AnswerKey, predictions: Predictions) -> pa.Table:
    """A row a sample; what is not finite is NULL."""
    predicted_S, confidence_S = predictions.predicted_B.numpy(), predictions.confidence_B.numpy()
    named = pa.array(predicted_S.astype(np.int32), mask=predicted_S < 0)
    columns = {
        "sample": pa.array(sample_S),
        "predicted": pa.DictionaryArray.from_arrays(named, pa.array(key.concepts)),
        "correct": pa.array(predictions.correct_B.numpy()),
        "confidence": pa.array(confidence_S, mask=np.isnan(confidence_S)),
    }
    return pa.Table.from_pydict(columns, schema=PREDICTIONS_SCHEMA)


def write_predictions(store: Store, shard: Shard, attempt: str, predictions: pa.Table) -> StoredFile:
    """What the model answered to each sample of one shard."""
    path = f"predictions/{shard.name}.{attempt}.parquet"
    return store.write_parquet("predictions", path, PREDICTIONS_SCHEMA, lambda: iter([predictions]), compression="zstd")


def _write_raw(
    store: Store, shard: Shard, attempt: str, capture: Capture, spec: CollectSpec, sample_ids: list[np.ndarray]
) -> list[StoredFile]:
    if not any(capture.raw_values.values()):
        return []
    sample_R = np.concatenate([ids[rows.numpy()] for ids, rows in zip(sample_ids, capture.raw_samples, strict=True)])
    position_R = None
    if capture.raw_positions[0] is not None:
        position_R = torch.cat([part for part in capture.raw_positions if part is not None]).numpy().astype(np.int32)
    files = []
    for index, parts in capture.raw_values.items():
        site = capture.sites[index]
        x_NR = torch.cat(parts).T.float().contiguous().numpy()
        neurons = np.arange(site.width) if spec.raw_neurons is None else np.array(spec.raw_neurons)
        files.append(write_raw(store, shard, attempt, site, neurons, x_NR, sample_R, position_R))
    return files


def write_raw(
    store: Store,
    shard: Shard,
    attempt: str,
    site: Place,
    neuron_N: np.ndarray,
    x_NR: np.ndarray,
    sample_R: np.ndarray,
    position_R: np.ndarray | None,
) -> StoredFile:
    """The values of one shard at one site: float32 x_NR of the neurons named, a column a row of activations."""
    tables = partial(_raw_tables, site, shard.concept, neuron_N, x_NR, sample_R, position_R)
    path = f"raw/hook_point={site.hook_point}/layer={site.layer}/{shard.name}.{attempt}.parquet"
    return store.write_parquet("raw", path, RAW_SCHEMA, tables, **RAW_OPTIONS)


def _raw_tables(
    site: Place,
    concept: str,
    neuron_N: np.ndarray,
    x_NR: np.ndarray,
    sample_R: np.ndarray,
    position_R: np.ndarray | None,
) -> Iterator[pa.Table]:
    """Neuron-major rows, some neurons a row group, so that reading one neuron skips all row groups but one."""
    n_rows = len(sample_R)
    step = max(1, RAW_ROW_GROUP_ROWS // max(1, n_rows))
    for first in range(0, len(neuron_N), step):
        chunk_N = neuron_N[first : first + step]
        keys = _keys(site, concept, np.repeat(chunk_N, n_rows))
        columns = {name: keys[name] for name in ("neuron", "concept")}
        columns["sample"] = pa.array(np.tile(sample_R, len(chunk_N)))
        columns["position"] = (
            pa.nulls(n_rows * len(chunk_N), pa.int32())
            if position_R is None
            else pa.array(np.tile(position_R, len(chunk_N)))
        )
        columns["value"] = pa.array(x_NR[first : first + step].reshape(-1))
        yield pa.Table.from_pydict(columns, schema=RAW_SCHEMA)
