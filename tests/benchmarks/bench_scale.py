"""Does the statistics stage hold at the size of an 8B model, in the memory that it is given?

    python -m tests.benchmarks.bench_scale [--layers 32] [--neurons 14336] [--concepts 14] [--shards 16]
        [--memory-limit 4GB] [--threads 2] [--keep all] [--folder /tmp] [--json]

Shards of synthetic partials and histograms are written as collectors write them, a row group per layer; then every
layer goes through `compute_layer`, one after the other, as a Ray task would run it: merge, histograms summed over the
shards, distributions and overlap in blocks of neurons, salience. Then a range table of all neurons is made by each
method. Each shard has values of its own; its layers share
them, so that making the files takes minutes and not hours. Reported are the rates of the heavy steps, what the process
gained in resident memory at its peak, and what lay in the scratch folder at most, spilled by DuckDB and merged
histograms apart. The files are removed at the end.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from neuronlens.histograms import MAX_BIN, N_BINS, bin_of
from neuronlens.moments import Moments
from neuronlens.query import connect, run_file
from neuronlens.ranges import RangeTable, TableModel
from neuronlens.recipe import CHOOSY_METHODS, OverlapSection, RangesSection, parse_bytes
from neuronlens.store import Store, receipt_of
from pipeline.collect import HISTOGRAMS_OPTIONS, HISTOGRAMS_SCHEMA, PARTIALS_OPTIONS, PARTIALS_SCHEMA
from pipeline.pieces import Method, with_pieces
from pipeline.statistics import Layer, Resources, Settings, compute_layer, kept_pairs

HOOK_POINT = "mlp_post"
FLOATS = ("mean", "m2", "m3", "m4", "min", "max", "mean_abs")
METHODS = ("paper", "hpd", *CHOOSY_METHODS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What all layers took together; bytes are peaks."""

    settings: dict[str, Any]
    kept: dict[str, Any]
    n_partial_rows: int
    n_histogram_rows: int
    n_input_bytes: int
    n_pairs: int
    n_pairs_kept: int
    n_output_bytes: int
    seconds_writing_inputs: float
    seconds: dict[str, float]
    ranges: dict[str, dict[str, float]]
    peak_resident_bytes: int
    peak_spilled_bytes: int
    peak_scratch_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--neurons", type=int, default=14_336)
    parser.add_argument("--concepts", type=int, default=14)
    parser.add_argument("--shards", type=int, default=16, help="Shards a concept.")
    parser.add_argument("--samples", type=int, default=100, help="Samples a shard.")
    parser.add_argument("--keep", choices=("auto", "all", "top", "threshold"), default="auto")
    parser.add_argument("--top", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-limit", default="4GB")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--json", action="store_true", help="Print one JSON line instead of the table.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="neuronlens-scale-", dir=args.folder) as folder:
        report = _run(args, Path(folder))
    print(json.dumps(asdict(report)) if args.json else _table(report))


def _run(args: argparse.Namespace, folder: Path) -> Report:
    store = Store(str(folder / "store"))
    started = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        commits = pool.map(partial(_write_shard, store, args), range(args.concepts * args.shards), chunksize=1)
    seconds_writing = time.perf_counter() - started
    files = [file for receipt in commits for file in receipt["files"]]
    rows = {kind: sum(f["n_rows"] for f in files if f["kind"] == kind) for kind in ("partials", "histograms")}
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    scratch = folder / "scratch"
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(store, commits, args, scratch, sender))
    process.start()
    sender.close()
    with _watched(scratch) as peaks:
        receipts, peak_resident_bytes, ranges = receiver.recv()
        process.join()
    return Report(
        settings={name: value for name, value in vars(args).items() if name not in ("json", "folder")},
        kept=receipts[0]["overlap"],
        n_partial_rows=rows["partials"],
        n_histogram_rows=rows["histograms"],
        n_input_bytes=sum(file["n_bytes"] for file in files),
        n_pairs=sum(receipt["n_pairs"] for receipt in receipts),
        n_pairs_kept=sum(receipt["n_pairs_kept"] for receipt in receipts),
        n_output_bytes=sum(file["n_bytes"] for receipt in receipts for file in receipt["files"]),
        seconds_writing_inputs=seconds_writing,
        seconds={step: sum(receipt["seconds"][step] for receipt in receipts) for step in receipts[0]["seconds"]},
        ranges=ranges,
        peak_resident_bytes=peak_resident_bytes,
        peak_spilled_bytes=peaks["spilled"],
        peak_scratch_bytes=peaks["merged"],
    )


