"""How fast does DuckDB merge, does it stay within the memory it is given, and what does the compiled overlap gain?

    python -m tests.benchmarks.bench_sql [--neurons 14336] [--concepts 14] [--threads 2] [--memory-limit 2GB] [--json]

One layer of synthetic files, as a collector writes them, goes through merge.sql, moments_from_raw.sql and overlap.sql,
each into a Parquet file; then the same histograms, merged into one file, through the compiled twin of overlap.sql, into
pairs in memory and into a Parquet file. Every row has a process of its own, so that its peak resident memory (above
that of the process before it begins) is its own; the time is the median of the repeats. "overlap, spilling" is the
query under a limit that it does not fit in.
"""

import argparse
import contextlib
import json
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from neuronlens.bumps import Bumps, open_counts, read_counts
from neuronlens.distributions import distributions_of
from neuronlens.histograms import MAX_BIN, N_BINS, bin_of
from neuronlens.overlap import PAIRS_SCHEMA, SCORES, pairs_of
from neuronlens.query import connect, run_to_parquet
from pipeline.collect import (
    HISTOGRAMS_OPTIONS,
    HISTOGRAMS_SCHEMA,
    PARTIALS_OPTIONS,
    PARTIALS_SCHEMA,
    RAW_OPTIONS,
    RAW_ROW_GROUP_ROWS,
    RAW_SCHEMA,
)
from pipeline.histograms import write_merged
from pipeline.statistics import RowsFile, neurons_a_block