def _table(report: Report) -> str:
    seconds, n_layers = report.seconds, report.settings["layers"]
    n_neurons = n_layers * report.settings["neurons"]
    bins = report.n_histogram_rows / report.n_partial_rows
    lines = [
        f"{n_neurons:,} neurons ({n_layers} layers) x {report.settings['concepts']} concepts x "
        f"{report.settings['shards']} shards; {report.n_partial_rows / 1e6:.1f} M partial rows, "
        f"{report.n_histogram_rows / 1e6:,.0f} M histogram rows ({bins:.0f} bins a partial row), "
        f"{report.n_input_bytes / 1e9:.1f} GB, written in {report.seconds_writing_inputs:.0f} s; "
        f"limit {report.settings['memory_limit']}, {report.settings['threads']} threads; pairs kept: {report.kept}",
        "",
        "| step | seconds | per second |",
        "|---|---|---|",
        f"| merge | {seconds['moments']:.1f} | {report.n_partial_rows / seconds['moments'] / 1e6:.2f} M partial rows |",
        f"| histograms over the shards | {seconds['histograms']:.1f} "
        f"| {report.n_histogram_rows / max(seconds['histograms'], 1e-9) / 1e6:.1f} M bins |",
        f"| distributions | {seconds['distributions']:.1f} | |",
        f"| overlap | {seconds['overlap']:.1f} | {report.n_pairs / seconds['overlap'] / 1e6:.3f} M pairs |",
        f"| salience | {seconds['salience']:.1f} | |",
        f"| all | {seconds['total']:.1f} | {n_neurons / seconds['total']:,.0f} neurons |",
        *(
            f"| ranges, {method} | {found['seconds']:.1f} | {found['rows'] / found['seconds']:,.0f} rows |"
            for method, found in report.ranges.items()
        ),
        "",
        f"pairs {report.n_pairs:,}, kept {report.n_pairs_kept:,}; output {report.n_output_bytes / 1e9:.2f} GB; peak "
        f"resident {report.peak_resident_bytes / 1e6:,.0f} MB; spilled {report.peak_spilled_bytes / 1e6:,.0f} MB; "
        f"merged histograms in scratch {report.peak_scratch_bytes / 1e6:,.0f} MB",
    ]
    return "\n".join(lines)


def _work(store: Store, commits: list[dict[str, Any]], args: argparse.Namespace, scratch: Path, sender: Any) -> None:
    settings = Settings(tau=2.5, overlap=kept_pairs(OverlapSection(keep=args.keep, top=args.top), args.concepts))
    resources = Resources(n_threads=args.threads, memory_bytes=parse_bytes(args.memory_limit), scratch=str(scratch))
    n_samples = sum(receipt["n_samples"] for receipt in commits)
    coverage = {"n_shards": len(commits), "n_planned_shards": len(commits)}
    coverage |= {"n_samples": n_samples, "n_planned_samples": n_samples}
    before, receipts = _peak_resident_bytes(), []
    for number in range(args.layers):
        layer = Layer(hook_point=HOOK_POINT, layer=number, width=args.neurons)
        receipts.append(compute_layer(store, layer, commits, settings=settings, coverage=coverage, resources=resources))
        print(f"layer {number}: {receipts[-1]['seconds']}", file=sys.stderr, flush=True)
    peak = _peak_resident_bytes() - before
    sender.send((receipts, peak, {method: _ranges(store, args, method) for method in METHODS}))