HOOK_POINT = "mlp_post"
AT = {"hook_point": HOOK_POINT, "layer": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Work over given files, by default a query. `n_items` is what its speed counts: rows in, values in or pairs out.

    `work` gets the case, the number of threads, the file to write and the folder to spill to; it gives the seconds and
    the rows.
    """

    name: str
    unit: str
    n_items: int
    files: dict[str, list[str]]
    query: str = ""
    memory_limit: str = ""
    params: dict[str, object] = field(default_factory=dict)
    work: Callable[["Case", int, str, str], tuple[float, int]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    name: str
    unit: str
    n_items: int
    n_rows_out: int
    seconds: float
    memory_limit: str
    peak_resident_bytes: int
    peak_spilled_bytes: int

    @property
    def per_second(self) -> float:
        return self.n_items / self.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurons", type=int, default=14_336, help="Neurons of the layer that is merged.")
    parser.add_argument("--concepts", type=int, default=14)
    parser.add_argument("--shards", type=int, default=16, help="Shards a concept that are merged.")
    parser.add_argument("--raw-neurons", type=int, default=1_024)
    parser.add_argument("--overlap-neurons", type=int, default=2_048)
    parser.add_argument("--overlap-shards", type=int, default=2, help="Shards a concept whose histograms are added up.")
    parser.add_argument("--samples", type=int, default=1_500, help="Samples a shard.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-limit", default="2GB")
    parser.add_argument("--tight-memory-limit", default="300MB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="Print one JSON line instead of the table.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="neuronlens-bench-") as folder:
        results = [_measure(case, args, Path(folder)) for case in _cases(args, Path(folder))]
    if args.json:
        rows = [asdict(result) | {"per_second": result.per_second} for result in results]
        print(json.dumps({"settings": vars(args), "rows": rows}))
        return
    print("| query | in | per second | s | rows out | memory limit | peak resident | spilled |")
    print("|---|---|---|---|---|---|---|---|")
    for r in results:
        print(
            f"| {r.name} | {r.n_items / 1e6:.2f} M {r.unit} | {r.per_second / 1e6:.2f} M | {r.seconds:.2f} "
            f"| {r.n_rows_out:,} | {r.memory_limit or '-'} | {r.peak_resident_bytes / 1e6:,.0f} MB "
            f"| {r.peak_spilled_bytes / 1e6:,.0f} MB |"
        )


def _cases(args: argparse.Namespace, folder: Path) -> Iterator[Case]:
    concepts = [f"concept {number:02d}" for number in range(args.concepts)]
    partials = _write_partials(folder / "partials", concepts, args)
    yield Case(
        name="merge",
        query="merge",
        unit="partial rows",
        n_items=args.neurons * args.concepts * args.shards,
        files={"partials": partials},
        memory_limit=args.memory_limit,
        params=AT,
    )
    raw = _write_raw(folder / "raw" / f"hook_point={HOOK_POINT}" / "layer=0", concepts, args)
    yield Case(
        name="moments from raw",
        query="moments_from_raw",
        unit="values",
        n_items=args.raw_neurons * args.concepts * args.samples,
        files={"raw": raw},
        memory_limit=args.memory_limit,
        params=AT,
    )
    moments, histograms = _write_histograms(folder / "histograms", concepts, args)
    for name, memory_limit in (("overlap", args.memory_limit), ("overlap, spilling", args.tight_memory_limit)):
        yield Case(
            name=name,
            query="overlap",
            unit="pairs",
            n_items=args.overlap_neurons * args.concepts * (args.concepts - 1) // 2,
            files={"moments": [moments], "histograms": histograms},
            memory_limit=memory_limit,
            params=AT | {"tau": 2.5, "first_neuron": 0, "last_neuron": args.overlap_neurons - 1},
        )
    merged = {"moments": [moments], "histograms": [_write_merged(folder, concepts, histograms, args)]}
    n_bumps = args.overlap_neurons * args.concepts
    n_pairs = n_bumps * (args.concepts - 1) // 2
    yield Case(name="overlap, compiled", unit="pairs", n_items=n_pairs, files=merged, work=_pairs)
    yield Case(name="the same, into a file", unit="pairs", n_items=n_pairs, files=merged, work=_pairs_to_parquet)
    yield Case(name="distributions", unit="neurons x concepts", n_items=n_bumps, files=merged, work=_distributions)


def _measure(case: Case, args: argparse.Namespace, folder: Path) -> Result:
    spill = folder / "spill"
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(
        target=_run, args=(case, args.threads, args.repeats, str(folder / "out.parquet"), str(spill), sender)
    )
    process.start()
    sender.close()
    n_spilled, done = [0], threading.Event()
    watcher = threading.Thread(target=_watch, args=(spill, n_spilled, done))
    watcher.start()
    try:
        seconds, n_rows, peak_bytes = receiver.recv()
    finally:
        done.set()
        watcher.join()
        process.join()
    return Result(
        name=case.name,
        unit=case.unit,
        n_items=case.n_items,
        n_rows_out=n_rows,
        seconds=statistics.median(seconds),
        memory_limit=case.memory_limit,
        peak_resident_bytes=peak_bytes,
        peak_spilled_bytes=n_spilled[0],
    )


def _run(case: Case, n_threads: int, n_repeats: int, out: str, spill: str, sender) -> None:
    work = case.work or _query_to_parquet
    if case.work:
        work(case, n_threads, out, spill)  # what is compiled or read from numba's cache is not the work
    before = _peak_resident_bytes()
    runs = [work(case, n_threads, out, spill) for _ in range(n_repeats)]
    sender.send(([seconds for seconds, _ in runs], runs[-1][1], _peak_resident_bytes() - before))


def _query_to_parquet(case: Case, n_threads: int, out: str, spill: str) -> tuple[float, int]:
    with connect(case.files, memory_limit=case.memory_limit, threads=n_threads, temp_directory=spill) as con:
        started = time.perf_counter()
        n_rows = run_to_parquet(con, case.query, out, **case.params)
        return time.perf_counter() - started, n_rows


def _pairs(case: Case, n_threads: int, out: str, spill: str) -> tuple[float, int]:
    bumps = _bumps(case)
    started = time.perf_counter()
    blocks = _blocks(bumps, case, n_threads)
    n_rows = sum(pairs_of(block, tau=2.5, n_threads=n_threads).num_rows for block in blocks)
    return time.perf_counter() - started, n_rows


def _pairs_to_parquet(case: Case, n_threads: int, out: str, spill: str) -> tuple[float, int]:
    bumps = _bumps(case)
    started = time.perf_counter()
    with RowsFile(out, PAIRS_SCHEMA, SCORES, {}) as file:
        for block in _blocks(bumps, case, n_threads):
            file.add(pairs_of(block, tau=2.5, n_threads=n_threads))
    return time.perf_counter() - started, pq.read_metadata(out).num_rows


def _distributions(case: Case, n_threads: int, out: str, spill: str) -> tuple[float, int]:
    bumps = _bumps(case)
    started = time.perf_counter()
    blocks = _blocks(bumps, case, n_threads)
    n_rows = sum(distributions_of(block, n_threads=n_threads).num_rows for block in blocks)
    return time.perf_counter() - started, n_rows


def _bumps(case: Case) -> Bumps:
    """The moments, which the stage reads once for all its passes."""
    [moments] = case.files["moments"]
    return Bumps.of(pq.read_table(moments, columns=["neuron", "concept", "mean", "std", "min", "max"]), **AT)


def _blocks(bumps: Bumps, case: Case, n_threads: int) -> Iterator[Bumps]:
    """As the statistics stage goes through the merged histograms of a layer."""
    counts = open_counts(case.files["histograms"][0])
    for block in bumps.blocks(neurons_a_block(len(bumps.concepts))):
        rows = read_counts(counts, block.first, block.last, n_threads=n_threads)
        yield block.with_counts(rows, n_threads=n_threads)


def _peak_resident_bytes() -> int:
    """Of this process alone: getrusage would start from the parent's peak."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def _watch(spill: Path, n_spilled: list[int], done: threading.Event) -> None:
    while not done.wait(0.02):
        with contextlib.suppress(FileNotFoundError):  # DuckDB removed a folder meanwhile
            n_spilled[0] = max(n_spilled[0], sum(_size(path) for path in spill.rglob("*")))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:  # DuckDB removed it meanwhile
        return 0


# --- files as a collector writes them ---


def _write_partials(folder: Path, concepts: Sequence[str], args: argparse.Namespace) -> list[str]:
    rng, n = np.random.default_rng(0), args.neurons
    paths = []
    for number in range(args.shards * len(concepts)):
        mean, std = rng.normal(0, 0.3, n), np.exp(rng.normal(-1, 0.5, n))
        columns = {
            "n": np.full(n, args.samples),
            "n_nonfinite": np.zeros(n, np.int64),
            "mean": mean,
            "m2": args.samples * std**2,
            "m3": args.samples * std**3 * rng.normal(size=n),
            "m4": args.samples * std**4 * rng.uniform(2, 9, n),
            "min": (mean - 4 * std).astype(np.float32),
            "max": (mean + 4 * std).astype(np.float32),
            "mean_abs": np.abs(mean) + 0.5 * std,
        }
        keys = _keys(np.arange(n), concepts[number % len(concepts)])
        table = pa.Table.from_pydict(keys | columns, schema=PARTIALS_SCHEMA)
        paths.append(_write(folder / f"{number}.parquet", [table], PARTIALS_OPTIONS))
    return paths


def _write_raw(folder: Path, concepts: Sequence[str], args: argparse.Namespace) -> list[str]:
    rng = np.random.default_rng(1)
    sample_S, paths = np.arange(args.samples), []
    step = max(1, RAW_ROW_GROUP_ROWS // args.samples)
    for number, concept in enumerate(concepts):
        x_NS = _values(rng, args.raw_neurons, args.samples)
        position_S = rng.integers(5, 90, args.samples).astype(np.int32)
        tables = []
        for first in range(0, args.raw_neurons, step):
            neurons = np.arange(first, min(first + step, args.raw_neurons))
            columns = _keys(np.repeat(neurons, args.samples), concept) | {
                "sample": np.tile(sample_S + number * args.samples, len(neurons)),
                "position": np.tile(position_S, len(neurons)),
                "value": x_NS[neurons].ravel(),
            }
            tables.append(pa.Table.from_pydict({k: columns[k] for k in RAW_SCHEMA.names}, schema=RAW_SCHEMA))
        paths.append(_write(folder / f"{number}.parquet", tables, RAW_OPTIONS))
    return paths


def _write_histograms(folder: Path, concepts: Sequence[str], args: argparse.Namespace) -> tuple[str, list[str]]:
    """Histograms, and the moments of the same values as merge.sql would make them."""
    rng, n = np.random.default_rng(2), args.overlap_neurons
    paths, moments = [], []
    for concept in concepts:
        x_NS = _values(rng, n, args.samples * args.overlap_shards)
        for number, part_NS in enumerate(np.split(x_NS, args.overlap_shards, axis=1)):
            slot_NS = np.arange(n)[:, None] * N_BINS + bin_of(part_NS) + MAX_BIN
            counts_NB = np.bincount(slot_NS.ravel(), minlength=n * N_BINS).reshape(n, N_BINS)
            neuron_X, bin_X = np.nonzero(counts_NB)
            columns = {"bin": (bin_X - MAX_BIN).astype(np.int16), "n": counts_NB[neuron_X, bin_X]}
            table = pa.Table.from_pydict(_keys(neuron_X, concept) | columns, schema=HISTOGRAMS_SCHEMA)
            paths.append(_write(folder / f"{concept}.{number}.parquet", [table], HISTOGRAMS_OPTIONS))
        columns = {"n": np.full(n, x_NS.shape[1]), "n_nonfinite": np.zeros(n, np.int64)}
        columns |= {"mean": x_NS.mean(1, dtype=float), "std": x_NS.std(1, dtype=float)}
        columns |= dict.fromkeys(("skewness", "kurtosis"), np.zeros(n))
        columns |= {"min": x_NS.min(1), "max": x_NS.max(1), "mean_abs": np.abs(x_NS).mean(1, dtype=float)}
        moments.append(pa.table(_keys(np.arange(n), concept) | columns))
    whole = pa.concat_tables(moments).unify_dictionaries().combine_chunks()
    return _write(folder / "moments.parquet", [whole], {"compression": "zstd"}), paths


def _write_merged(folder: Path, concepts: Sequence[str], histograms: list[str], args: argparse.Namespace) -> str:
    summed = {concept: str(folder / f"summed {concept}.parquet") for concept in concepts}
    with connect({"histograms": histograms}, threads=args.threads) as con:
        for concept, path in summed.items():
            run_to_parquet(con, "merged_histograms", path, concept=concept, **AT)
    write_merged(summed, str(folder / "merged.parquet"), width=args.overlap_neurons, metadata={}, **AT)
    return str(folder / "merged.parquet")


def _values(rng: np.random.Generator, n_neurons: int, n_samples: int) -> np.ndarray:
    """Float32 [neurons, samples], each neuron a bump of its own."""
    center_N, width_N = rng.normal(0, 0.3, n_neurons), np.exp(rng.normal(-1, 0.5, n_neurons))
    noise_NS = rng.standard_normal((n_neurons, n_samples), dtype=np.float32)
    return (center_N[:, None] + width_N[:, None] * noise_NS).astype(np.float32)


def _keys(neuron_X: np.ndarray, concept: str) -> dict[str, object]:
    zeros = np.zeros(len(neuron_X), np.int32)
    return {
        "layer": zeros.astype(np.int16),
        "hook_point": pa.DictionaryArray.from_arrays(zeros.astype(np.int8), [HOOK_POINT]),
        "neuron": neuron_X.astype(np.int32),
        "concept": pa.DictionaryArray.from_arrays(zeros, [concept]),
    }


def _write(path: Path, tables: Sequence[pa.Table], options: dict[str, object]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, tables[0].schema, **options) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=table.num_rows)
    return str(path)


if __name__ == "__main__":
    main()