def _ranges(store: Store, args: argparse.Namespace, name: str) -> dict[str, float]:
    """The seconds and rows of a table of all neurons, from the statistics to the id."""
    started = time.perf_counter()
    method = Method(name=name, options=RangesSection(method=name).options)
    with connect(store.file_lists(), fs=store.fs) as con:
        rows = run_file(con, "ranges", tau=2.5, top_fraction=1.0, salience="mean_abs")
        if name != "paper":
            rows = with_pieces(con, store, rows, method, args.threads, lambda _: None)
    table = RangeTable.make(
        rows,
        tau=2.5,
        top_fraction=1.0,
        salience="mean_abs",
        store_hash="0" * 64,
        model=TableModel(id="none", config_hash="0" * 64),
        unit="last_token",
        widths={HOOK_POINT: args.neurons},
        method=name,
        options=method.options,
    )
    found = {"seconds": time.perf_counter() - started, "rows": table.rows.num_rows}
    print(f"{name}: {found}", file=sys.stderr, flush=True)
    return found


def _peak_resident_bytes() -> int:
    """Of this process alone: getrusage would start from the parent's peak."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


class _watched:
    """Peak bytes below the scratch folder while it is open: `merged` histograms, and what DuckDB `spilled`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._peaks, self._done = folder, {"spilled": 0, "merged": 0}, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> dict[str, int]:
        self._thread.start()
        return self._peaks

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            now = {"spilled": 0, "merged": 0}
            for path in self._folder.rglob("*"):
                try:
                    if path.is_file():
                        now["merged" if path.suffix == ".parquet" else "spilled"] += path.stat().st_size
                except FileNotFoundError:  # removed meanwhile
                    continue
            self._peaks.update({kind: max(self._peaks[kind], n_bytes) for kind, n_bytes in now.items()})


# --- shards as a collector writes them ---


def _write_shard(store: Store, args: argparse.Namespace, number: int) -> dict[str, Any]:
    """One shard's two files and its receipt. Its values are its own, the same in every layer."""
    concept = f"concept {number // args.shards:03d}"
    rng = np.random.default_rng(number)
    # Where a bump lies is the concept's, so that its shards agree.
    place = np.random.default_rng(1_000_000 + number // args.shards)
    center_N = place.normal(0, 0.3, args.neurons).astype(np.float32)
    width_N = np.exp(place.normal(-1, 0.5, args.neurons)).astype(np.float32)
    x_SN = center_N + width_N * rng.standard_normal((args.samples, args.neurons), dtype=np.float32)
    part, counts_NB = Moments.of(x_SN), _counts(x_SN)
    neuron_X, bin_X = np.nonzero(counts_NB)
    partials = {"n": part.n_N, "n_nonfinite": part.n_nonfinite_N} | {f: getattr(part, f"{f}_N") for f in FLOATS}
    histograms = {"bin": (bin_X - MAX_BIN).astype(np.int16), "n": counts_NB[neuron_X, bin_X]}

    def tables(schema: pa.Schema, neurons: np.ndarray, columns: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        for layer in range(args.layers):
            yield pa.Table.from_pydict(_keys(layer, concept, neurons) | columns, schema=schema)

    name = f"shard-{number:05d}.0123456789ab.parquet"
    files = [
        store.write_parquet(
            "partials",
            f"partials/{name}",
            PARTIALS_SCHEMA,
            lambda: tables(PARTIALS_SCHEMA, np.arange(args.neurons), partials),
            **PARTIALS_OPTIONS,
        ),
        store.write_parquet(
            "histograms",
            f"histograms/{name}",
            HISTOGRAMS_SCHEMA,
            lambda: tables(HISTOGRAMS_SCHEMA, neuron_X, histograms),
            **HISTOGRAMS_OPTIONS,
        ),
    ]
    return receipt_of(files, shard=number, attempt="0123456789ab", concept=concept, n_samples=args.samples)


def _counts(x_SN: np.ndarray) -> np.ndarray:
    n = x_SN.shape[1]
    slot_SN = np.arange(n) * N_BINS + bin_of(x_SN) + MAX_BIN
    return np.bincount(slot_SN.ravel(), minlength=n * N_BINS).reshape(n, N_BINS)


def _keys(layer: int, concept: str, neuron_X: np.ndarray) -> dict[str, Any]:
    zeros = np.zeros(len(neuron_X), np.int8)
    return {
        "layer": np.full(len(neuron_X), layer, np.int16),
        "hook_point": pa.DictionaryArray.from_arrays(zeros, [HOOK_POINT]),
        "neuron": neuron_X.astype(np.int32),
        "concept": pa.DictionaryArray.from_arrays(zeros.astype(np.int32), [concept]),
    }


if __name__ == "__main__":
    main()
